"""Model folders in Hugging Face's layout: their cards, and real huggingface_hub against a stand-in of the hub."""

import hashlib
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import CHECKPOINTS, ROOT, draw
from PIL import Image

from goconv_tf import cards, codec, hub, presets, zoo
from goconv_tf.errors import CheckpointError

yaml = pytest.importorskip("yaml")  # comes with huggingface_hub
huggingface_hub = pytest.importorskip("huggingface_hub")


def read_card(folder):
    """(metadata, text) of a folder's card."""
    _, head, text = pathlib.Path(folder, cards.CARD_FILE).read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def loaded_card(folder):
    """The same as the hub reads it."""
    return huggingface_hub.ModelCard.load(os.path.join(folder, cards.CARD_FILE))


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=os.path.basename)
def test_cards_of_the_checkpoints_say_what_their_config_says(folder):
    info = zoo.read_info(folder)
    head, text = read_card(folder)
    assert head == cards.metadata(info)
    assert head["license"] == "apache-2.0" and head["library_name"] == "goconv_tf" and info.model in head["tags"]
    assert f"# {info.name}\n" in text and info.fingerprint in text
    data = loaded_card(folder).data
    assert (data.license, data.pipeline_tag, data.model_name) == ("apache-2.0", "image-to-image", info.name)
    measured = [(r.metric_type, r.metric_value) for r in data.eval_results]
    rows = info.card["kodak"]
    assert measured and measured == [pair for r in rows for pair in (("psnr", round(r["psnr-rgb"], 3)), ("ms-ssim", round(r["ms-ssim-rgb"], 5)))]
    for row in rows:  # the same figures as in the card's table
        assert f"{row['bpp']:.4f}" in text and f"{row['psnr-rgb']:.3f}" in text


def test_save_writes_a_card_and_keeps_what_people_wrote(tmp_path):
    model, folder = zoo.new_model(presets.get_preset("variable_rate", "tiny")), str(tmp_path / "m")
    info = zoo.save_pretrained(model, folder, "some-name")
    head, text = read_card(folder)
    assert head == cards.metadata(info) and "license" not in head and "model-index" not in head
    assert "# some-name" in text and info.fingerprint in text
    loaded_card(folder)
    # Its own card follows the model.
    card = {"license": "mit", "notes": "Trained: on nothing.", "kodak": [{"bpp": 0.5, "psnr-rgb": 20.12345, "ms-ssim-rgb": None}]}
    info = zoo.save_pretrained(model, folder, "other-name", card)
    head, text = read_card(folder)
    assert head == cards.metadata(info) and head["license"] == "mit" and "# other-name" in text and card["notes"] in text
    (result,) = loaded_card(folder).data.eval_results
    assert (result.metric_value, result.metric_name) == (20.123, "PSNR RGB, dB, at 0.5000 bpp")
    # Also where what it was made of is no longer there: another version's, or a killed process'.
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "fingerprint": "00000000"}))
    zoo.save_pretrained(model, folder, "some-name")
    assert "# some-name" in read_card(folder)[1]
    # One that somebody changed stays as it is.
    readme = tmp_path / "m" / cards.CARD_FILE
    for mine in (readme.read_text() + "\nMy words.\n", "", "no front matter"):
        readme.write_text(mine)
        zoo.save_pretrained(model, folder, "third-name")
        assert readme.read_text() == mine


class Hub(http.server.ThreadingHTTPServer):
    """What huggingface_hub asks a hub for: {repository: {revision: folder}}; `asked` is what it asked."""

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.asked = repositories, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


def commit(folder):
    return hashlib.sha1(folder.encode()).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/?]+)(\?.*)?", self.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/?]+)", self.path)
        if not (api or file):
            return self.answer(404)
        repository, revision = api.group(1, 3) if api else file.group(1, 2)
        if repository == "org/broken":
            return self.answer(500)
        if repository == "org/gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if repository not in self.server.repositories:
            return self.answer(404, X_Error_Code="RepoNotFound")
        revisions = self.server.repositories[repository]
        folder = {**revisions, **{commit(folder): folder for folder in revisions.values()}}.get(revision)
        if folder is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        names = sorted(os.listdir(folder))
        if api and api.group(2) == "tree":  # version 2 of huggingface_hub asks for it, earlier ones do not
            contents = [{"type": "file", "path": name, "size": os.path.getsize(os.path.join(folder, name)), "oid": "0" * 40} for name in names]
            return self.answer(200, json.dumps(contents).encode(), Content_Type="application/json")
        if api:
            contents = {"id": repository, "sha": commit(folder), "siblings": [{"rfilename": name} for name in names]}
            return self.answer(200, json.dumps(contents).encode(), Content_Type="application/json")
        path = pathlib.Path(folder, file.group(3))
        if not path.exists():
            return self.answer(404, X_Error_Code="EntryNotFound")
        data = path.read_bytes()
        return self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=commit(folder))

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def folders(model_dir, tmp_path_factory):
    """What the stand-in has: a model, an older revision of it, and damaged ones."""
    root = tmp_path_factory.mktemp("repositories")
    for name in ("new", "old", "damaged", "no-config", "no-weights", "bad-config"):
        shutil.copytree(model_dir, root / name)
    (root / "new" / "training.bin").write_bytes(bytes(1000))  # nobody needs it
    weights = root / "damaged" / zoo.WEIGHTS_FILE
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    (root / "no-config" / zoo.CONFIG_FILE).unlink()
    (root / "no-weights" / zoo.WEIGHTS_FILE).unlink()
    (root / "bad-config" / zoo.CONFIG_FILE).write_text('{"format": 1}')
    config = (root / "old" / zoo.CONFIG_FILE).read_text()
    (root / "old" / zoo.CONFIG_FILE).write_text(config.replace('"card": {', '"card": {"notes": "old",'))
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def server(folders):
    repositories = {f"org/{name}": {"main": folder} for name, folder in folders.items()}
    repositories["org/tiny"] = {"main": folders["new"], "v1": folders["old"], "refs%2Fpr%2F1": folders["old"]}
    with Hub(repositories) as hub_server:
        yield hub_server
        hub_server.shutdown()


@pytest.fixture
def environment(server, tmp_path):
    """Of a process for which the stand-in is the hub, with an empty cache."""
    return {
        **{key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
        **{"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ROOT, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    }


def find(names, environment, function="find_model"):
    """What zoo.find_model, or another function, gives for each name: [path, fingerprint, notes], or the error's one line."""
    code = f"""
import json, sys
from goconv_tf import zoo
from goconv_tf.errors import CheckpointError
found = []
for name in sys.argv[1:]:
    try:
        info = zoo.{function}(name)
        info = getattr(info, "info", info)
        found.append([info.path, info.fingerprint, info.card.get("notes")])
    except CheckpointError as error:
        found.append(str(error))
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_finds_models_on_the_hub(server, environment, model, tmp_path):
    new, again, old, pull = find(["hf://org/tiny", "hf://org/tiny", "hf://org/tiny@v1", "hf://org/tiny@refs/pr/1"], environment)
    assert new == again and new[1:] == [model.info.fingerprint, None]
    assert old[1:] == pull[1:] == [model.info.fingerprint, "old"]
    assert new[0].startswith(str(tmp_path / "hf")) and sorted(os.listdir(new[0])) == [zoo.CONFIG_FILE, zoo.WEIGHTS_FILE]
    gets = [path for command, path in server.asked if command == "GET" and "/resolve/" in path]
    # The revision is looked up once a process and its two files come of one commit; nothing else is fetched.
    assert len([path for _, path in server.asked if "/revision/" in path]) == 3
    assert {path.rsplit("/", 1)[1] for path in gets} == {zoo.CONFIG_FILE, zoo.WEIGHTS_FILE}
    assert len({path.rsplit("/", 2)[1] for path in gets if "org/tiny" in path}) == 2  # commits
    # What was downloaded before is there without the hub, and other things are not.
    server.repositories.clear()
    server.shutdown()
    server.server_close()
    cached, missing = find(["hf://org/tiny", "hf://org/damaged"], environment)
    assert cached == new and "cannot be reached" in missing


def test_what_the_hub_does_not_have(server, environment):
    wrong = [
        "hf://../x",
        "hf://org/../x",
        "hf://org/x@../../y",
        "hf://org",
        "hf://",
        "hf:///etc/passwd",
        "hf://org/x/y",
        "hf://o rg/x",
        "hf://.org/x",
        "hf://org/-",
    ]
    said = {
        "hf://org/nothing": "no such repository",
        "hf://org/gated": "gated",
        "hf://org/broken": "has an error",
        "hf://org/tiny@none": "no revision none",
        "hf://org/no-config": "not a model folder",
        "hf://org/bad-config": "cannot be read",
        "hf://org/x.": "cannot be downloaded",
    }
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    for name, line in zip([*wrong, *said], find([*wrong, *said], environment)):
        assert said.get(name, "must be hf://ORGANISATION/NAME") in line and "\n" not in line
    assert all("/../" not in path for _, path in server.asked)
    (line,) = find(["hf://org/tiny"], offline)
    assert "cannot be reached" in line and "\n" not in line


def test_loads_and_refuses_damage(server, environment, model, tmp_path):
    names = ["hf://org/tiny", "hf://org/damaged", "hf://org/no-weights"]
    good, damaged, missing = find(names, environment, "load_pretrained")
    assert good[1] == model.info.fingerprint
    assert "is damaged: its SHA-256" in damaged and "model.safetensors cannot be read: no such file" in missing
    # In a command.
    picture, stream = tmp_path / "a.png", tmp_path / "a.gcv"
    Image.fromarray(draw(20, 24)).save(picture)
    command = [sys.executable, "-m", "goconv_tf", "compress", str(picture), str(stream), "--model"]
    done = subprocess.run([*command, "hf://org/tiny"], env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_array_equal(codec.decompress(model, stream.read_bytes()), codec.compress(model, draw(20, 24), reconstruct=True).reconstruction)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"hf://org/name: huggingface_hub is not installed: pip install 'huggingface_hub>=0\.36'"):
        hub.fetch("hf://org/name", ())
