"""The variable-rate model: one walk for every mode, and what depends on what."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from conftest import draw, lively

from goconv_tf import losses, presets, zoo
from goconv_tf.entropy import CODERS, Decoder, Encoder, NoisyWalker, RoundingWalker
from goconv_tf.errors import BitstreamError, ModelMismatchError, UsageError
from goconv_tf.models import VariableRate, named_weights
from goconv_tf.models.principal import principal_start, share


def test_estimate_and_file_agree(model):
    x = draw(192, 256)
    for lmbda in (0.002, 0.05):
        estimate = model.estimate(tf.constant(x)[None], tf.constant([lmbda]))
        coded = model.compress(x, lmbda, reconstruct=True)
        both = model.estimate(tf.constant(np.stack([x, x])), tf.constant([lmbda, 0.1]))  # any batch, before and after coding
        assert float(both.rates["y_high"][0]) == pytest.approx(float(estimate.rates["y_high"][0]), rel=1e-3)
        for name, string in coded.strings.items():
            assert 8 * len(string) == pytest.approx(float(estimate.rates[name][0]), rel=0.05, abs=40)
        total = 8 * sum(map(len, coded.strings.values()))
        assert total == pytest.approx(sum(float(r[0]) for r in estimate.rates.values()), rel=0.03)
        exact = np.round(np.clip(estimate.reconstruction[0], 0, 255)).astype(int)
        assert np.abs(exact - coded.reconstruction).max() <= 1


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("size", [(16, 16), (16, 144), (176, 80), (304, 208)])
def test_decompress_gives_the_encoders_picture(model, coder, size):
    coded = model.compress(draw(*size), 0.02, coder, reconstruct=True)
    assert list(coded.strings) == ["z_low", "z_high", "y_low", "y_high"]
    picture = model.decompress(coded.strings, coded.checksums, *size, 0.02, coder)
    np.testing.assert_array_equal(picture, coded.reconstruction)
    assert picture.shape == (*size, 3) and picture.dtype == np.uint8


def test_wrong_checksum_is_noticed(model):
    coded = model.compress(draw(64, 64), 0.02)
    with pytest.raises(ModelMismatchError, match="entropy parameters differ"):
        model.decompress(coded.strings, [coded.checksums[0] ^ 1], 64, 64, 0.02)


def test_other_entropy_parameters_do_not_pass(model_dir):
    """One weight of the hyper synthesis changed by a little: the decoder must notice, not show a wrong picture."""
    a, b = zoo.load_pretrained(model_dir), zoo.load_pretrained(model_dir, fold=False)
    bias = b.h_s[-1].low.bias_parameter
    bias.assign(bias + 0.5)
    coded = a.compress(draw(128, 128), 0.02, exact=False)
    with pytest.raises(BitstreamError):
        b.decompress(coded.strings, coded.checksums, 128, 128, 0.02, exact=False)


def latents_of(model, size=(128, 160)):
    return model.analysis(tf.constant(draw(*size))[None], tf.constant([0.02]))


class Recorder(RoundingWalker):
    """Notes the parameters each latent was visited with."""

    def __init__(self, latents):
        super().__init__(latents)
        self.parameters = {}

    def __call__(self, name, entropy_model, *parameters):
        self.parameters[name] = [p.numpy() for p in parameters]
        return super().__call__(name, entropy_model, *parameters)


@pytest.mark.parametrize(
    ("changed", "heard_by"),
    [("z_low", {"y_low", "y_high"}), ("z_high", {"y_low", "y_high"}), ("y_low", {"y_high"}), ("y_high", set())],
)
def test_which_latent_conditions_which(model, changed, heard_by):
    latents = latents_of(model)
    before, after = Recorder(latents), Recorder({**latents, changed: latents[changed] + 3.0})
    model.walk(before)
    model.walk(after)
    for name in model.latent_names:
        moved = any(np.abs(a - b).max() > 1e-6 for a, b in zip(before.parameters[name], after.parameters[name]))
        assert moved == (name in heard_by), name


def test_latent_shapes(model):
    for size in ((16, 16), (16, 32), (48, 80), (208, 336)):
        latents = latents_of(model, size)
        shapes = model.latent_shapes(*size)
        assert {name: tuple(t.shape[1:]) for name, t in latents.items()} == shapes


def test_lambda_modulates_encoder_and_decoder_but_not_the_hyper_networks(model):
    x = tf.constant(draw(64, 64))[None]
    a, b = (model.analysis(x, tf.constant([lm])) for lm in (0.001, 0.1))
    assert np.abs(a["y_high"] - b["y_high"]).max() > 1e-3
    latents = model.walk(RoundingWalker(a))
    assert np.abs(model.synthesis(latents, tf.constant([0.001])) - model.synthesis(latents, tf.constant([0.1]))).max() > 1e-3
    names = {name for name in named_weights(model) if "scaling" in name}
    assert {name.split("/")[0] for name in names} == {"g_a", "g_s"}
    # 4 paths a layer, less `low` and `up` of the first (one input) and `down` of the last (one output).
    assert len(names) == 4 * (4 * 8 - 3)


def test_tf_function_of_the_loss_has_a_gradient_for_every_weight():
    tf.keras.utils.set_random_seed(0)
    model = lively(zoo.new_model(presets.get_preset("variable_rate", "tiny")))
    variables = model.trainable_variables

    @tf.function
    def gradients(x):
        with tf.GradientTape() as tape:
            loss, metrics = model.loss_fn(x, tf.constant([0.01, 0.1]), tf.constant([1, 2]), tf.constant(0))
        return loss, metrics, tape.gradient(loss, variables)

    x = tf.constant(np.stack([draw(128, 128, 1), draw(128, 128, 2)]))
    loss, metrics, values = gradients(x)
    assert np.isfinite(loss) and all(v is not None for v in values)
    silent = [v.name for v, g in zip(variables, values) if not np.abs(g).max() > 0]
    assert not silent
    # Rates are those of the latents; what they weigh beside D, `test_loss_arithmetic` has.
    assert float(metrics["bpp"]) == pytest.approx(sum(float(metrics[f"bpp_{n}"]) for n in model.latent_names), rel=1e-5)
    again = float(model.loss_fn(x, tf.constant([0.001, 0.001]), tf.constant([1, 2]), tf.constant(0))[1]["mse"])
    assert np.isfinite(again) and again != pytest.approx(float(metrics["mse"]), rel=1e-6)  # another lambda modulates otherwise


def test_ms_ssim_equals_tensorflows_and_keeps_its_gradient():
    a = tf.constant(np.stack([draw(180, 200, k)[..., :1] for k in range(3)]), tf.float32)
    b = tf.clip_by_value(a + tf.random.stateless_normal(a.shape, [1, 2], 0, 25), 0, 255)
    np.testing.assert_allclose(losses.ms_ssim(a, b), tf.image.ssim_multiscale(a, b, 255.0), rtol=1e-4)
    np.testing.assert_allclose(losses.ms_ssim(a, a), 1.0, rtol=1e-5)
    inverted = tf.Variable(255.0 - a)
    with tf.GradientTape() as tape:
        value = losses.ms_ssim(a, inverted)
    assert np.isfinite(tape.gradient(value, inverted)).all() and float(tf.reduce_max(value)) < 0.2


def test_loss_arithmetic():
    """R + lambda * D on numbers computed by hand from the model's own parts."""
    tf.keras.utils.set_random_seed(0)
    model = lively(zoo.new_model(presets.get_preset("variable_rate", "tiny")))
    x = tf.constant(draw(176, 176))[None]
    lmbda = tf.constant([0.02])
    _, plain = model.loss_fn(x, lmbda, tf.constant([5, 6]), tf.constant(0))
    loss, _ = model.loss_fn(x, lmbda, tf.constant([5, 6]), tf.constant(0))
    assert float(loss) == pytest.approx(float(plain["bpp"] + 0.02 * plain["mse"]), rel=1e-5)
    model.distortion = "mix"
    mixed, metrics = model.loss_fn(x, lmbda, tf.constant([5, 6]), tf.constant(0))
    walker = NoisyWalker(model.analysis(x, lmbda), tf.constant([5, 6]), False)
    expected = losses.distortion(tf.cast(x, tf.float32), model.synthesis(model.walk(walker), lmbda), "mix")
    assert float(mixed) == pytest.approx(float(metrics["bpp"]) + 0.02 * float(expected[0]), rel=1e-5)
    assert float(expected[0]) != pytest.approx(float(metrics["mse"]), rel=0.01)
    assert float(metrics["bpp"]) == pytest.approx(sum(float(walker.bits(name)) for name in model.latent_names) / 176**2, rel=1e-5)
    # balance: a sample counts (lambda / middle)^-b times; each of a batch by its own lambda.
    model.distortion = "mse"
    several = tf.repeat(x, 2, axis=0), tf.constant([0.02, 0.08]), tf.constant([[5, 6], [5, 6]]), tf.constant(0)
    alone = [float(model.loss_fn(x, lm[None], tf.constant([[5, 6]]), tf.constant(0))[0]) for lm in several[1]]
    model.balance = 0.5
    weights = (np.array([0.02, 0.08]) / np.sqrt(model.config.lmbda_min * model.config.lmbda_max)) ** -0.5
    assert float(model.loss_fn(*several)[0]) == pytest.approx(np.mean(weights * alone), rel=1e-4)


def test_distortions():
    """Against TensorFlow's MS-SSIM, and of what is not one of them nothing."""
    x, y = (tf.constant(np.stack([draw(180, 200, seed), draw(180, 200, seed + 7)]), tf.float32) for seed in (0, 1))
    y = 0.8 * x + 0.2 * y
    errors = np.mean(np.square(x - y), axis=(1, 2, 3))
    np.testing.assert_allclose(losses.distortion(x, y, "mse"), errors, rtol=1e-5)
    rgb = np.mean([tf.image.ssim_multiscale(x[..., k : k + 1], y[..., k : k + 1], 255) for k in range(3)], axis=0)
    np.testing.assert_allclose(losses.distortion(x, y, "ms-ssim"), 1280 * (1 - rgb), rtol=2e-3)
    luma = [tf.tensordot(z, [0.299, 0.587, 0.114], 1)[..., None] for z in (x, y)]
    mix = 0.9 * errors + 0.1 * 255**2 * (1 - tf.image.ssim_multiscale(*luma, 255))
    np.testing.assert_allclose(losses.distortion(x, y, "mix"), mix, rtol=2e-3)
    with pytest.raises(ValueError, match="must be mse, mix or ms-ssim"):
        losses.distortion(x, y, "ms_ssim")


@pytest.mark.parametrize(("count", "high", "low", "expected"), [(192, 96, 96, 96), (192, 192, 192, 96), (192, 224, 224, 96), (64, 32, 32, 32)])
def test_wide_layers_share_components(count, high, low, expected):
    """There are 192 at most at the third stride, fewer than a wide model's channels: both frequencies get some."""
    assert share(count, high, low) == expected


def test_start_from_principal_components():
    """Before the first step: pictures come back at every lambda, y grows with sqrt(lambda), and scales follow it block by block."""
    config = dataclasses.replace(presets.get_preset("variable_rate", "tiny"), filters=32, latents=128)
    tf.keras.utils.set_random_seed(0)
    models = [VariableRate(config).build_weights() for _ in range(2)]
    pictures = np.stack([draw(128, 160, seed=seed) for seed in range(12)])
    principal_start(models[1], pictures)
    x = tf.constant(pictures[:2])
    spread, errors = {}, {}
    for lmbda in (config.lmbda_min, 0.01, config.lmbda_max):
        y = models[1].transform(x, tf.constant([lmbda] * 2))
        back = models[1].synthesis(y, tf.constant([lmbda] * 2))
        spread[lmbda] = [np.std(part) for part in y]
        errors[lmbda] = np.mean(np.square(back - pictures[:2]))
        losses_of = [float(model.loss_fn(x, tf.constant([lmbda] * 2), tf.constant([1, 2]), tf.constant(0))[0]) for model in models]
        assert losses_of[1] < 0.5 * losses_of[0]
    # 80 of 768 numbers a block: what other 80 components at best leave of these pictures.
    cells = pictures.reshape(12, 8, 16, 10, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 768) * 1.0
    left = np.linalg.eigvalsh(np.cov(cells.T))[:-80].sum() / 768
    assert max(errors.values()) < 3 * left < 0.1 * np.var(pictures), (errors, left)
    np.testing.assert_allclose(spread[config.lmbda_max], 10 * np.array(spread[config.lmbda_min]), rtol=0.03)
    # Scales follow what y is like, block by block: of flat pictures with a patch of noise, those of the patch are wide.
    pictures[:2] = 128
    pictures[:2, 32:96, 64:128] = np.random.default_rng(0).integers(64, 192, (2, 64, 64, 3))
    visit = Recorder(models[1].analysis(tf.constant(pictures[:2]), tf.constant([0.05] * 2)))
    models[1].walk(visit)
    scales = np.maximum(visit.parameters["y_high"][1], 0.11).mean(axis=(0, -1))
    assert scales[2:6, 4:8].min() > 3 * np.median(scales)


def test_a_model_without_tables_says_so():
    model = zoo.new_model(presets.get_preset("variable_rate", "tiny"))
    picture = tf.zeros([64, 64, 3], tf.uint8)
    with pytest.raises(ValueError, match="call build_tables"):
        model.compress(picture, 0.01)
    with pytest.raises(ValueError, match="no entropy coder 'zip'"):
        model.compress(picture, 0.01, "zip")


def test_presets_build_what_the_papers_say():
    paper = presets.get_preset("variable_rate", "paper")
    assert (paper.filters, paper.latents, paper.hyper_width, paper.estimation_widths) == (448, 448, 288, (640, 512))
    assert presets.get_preset("variable_rate", "base").latents == 384
    small = presets.get_preset("variable_rate", "small")
    assert (small.filters, small.latents) == (64, 256)
    for odd in (dict(filters=63), dict(latents=7), dict(alpha=0.3)):
        with pytest.raises(UsageError, match="cannot be split"):
            dataclasses.replace(paper, **odd)
    model = VariableRate(dataclasses.replace(paper, filters=16, latents=24))
    model.build_weights()
    assert [layer.strides for layer in model.g_a + model.g_s] == [2] * 8
    assert [layer.filters for layer in model.g_a + model.g_s + model.h_a + model.h_s] == [16, 16, 16, 24, 16, 16, 16, 3, 16, 16, 16, 16, 288, 48]
    assert [layer.kernel_size for layer in model.h_a + model.h_s] == [3, 5, 5, 5, 5, 3]
    assert [layer.activation for layer in model.g_a + model.g_s] == ["gdn"] * 3 + [None] + ["igdn"] * 3 + [None]
    assert [layer.activation for layer in model.h_a + model.h_s] == 2 * ["leaky_relu", "leaky_relu", None]
    assert not any(conv.use_bias for conv in (model.h_a[-1].high, model.h_a[-1].down, model.f_pe[-1]))


def test_encoder_and_decoder_share_compiled_functions(model):
    coded = Encoder(latents_of(model), CODERS["tfc"])
    model.walk(coded)
    stages = dict(model._stages)  # and those of other tests
    decoder = Decoder(coded.strings, model.latent_shapes(128, 160), CODERS["tfc"])
    model.walk(decoder)
    assert model._stages == stages and decoder.checksums == coded.checksums
    assert all(f.experimental_get_tracing_count() == 1 for f in stages.values())
