"""make results: every table, plot and page, on tiny models."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, draw
from PIL import Image

from goconv_tf import presets
from goconv_tf.errors import RateError


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
