"""The report page: what it holds, and that it works in a browser (Debian's Chromium, when installed)."""

import base64
import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import time
import urllib.request

import numpy as np
import pytest
from conftest import draw
from PIL import Image

from goconv_tf import codec, commands, evaluation, report
from goconv_tf.errors import UsageError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(model, model_dir, rnn, rnn_dir, tmp_path_factory):
    """Path of a report on two models, a codec and a published curve, with one picture."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "in").mkdir()
    Image.fromarray(draw(170, 240)).save(folder / "in" / "photo <1>.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOCONV_TF_ZOO", os.pathsep.join(map(os.path.dirname, (model_dir, rnn_dir))))
        patch.setattr(evaluation.zoo, "load_pretrained", lambda path: rnn if "rnn" in path else model)
        specs = [("model", "tiny-test", "tfc", 3), ("model", "tiny-rnn", "tfc", 3), ("codec", "jpeg")]
        paths = evaluation.evaluate(specs, str(folder / "in"), str(folder / "results"))
        path = str(folder / "report.html")
        images = [str(folder / "in" / "photo <1>.png")]
        assert commands.report([*paths, "kodak:bpg444"], path, images, target_bpp=3.0, title="Tiny <models>") == 0
        data = evaluation.read_results(paths[0])
        data["meta"]["fingerprint"] = "00000000"
        with pytest.raises(UsageError, match="the zoo has weights"):
            report.subject_of(data)
        data["meta"]["fingerprint"] = rnn.info.fingerprint
        subject = report.subject_of(data, [model.info, rnn.info])
        assert subject.model is rnn and subject.info.path == rnn.info.path
    return path


def test_values_may_look_like_places_in_the_page(tmp_path):
    report.write(tmp_path / "page.html", [evaluation.read_results("kodak:vtm")], title="{{table}} {{no}}")
    assert "<h1>{{table}} {{no}}</h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_pictures_come_as_near_to_the_rate_as_they_can():
    """Above what a model reaches its best is shown, below it its smallest."""
    subject, picture = evaluation.ModelSubject("variable-rate-small-mse"), draw(64, 64)
    model, config = subject.model, subject.info.config
    lowest, highest = (codec.compress(model, picture, lmbda=value).data for value in (config.lmbda_min, config.lmbda_max))
    for target, expected in ((1e-3, lowest), (1e3, highest)):
        data, decoded = report.code_at(subject, picture, target)
        assert data == expected
        np.testing.assert_array_equal(decoded, codec.decompress(model, data))
    between = 8 * math.sqrt(len(lowest) * len(highest)) / picture[..., 0].size
    assert 0.9 * between < 8 * len(report.code_at(subject, picture, between)[0]) / picture[..., 0].size <= 1.01 * between


def test_page_is_self_contained_and_whole(page):
    with open(page, encoding="utf-8") as f:
        text = f.read()
    assert "Tiny &lt;models&gt;" in text and "{{" not in text
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)[^"'#]""", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))
    versions = data[0]["versions"]
    assert [v["text"].split(":")[0] for v in versions] == ["original", "tiny-test", "tiny-rnn", "jpeg"]
    for version in versions[1:]:
        assert float(re.search(r"([\d.]+) bpp", version["text"]).group(1)) <= 3.0 * 1.01
    original = np.asarray(Image.open(io.BytesIO(base64.b64decode(versions[0]["source"].split(",")[1]))))
    np.testing.assert_array_equal(original, draw(170, 240))
    assert text.count("<tr>") == 5 and "<svg" in text


class Browser:
    """Chromium spoken to by its DevTools protocol; keeps what goes wrong on the page."""

    def __init__(self, port, url):
        import websocket

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as f:
            target = next(t for t in json.load(f) if t["type"] == "page")
        self.socket = websocket.create_connection(target["webSocketDebuggerUrl"], timeout=30, suppress_origin=True)
        self.numbers, self.problems = itertools.count(1), []
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        end = time.time() + 60
        while self.value("document.body && document.body.dataset.ready") is None and time.time() < end:
            time.sleep(0.2)

    def call(self, method, **parameters):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            kind = message.get("method", "")
            if kind == "Runtime.exceptionThrown" or (kind == "Log.entryAdded" and message["params"]["entry"]["level"] == "error"):
                self.problems.append(message["params"])
            if kind == "Runtime.consoleAPICalled" and message["params"]["type"] == "error":
                self.problems.append(message["params"])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path):
        with open(path, "wb") as f:
            f.write(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(url, folder):
    """A Browser with the page open."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    flags += ["--disable-sync", "--disable-quic", f"--user-data-dir={folder}/profile", "--remote-debugging-port=0", "--window-size=1100,1400"]
    with subprocess.Popen([CHROMIUM, *flags, "about:blank"], stderr=subprocess.PIPE, text=True) as process:
        try:
            port = next(m.group(1) for m in (re.search(r"ws://127\.0\.0\.1:(\d+)/", line) for line in process.stderr) if m)
            yield Browser(port, url)
        finally:
            process.kill()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page_works_in_a_browser(page, tmp_path):
    with browser(f"file://{page}", tmp_path) as b:
        assert b.value("document.body.dataset.ready") == "1"
        assert b.value("document.querySelectorAll('#picture0 option').length") == 4 + 4 + 4
        b.value("Promise.all([...document.images].map(i => i.decode()))")
        assert b.value("[...document.images].every(i => i.naturalWidth == 240)")
        clip = "document.querySelector('#picture0 img[alt=right]').style.clipPath"
        slider = "document.querySelector('#picture0 .slider')"
        before = b.value(clip)
        b.value(f"{slider}.value = 250, {slider}.dispatchEvent(new Event('input')), 0")
        after = b.value(clip)
        assert before != after and "60px" in after  # a quarter of 240 pixels
        b.value("(box => { box.checked = true; box.dispatchEvent(new Event('change')); })(document.querySelector('#picture0 input[type=checkbox]'))")
        canvas = "document.querySelector('#picture0 canvas')"
        for _ in range(100):
            if b.value(f"{canvas}.dataset.drawn || ''"):
                break
            time.sleep(0.1)
        assert b.value(f"Math.max(...{canvas}.getContext('2d').getImageData(0, 0, 240, 170).data.filter((_, k) => k % 4 < 3))") > 8
        b.value("(z => { z.value = 2; z.dispatchEvent(new Event('change')); })(document.querySelectorAll('#picture0 select')[2])")
        assert b.value("document.querySelector('#picture0 .stack').style.width") == "480px"
        b.screenshot(tmp_path / "report.png")
        assert b.problems == []
    with Image.open(tmp_path / "report.png") as image:
        assert np.asarray(image.convert("L")).std() > 10  # something is drawn
