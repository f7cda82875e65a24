"""Checkpoints of the originals' TensorFlow 1 code: read by name, and computed to the original's numbers."""

import glob
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, draw, lively_rnn
from tensorflow_compression.python.ops import gen_ops

from goconv_tf import codec, commands, entropy, presets, tf1, zoo
from goconv_tf.errors import CheckpointError, UsageError
from goconv_tf.models import base

GOLDEN = os.path.join(os.path.dirname(ROOT), "shared", "golden", "rnn")
needs_golden = pytest.mark.skipif(not os.path.isdir(GOLDEN), reason="the original's tensors are not on this machine")


@pytest.fixture(scope="module", params=["div16", "div8"])
def golden(request):
    """(model, folder) of an original checkpoint."""
    folder = os.path.join(GOLDEN, request.param)
    model = tf1.import_scalable_rnn(os.path.join(folder, "model.ckpt-stress"))
    model.pads_magnitudes = False  # two of the sizes have z shifted
    return model, folder


class Recorder(entropy.RoundingWalker):
    """Keeps what it is asked to code, and how."""

    def __init__(self, latents):
        super().__init__(latents)
        self.parameters, self.values = {}, {}

    def __call__(self, name, model, *parameters):
        self.parameters[name] = parameters
        self.values[name] = super().__call__(name, model, *parameters)
        return self.values[name]


def original_string(prior, value, *parameters):
    """The original's range coder: cumulative frequencies as a matrix, escapes in digits of 4 bits."""
    offset = prior.offset(*parameters)
    symbols = tf.cast(tf.round(value - offset), tf.int32)
    indexes = tf.reshape(prior.indexes(tf.shape(symbols), *parameters), tf.shape(symbols))
    rows = prior.table.rows[:-2]
    width = max(map(len, rows))
    cdf = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    lengths = np.array(list(map(len, rows)), np.int32)
    string = gen_ops.unbounded_index_range_encode(symbols, indexes, cdf, lengths, prior.table.offset, precision=16, overflow_width=4, debug_level=1)
    return string.numpy()


@needs_golden
def test_every_recorded_tensor(golden):
    model, folder = golden
    crops = sorted(glob.glob(os.path.join(folder, "golden_*.npz")))
    assert len(crops) >= 4
    strings = 0
    for crop in crops:
        g = np.load(crop)
        x = tf.constant(g["img_uint8"])[None]
        walker = Recorder(model.analysis(x, None))
        np.testing.assert_allclose(walker.latents["residual"], g["x"], atol=1e-6)
        pictures = model.walk(walker)
        bpp = 0.0
        for k in range(4):
            y, z = f"y_{k}", f"z_{k}"
            sigma = walker.parameters[y][1]
            indexes = tf.reshape(model.conditional.indexes(sigma.shape, 0.0, sigma), sigma.shape)
            for name, value, tolerance in (
                ("y", walker.latents[y], 1e-5),
                ("z", walker.latents[z], 1e-5),
                ("z_hat", walker.values[z], 1e-5),
                ("sigma", sigma, 1e-5),
                ("scale_index", indexes, 0),
                ("y_hat", walker.values[y], 0),
                ("recon", pictures[k], 1e-5),
                ("y_likelihoods", walker.likelihoods[y], 1e-5),
                ("z_likelihoods", walker.likelihoods[z], 1e-5),
            ):
                np.testing.assert_allclose(value, g[f"{name}_{k}"], rtol=tolerance, atol=tolerance, err_msg=f"{crop} {name}_{k}")
            bpp += float(walker.bits(y)[0] + walker.bits(z)[0]) / (x.shape[1] * x.shape[2])
            assert bpp == pytest.approx(float(g[f"eval_bpp_cum_{k}"]), abs=1e-5)
            if f"string_{k}" in g:
                for name, prior, latent in (("string", model.conditional, y), ("side_string", model.priors[k], z)):
                    ours = original_string(prior, walker.values[latent], *walker.parameters[latent])
                    theirs = g[f"{name}_{k}"].tobytes()
                    assert abs(len(ours) - len(theirs)) <= 1 and ours[: len(theirs) - 2] == theirs[:-2], (crop, name, k)
                    strings += 1
    assert strings >= 16


@needs_golden
def test_our_own_stream_gives_the_originals_picture(golden):
    model, folder = golden
    g = np.load(os.path.join(folder, "golden_64x128.npz"))
    coded = model.compress(g["img_uint8"], 0.0, reconstruct=True)
    for k in range(4):
        assert np.abs(coded.pictures[k].astype(int) - g[f"recon255_{k}"]).max() <= 1
    # Our coder's escapes differ from the original's: about the same bytes.
    theirs = sum(len(g[f"{name}_{k}"]) for name in ("string", "side_string") for k in range(4))
    assert sum(map(len, coded.strings.values())) == pytest.approx(theirs, rel=0.05)


class NoNoise(entropy.NoisyWalker):
    def __call__(self, name, model, *parameters):
        latent = self.latents[name]
        self.likelihoods[name] = model.likelihood(latent, *parameters)
        return latent


@needs_golden
def test_training_loss_and_gradients_without_noise(golden, monkeypatch):
    model, folder = golden
    g = np.load(os.path.join(folder, "train_loss_nonoise.npz"))
    monkeypatch.setattr(base.entropy, "NoisyWalker", NoNoise)
    _, weights = tf1._scalable_rnn_weights(model.config)  # names in the order of a new model's variables ...
    ours = {id(a): b for a, b in zip(_.variables, model.variables)}
    weights = {name: ours[id(v)] for name, v in weights.items()}  # ... to this model's

    @tf.function(autograph=False)
    def gradients(x):
        with tf.GradientTape() as tape:
            loss, metrics = model.loss_fn(x, tf.zeros([1]), tf.constant([0, 0]), tf.constant(0))
        return loss, metrics, tape.gradient(loss, list(weights.values()))

    loss, metrics, values = gradients(tf.constant(g["img_uint8"])[None])
    assert float(loss) == pytest.approx(float(g["loss"]), rel=1e-4)
    for k in range(4):
        assert float(metrics[f"mse_{k}"]) == pytest.approx(float(g["mse"][k]), rel=1e-4)
        assert float(metrics[f"bpp_y_{k}"] + metrics[f"bpp_z_{k}"]) == pytest.approx(float(g["bpp"][k]), rel=1e-4)
    norms = [name for name in g.files if name.startswith("gradnorm:")]
    assert len(norms) == 104 == len(weights)
    for (name, variable), gradient in zip(weights.items(), values):
        norm = float(g[f"gradnorm:{name}"])
        assert float(tf.norm(gradient)) == pytest.approx(norm, rel=1e-4), name
        if f"grad:{name}" in g:
            np.testing.assert_allclose(gradient, g[f"grad:{name}"], atol=1e-4 * norm, err_msg=variable.name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(prefix, {name: array}, model) of a checkpoint in TensorFlow 1's format, written here."""
    config = presets.ScalableRNNConfig(8, 4, (8, 8, 8), (8, 8, 8, 8), 2)
    tf.keras.utils.set_random_seed(3)
    model, weights = tf1._scalable_rnn_weights(config)
    lively_rnn(model).build_tables()
    arrays = {name: v.numpy() for name, v in weights.items()}
    for k, prior in enumerate(model.priors):
        prior.quantization_offset.assign(np.full(8, 0.25))
        lower = 0.25 + prior.table.offset  # of a quantile that gives this offset
        arrays[f"entropy_iter{k}/quantiles"] = np.stack([lower, np.full(8, 0.25), lower + 20], -1)[:, None].astype(np.float32)
        arrays |= {f"entropy_iter{k}/{n}": a for n, a in padded(prior.table).items()}
        model.conditional.table = symmetric(model.conditional.table)
        arrays |= {f"conditional{k}/{n}": a for n, a in padded(model.conditional.table).items()}
    arrays["global_step"] = np.int64(8)
    arrays["encoder/encoder_outputs/bias/Adam"] = np.zeros(8, np.float32)
    prefix = str(tmp_path_factory.mktemp("tf1") / "model.ckpt-8")
    write(prefix, arrays)
    return prefix, arrays, model


def symmetric(table):
    """Rows of odd length around 0, as the original's always are."""
    assert all(len(row) % 2 for row in table.rows[:-2])
    return entropy.CodingTable(table.cdf, [-((len(row) - 3) // 2) for row in table.rows[:-2]])


def padded(table):
    rows = table.rows[:-2]
    width = max(map(len, rows))
    cdf = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    return {"quantized_cdf": cdf, "cdf_length": np.array(list(map(len, rows)), np.int32)}


def write(prefix, arrays):
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=list(arrays), shape_and_slices=[""] * len(arrays), tensors=list(arrays.values()))


def test_import_command(checkpoint, tmp_path, capsys):
    prefix, _, model = checkpoint
    output = str(tmp_path / "imported")
    assert commands.import_tf1(prefix, "scalable_rnn", output) == 0
    assert "2 layers" in capsys.readouterr().out
    imported = zoo.load_pretrained(output)
    assert imported.config == model.config
    picture = draw(48, 64)
    a, b = (m.compress(picture, 0.0, reconstruct=True) for m in (model, imported))
    assert a.strings == b.strings
    result = codec.compress(imported, picture, reconstruct=True)
    np.testing.assert_array_equal(codec.decompress(imported, result.data), a.reconstruction)
    with pytest.raises(UsageError, match="exists"):
        commands.import_tf1(prefix, "scalable_rnn", output)


def without(*names):
    return lambda a: [a.pop(name) for name in names]


def with_zeros(name, *shape):
    return lambda a: a.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("damage", "lines"),
    [
        (without("decoder/output/kernel", "entropy_iter1/cdf_length"), ["decoder/output/kernel: missing", "entropy_iter1/cdf_length: missing"]),
        (with_zeros("decoder/output/kernel", 3, 3, 5, 3), ["decoder/output/kernel: shape (3, 3, 5, 3) instead of (3, 3, 2, 3)"]),
        (with_zeros("generator/kernel", 3), ["generator/kernel: not a variable of scalable_rnn"]),
        (without("encoder/encoder_outputs/bias"), ["encoder/encoder_outputs/bias: missing"]),
        (lambda a: a.update({"entropy_iter0/quantized_cdf": np.zeros_like(a["entropy_iter0/quantized_cdf"])}), ["not cumulative frequencies"]),
        (lambda a: a.update({"entropy_iter0/cdf_length": np.full(8, 10**6, np.int32)}), ["is not a table of 8 rows"]),
        (lambda a: a.update({"entropy_iter0/cdf_length": a["entropy_iter0/cdf_length"].astype(np.float32)}), ["is not a table of 8 rows"]),
        (lambda a: a.update({"conditional1/cdf_length": np.array([b"3"] * 64)}), ["conditional1/quantized_cdf: "]),
        (with_zeros("entropy_iter0/quantiles", 8, 1, 2), ["entropy_iter0/quantiles: float32 (8, 1, 2) is not three numbers for 8 channels"]),
    ],
)  # fmt: skip
def test_checkpoints_that_do_not_fit(checkpoint, tmp_path, damage, lines):
    arrays = dict(checkpoint[1])
    damage(arrays)
    write(str(tmp_path / "bad"), arrays)
    with pytest.raises(CheckpointError) as error:
        commands.import_tf1(str(tmp_path / "bad"), "scalable_rnn", str(tmp_path / "out"))
    for line in lines:
        assert line in str(error.value)
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_cannot_be_read(checkpoint, tmp_path):
    for path, message in ((str(tmp_path / "nothing"), "no such checkpoint"), (str(tmp_path), "no TensorFlow checkpoint in this folder")):
        with pytest.raises(CheckpointError, match=message):
            tf1.import_scalable_rnn(path)
    for part in (".index", ".data-00000-of-00001"):
        shutil.copy(checkpoint[0] + part, tmp_path / f"cut{part}")
    data = (tmp_path / "cut.data-00000-of-00001").read_bytes()
    (tmp_path / "cut.data-00000-of-00001").write_bytes(data[:1000])
    with pytest.raises(CheckpointError) as error:
        tf1.import_scalable_rnn(str(tmp_path / "cut"))
    assert "\n" not in str(error.value)
    (tmp_path / "cut.index").write_bytes(b"no index")
    with pytest.raises(CheckpointError, match="cannot be read"):
        tf1.import_scalable_rnn(str(tmp_path / "cut"))
