"""CRPE: its one walk, what each ablation switch changes, its commands."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, draw, lively
from PIL import Image
from test_commands import one_line
from test_variable_rate import Recorder

from goconv_tf import bitstream, codec, entropy, metrics, presets, training, zoo
from goconv_tf.errors import BitstreamError, RateError, UsageError
from goconv_tf.models import CRPE, named_weights

TINY = presets.get_preset("crpe", "tiny")


@pytest.mark.parametrize("coder", entropy.CODERS)
@pytest.mark.parametrize("size", [(1, 1), (17, 130), (150, 203)])
def test_any_size(crpe, coder, size):
    picture = draw(*size)
    result = codec.compress(crpe, picture, entropy_coder=coder, reconstruct=True)
    np.testing.assert_array_equal(codec.decompress(crpe, result.data), result.reconstruction)
    assert result.lmbda is None
    with pytest.raises(RateError, match="no lambda"):
        codec.compress(crpe, picture, lmbda=0.01)
    with pytest.raises(RateError, match="one rate"):
        codec.compress(crpe, picture, target_bpp=0.3)


def test_estimate_and_file_agree(crpe):
    x = draw(192, 256)
    estimate = crpe.estimate(tf.constant(x)[None], tf.constant([0.01]))
    coded = crpe.compress(x, 0.0, reconstruct=True)
    assert list(coded.strings) == ["z2_high", "z2_low", "z1_low", "z1_high", "y_low", "y_high"] == list(crpe.latent_names)
    for name, string in coded.strings.items():
        assert 8 * len(string) == pytest.approx(float(estimate.rates[name][0]), rel=0.05, abs=40), name
    total = 8 * sum(map(len, coded.strings.values()))
    assert total == pytest.approx(sum(float(r[0]) for r in estimate.rates.values()), rel=0.05)
    assert np.abs(np.round(np.clip(estimate.reconstruction[0], 0, 255)).astype(int) - coded.reconstruction).max() <= 1


def test_latent_shapes(crpe):
    for size in ((16, 16), (48, 80), (208, 336)):
        latents = crpe.analysis(tf.constant(draw(*size))[None], tf.constant([0.01]))
        assert {name: tuple(latents[name].shape[1:]) for name in crpe.latent_names} == crpe.latent_shapes(*size)


def hears(model):
    """{latent: latents whose entropy parameters move with it}."""
    latents = model.analysis(tf.constant(draw(128, 160))[None], tf.constant([0.01]))
    before = Recorder(latents)
    model.walk(before)
    heard = {}
    for changed in model.latent_names:
        after = Recorder({**latents, changed: latents[changed] + 3.0})
        model.walk(after)
        pairs = {name: zip(before.parameters[name], after.parameters[name]) for name in model.latent_names}
        heard[changed] = {name for name, both in pairs.items() if any(np.abs(a - b).max() > 1e-6 for a, b in both)}
    return heard


FULL = {
    "z2_high": {"z1_low", "z1_high", "y_low", "y_high"},
    "z2_low": {"z1_low", "z1_high", "y_low", "y_high"},
    "z1_low": {"z1_high", "y_low", "y_high"},
    "z1_high": {"y_low", "y_high"},
    "y_low": {"y_high"},
    "y_high": set(),
}
WITHOUT_SECOND = {"z1_low": {"y_low", "y_high"}, "z1_high": {"y_low", "y_high"}, "y_low": {"y_high"}, "y_high": set()}
SWITCHES = {
    "full": ({}, FULL, set()),
    "without CRPE at z": ({"crpe_z": False}, {**FULL, "z1_low": {"y_low", "y_high"}}, {"f_z_up"}),
    "without CRPE at y": ({"crpe_y": False}, {**FULL, "y_low": set()}, {"f_y_up"}),
    "without the second hyper layer": (
        {"second_hyper": False, "crpe_z": False},
        WITHOUT_SECOND,
        {"h_a2", "h_s2", "f_z", "f_z_up", "up4_mean", "up4_scale", "up4_high", "fusion"},
    ),
    "without information fidelity": ({"if_weight": 0.0}, FULL, {"if_y", "if_z"}),
    "separate convolutions C": ({"separate_fusion": True}, FULL, set()),
}


@pytest.fixture(scope="module")
def everything():
    return {name: tuple(v.shape) for name, v in named_weights(CRPE(TINY).build_weights()).items()}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_changes_what_it_should_and_nothing_else(switch, everything):
    changes, expected, gone = SWITCHES[switch]
    tf.keras.utils.set_random_seed(0)
    model = lively(CRPE(dataclasses.replace(TINY, **changes)).build_weights())
    shapes = {name: tuple(v.shape) for name, v in named_weights(model).items()}
    added = {"fusion_scale"} if switch.startswith("separate") else set()
    assert {n.split("/")[0] for n in everything} - {n.split("/")[0] for n in shapes} == gone
    assert {n.split("/")[0] for n in shapes} - {n.split("/")[0] for n in everything} == added
    # Only the first 1x1 layer of an estimation that hears less is narrower.
    narrower = {name for name, shape in shapes.items() if name in everything and everything[name] != shape}
    expected_narrower = {"crpe_z": "f_z/0", "crpe_y": "f_y/0", "second_hyper": "f_y/0"}.get(next(iter(changes), ""))
    assert all(name.startswith(expected_narrower or "none") for name in narrower) and bool(narrower) == bool(expected_narrower)
    assert hears(model) == expected


def test_one_convolution_fuses_means_and_scales_unless_asked(crpe):
    """C is shared: moving its weights moves both; the separate one for scales moves scales only."""
    for config, moves in ((TINY, (True, True)), (dataclasses.replace(TINY, separate_fusion=True), (True, False))):
        tf.keras.utils.set_random_seed(0)
        model = lively(CRPE(config).build_weights())
        latents = model.analysis(tf.constant(draw(96, 96))[None], tf.constant([0.01]))
        before, after = Recorder(latents), Recorder(latents)
        model.walk(before)
        model.fusion.bias_parameter.assign_add(np.full(model.fusion.filters, 0.5))
        model.walk(after)
        moved = tuple(bool(np.abs(a - b).max() > 0.1) for a, b in zip(before.parameters["y_low"], after.parameters["y_low"]))
        assert moved == moves


def test_settings_that_do_not_fit_together():
    for odd in (dict(second_hyper=False), dict(second_hyper=False, crpe_z=False, separate_fusion=True), dict(filters=9), dict(lmbda=-1.0)):
        with pytest.raises(UsageError):
            dataclasses.replace(TINY, **odd)
    with pytest.raises(UsageError, match="one lambda"):
        TINY.adapt(lambdas=(0.1, 0.2))
    changed = presets.change_settings(TINY, ["if_weight=0", "crpe_y=false", "estimation_widths=[8, 8]", "filters=16"])
    assert (changed.if_weight, changed.crpe_y, changed.estimation_widths, changed.filters) == (0.0, False, (8, 8), 16)
    paper = presets.get_preset("crpe", "paper-high")
    assert [presets.change_settings(paper, settings).latents for settings in (["filters=96"], ["latents=192", "filters=96"])] == [96, 192]
    for bad in ("nothing=1", "crpe_y=3", "filters=1.5", "if_weight=true", "if_weight=", "if_weight", "estimation_widths=3"):
        with pytest.raises(UsageError, match=r"setting|JSON|type"):
            presets.change_settings(TINY, [bad])


def test_presets_build_what_the_paper_says():
    assert [presets.get_preset("crpe", name).filters for name in ("paper-high", "paper-low", "base", "small")] == [448, 256, 192, 64]
    model = CRPE(dataclasses.replace(presets.get_preset("crpe", "paper-high"), filters=16, latents=24))
    model.build_weights()
    networks = (model.g_a, model.g_s, model.h_a1, model.h_s1, model.h_a2, model.h_s2)
    assert [[layer.filters for layer in layers] for layers in networks] == [
        [16] * 3 + [24],
        [16] * 3 + [3],
        [16] * 3,
        [16, 288, 48],
        [16] * 3,
        [16, 288, 32],
    ]
    assert [[layer.strides for layer in layers] for layers in networks] == [[2] * 4, [2] * 4, [1, 2, 2], [2, 2, 1], [1] * 3, [1] * 3]
    assert [[layer.kernel_size for layer in layers] for layers in networks[2:]] == [[3, 5, 5], [5, 5, 3], [3, 3, 3], [3, 3, 3]]
    assert [[layer.activation for layer in layers] for layers in networks] == [
        ["gdn"] * 3 + [None],
        ["igdn"] * 3 + [None],
        *[["leaky_relu"] * 2 + [None]] * 4,
    ]
    assert [layer.filters for layer in (*model.f_y, *model.f_z)] == [640, 512, 24, 640, 512, 16]
    assert not any(conv.use_bias for conv in (model.h_a1[-1].high, model.h_a2[-1].low, model.f_y[-1], model.f_z[-1]))


@pytest.fixture(scope="module")
def traced():
    """(model, gradients(x, step)) of a lively model whose information fidelity ends at step 10."""
    tf.keras.utils.set_random_seed(0)
    model = lively(CRPE(dataclasses.replace(TINY, if_weight=2.0, if_steps=10)).build_weights())

    @tf.function(autograph=False)
    def gradients(x, step):
        with tf.GradientTape() as tape:
            loss, metrics = model.loss_fn(x, tf.constant([0.02]), tf.constant([1, 2]), step)
        return loss, metrics, tape.gradient(loss, model.trainable_variables)

    return model, gradients


def test_loss_and_its_schedule(traced):
    model, gradients = traced
    x = tf.constant(draw(128, 128))[None]
    loss, m, values = gradients(x, tf.constant(9))
    m = {name: float(value) for name, value in m.items()}
    assert m["bpp_high"] + m["bpp_low"] == pytest.approx(m["bpp"], rel=1e-5)
    assert m["bpp_low"] == pytest.approx(sum(m[f"bpp_{name}_low"] for name in ("z2", "z1", "y")), rel=1e-5)
    assert float(loss) == pytest.approx(m["bpp"] + 0.02 * m["mse"] + 2.0 * m["info_fidelity"], rel=1e-5)
    walker = entropy.NoisyWalker(model.analysis(x, tf.constant([0.02])), tf.constant([1, 2]), False)
    model.walk(walker)
    seen = {name: value.numpy() for name, value in walker.values.items()}
    errors = [transform(seen[f"{name}_low"]).numpy() - seen[f"{name}_high"] for name, transform in (("y", model.if_y), ("z1", model.if_z))]
    assert m["info_fidelity"] == pytest.approx(sum(np.mean(error**2) for error in errors), rel=1e-4)
    assert m["bpp"] == pytest.approx(sum(float(walker.bits(name)) for name in model.latent_names) / 128**2, rel=1e-4)
    names = [name for name, _ in sorted(named_weights(model).items())]
    assert any(name.startswith("if_y") for name in names)
    assert not [v.name for v, g in zip(model.trainable_variables, values) if g is None or not np.abs(g).max() > 0]
    later, n, values = gradients(x, tf.constant(10))
    assert float(later) == pytest.approx(m["bpp"] + 0.02 * m["mse"], rel=1e-5) and float(n["info_fidelity"]) == pytest.approx(m["info_fidelity"])
    silent = {id(v) for v, g in zip(model.trainable_variables, values) if not np.abs(g).max() > 0}
    assert silent == {id(v) for layer in (model.if_y, model.if_z) for v in layer.trainable_variables}


def test_starts_from_a_variable_rate_model(model_dir):
    """At its lambda, what is left of the picture and the rate of y are the other model's."""
    source = zoo.load_pretrained(model_dir, fold=False)
    for separate in (False, True):
        model = CRPE(dataclasses.replace(TINY, lmbda=0.02, separate_fusion=separate)).build_weights()
        training.start_from(model, source, "x", None)
        # Medians of z would differ: compare what follows from the same latents, not rounded.
        x, lmbda = tf.constant(draw(96, 128))[None], tf.constant([0.02])
        theirs, ours = (Pass(m.analysis(x, lmbda)) for m in (source, model))
        pictures = source.synthesis(source.walk(theirs), lmbda), model.synthesis(model.walk(ours), lmbda)
        np.testing.assert_allclose(*pictures, atol=0.02)
        for name in ("y_low", "y_high"):
            np.testing.assert_allclose(theirs.latents[name], ours.latents[name], atol=1e-3)
            for a, b in zip(theirs.parameters[name], ours.parameters[name]):
                np.testing.assert_allclose(a, b, atol=2e-3)
    for changes, message in (({"filters": 16, "latents": 8}, "other widths"), ({"crpe_y": False}, "without second_hyper or crpe_y")):
        with pytest.raises(UsageError, match=message):
            training.start_from(CRPE(dataclasses.replace(TINY, **changes)).build_weights(), source, "x", None)
    with pytest.raises(UsageError, match=r"lambda 0\.3 is outside what it was trained for"):
        training.start_from(CRPE(dataclasses.replace(TINY, lmbda=0.3)).build_weights(), source, "x", None)


def test_starts_from_one_with_another_auxiliary_loss():
    """`if_y` and `if_z` are there only if their loss is."""
    for weight in (0.0, 1.0):
        source = CRPE(dataclasses.replace(TINY, if_weight=weight)).build_weights()
        model = CRPE(dataclasses.replace(TINY, if_weight=1.0 - weight)).build_weights()
        training.start_from(model, source, "x", None)
        ours, theirs = named_weights(model), named_weights(source)
        assert len(ours) != len(theirs)
        for name in ours.keys() & theirs.keys():
            np.testing.assert_array_equal(ours[name], theirs[name])


class Pass(Recorder):
    """Rounds nothing."""

    def __call__(self, name, entropy_model, *parameters):
        super().__call__(name, entropy_model, *parameters)
        return self.latents[name]


def test_damaged_streams(crpe):
    data = codec.compress(crpe, draw(96, 112)).data
    rng = np.random.default_rng(0)
    for k in range(60):
        stream = bitstream.unpack(data, 10**6)
        sections = stream.layers[0].sections
        n = rng.integers(len(sections))
        sections[n] = rng.bytes(len(sections[n]) + int(rng.integers(2))) if k % 2 else sections[(n + 1) % 6]
        if sections != bitstream.unpack(data, 10**6).layers[0].sections:
            with pytest.raises(BitstreamError):
                codec.decode(crpe, stream)
    for k in range(200):
        copy = bytearray(data)
        copy[rng.integers(len(copy))] ^= 1 << rng.integers(8)
        with pytest.raises(BitstreamError):
            codec.decompress(crpe, bytes(copy) if k % 2 else data[: rng.integers(len(data))])


def test_original_commands(crpe, crpe_dir, model_dir, command_here, tmp_path):
    script = os.path.join(ROOT, "experiments", "crpe.py")

    def run(*args):
        env = {**os.environ, "PYTHONPATH": ROOT}
        return subprocess.run([sys.executable, script, *map(str, args)], env=env, capture_output=True, text=True, check=False, cwd=tmp_path)

    folder = tmp_path / "in"
    folder.mkdir()
    for k, size in enumerate(((170, 180), (165, 200))):
        Image.fromarray(draw(*size, k)).save(folder / f"{k}.png")
    os.rename(folder / "1.png", folder / "1_rec.png")  # only what an earlier call wrote is left out
    done = run("--checkpoint_dir", crpe_dir, "encode", folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["0.png.bitstream", "0.png_rec.png", "1_rec.png.bitstream", "1_rec.png_rec.png"]
    figures = [line.split(": ") for line in done.stdout.splitlines() if ": " in line]
    values = [{name: float(value) for name, value in figures[k * 11 : k * 11 + 11]} for k in range(3)]
    assert "Averages of 2 pictures" in done.stdout and len(figures) == 33
    pictures = [np.asarray(Image.open(tmp_path / "out" / f"{name}.png_rec.png")) for name in ("0", "1_rec")]
    decoded = pictures[1]
    measured = [metrics.quality(draw(*size, k), pictures[k]) for k, size in enumerate(((170, 180), (165, 200)))]
    means = {key: (measured[0][key] + measured[1][key]) / 2 for key in measured[0]}
    for name in values[0]:  # dB are of means
        if name == "YUV444 PSNR (dB)":
            channels = [-10 * np.log10(sum(10 ** (-row[f"psnr-{c}"] / 10) for row in measured) / 2) for c in "yuv"]
            expected = (6 * channels[0] + channels[1] + channels[2]) / 8
        elif name.endswith("SSIM (dB)"):
            expected = -10 * np.log10(1 - means[f"ms-ssim-{name.split()[0].lower()}"])
        else:
            expected = (values[0][name] + values[1][name]) / 2
        assert values[2][name] == pytest.approx(expected, abs=0.011)
    assert values[1]["YUV444 PSNR (dB)"] == pytest.approx(metrics.quality(draw(165, 200, 1), decoded)["psnr-yuv"], abs=0.006)
    assert values[1]["Actual bits per pixel"] == pytest.approx(8 * os.path.getsize(tmp_path / "out" / "1_rec.png.bitstream") / (165 * 200), abs=1e-4)
    assert values[1]["Information content in bpp_h"] + values[1]["Information content in bpp_l"] == pytest.approx(
        values[1]["Information content in bpp"], abs=2e-4
    )
    # A picture of the user's is not replaced by another's reconstruction; what an earlier call wrote is.
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("a.png", "a.png_rec.png"):
        Image.fromarray(draw(40, 48)).save(mine / name)
    for source in (mine, mine / "a.png"):
        assert "no earlier call's" in one_line(command_here("--checkpoint_dir", crpe_dir, "encode", source, module=script))
    assert (mine / "a.png_rec.png").read_bytes() == (mine / "a.png").read_bytes() and len(os.listdir(mine)) == 2
    os.remove(mine / "a.png_rec.png")
    for _ in range(2):
        assert command_here("--restore_path", crpe_dir, "encode", mine, module=script).returncode == 0
        assert sorted(os.listdir(mine)) == ["a.png", "a.png.bitstream", "a.png_rec.png"]
    done = run("--checkpoint_dir", crpe_dir, "decode", "out/1_rec.png.bitstream")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "1_rec.png.bitstream.png")), decoded)
    assert "no such file" in one_line(command_here("--checkpoint_dir", crpe_dir, "encode", "missing.png", module=script))
    assert "is a variable_rate, not a crpe" in one_line(command_here("--checkpoint_dir", model_dir, "encode", mine / "a.png", module=script))
    assert "if_weight must be 0 or more" in one_line(command_here("--if_weight", "-1", "train", "--train_root_dir", folder, module=script))
    assert "no PNG" in one_line(command_here("train", "--train_root_dir", "nothing", module=script))
