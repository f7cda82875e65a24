"""make results: every table, plot and page, on tiny models."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import types

import pytest
from conftest import ROOT, draw
from PIL import Image

from goconv_tf import presets
from goconv_tf.errors import RateError, UsageError


def load_table(monkeypatch, name):
    folder = os.path.join(ROOT, "experiments", "tables")
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location(f"{name}_table", os.path.join(folder, f"{name}.py"))
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    return table


def test_crpe_curves_are_named_after_all_that_differs(monkeypatch):
    table = load_table(monkeypatch, "crpe")
    full, narrow, switched, wider, plain = (
        table.Setting(presets.change_settings(presets.get_preset("crpe", "small"), settings))
        for settings in ([], ["latents=64"], ["crpe_y=false"], ["filters=96"], ["if_weight=0"])
    )
    similar = full._replace(distortion="ms-ssim")
    titles = ["CRPE N=64", "CRPE N=64 (latents 64)", "CRPE N=64 (crpe_y False)", "CRPE N=64 (if_weight 0)", "CRPE N=64 (ms-ssim)"]
    assert [table.title(group, full) for group in (full, narrow, switched, plain, similar)] == titles
    assert table.title(plain, plain) == "CRPE N=64 (if_weight 0)"
    low, high = (table.Setting(presets.get_preset("crpe", name)) for name in ("paper-low", "paper-high"))
    assert table.title(low, high) == "CRPE N=256"
    assert [table.is_switched(group, full) for group in (narrow, switched, wider, plain, similar)] == [False, True, False, True, False]
    assert max((plain, switched, similar, full), key=table.fullness) == full


def test_each_rate_is_coded_by_the_model_that_the_paper_took(monkeypatch):
    """Of three; or by the first that reaches it."""
    table = load_table(monkeypatch, "variable_rate")
    asked = []

    def refuse(one, picture, target_bpp):
        asked.append(one)
        raise RateError("out of reach")

    monkeypatch.setattr(table.codec, "compress", refuse)
    for target, order in ((0.12, "low middle high"), (0.25, "middle low high"), (2.0, "high low middle")):
        assert table.reach(["low", "middle", "high"], None, target) == "; ".join(["out of reach"] * 3)
        assert [asked.pop(0) for _ in range(3)] == order.split()
    table.reach(["a", "b"], None, 2.0)
    assert asked == ["a", "b"]


def run_table(table, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["table.py", *map(str, args)])
    table.main()


def measured(config, rates, qualities, pictures, **more):
    """What `common.measure` gives of one model."""
    count = len(rates)
    results = {"bpp": rates, "psnr-rgb": qualities, "psnr-yuv": qualities, "ms-ssim-rgb": [0.9] * count, "ms-ssim-y": [0.9] * count, **more}
    results.update({name: [1.0] * count for name in ("bpp-estimated", "encoding_time", "decoding_time")})
    results.update({f"bpp-{name}": [rates[0] * (k + 1) / 21] * count for k, name in enumerate(config.layers[0])})
    meta = {"fingerprint": "01234567", "steps": 7, "pictures": pictures, "model": config.model, "dataset": "kodak", "machine": "m"}
    return {"meta": meta, "results": results}


def test_crpe_curves_switches_and_tecnick(tmp_path, monkeypatch):
    """Models of several lambdas are a curve; those of a switch are held against it, as a curve where they are three, or else one by one."""
    table, measures = load_table(monkeypatch, "crpe"), {}
    settings = {"full": ([], 3), "plain": (["if_weight=0"], 3), "single": (["crpe_z=false"], 2)}
    for name, (changes, count) in settings.items():
        for k, lmbda in enumerate((0.003, 0.01, 0.03)[:count]):
            config = presets.change_settings(presets.get_preset("crpe", "tiny"), changes).adapt(lambdas=(lmbda,))
            folder = tmp_path / f"{name}-{lmbda:g}"
            folder.mkdir()
            described = {"format": 1, "name": folder.name, "model": "crpe", "config": dataclasses.asdict(config), "fingerprint": 8 * "0"}
            (folder / "config.json").write_text(json.dumps({**described, "sha256": 64 * "0"}))
            rate = 0.25 * 2**k * {"full": 1.0, "plain": 1.1, "single": 1.25}[name]
            measures[folder.name] = measured(config, [rate], [30.0 + 3 * k], 24)
    for name in ("kodak", "tecnick"):
        (tmp_path / name).mkdir()
    asked = []
    monkeypatch.setattr(table, "measure", lambda models, images, output: asked.append((images, output)) or measures)
    output = tmp_path / "out"
    output.mkdir()  # as measuring does
    folders = [tmp_path / name for name in measures]
    run_table(table, monkeypatch, tmp_path / "kodak", "--models", *folders, "--tecnick", tmp_path / "tecnick", "--output", output)
    assert asked == [(str(tmp_path / "kodak"), str(output)), (str(tmp_path / "tecnick"), str(output / "tecnick"))]
    text = (output / "crpe.md").read_text()
    kodak, tecnick = text.split("## Tecnick, mean of")
    for part, curves in ((kodak, ("hyperprior", "VTM")), (tecnick, ("BPG",))):
        assert "| CRPE N=8 | 0.003 | 0.2500 | 1.0000 | 30.000 |" in part and "| CRPE N=8 | 0.03 | 1.0000 |" in part
        assert "| CRPE N=8 (if_weight 0) | +10.00 % (30.0 to 36.0 dB) | 0.003, 0.01, 0.03 |" in part
        assert "| CRPE N=8 (crpe_z False) | +25.0%, +25.0% | 0.003, 0.01 |" in part
        assert all(f"BD-rate of {name} against" in part for name in ("CRPE N=8", "CRPE N=8 (if_weight 0)")) and all(c in part for c in curves)
        shares = [4.76 * (k + 1) for k in range(6)]
        assert "| 0.003 | " + " | ".join(f"{round(share / 100 * 21) / 21:.2%}".replace("%", " %") for share in shares) + " |" in part
    assert (output / "crpe-kodak.png").exists() and (output / "crpe-tecnick.png").exists()
    saved = json.loads((output / "tables" / "crpe.json").read_text())
    assert saved["tecnick"]["CRPE N=8"]["psnr-rgb"] == [[0.25, 30.0], [0.5, 33.0], [1.0, 36.0]]


def test_a_scalable_model_of_one_layer(tmp_path, monkeypatch):
    table = load_table(monkeypatch, "scalable_rnn")
    config = presets.change_settings(presets.get_preset("scalable_rnn", "tiny"), ["iterations=1"])
    found = {"name": "one", "description": "", **measured(config, [1.4], [30.0], 24)}
    info = types.SimpleNamespace(config=config)
    monkeypatch.setattr(table, "measure", lambda *_: {"one": found})
    monkeypatch.setattr(table.zoo, "find_model", lambda _: info)
    limits = []
    monkeypatch.setattr(table.plots, "rate_distortion", lambda path, curves, max_bpp: limits.append(max_bpp))
    (tmp_path / "one.json").write_text(json.dumps(found))
    run_table(table, monkeypatch, "photos/kodak", "--model", "one", "--output", tmp_path)
    assert re.search(r"^\| 1 \| [\d.]+ \| 1\.4000 \|", (tmp_path / "scalable_rnn.md").read_text(), re.M)
    assert limits == [pytest.approx(1.54)]  # its own curve is in the plot whole


def test_three_models_for_three_rates(model, tmp_path, monkeypatch):
    """LOW,MIDDLE,HIGH are one system; two pictures of one name would be one row."""
    table = load_table(monkeypatch, "variable_rate")
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(draw(48, 64)).save(folder / "a.png")
    results = measured(model.config, [0.5, 1.0], [30.0, 33.0], 1)
    models = {name: types.SimpleNamespace(has_lambda=True, info=types.SimpleNamespace(name=name)) for name in ("low", "middle", "high")}
    monkeypatch.setattr(table.zoo, "load_pretrained", models.get)
    monkeypatch.setattr(table, "measure", lambda names, images, output: os.makedirs(output, exist_ok=True) or dict.fromkeys(names, results))
    monkeypatch.setattr(table.evaluation, "read_results", lambda path: {"name": path, "results": {"psnr-rgb": [(0.5, 30.0)]}})
    row = {"lmbda": 0.01, "deviation": 0.0, "codings": 3, "psnr-yuv": 31.0, "ms-ssim-y": 0.9, "encoding_time": 1.0, "decoding_time": 2.0}
    monkeypatch.setattr(table, "reach", lambda parts, picture, target: {**row, "model": parts[table.PAPERS[target]].info.name, "bpp": target})
    args = (folder, "--model", "low,middle,high", "--output", tmp_path / "out", "--targets", "0.12", "0.5", "1.5")
    run_table(table, monkeypatch, *args)
    text = (tmp_path / "out" / "variable_rate.md").read_text()
    assert "## low, middle, high" in text and "| a | 64 x 48 | high, low, middle | 1.00 | 2.00 |" in text
    assert [re.search(rf"^\| {target} \| {target:.4f} \| \+0.00 % \| (\w+) ", text, re.M)[1] for target in (0.12, 0.5, 1.5)] == [
        "low",
        "middle",
        "high",
    ]
    Image.fromarray(draw(48, 64)).save(folder / "a.jpg")
    with pytest.raises(UsageError, match="same name but for the extension"):
        run_table(table, monkeypatch, *args)


def test_all_tables(model_dir, rnn_dir, crpe_dir, tmp_path):
    folder = tmp_path / "kodak"
    folder.mkdir()
    for name, size in (("a", (165, 170)), ("jpegai09", (170, 165))):
        Image.fromarray(draw(*size)).save(folder / f"{name}.png")
    env = {**os.environ, "PYTHONPATH": ROOT, "GOCONV_TF_ZOO": os.pathsep.join(map(os.path.dirname, (model_dir, rnn_dir)))}
    command = [
        sys.executable,
        os.path.join(ROOT, "experiments", "tables", "all.py"),
        str(folder),
        "--output",
        str(tmp_path / "out"),
        "--shown",
        "1",
        "--targets",
        "1.0",
        "2.0",
    ]
    command += ["--model", "tiny-test", "--model", "tiny-rnn", "--model", crpe_dir]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    written = set(os.listdir(tmp_path / "out"))
    assert {"RESULTS.md", "rd.png", "report.html", "crpe.md", "crpe-kodak.png", "scalable_rnn.md", "scalable_rnn.png", "variable_rate.md"} <= written
    assert {f"{name}.json" for name in ("tiny-test", "tiny-rnn", "tiny-crpe", "jpeg", "webp")} <= written
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    for words in ("### jpegai09", "reached, published", "z2_high", "BD-rate", "fingerprint", "python", "Titan Xp", "psnr-rgb published"):
        assert words in text, words
    # Published figures are of Kodak only.
    other = tmp_path / "photos"
    os.rename(folder, other)
    Image.fromarray(draw(100, 120)).save(other / "small.png")  # MS-SSIM is not defined for it
    for script, flags, name in (("crpe.py", ["--models", crpe_dir], "crpe"), ("scalable_rnn.py", ["--model", rnn_dir], "scalable_rnn")):
        args = [os.path.join(ROOT, "experiments", "tables", script), str(other), "--output", str(tmp_path / "others"), *flags]
        done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        text = (tmp_path / "others" / f"{name}.md").read_text()
        assert "ublished" not in text and "Kodak" not in text and "BD-rate" not in text and "3 pictures" in text
        assert (tmp_path / "others" / f"{name}.png").exists()
    results = json.loads((tmp_path / "out" / "tiny-rnn.json").read_text())["results"]
    assert [value is None for value in results["bpp-z_2"]] == [True, True, False]
    parts = [value or 0 for k in range(3) for kind in "zy" for value in results[f"bpp-{kind}_{k}"][2:]]
    assert sum(parts) == pytest.approx(results["bpp-strings"][2])
    rows = json.loads((tmp_path / "out" / "tables" / "scalable_rnn.json").read_text())["models"]["tiny-rnn"]["rows"]
    assert [row["layers"] for row in rows] == [1, 2, 3]
