"""The scalable codec: its cell, its walk, its layers, and what is left of a stream that was cut."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, draw, lively_rnn
from PIL import Image
from test_codec import resealed
from test_commands import one_line

from goconv_tf import bitstream, codec, commands, metrics, presets, training, zoo
from goconv_tf.entropy import RoundingWalker
from goconv_tf.errors import BitstreamError, RateError, UsageError
from goconv_tf.layers import ConvLSTM2DCell
from goconv_tf.models import ScalableRNN, named_weights
from goconv_tf.models.principal_rnn import scalable_start


def conv(x, kernel, stride):
    """Independent "same" correlation, [h, w, c] with [k, k, c, d]: TensorFlow pads the odd pixel after."""
    k = kernel.shape[0]
    out = [-(-n // stride) for n in x.shape[:2]]
    total = [max((o - 1) * stride + k - n, 0) for o, n in zip(out, x.shape[:2])]
    x = np.pad(x, [(t // 2, t - t // 2) for t in total] + [(0, 0)])
    y = np.zeros([*out, kernel.shape[-1]])
    for i in range(out[0]):
        for j in range(out[1]):
            y[i, j] = np.einsum("abc,abcd->d", x[i * stride : i * stride + k, j * stride : j * stride + k], kernel)
    return y


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(("kernel_size", "strides", "size"), [(3, 2, (6, 7)), (2, 1, (4, 5)), (3, 1, (3, 4))])
def test_cell_is_the_papers(kernel_size, strides, size):
    cell = ConvLSTM2DCell(3, kernel_size, strides)
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (2, *size, 2))
    cell(tf.constant(x[:1], tf.float32))
    for variable in cell.variables:
        variable.assign(rng.normal(0, 0.4, variable.shape))
    (wx, bx), (wh, bh) = ([v.numpy() for v in layer.variables] for layer in (cell.conv_inputs, cell.conv_hidden))
    hidden = state = np.zeros([-(-n // strides) for n in size] + [3])
    states = None
    for step in range(2):
        i, f, o, g = np.split(conv(x[step], wx, strides) + bx + conv(hidden, wh, 1) + bh, 4, axis=-1)
        state = sigmoid(f) * state + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(state)
        output, states = cell(tf.constant(x[step : step + 1], tf.float32), states)
        np.testing.assert_allclose(output[0], hidden, atol=1e-5)
        np.testing.assert_allclose(states[1][0], state, atol=1e-5)
    zeros = 2 * (tf.zeros([1, *hidden.shape]),)
    np.testing.assert_array_equal(*(cell(tf.constant(x[:1], tf.float32), s)[0] for s in (None, zeros)))
    again = ConvLSTM2DCell.from_config({**cell.get_config(), "grid_bits": 12})
    assert (again.filters, again.kernel_size, again.strides, again.get_config()["grid_bits"]) == (3, kernel_size, strides, 12)
    with pytest.raises(ValueError, match="10 to 14"):
        ConvLSTM2DCell(3, grid_bits=9)


@pytest.mark.parametrize("coder", ["tfc", "range-coder"])
@pytest.mark.parametrize("size", [(1, 1), (17, 3), (64, 96), (70, 101)])
def test_any_size_and_any_number_of_layers(rnn, coder, size):
    picture = draw(*size)
    whole = codec.compress(rnn, picture, entropy_coder=coder, reconstruct=True)
    assert whole.layers == 3 and whole.lmbda is None and len(whole.pictures) == 3
    for count in (1, 2, 3):
        np.testing.assert_array_equal(codec.decompress(rnn, whole.data, layers=count), whole.pictures[count - 1])
    part = codec.compress(rnn, picture, entropy_coder=coder, layers=2)
    # Cutting is coding fewer layers, to the byte.
    assert part.data == bitstream.pack(bitstream.unpack(whole.data, 10**6).cut(2))
    np.testing.assert_array_equal(codec.decompress(rnn, part.data), whole.pictures[1])


def test_estimate_and_file_agree(rnn):
    x = draw(192, 256)
    estimate = rnn.estimate(tf.constant(x)[None], tf.constant([0.0]))
    coded = rnn.compress(x, 0.0, reconstruct=True)
    assert list(coded.strings) == list(rnn.latent_names) == ["z_0", "y_0", "z_1", "y_1", "z_2", "y_2"]
    for name, string in coded.strings.items():
        assert 8 * len(string) == pytest.approx(float(estimate.rates[name][0]), rel=0.05, abs=40), name
    for layer, picture in zip(estimate.layers, coded.pictures):
        assert np.abs(np.round(np.clip(layer[0], 0, 255)).astype(int) - picture).max() <= 1
    both = rnn.estimate(tf.constant(np.stack([x, x[::-1]])), tf.constant([0.0, 0.0]))
    np.testing.assert_allclose(both.layers[2][0], estimate.layers[2][0], atol=0.05)


class Recorder(RoundingWalker):
    """Notes sigmas; rounds nothing, so that small differences travel; changes one latent as it is coded."""

    def __init__(self, latents, changed=None):
        super().__init__(latents)
        self.changed, self.sigmas = changed, {}

    def __call__(self, name, entropy_model, *parameters):
        if parameters:
            self.sigmas[name] = parameters[1].numpy()
        return self.latents[name] + 20.0 * (name == self.changed)


@pytest.mark.parametrize(
    ("changed", "sigmas", "pictures"),
    [("z_0", {"y_0", "y_1", "y_2"}, set()), ("z_1", {"y_1", "y_2"}, set()), ("y_1", {"y_2"}, {1, 2}), ("y_2", set(), {2})],
)
def test_what_hears_of_a_changed_latent(rnn, changed, sigmas, pictures):
    """Also through the residual and the states: a later layer hears of an earlier one, never the other way round. z changes how y is coded only."""
    walkers = [Recorder(rnn.analysis(tf.constant(draw(96, 96))[None], None), c) for c in (None, changed)]
    (before, a), (after, b) = ((walker, rnn.walk(walker)) for walker in walkers)
    assert {name for name in before.sigmas if np.abs(before.sigmas[name] - after.sigmas[name]).max() > 1e-6} == sigmas
    assert {k for k in range(3) if np.abs(a[k] - b[k]).max() > 1e-6} == pictures


def test_without_hyperprior(tmp_path):
    config = dataclasses.replace(presets.get_preset("scalable_rnn", "tiny"), hyperprior=False)
    tf.keras.utils.set_random_seed(0)
    model = lively_rnn(zoo.new_model(config))
    assert not [name for name in named_weights(model) if name.startswith("h_")]
    zoo.save_pretrained(model, str(tmp_path / "plain"), "plain")
    model = zoo.load_pretrained(str(tmp_path / "plain"))
    result = codec.compress(model, draw(50, 70), reconstruct=True)
    np.testing.assert_array_equal(codec.decompress(model, result.data), result.reconstruction)
    assert [len(layer.sections) for layer in bitstream.unpack(result.data, 10**6).layers] == [1, 1, 1]
    # No variable is without use.
    assert {n.split("/")[0] for n in named_weights(model)} == {
        "g_a_input", "g_a_cells", "g_a_output", "g_s_input", "g_s_cells", "g_s_output", "priors"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("units", "iterations", "groups"),
    [(144, 3, 3), (96, 4, 2), (48, 1, 1)],
    ids=["a group for each layer, the last one less to make room", "two turns each", "one layer"],
)
def test_start_from_principal_components(units, iterations, groups):
    """Before the first step: each layer adds components of its own, then precision, and scales follow y block by block."""
    config = presets.ScalableRNNConfig(48, 12, (20, 36, units), (units, 80, 48, 24), iterations)
    tf.keras.utils.set_random_seed(0)
    model = ScalableRNN(config).build_weights()
    pictures = np.stack([draw(128, 128, seed=seed) for seed in range(12)])
    scalable_start(model, pictures)
    x = tf.constant(pictures[:4])
    walker = RoundingWalker(model.analysis(x, None))
    layers = model.pictures(model.walk(walker), None)
    # Each layer has 12 maps of blocks of 8 x 8 pixels, but for the one that makes room for what counts layers.
    cells = pictures.reshape(12, 16, 8, 16, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 192) - 127.5
    energies = np.sort(np.linalg.eigvalsh(cells.T @ cells / len(cells)))[::-1] / 192
    errors = [float(np.mean(np.square(picture - tf.cast(x, tf.float32)))) for picture in layers]
    assert all(after < 0.98 * before for before, after in zip(errors, errors[1:]))
    for k, error in enumerate(errors[:groups]):
        maps = 12 * (k + 1) - (iterations > 1 and k == groups - 1)
        assert 0.9 * energies[maps:].sum() < error < 1.2 * energies[maps:].sum() + 25, (k, error)
    # Scales follow what y is like, block by block: of flat pictures with a patch of noise, those of the patch are wide.
    pictures[:2] = 128
    pictures[:2, 32:96, 64:128] = np.random.default_rng(0).integers(64, 192, (2, 64, 64, 3))
    visit = Recorder(model.analysis(tf.constant(pictures[:2]), None))
    model.walk(visit)
    for k, sigma in enumerate(visit.sigmas.values()):
        blocks = np.maximum(sigma, 0.11).mean(axis=(0, -1))
        assert blocks[2:6, 4:8].min() > (2.5 if k < groups else 1.3) * np.median(blocks)  # second turns have little left


def test_presets_build_what_the_paper_says():
    paper = presets.get_preset("scalable_rnn", "paper")
    assert (paper.iterations, paper.lambdas) == (4, (0.01, 0.02, 0.04, 0.08))
    with tf.Graph().as_default():  # shapes only
        model = ScalableRNN(paper)
        for cells, x in ((model.g_a_cells, 64), (model.g_s_cells, 128), (model.h_a_cells, 128), (model.h_s_cells, 128)):
            for cell in cells:
                cell.build([None, None, None, x])
                x = cell.filters // (1 if cells in (model.g_a_cells, model.h_a_cells) else 4)
        count = sum(int(np.prod(v.shape)) for cells in (model.g_a_cells, model.g_s_cells) for c in cells for v in c.variables)
        others = (27 * 64 + 64) + (512 * 128 + 128) + (9 * 128 * 128 + 128) + (9 * 32 * 3 + 3)
    assert count + others == 36_056_960 + 21_622_755  # the original's encoder and decoder
    assert presets.ScalableRNNConfig(iterations=2).lambdas == (0.01, 0.02)
    for odd in (dict(iterations=0), dict(lambdas=(0.1,)), dict(lambdas=(0.1, 0.2, -0.1, 0.4)), dict(decoder_filters=(6, 8, 8, 8))):
        with pytest.raises(UsageError):
            presets.ScalableRNNConfig(**odd)
    assert paper.adapt(32, lambdas=(0.1, 0.2)).iterations == 2
    with pytest.raises(UsageError, match="num_latents"):
        paper.adapt(num_latents=3)


def test_operating_points_that_are_refused(rnn, model):
    for change, message in (
        (dict(lmbda=0.01), "no lambda"),
        (dict(layers=4), "has 3"),
        (dict(layers=0), "has 3"),
        (dict(target_bpp=1e-3), "first layer"),
    ):
        with pytest.raises(RateError, match=message):
            codec.compress(rnn, draw(40, 40), **change)
    data = codec.compress(rnn, draw(40, 40), layers=2).data
    with pytest.raises(RateError, match="the file has 2"):
        codec.decompress(rnn, data, layers=3)
    with pytest.raises(RateError, match="the model has 1"):
        codec.compress(model, draw(40, 40), layers=2)


def test_target_rate_is_not_exceeded(rnn):
    picture = draw(100, 120)
    sizes = bitstream.unpack(codec.compress(rnn, picture).data, 10**6).layer_bytes()
    for count, size in enumerate(sizes, 1):
        rate = 8 * size / picture[..., 0].size
        assert codec.compress(rnn, picture, target_bpp=rate).layers == count
        if count > 1:
            assert codec.compress(rnn, picture, target_bpp=rate * 0.999).layers == count - 1
    result = codec.compress(rnn, picture, target_bpp=8 * sizes[1] / picture[..., 0].size, reconstruct=True)
    assert len(result.pictures) == result.layers == 2
    np.testing.assert_array_equal(codec.decompress(rnn, result.data), result.reconstruction)


def test_300_damaged_or_cut_streams(rnn, rnn_dir, tmp_path, capsys, monkeypatch):
    """A clear line, or the picture of the layers that are whole, said to be partial."""
    whole = codec.compress(rnn, draw(90, 110), reconstruct=True)
    data, sizes = whole.data, bitstream.unpack(whole.data, 10**6).layer_bytes()
    rng = np.random.default_rng(1)
    copies = [data[:n] for n in rng.integers(0, len(data), 120)] + [data[:n] for n in sizes[:2]]
    for _ in range(100):
        copy = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            copy[position] ^= 1 << rng.integers(8)
        copies.append(bytes(copy))
    copies += [data + rng.bytes(5) for _ in range(5)] + [rng.bytes(300) for _ in range(10)]

    def random_section(stream):
        sections = stream.layers[rng.integers(3)].sections
        k = rng.integers(2)
        sections[k] = rng.bytes(len(sections[k]) + 1)

    copies += [resealed(data, random_section) for _ in range(40)]
    copies += [resealed(data, lambda s: s.layers.__setitem__(2, s.layers[2]._replace(checksum=7))) for _ in range(2)]
    copies += [resealed(data, lambda s: s.layers.reverse()), resealed(data, lambda s: s.layers.append(s.layers[0]))]
    copies += [resealed(data, lambda s: setattr(s, "height", s.height + int(rng.integers(16, 99)))) for _ in range(20)]
    copies = [copy for copy in copies if copy != data]
    assert len(copies) >= 299
    source, target = tmp_path / "streams", tmp_path / "pictures"
    source.mkdir()
    for k, copy in enumerate(copies):
        (source / f"{k:03d}.gcv").write_bytes(copy)
    monkeypatch.setattr(zoo, "load_pretrained", lambda path: rnn)
    assert commands.decompress([str(source)], rnn_dir, str(target)) == 1
    assert len(capsys.readouterr().err.splitlines()) == len(copies) and os.listdir(target) == []
    assert commands.decompress([str(source)], rnn_dir, str(target), allow_truncated=True) == 1
    out = capsys.readouterr()
    written = sorted(os.listdir(target))
    assert 20 < len(written) < len(copies) and len(out.err.splitlines()) == len(copies) - len(written)
    lines = {line.split(" -> ")[0].split("/")[-1]: line for line in out.out.splitlines()}
    for name in written:
        count = int(lines[name.replace(".png", ".gcv")].split(" of 3 layers")[0].split()[-1])
        assert count < 3 and f"the last {3 - count} are missing or damaged" in lines[name.replace(".png", ".gcv")]
        np.testing.assert_array_equal(np.asarray(Image.open(target / name)), whole.pictures[count - 1])


def test_commands(command, command_here, rnn, photo, tmp_path):
    stream, short, picture = tmp_path / "a.gcv", tmp_path / "b.gcv", tmp_path / "a.png"
    done = command("compress", photo, stream, "--model", "tiny-rnn", "--verify")
    assert done.returncode == 0 and "3 layers, verified" in done.stdout, done.stderr
    info = json.loads(command_here("info", stream).stdout)
    assert [list(layer["substreams"]) for layer in info["layers"]] == [["z_0", "y_0"], ["z_1", "y_1"], ["z_2", "y_2"]]
    assert info["lmbda"] is None and sum(layer["bytes"] for layer in info["layers"]) == info["bytes"] == os.path.getsize(stream)
    rate = info["layers"][1]["bpp_so_far"]
    done = command_here("truncate", stream, short, "--target_bpp", rate)
    assert done.returncode == 0 and "2 of 3 layers" in done.stdout, done.stderr
    assert os.path.getsize(short) == info["layers"][1]["bytes_so_far"]
    hashes = [command("decompress", *args).stdout.split()[-1] for args in ((stream, picture, "--layers", 2), (short, picture))]
    assert hashes[0] == hashes[1] == commands.picture_hash(codec.decompress(rnn, short.read_bytes()))
    (tmp_path / "cut.gcv").write_bytes(stream.read_bytes()[: info["layers"][1]["bytes_so_far"] + 9])
    assert "--allow_truncated" in one_line(command_here("decompress", tmp_path / "cut.gcv", picture))
    assert json.loads(command_here("info", tmp_path / "cut.gcv", "--allow_truncated").stdout)["missing_layers"] == 1
    assert "takes" in one_line(command_here("truncate", stream, tmp_path / "c.gcv", "--target_bpp", "0.001"))
    assert "the file has 3" in one_line(command_here("truncate", stream, tmp_path / "c.gcv", "--layers", "4"))
    assert not (tmp_path / "c.gcv").exists()


def test_original_commands(rnn, rnn_dir, command_here, tmp_path):
    """To the letter of the original's README; its flags before or after the command."""
    script = os.path.join(ROOT, "experiments", "rnn.py")
    env = {**os.environ, "PYTHONPATH": ROOT}

    def run(*args):
        return subprocess.run([sys.executable, script, *map(str, args)], env=env, capture_output=True, text=True, check=False, cwd=tmp_path)

    Image.fromarray(draw(170, 180)).save(tmp_path / "xxx.png")
    done = run("--checkpoint_dir", rnn_dir, "--batchsize", 1, "compress", "xxx.png", "compressed.bin")
    assert done.returncode == 0, done.stderr
    lines = [line.split(": ") for line in done.stdout.splitlines()]
    figures = "Mean squared error", "PSNR (dB)", "Multiscale SSIM", "Multiscale SSIM (dB)", "Information content in bpp", "Actual bits per pixel"
    assert [name for name, _ in lines] == list(figures) * 3
    assert float(lines[-1][1]) == pytest.approx(8 * os.path.getsize(tmp_path / "compressed.bin") / (170 * 180), abs=1e-4)
    assert float(lines[-2][1]) == pytest.approx(float(lines[-1][1]), rel=0.1)
    done = run("decompress", "--batchsize", 1, "--checkpoint_dir", rnn_dir, "--iter", 2, "compressed.bin", "back.png")
    assert done.returncode == 0, done.stderr
    shown = codec.decompress(rnn, (tmp_path / "compressed.bin").read_bytes(), layers=2)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "back.png")), shown)
    assert float(lines[7][1]) == pytest.approx(metrics.psnr(draw(170, 180), shown), abs=0.006)
    assert "no such file" in one_line(command_here("--checkpoint_dir", rnn_dir, "compress", "missing.png", module=script))
    assert "no PNG" in one_line(command_here("train", "--train_glob", "nothing/*.png", module=script))
    assert sorted(os.listdir(tmp_path)) == ["back.png", "compressed.bin", "xxx.png"]


def test_original_training_flags_reach_training(monkeypatch):
    spec = importlib.util.spec_from_file_location("rnn_script", os.path.join(ROOT, "experiments", "rnn.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    runs = []
    monkeypatch.setattr(training, "train", runs.append)
    for flags in (["train"], ["--num_filters", "192", "train", "--preset", "base", "--iter", "3", "--patchsize", "128"]):
        assert script.command(script.make_parser().parse_args(flags)) == 0
    configs = [training.make_config(run) for run in runs]
    assert [(c.filters, c.iterations) for c in configs] == [(128, 4), (192, 3)]
    assert [run.lambdas for run in runs] == [(0.01, 0.02, 0.04, 0.08), (0.01, 0.02, 0.04)]
    assert (runs[1].patchsize, runs[1].batchsize, runs[1].model) == (128, 4, "scalable_rnn")
    paper = runs[0]
    assert (paper.lr, paper.last_step, paper.patchsize, paper.batchsize, paper.distortion) == (1e-4, 400_000, 256, 4, "mse")
    assert (paper.flip, paper.ema, paper.optimizer, paper.quantization, paper.vivid) == (False, 0.0, "adam", "noise", 0.0)


@pytest.mark.parametrize("setting", ["encoder_filters=[64,208]", "decoder_filters=[64,64,64]"])
def test_cells_that_do_not_fit_each_other(setting):
    """Two encoder cells would train, and write files that nothing decodes."""
    with pytest.raises(UsageError, match="filters must be"):
        training.make_config(training.Options("scalable_rnn", "tiny", ("x",), "y", settings=(setting,)))


def test_layers_of_other_models_do_not_decode(rnn, model):
    data = codec.compress(rnn, draw(40, 40)).data
    stream = bitstream.unpack(data, 10**6)
    stream.model_id, stream.fingerprint = model.info.model_id, int(model.info.fingerprint, 16)
    with pytest.raises(BitstreamError, match="other layers"):
        codec.decode(model, stream)


def test_loss_weighs_layers_as_the_original():
    """sum of lambda_k * mse_k + running bpp; a gradient for every weight."""
    tf.keras.utils.set_random_seed(0)
    model = lively_rnn(zoo.new_model(presets.get_preset("scalable_rnn", "tiny")))
    variables = model.trainable_variables

    @tf.function(autograph=False)
    def gradients(x):
        with tf.GradientTape() as tape:
            loss, metrics = model.loss_fn(x, tf.constant([0.5]), tf.constant([1, 2]), tf.constant(0))
        return loss, metrics, tape.gradient(loss, variables)

    loss, metrics, values = gradients(tf.constant(draw(128, 128))[None])
    m = {name: float(value) for name, value in metrics.items()}
    b = [m[f"bpp_z_{k}"] + m[f"bpp_y_{k}"] for k in range(3)]
    expected = 0.01 * m["mse_0"] + 0.02 * m["mse_1"] + 0.04 * m["mse_2"] + 3 * b[0] + 2 * b[1] + b[2]
    assert float(loss) == pytest.approx(expected, rel=1e-5) and m["bpp"] == pytest.approx(sum(b), rel=1e-5)
    assert m["bpp_to_1"] == pytest.approx(b[0] + b[1], rel=1e-5)
    assert not [v.name for v, g in zip(variables, values) if g is None or not np.abs(g).max() > 0]
