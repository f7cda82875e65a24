"""Entropy parameters in integers: equal to an independent computation, whatever adds up the sums, and a stream's decoding with them."""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import CHECKPOINTS, ROOT, draw
from threadpoolctl import threadpool_info

from goconv_tf import bitstream, blas, codec, zoo
from goconv_tf.entropy import Decoder, GaussianConditional, RoundingWalker
from goconv_tf.errors import BitstreamError, CheckpointError, UsageError
from goconv_tf.layers import GDN, Conv2D, ConvLSTM2DCell, GoConv2D, GoConv2DTranspose, OctaveTensor, RDFTKernel, SignalConv2D, exact


def round_half_up(x):
    return np.floor(x + 0.5)


def integer_conv(x, kernel, stride, before, size):
    """Correlation of int64 [h, w, c] with [k, k, c, d], added up tap by tap from the last to the first; no floats."""
    k = kernel.shape[0]
    padded = np.zeros((size[0] * stride + 2 * k, size[1] * stride + 2 * k, x.shape[2]), np.int64)
    padded[before : before + x.shape[0], before : before + x.shape[1]] = x
    total = np.zeros((*size, kernel.shape[3]), np.int64)
    for i in reversed(range(k)):
        for j in reversed(range(k)):
            patch = padded[i : i + size[0] * stride : stride, j : j + size[1] * stride : stride]
            for c in reversed(range(x.shape[2])):
                total += patch[:, :, c, None] * kernel[i, j, c].astype(np.int64)
    return total


def integer_conv_transpose(x, kernel, stride, before):
    """Its upsampling counterpart, [h * s, w * s, d]."""
    h, w = x.shape[:2]
    k = kernel.shape[0]
    total = np.zeros((h * stride + k, w * stride + k, kernel.shape[3]), np.int64)
    for y in range(h):
        for z in range(w):
            total[y * stride : y * stride + k, z * stride : z * stride + k] += np.einsum("c,abcd->abd", x[y, z], kernel.astype(np.int64))
    return total[before : before + h * stride, before : before + w * stride]


def finish(total, quantized):
    """Bias, back to the grid, in exact integers."""
    total, half = total + quantized.bias, 2 ** int(quantized.shift) // 2
    return np.clip((total + half) >> int(quantized.shift), -exact.LIMIT, exact.LIMIT)


def on_grid(shape, seed=0, spread=3.0):
    return np.floor(np.random.default_rng(seed).normal(0, spread, shape) * exact.GRID).astype(np.int64)


@pytest.mark.parametrize(
    ("kernel_size", "strides", "transpose"), [(3, 1, False), (5, 2, False), (3, 1, True), (5, 2, True), (3, 2, True), (1, 1, False), (1, 2, True)]
)
def test_signal_convolutions(kernel_size, strides, transpose):
    layer = SignalConv2D(4, kernel_size, strides, transpose)
    x = on_grid((7, 6, 3))
    expected = layer(tf.constant(x[None] / exact.GRID, tf.float32))
    layer.bias_parameter.assign([0.3, -2.0, 0.0, 11.0])
    layer.quantized = layer.quantize()
    result = layer.exact(x[None].astype(np.float64))[0]
    np.testing.assert_array_equal(layer.exact(tf.constant(x[None], tf.float64))[0], result)
    layer.quantized = layer.quantize()
    leaky = np.where(result < 0, np.floor(result * 0.2 + 0.5), result)
    np.testing.assert_array_equal(layer.exact(x[None].astype(np.float64), leaky=True)[0], leaky)
    np.testing.assert_array_equal(layer.exact(tf.constant(x[None], tf.float64), leaky=True)[0], leaky)
    k = layer.quantized.kernel
    if transpose and strides == 2:
        total = integer_conv_transpose(x, k, strides, kernel_size // 2)
    else:
        k = k[::-1, ::-1] if transpose else k
        total = integer_conv(x, k, strides, kernel_size // 2, expected.shape[1:3])
    np.testing.assert_array_equal(result, finish(total, layer.quantized))
    np.testing.assert_allclose(result / exact.GRID, layer(tf.constant(x[None] / exact.GRID, tf.float32))[0], atol=0.01)


@pytest.mark.parametrize("what", [{"kernel_size": (3, 5)}, {"data_format": "channels_first"}])
def test_what_has_no_exact_form_says_so(what):
    layer = Conv2D(**{"filters": 4, "kernel_size": 3, **what})
    layer.build([None, 8, 8, 8])
    with pytest.raises(ValueError, match="there is no exact form with"):
        layer.quantize()


def test_plain_convolution_with_tensorflows_padding():
    layer = Conv2D(4, 2)
    x = on_grid((5, 6, 3))
    layer(tf.zeros([1, 5, 6, 3]))
    layer.bias.assign([0.1, 0.2, -0.3, 4.0])
    layer.quantized = layer.quantize()
    result = layer.exact(tf.constant(x[None], tf.float64))[0].numpy()
    np.testing.assert_array_equal(result, finish(integer_conv(x, layer.quantized.kernel, 1, 0, (5, 6)), layer.quantized))


def test_what_has_no_exact_form_is_refused():
    """Rather than computed otherwise than in `call`."""
    for kwargs in ({"padding": "valid"}, {"dilation_rate": 2}, {"activation": "relu"}, {"strides": 2}):
        layer = Conv2D(4, 3, **kwargs)
        layer(tf.zeros([1, 5, 6, 3]))
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            layer.quantize()
    layer = Conv2D(4, 3, use_bias=False)
    layer(tf.zeros([1, 5, 6, 3]))
    assert not layer.quantize().bias.any()
    steep = GoConv2D(4, 3, activation=tf.keras.layers.LeakyReLU)
    x = OctaveTensor(tf.zeros([1, 4, 4, 2]), tf.zeros([1, 2, 2, 2]))
    steep(x)
    for part in steep.submodules:
        if hasattr(part, "quantize"):
            part.quantized = part.quantize()
    with pytest.raises(ValueError, match=r"slope 0\.2, not 0\.3"):
        steep.exact(OctaveTensor(*map(exact.to_grid, x)))


@pytest.mark.parametrize("inverse", [False, True])
def test_gdn(inverse):
    layer = GDN(inverse)
    x = on_grid((3, 4, 5), spread=20.0)
    layer(tf.zeros([1, 3, 4, 5]))
    layer.gamma.variable.assign(np.random.default_rng(1).uniform(0.1, 0.5, (5, 5)))
    layer.quantized = q = layer.quantize()
    result = layer.exact(tf.constant(x[None], tf.float64))[0].numpy()
    for row, values in zip(result.reshape(-1, 5), x.reshape(-1, 5)):
        for i in range(5):
            pool = sum(int(v) ** 2 * int(g) for v, g in zip(values, q.kernel[:, i])) + int(q.bias[i])
            norm = math.sqrt(pool * 2.0 ** -(20 + int(q.shift)))
            assert row[i] == round_half_up(values[i] * norm if inverse else values[i] / norm)
    np.testing.assert_allclose(result / exact.GRID, layer(tf.constant(x[None] / exact.GRID, tf.float32))[0], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("bits", [10, 14])
def test_lstm_cell(bits):
    """Two steps, from Python's integers and the tables."""
    cell = ConvLSTM2DCell(2, 3, grid_bits=bits)
    x, parts = on_grid((2, 4, 5, 3)), 2 ** (bits - 10)
    x = x * parts + np.random.default_rng(1).integers(0, parts, x.shape)
    cell(tf.zeros([1, 4, 5, 3]))
    for k, conv in enumerate((cell.conv_inputs, cell.conv_hidden)):
        conv.bias.assign(np.random.default_rng(k).normal(0, 1, 8))
        conv.quantized = conv.quantize()
    places = np.arange(2 * exact.TABLE_REACH * parts + 1)  # between a table's entries, linear
    sigmoid, tanh = (np.interp(places / parts, places[::parts] / parts, table) * parts for table in exact.gate_tables())
    sigmoid, tanh = (np.rint(table).astype(np.int64) for table in (sigmoid, tanh))
    reach = exact.TABLE_REACH * parts
    gate = 15 + bits - 10
    hidden = state = np.zeros((4, 5, 2), np.int64)
    states = array_states = floats = None
    for step in range(2):
        gates = sum(
            finish(integer_conv(v, conv.quantized.kernel, 1, 1, (4, 5)), conv.quantized)
            for v, conv in ((x[step], cell.conv_inputs), (hidden, cell.conv_hidden))
        )
        i, f, o, g = np.split(np.clip(gates, -reach, reach) + reach, 4, axis=-1)
        # In units of 2^-30 or, with four more bits a gate, 2^-38: exact integers, rounded halves up.
        shift = 2 * gate - bits
        state = (sigmoid[f] * state * 2 ** (gate - bits) + sigmoid[i] * tanh[g] + 2 ** (shift - 1)) >> shift
        hidden = (sigmoid[o] * tanh[np.clip(state, -reach, reach) + reach] + 2 ** (shift - 1)) >> shift
        output, states = cell.exact(tf.constant(x[step : step + 1], tf.float64), states)
        arrays, array_states = cell.exact(x[step : step + 1].astype(np.float64), array_states)
        near, floats = cell(tf.constant(x[step : step + 1] / 2.0**bits, tf.float32), floats)
        for both in (output, arrays):
            np.testing.assert_array_equal(both[0], hidden)
        for both in (states, array_states):
            np.testing.assert_array_equal(both[1][0], state)
        np.testing.assert_allclose(output / 2.0**bits, near, atol=0.01 / parts)


def test_octave_layers_stay_near_their_float_form():
    tf.keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    for layer in (
        GoConv2D(8, 5, 2, activation="leaky_relu"),
        GoConv2DTranspose(8, 5, 2, activation="leaky_relu"),
        GoConv2DTranspose(6, 3, activation="igdn"),
    ):
        x = OctaveTensor(*(tf.constant(rng.normal(0, 3, (1, n, n, 4)), tf.float32) for n in (12, 6)))
        expected = layer(x)
        for part in layer.submodules:
            if hasattr(part, "quantize"):
                part.quantized = part.quantize()
        result = layer.exact(OctaveTensor(*map(exact.to_grid, x)))
        for a, b in zip(result, expected):
            np.testing.assert_allclose(exact.from_grid(a), b, rtol=0.01, atol=0.1)


def test_sums_that_could_lose_a_bit_are_refused():
    for kernel in (np.full((5, 5, 20000, 1), 1.0), np.array([[[[np.nan]]]])):
        with pytest.raises(ValueError, match=r"too large|finite"):
            exact.quantize_kernel(kernel, None)
    with pytest.raises(ValueError, match="too large"):
        exact.quantize_kernel(np.ones((1, 1, 1, 1)), np.array([1e12]))
    q = exact.quantize_kernel(np.random.default_rng(0).normal(0, 0.1, (5, 5, 64, 64)), np.ones(64))
    assert exact.sum_bound(q) < exact.SUM_LIMIT
    worst = np.sign(q.kernel.astype(np.int64))[..., 0] * exact.LIMIT
    assert abs(int((worst * q.kernel[..., 0].astype(np.int64)).sum())) + abs(int(q.bias[0])) <= exact.sum_bound(q)


def test_tables_do_not_depend_on_the_last_bits_of_exp_and_tanh():
    x = np.arange(-exact.TABLE_REACH, exact.TABLE_REACH + 1) / exact.GRID
    for values in (1 / (1 + np.exp(-x)), np.tanh(x)):
        scaled = values * 2.0**exact.GATE_BITS
        inside = np.abs(x) > 0  # sigmoid(0) and tanh(0) are exact
        assert np.abs(scaled - np.floor(scaled) - 0.5)[inside].min() > 1e-7  # a last bit is under 1e-11


MODELS = ("model", "crpe", "rnn")


@pytest.fixture(params=MODELS)
def any_model(request):
    return request.getfixturevalue(request.param)


def parameters_of(model, data):
    """{latent: entropy parameters} as a decoder computes them."""

    class Recorder(Decoder):
        def __call__(self, name, entropy_model, *parameters):
            seen[name] = [np.asarray(p) for p in parameters]
            return super().__call__(name, entropy_model, *parameters)

    from goconv_tf.entropy import CODERS

    seen = {}
    stream = bitstream.unpack(data, 10**6)
    strings = {n: s for names, layer in zip(model.config.layers, stream.layers) for n, s in zip(names, layer.sections)}
    size = [-(-n // model.alignment) * model.alignment for n in (stream.height, stream.width)]
    walker = Recorder(strings, model.latent_shapes(*size), CODERS[stream.coder], len(stream.layers))
    walker.enter = exact.to_grid
    model.walk(walker)
    assert [walker.checksums[names[-1]] for names in model.config.layers] == [layer.checksum for layer in stream.layers]
    return seen


def numpy_conv2d(original):
    """tf.nn.conv2d whose float64 sums NumPy adds up in another order: channel by channel from the last, tap by tap."""

    def conv2d(x, kernel, strides, padding, **kwargs):
        if tf.convert_to_tensor(x).dtype != tf.float64:
            return original(x, kernel, strides, padding, **kwargs)
        stride = strides if isinstance(strides, int) else strides[0]
        x, kernel = np.asarray(x), np.asarray(kernel)
        k = kernel.shape[0]
        if padding == "SAME":
            total = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in x.shape[1:3]]
            x = np.pad(x, [(0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)])
        size = [(n - k) // stride + 1 for n in x.shape[1:3]]
        y = np.zeros((x.shape[0], *size, kernel.shape[3]))
        for c in reversed(range(x.shape[3])):
            for i in reversed(range(k)):
                for j in range(k):
                    y += x[:, i : i + size[0] * stride : stride, j : j + size[1] * stride : stride, c, None] * kernel[i, j, c]
        return tf.constant(y)

    return conv2d


def test_another_order_of_summation_gives_the_same_parameters(any_model, monkeypatch):
    data = codec.compress(any_model, draw(70, 90), **({"lmbda": 0.03} if any_model.has_lambda else {})).data
    by_numpy = parameters_of(any_model, data)
    with exact.tensorflow_only():
        compiled = parameters_of(any_model, data)
        monkeypatch.setattr(tf.nn, "conv2d", numpy_conv2d(tf.nn.conv2d))
        stages = any_model.__dict__.pop("_stages")
        monkeypatch.setattr(any_model, "built", False)  # stages run operation by operation
        reordered = parameters_of(any_model, data)
    any_model.__dict__["_stages"] = stages
    for others in (compiled, reordered):
        for name, values in by_numpy.items():
            for a, b in zip(values, others[name]):
                np.testing.assert_array_equal(a, b)


def test_indexes_from_the_table_are_those_of_a_search():
    """All scales that the grid has below the last of the scale table, which --noexact and exports search for, and some outside."""
    conditional = GaussianConditional()
    scale = exact.from_grid(np.concatenate([np.arange(257 * 1024.0), [-exact.LIMIT, -1, exact.LIMIT]]))
    found = conditional.indexes(scale.shape, 0.0, scale)
    np.testing.assert_array_equal(found, conditional.indexes(scale.shape, 0.0, tf.constant(scale)))
    assert found.dtype == np.int32 and found.min() == 0 and found.max() == 63


def test_blas_gets_its_threads_back():
    def threads():
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    before = threads()
    conv = SignalConv2D(8, 3)
    conv.build([None, None, None, 8])
    conv.quantized = conv.quantize()
    x = on_grid((1, 40, 40, 8)).astype(float)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: conv.exact(x), range(40)))
    assert all(np.array_equal(results[0], result) for result in results)
    assert before and threads() == before


@pytest.mark.parametrize("kind", ["model", "crpe"])
def test_xla_gives_the_same_parameters(kind, request):
    """Another compiler, whose programs JAX runs too, with kernels of its own: from z to the means and scales of y_high."""
    any_model = request.getfixturevalue(kind)
    stages = ("hyper_synthesis", "parameter_estimation") if kind == "model" else ("hyper_synthesis1", "estimate_y_high")
    z_high, z_low = (on_grid((1, *n, c)).astype(float) for n, c in (((4, 6), any_model.z_high_channels), ((2, 3), any_model.z_low_channels)))
    y_low = on_grid((1, 7, 10, any_model.y_low_channels), 1).astype(float)
    size = tf.constant([13, 20])

    def parameters(z_high, z_low, y_low):
        psi, p_low = getattr(any_model, stages[0])(z_high, z_low, size)
        between = () if kind == "model" else (z_high,)
        between = tuple(exact.concat([b, b]) for b in between)  # stands for P2_H, which has twice the channels
        return p_low, getattr(any_model, stages[1])(y_low, *between, psi)

    expected = parameters(z_high, z_low, y_low)
    compiled = tf.function(parameters, jit_compile=True, autograph=False)(*map(tf.constant, (z_high, z_low, y_low)))
    for a, b in zip(expected, compiled):
        np.testing.assert_array_equal(a, b)


def test_a_batch_gives_each_picture_its_parameters(model):
    """Other shapes are added up in other blocks."""
    x = np.stack([draw(64, 96), draw(64, 96, 5)])

    class Recorder(RoundingWalker):
        def __call__(self, name, entropy_model, *parameters):
            seen.append([np.asarray(p) for p in parameters])
            return super().__call__(name, entropy_model, *parameters)

    several = []
    for picture, context in ((x, contextlib.nullcontext()), (x, exact.tensorflow_only()), (x[:1], exact.tensorflow_only())):
        seen = []
        latents = model.analysis(tf.constant(x), tf.constant([0.02, 0.02]))
        walker = Recorder({name: value[: len(picture)] for name, value in latents.items()})
        walker.enter = exact.to_grid
        with context:
            model.walk(walker)
        several.append(seen)
    for a, b, c in zip(*several):
        for p, q, r in zip(a, b, c):
            np.testing.assert_array_equal(p, q)
            np.testing.assert_array_equal(p[:1], r)


def test_decodes_with_other_threads_and_kernels(any_model, tmp_path, model_dir, crpe_dir, rnn_dir):
    """TensorFlow in one thread without oneDNN; OpenBLAS's oldest kernels, small pieces in threads: the same latents, by their checksum."""
    path = tmp_path / "a.gcv"
    result = codec.compress(any_model, draw(70, 90), reconstruct=True)
    path.write_bytes(result.data)
    np.save(tmp_path / "picture.npy", result.reconstruction)
    code = """
import contextlib, sys, numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[4]))
from goconv_tf import codec, zoo
from goconv_tf.layers import exact
if sys.argv[5] == "pieces":
    exact._SMALL, exact._CHUNK, exact._LEAST = 0, 2**8, 1
with exact.tensorflow_only() if sys.argv[5] == "tensorflow" else contextlib.nullcontext():
    picture = codec.decompress(zoo.load_pretrained(sys.argv[1]), open(sys.argv[2], "rb").read())
assert np.abs(picture.astype(int) - np.load(sys.argv[3])).max() <= 1
"""
    folder = any_model.info.path
    for onednn, threads, kernels, how in (("0", "1", {}, "tensorflow"), ("1", "2", {"OPENBLAS_CORETYPE": "Prescott"}, "pieces")):
        env = {**os.environ, "PYTHONPATH": ROOT, "TF_ENABLE_ONEDNN_OPTS": onednn, **kernels}
        args = [sys.executable, "-c", code, folder, str(path), str(tmp_path / "picture.npy"), threads, how]
        done = subprocess.run(args, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-1500:]


def test_new_processors_have_their_kernels(monkeypatch, tmp_path):
    flags = "flags\t\t: fpu sse2 avx2 avx512f avx512cd avx512bw avx512dq avx512vl\n"
    for name, text in (("new", "processor\t: 0\n" + flags), ("old", flags.replace(" avx512vl", ""))):
        (tmp_path / name).write_text(text)
    environment = {}
    monkeypatch.setattr(os, "environ", environment)

    def chosen(name):
        blas.choose_kernels(str(tmp_path / name))
        return environment.get("OPENBLAS_CORETYPE")

    assert chosen("new") is None  # NumPy is loaded
    monkeypatch.delitem(sys.modules, "numpy")
    assert chosen("old") is chosen("missing") is None
    assert chosen("new") == "SKYLAKEX"
    environment["OPENBLAS_CORETYPE"] = "Haswell"
    assert chosen("new") == "Haswell"


def test_costs_next_to_no_bits(any_model):
    picture = draw(192, 256)
    sizes = [len(codec.compress(any_model, picture, exact=e).data) for e in (True, False)]
    assert sizes[0] < 1.005 * sizes[1]


def test_float_path_is_marked_and_would_notice_a_weight_of_another_machine(model, model_dir):
    """A float weight moved by a thousandth breaks a stream without integers, and leaves one with them as it was."""
    picture = draw(96, 128)
    exactly, floating = (codec.compress(model, picture, lmbda=0.05, exact=e) for e in (True, False))
    assert [bitstream.unpack(r.data, 10**6).exact for r in (exactly, floating)] == [True, False]
    codec.decompress(model, floating.data)
    other = zoo.load_pretrained(model_dir, fold=False)
    info, bias = other.info, other.h_s[-1].low.bias_parameter
    bias.assign(1.001 * bias)
    other.info = info  # as it were on a machine whose floats are these
    with pytest.raises(BitstreamError):
        codec.decompress(other, floating.data)
    np.testing.assert_array_equal(codec.decompress(other, exactly.data), codec.decompress(model, exactly.data))


@pytest.mark.parametrize("kind", ["model", "rnn"])
def test_transforms_may_be_of_another_precision(kind, request):
    """What is coded with bfloat16 transforms decodes with float32 ones and back: integers do not follow Keras' policy."""
    models, picture = [request.getfixturevalue(kind)], draw(70, 90)
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        models.append(zoo.load_pretrained(models[0].info.path))
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")
    streams = [codec.compress(m, picture).data for m in models]
    assert streams[0] != streams[1]
    for data in streams:
        full, brief = (codec.decompress(m, data).astype(int) for m in models)
        assert 0 < abs(full - brief).mean() < 2


def test_models_without_integers(model_dir, tmp_path):
    """Of an earlier version: they code in floating point only, and say so."""
    old = zoo.load_pretrained(model_dir)
    for layer in old.exact_layers().values():
        del layer.quantized
    with pytest.raises(CheckpointError, match="--noexact"):
        codec.compress(old, draw(20, 20))
    data = codec.compress(old, draw(20, 20), exact=False).data
    codec.decompress(old, data)
    with pytest.raises(CheckpointError, match="no integer form"):
        codec.decompress(old, codec.compress(zoo.load_pretrained(model_dir), draw(20, 20)).data)


def test_integers_that_come_out_otherwise_are_noticed(model_dir, tmp_path):
    """They are made from the stored weights when a model is loaded; a hash says whether they are the writer's."""
    folder = tmp_path / "m"
    shutil.copytree(model_dir, folder)
    config = (folder / zoo.CONFIG_FILE).read_text()
    info = zoo.read_info(model_dir)
    assert info.integers == zoo.integers_hash(zoo.load_pretrained(model_dir, fold=False))
    (folder / zoo.CONFIG_FILE).write_text(config.replace(info.integers, "0" * 16))
    with pytest.raises(CheckpointError, match="other integers on this machine"):
        zoo.load_pretrained(str(folder))
    (folder / zoo.CONFIG_FILE).write_text(config.replace(info.integers, ""))
    assert not zoo.load_pretrained(str(folder)).has_exact


def test_recurrent_models_of_earlier_versions(rnn, tmp_path):
    """Their folders do not say which grid their integers are of: the coarse one, on which their streams go on to decode."""
    coarse = zoo.new_model(dataclasses.replace(rnn.config, grid_bits=10))
    coarse.set_weights(rnn.get_weights())
    info = zoo.save_pretrained(coarse, str(tmp_path), "coarse")
    fine = zoo.integers_hash(rnn)
    assert info.integers != fine
    result = codec.compress(zoo.load_pretrained(info.path), draw(40, 50), reconstruct=True)
    path = tmp_path / zoo.CONFIG_FILE
    contents = json.loads(path.read_text())
    contents["config"]["grid_bits"], contents["config"]["iterations"] = 10.0, 3.0  # as another writer of JSON may have it
    path.write_text(json.dumps(contents))
    assert zoo.read_info(info.path).config == coarse.config and isinstance(zoo.read_info(info.path).config.grid_bits, int)
    assert zoo.load_pretrained(info.path).info.fingerprint == info.fingerprint
    del contents["config"]["grid_bits"]
    contents["fingerprint"] = zoo._fingerprint("coarse", contents["config"], info.sha256)
    path.write_text(json.dumps(contents))
    old = zoo.load_pretrained(info.path)
    assert old.config.grid_bits == 10 and zoo.integers_hash(old) == info.integers
    stream = bitstream.unpack(result.data, 10**6)
    stream.fingerprint = int(contents["fingerprint"], 16)
    np.testing.assert_array_equal(codec.decompress(old, bitstream.pack(stream)), result.reconstruction)
    with pytest.raises(UsageError, match="10 to 14"):
        dataclasses.replace(rnn.config, grid_bits=15)


@pytest.mark.parametrize("any_dir", ["model_dir", "crpe_dir", *(folder for folder in CHECKPOINTS if "rnn" not in folder)])
def test_no_weight_lies_where_machines_could_round_it_otherwise(any_dir, request):
    """Kernels held as their DFT are summed in float64: no result lies within its rounding error of a half."""
    loaded = zoo.load_pretrained(any_dir if os.path.isdir(any_dir) else request.getfixturevalue(any_dir), fold=False)
    layers = [layer for layer in loaded.exact_layers().values() if isinstance(getattr(layer, "kernel_parameter", None), RDFTKernel)]
    layers = [layer for layer in layers if layer.kernel_support != (1, 1)]  # those are no sums
    assert layers
    for layer in layers:
        scaled = layer.kernel_parameter.to_float64() * 2.0 ** int(layer.quantized.shift)
        assert np.abs(scaled - np.floor(scaled) - 0.5).min() > 1e-9  # sums of 25 products under 2^15: errors under 1e-10


@pytest.mark.parametrize("any_dir", ["model_dir", "crpe_dir"])
def test_half_precision_folders_are_exact_too(any_dir, request, tmp_path):
    source = zoo.load_pretrained(request.getfixturevalue(any_dir), fold=False)
    before = [v.numpy() for v in source.variables]
    integers, data = zoo.integers_hash(source), codec.compress(source, draw(40, 50)).data
    info = zoo.save_pretrained(source, str(tmp_path / "half"), "half", dtype="float16")
    assert all((a == b.numpy()).all() for a, b in zip(before, source.variables))
    assert zoo.integers_hash(source) == integers and codec.compress(source, draw(40, 50)).data == data
    loaded = zoo.load_pretrained(info.path)
    assert loaded.has_exact
    result = codec.compress(loaded, draw(40, 50), reconstruct=True)
    np.testing.assert_array_equal(codec.decompress(zoo.load_pretrained(info.path), result.data), result.reconstruction)


def test_sums_of_paths_stay_on_the_grid():
    layer = GoConv2D(2, 1, inter_kernel_size=1)
    layer(OctaveTensor(tf.zeros([1, 2, 2, 1]), tf.zeros([1, 1, 1, 1])))
    for v in layer.trainable_variables:
        v.assign(tf.ones_like(v))
    for conv in layer.paths.values():
        conv.quantized = conv.quantize()
    for make in (np.asarray, tf.constant):
        x = OctaveTensor(*(make(np.full([1, n, n, 1], float(exact.LIMIT))) for n in (2, 1)))
        assert max(np.abs(part).max() for part in layer.exact(x)) == exact.LIMIT


def test_what_gdn_squares_is_kept_small():
    layer = GDN()
    layer(tf.zeros([1, 1, 1, 1]))
    layer.quantized = layer.quantize()
    for make in (np.asarray, tf.constant):
        at, beyond = (np.asarray(layer.exact(make(np.full([1, 1, 1, 1], float(n))))).item() for n in (exact.NORM_LIMIT, exact.LIMIT))
        assert at == beyond


@pytest.mark.parametrize("bits", [9, 15])
def test_grids_of_recurrent_cells_have_bounds(bits):
    with pytest.raises(ValueError, match="grid_bits must be 10 to 14"):
        ConvLSTM2DCell(2, grid_bits=bits)
