"""Latents that are optimised for one picture: smaller files that any decoder of the model reads."""

import json
import os

import numpy as np
import pytest
import tensorflow as tf
from conftest import draw
from PIL import Image

import goconv_tf
from goconv_tf import bitstream, codec, entropy, evaluation, memory, metrics, presets, report
from goconv_tf.errors import GoConvError, UsageError
from goconv_tf.models import refine


def cost(picture, data, decoded, lmbda):
    """R + lambda D of a real file."""
    return 8 * len(data) / picture[..., 0].size + lmbda * np.mean((picture.astype(float) - decoded) ** 2)


@pytest.mark.parametrize("name", ["variable-rate-small-mse", "crpe-small-mse-0.01"])
def test_files_are_better_and_decode_as_ever(name):
    """On a shipped model; in a process's own order of calls, with a picture of another size between."""
    model, picture = goconv_tf.load_pretrained(name), draw(120, 136, seed=3)
    lmbda = 0.008 if model.has_lambda else model.config.lmbda
    point = {"lmbda": lmbda} if model.has_lambda else {}
    plain = goconv_tf.compress(model, picture, **point)
    refined = goconv_tf.compress(model, picture, refine=60, reconstruct=True, **point)
    goconv_tf.compress(model, draw(40, 72), refine=2, **point)
    again = goconv_tf.compress(model, picture, refine=60, **point)
    assert again.data == refined.data
    decoded = goconv_tf.decompress(goconv_tf.load_pretrained(name), refined.data)
    np.testing.assert_array_equal(decoded, refined.reconstruction)
    before = cost(picture, plain.data, goconv_tf.decompress(model, plain.data), lmbda)
    assert cost(picture, refined.data, decoded, lmbda) < 0.985 * before
    assert bitstream.unpack(refined.data, 10**6).lmbda_code == bitstream.unpack(plain.data, 10**6).lmbda_code


def test_what_is_no_better_is_not_taken(model, monkeypatch):
    x, lmbda = tf.constant(draw(64, 64))[None], tf.constant([0.02])
    latents = model.analysis(x, lmbda)
    monkeypatch.setattr(refine, "RATES", (30.0, 30.0))  # which scatters them
    for name, latent in refine.refine(model, x, (64, 64), lmbda, latents, 3).items():
        np.testing.assert_array_equal(latent, latents[name])


def test_what_pads_a_picture_does_not_count(model):
    """R + lambda D is of the picture's own pixels."""
    x, lmbda = tf.constant(draw(64, 64))[None], tf.constant([0.02])
    latents = {name: tf.cast(latent, tf.float32) for name, latent in model.analysis(x, lmbda).items()}
    estimate = model.estimate(x, lmbda, exact=False)
    decoded = np.clip(np.rint(estimate.reconstruction[0]), 0, 255)[:50, :33]
    squares = np.square(decoded - draw(64, 64)[:50, :33].astype(float)).mean((0, 1, 2))
    expected = sum(float(bits[0]) for bits in estimate.rates.values()) + 50 * 33 * 0.02 * squares
    _, loss = refine._compiled(model, "mse", latents)
    assert float(loss((x, tf.constant([50, 33]), lmbda), latents)) == pytest.approx(expected, rel=1e-4)


def test_annealing_ends_in_rounding(model):
    """Draws lie between the two nearest integers, are them when it is cold, and the nearer one more often."""

    class Prior:
        @staticmethod
        def offset():
            return tf.constant([0.25])

        @staticmethod
        def likelihood(values):
            return tf.ones_like(values)

    latents = tf.fill([1, 100, 100, 1], 3.45)  # 3.2 above the offset
    draws = {}
    for temperature in (0.5, 0.02):
        walker = entropy.AnnealingWalker({"y": latents}, [1, 2], tf.constant(temperature))
        draws[temperature] = walker("y", Prior).numpy() - 0.25
        assert draws[temperature].min() >= 3 and draws[temperature].max() <= 4
    assert 3.05 < draws[0.5].mean() < 3.45 and np.mean(np.abs(draws[0.5] - np.rint(draws[0.5])) > 0.02) > 0.2
    assert np.abs(draws[0.02] - 3).max() < 1e-3


def test_rates_and_measures(model, model_dir, command_here, tmp_path):
    """The commands; results of refined files have a name of their own, and pages show such files."""
    (tmp_path / "in").mkdir()
    picture = draw(64, 80)
    Image.fromarray(picture).save(tmp_path / "in" / "a.png")
    stream = tmp_path / "a.gcv"
    done = command_here(
        "compress", tmp_path / "in" / "a.png", stream, "--model", "variable-rate-small-mse", "--target_bpp", "1.5", "--refine", "3", "--verify"
    )
    assert done.returncode == 0 and "verified" in done.stdout, done.stderr
    assert abs(8 * os.path.getsize(stream) / (64 * 80) / 1.5 - 1) <= codec.TOLERANCE
    for _ in range(2):  # the second finds all there
        done = command_here("evaluate", tmp_path / "in", "--model", "tiny-test", "--points", "3", "--refine", "4", "--output", tmp_path / "out")
        assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "out" / "tiny-test-refined-4.json").read_text())
    assert data["meta"]["refine"] == 4 and "refined in 4 steps" in data["description"] and "bpp-estimated" not in data["results"]
    results = evaluation.read_results(str(tmp_path / "out" / "tiny-test-refined-4.json"))
    subject = report.subject_of(results, [model.info])
    assert (subject.refine, subject.name) == (4, "tiny-test-refined-4")
    coded, decoded = report.code_at(subject, picture, 1.5)
    assert metrics.bpp(coded, 64, 80) <= 1.5 * 1.01 and decoded.shape == picture.shape
    results["meta"]["refine"] = "4"
    (tmp_path / "bad.json").write_text(json.dumps({**data, "meta": results["meta"]}))
    with pytest.raises(UsageError, match="not a results file"):
        evaluation.read_results(str(tmp_path / "bad.json"))


def test_what_cannot_be_refined(model, rnn, monkeypatch):
    with pytest.raises(UsageError, match="latents of a scalable_rnn cannot be refined"):
        codec.compress(rnn, draw(32, 32), refine=5)
    with pytest.raises(UsageError, match="not in -1"):
        codec.compress(model, draw(32, 32), refine=-1)
    with pytest.raises(UsageError, match="176 x 160 pixels cannot be refined for MS-SSIM, which needs 161 a side"):
        refine.check(model, (160, 176), (160, 176), "mix")
    one_layer = presets.change_settings(presets.get_preset("scalable_rnn", "tiny"), ["iterations=1"])
    with pytest.raises(UsageError, match="latents of a scalable_rnn cannot be refined"):
        codec.check_refine(one_layer, 5)
    for card, distortion in (({}, None), ({"training": {}}, "mse"), ({"training": {"distortion": ["mix"]}}, None), ({"training": 3}, None)):
        info = model.info._replace(card=card)
        assert info.distortion == distortion
        if distortion is None:
            with pytest.raises(UsageError, match="card does not say which distortion it was trained for"):
                codec.refined(model, info, draw(32, 32), (32, 32), 0.02, 5)
    monkeypatch.setattr(type(model), "analysis", lambda *_: pytest.fail("the analysis runs before memory is looked at"))
    monkeypatch.setattr(memory, "available_memory", lambda: 2.0 * model.bytes_per_pixel * 32 * 32)
    with pytest.raises(GoConvError, match="refining 32 x 32 pixels need about"):
        codec.compress(model, draw(32, 32), refine=5)
