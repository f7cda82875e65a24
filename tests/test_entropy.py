"""Tables and coders: exact round trips, sizes near the estimate, and no hanging on damage."""

import math
import os
import time

import numpy as np
import pytest
import tensorflow as tf

from goconv_tf import limits
from goconv_tf.entropy import CODERS, Decoder, Encoder, FactorizedPrior, GaussianConditional, NoisyWalker, RoundingWalker, coders
from goconv_tf.errors import BitstreamError


@pytest.fixture(scope="module")
def conditional():
    model = GaussianConditional()
    model.build_table()
    return model


@pytest.fixture(scope="module")
def prior():
    tf.random.set_seed(1)
    model = FactorizedPrior(3)
    model.build_table()
    return model


@pytest.fixture(scope="module")
def gaussian(conditional):
    """(symbols, indexes, ideal bits) of 30,000 draws from normal distributions of many scales."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(0, 1.7, 30_000)).astype(np.float32).clip(0.05, 200)
    symbols = np.round(rng.normal(0, 1, scale.shape) * np.maximum(scale, 0.11)).astype(np.int32)
    indexes = conditional.indexes(scale.shape, None, tf.constant(scale)).numpy()
    bits = -np.log2(conditional.likelihood(tf.constant(symbols, tf.float32), tf.zeros_like(scale), tf.constant(scale))).sum()
    return symbols, indexes, float(bits)


@pytest.mark.parametrize("name", CODERS)
def test_round_trip_near_the_estimate(name, conditional, gaussian):
    symbols, indexes, bits = gaussian
    string = CODERS[name].encode(symbols, indexes, conditional.table)
    np.testing.assert_array_equal(CODERS[name].decode(string, indexes, conditional.table), symbols)
    assert 0.999 * bits <= 8 * len(string) <= 1.01 * bits


def test_coders_agree_in_size(conditional, gaussian):
    symbols, indexes, _ = gaussian
    sizes = [len(coder.encode(symbols, indexes, conditional.table)) for coder in CODERS.values()]
    assert max(sizes) < 1.005 * min(sizes)


@pytest.mark.parametrize("name", CODERS)
def test_symbols_outside_the_table(name, conditional):
    rng = np.random.default_rng(1)
    indexes = rng.integers(0, 64, 500).astype(np.int32)
    symbols = rng.integers(-5, 6, 500).astype(np.int32)
    escape, offset = conditional.table.escape[indexes], conditional.table.offset[indexes]
    symbols[:40] = rng.integers(-(2**20), 2**20, 40)
    symbols[40:60] = (escape + offset)[40:60]  # just above the last one in the table
    symbols[60:80] = (offset - 1)[60:80]  # just below the first
    symbols[80:100] = (escape + offset - 1)[80:100]  # the last one
    symbols[100:102] = [-(2**20), 2**20]
    string = CODERS[name].encode(symbols, indexes, conditional.table)
    np.testing.assert_array_equal(CODERS[name].decode(string, indexes, conditional.table), symbols)


@pytest.mark.parametrize("name", CODERS)
def test_nothing_but_escapes_in_bounded_pieces(name, conditional, monkeypatch):
    """A hostile stream may have them all: the clock is looked at between blocks of them, too."""
    blocks, looks = coders._blocks, []
    monkeypatch.setattr(coders, "_blocks", lambda count, size=2**22: blocks(count, min(size, 100)))
    monkeypatch.setattr(coders.limits, "check", lambda: looks.append(1))
    rng = np.random.default_rng(3)
    indexes = rng.integers(0, 64, 1000).astype(np.int32)
    symbols = (rng.choice([-1, 1], 1000) * rng.integers(2**13, 2**21, 1000)).astype(np.int32)
    string = CODERS[name].encode(symbols, indexes, conditional.table)
    looks.clear()
    np.testing.assert_array_equal(CODERS[name].decode(string, indexes, conditional.table), symbols)
    assert len(looks) == 40 if name == "tfc" else len(looks) >= 40  # ten times symbols, digits, signs, bits; more in the range-coder's long rows


@pytest.mark.parametrize("name", CODERS)
def test_nothing_is_left_behind_where_time_runs_out(name, conditional, gaussian, monkeypatch, tmp_path):
    symbols, indexes, _ = gaussian
    string = CODERS[name].encode(symbols, indexes, conditional.table)
    monkeypatch.setattr(coders.tempfile, "tempdir", str(tmp_path))
    with limits.seconds(-1), pytest.raises(BitstreamError) as caught:
        CODERS[name].decode(string, indexes, conditional.table)
    assert os.listdir(tmp_path) == [] and caught.tb is not None  # which still holds what decoded; only the range-coder works on files


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("count", [0, 1])
def test_hardly_anything_to_code(name, count, conditional):
    symbols, indexes = np.full(count, 3, np.int32), np.full(count, 20, np.int32)
    string = CODERS[name].encode(symbols, indexes, conditional.table)
    np.testing.assert_array_equal(CODERS[name].decode(string, indexes, conditional.table), symbols)


@pytest.mark.parametrize("name", CODERS)
def test_damaged_strings_end_quickly(name, conditional, gaussian):
    symbols, indexes, _ = gaussian
    string = CODERS[name].encode(symbols, indexes, conditional.table)
    rng = np.random.default_rng(2)
    damaged = [b"", string[:10], string[: len(string) // 2], string + b"tail", bytes(1000), b"\xff" * 3000]
    damaged += [rng.integers(0, 256, rng.integers(1, 5000), dtype=np.uint8).tobytes() for _ in range(10)]
    begin = time.time()
    for data in damaged:
        try:
            decoded = CODERS[name].decode(data, indexes, conditional.table)
        except BitstreamError:
            continue
        assert decoded.shape == symbols.shape
    assert time.time() - begin < 60


def test_scale_table_and_indexes(conditional):
    table = conditional.scale_table
    np.testing.assert_allclose(table, np.exp(np.linspace(np.log(0.11), np.log(256), 64)), rtol=1e-6)
    scale = tf.constant([-3.0, 0.0, 0.11, 0.1101, table[10], table[10] * 1.0001, 256.0, 1e9])
    np.testing.assert_array_equal(conditional.indexes(scale.shape, None, scale), [0, 0, 0, 1, 10, 11, 63, 63])


@pytest.mark.parametrize("dtype", [tf.float16, tf.float64])
def test_other_precisions_and_one_scale_for_all(dtype, prior, conditional):
    """Models of other precisions train and code: entropy models compute in float32."""
    latents = {name: tf.cast(tf.random.stateless_normal([1, 4, 5, 3], [k, 0], stddev=3.0), dtype) for k, name in enumerate("zy")}
    mean, scale = tf.constant(0.5, dtype), tf.constant(2.0, dtype)

    def walk(walker):
        return walker("z", prior), walker("y", conditional, mean, scale)

    encoder, rounding, noisy = Encoder(latents, CODERS["tfc"]), RoundingWalker(latents), NoisyWalker(latents, [1, 2])
    decoder = Decoder(encoder.strings, dict.fromkeys("zy", (4, 5, 3)), CODERS["tfc"])
    for a, b, c in zip(walk(encoder), walk(decoder), walk(rounding)):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    assert all(value.dtype == tf.float32 for value in walk(noisy))
    assert 8 * len(encoder.strings["y"]) == pytest.approx(float(rounding.bits("y")[0]), rel=0.1, abs=32)


def test_wrong_calls_of_walkers_say_so(prior, conditional):
    latent = tf.zeros([2, 4, 5, 3])
    for walker in (Encoder({"z": latent[:1]}, CODERS["tfc"]), Decoder({"z": b""}, {"z": (4, 5, 3)}, CODERS["tfc"])):
        with pytest.raises(ValueError, match="z: its entropy model has no coding table"):
            walker("z", FactorizedPrior(3))
    with pytest.raises(ValueError, match="one by one, not 2 at once"):
        Encoder({"z": latent}, CODERS["tfc"])("z", prior)


def test_entropy_models_in_a_keras_model(prior, conditional, tmp_path):
    class Model(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.prior = FactorizedPrior(3, dtype="float32")

        def call(self, x):
            return self.prior.likelihood(x)

    model, other, x = Model(), Model(), tf.random.stateless_normal([1, 4, 5, 3], [1, 2])
    assert model(x).shape == x.shape and (model(x) != other(x)).numpy().any()
    model.save_weights(tmp_path / "m.weights.h5")
    other.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(other(x), model(x))
    for made in (FactorizedPrior(3, (3, 3, 3)), conditional):
        again = tf.keras.layers.deserialize(tf.keras.layers.serialize(made))
        assert type(again) is type(made) and again.get_config() == made.get_config()


def test_gaussian_likelihood(conditional):
    def normal_cdf(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    for value, mean, scale in ((0.0, 0.2, 0.05), (3.0, 1.5, 2.0), (-7.0, 0.0, 3.0), (1.0, 0.4, 0.11)):
        bounded = max(scale, 0.11)
        expected = normal_cdf((value + 0.5 - mean) / bounded) - normal_cdf((value - 0.5 - mean) / bounded)
        actual = conditional.likelihood(tf.constant([value]), tf.constant([mean]), tf.constant([scale]))[0]
        np.testing.assert_allclose(actual, max(expected, 1e-9), rtol=1e-3)
    assert float(conditional.likelihood(tf.constant([1e6]), tf.constant([0.0]), tf.constant([1.0]))[0]) == pytest.approx(1e-9)


def test_gradient_through_the_lower_bound(conditional):
    scale = tf.Variable([0.01])
    with tf.GradientTape() as tape:
        # A value far from the mean wants a larger scale: the gradient must pass the bound.
        bits = -tf.math.log(conditional.likelihood(tf.constant([0.9]), tf.constant([0.0]), scale))
    assert tape.gradient(bits, scale).numpy()[0] < 0


def test_factorized_table_matches_its_density(prior):
    values = tf.range(-400.0, 401.0)[None, None, :, None] + prior.quantization_offset
    probability = prior.likelihood(values).numpy()[0, 0]
    assert np.allclose(probability.sum(0), 1, atol=1e-2)
    for channel, row in enumerate(prior.table.rows[:3]):
        first = prior.table.offset[channel] + 400
        frequencies = np.diff(row)[:-1] / 65536
        np.testing.assert_allclose(frequencies, probability[first : first + len(frequencies), channel], atol=2e-3)


@pytest.mark.parametrize("name", CODERS)
def test_walkers_agree(name, prior, conditional):
    """Rounding, encoding and decoding give identical values; training adds noise in [-0.5, 0.5)."""
    rng = np.random.default_rng(3)
    latents = {"z": tf.constant(rng.normal(0, 4, (1, 3, 4, 3)), tf.float32), "y": tf.constant(rng.normal(0, 9, (1, 5, 2, 6)), tf.float32)}
    mean, scale = (tf.constant(rng.normal(0, 2, (1, 5, 2, 6)), tf.float32) for _ in range(2))

    def walk(walker):
        return walker("z", prior), walker("y", conditional, mean, scale)

    rounding, encoder = RoundingWalker(latents), Encoder(latents, CODERS[name])
    expected = walk(rounding)
    encoded = walk(encoder)
    decoder = Decoder(encoder.strings, {"z": (3, 4, 3), "y": (5, 2, 6)}, CODERS[name])
    decoded = walk(decoder)
    for a, b, c in zip(expected, encoded, decoded):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    assert encoder.checksums == decoder.checksums
    np.testing.assert_allclose(expected[1] - mean, tf.round(latents["y"] - mean), atol=1e-5)
    noisy = walk(NoisyWalker(latents, tf.constant([1, 2])))
    noise = np.concatenate([(a - latents[key]).numpy().ravel() for key, a in zip("zy", noisy)])
    assert noise.min() >= -0.5 and noise.max() <= 0.5 and 0.2 < noise.std() < 0.4
    assert list(rounding.likelihoods) == list(encoder.strings) == ["z", "y"]
    # "Mixed" training passes on what decoding gives, with the gradient of what is not rounded, and counts the bits of noisy latents.
    unrounded = {key: tf.Variable(latent) for key, latent in latents.items()}
    with tf.GradientTape() as tape:
        mixed_walker = NoisyWalker({key: v.read_value() for key, v in unrounded.items()}, tf.constant([1, 2]), mixed=True)
        mixed = walk(mixed_walker)
        total = tf.add_n([tf.reduce_sum(3.0 * value) for value in mixed])
    for a, b in zip(mixed, expected):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for gradient in tape.gradient(total, list(unrounded.values())):
        np.testing.assert_allclose(gradient, 3.0)
    noisy_walker = NoisyWalker(latents, tf.constant([1, 2]))
    walk(noisy_walker)
    for key in "zy":
        np.testing.assert_allclose(mixed_walker.likelihoods[key], noisy_walker.likelihoods[key], rtol=1e-5)
        np.testing.assert_array_equal(mixed_walker.values[key], noisy_walker.values[key])


def test_noise_is_each_latents_and_each_samples_own(prior):
    zeros = {name: tf.zeros([2, 3, 4, 3]) for name in "ab"}
    for seed in ([1, 2], [[1, 2], [3, 4]]):
        walker = NoisyWalker(zeros, tf.constant(seed))
        a, b = (walker(name, prior).numpy() for name in "ab")
        for one, other in ((a, b), (a[0], a[1]), (b[0], b[1])):
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.6
    alone = NoisyWalker({name: latent[1:] for name, latent in zeros.items()}, tf.constant([[3, 4]]))
    np.testing.assert_array_equal(alone("a", prior)[0], a[1])  # in whatever batch it is


def test_latents_that_are_no_numbers_or_too_large():
    latents = {"a": tf.constant([float("nan"), float("inf"), -float("inf"), 1e30, 2.5])[None, None, :, None]}
    np.testing.assert_array_equal(RoundingWalker(latents)("a", FactorizedPrior(1))[0, 0, :, 0], [0, 0, 0, 2**20, 3])


def test_strings_that_go_on(conditional):
    symbols, indexes = np.arange(-50, 50, dtype=np.int32), np.full(100, 40, np.int32)
    string = CODERS["tfc"].encode(symbols, indexes, conditional.table) + b"tail"
    with pytest.raises(BitstreamError, match="does not end where it should"):
        CODERS["tfc"].decode(string, indexes, conditional.table)
    np.testing.assert_array_equal(CODERS["tfc"].decode(string, indexes, conditional.table, strict=False), symbols)


def test_escapes_are_rare(prior, conditional):
    for model in (prior, conditional):
        assert max(row[-1] - row[-2] for row in model.table.rows[:-2]) <= 2**16 * 2**-11


def test_entropy_models_are_not_called():
    x = tf.keras.Input([4, 4, 3])
    for call in (lambda: FactorizedPrior(3)(x), lambda: GaussianConditional()(x), lambda: GaussianConditional()(x, mean=x, scale=x)):
        with pytest.raises(TypeError, match="makes nothing of its input"):
            call()
