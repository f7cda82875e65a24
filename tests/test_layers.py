"""The layers against computations in NumPy that share no code with them."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_compression as tfc
from conftest import ROOT

from goconv_tf.entropy import FactorizedPrior
from goconv_tf.layers import (
    GDN,
    Conv2D,
    GoConv2D,
    GoConv2DTranspose,
    ModulatedGoConv2D,
    ModulatedGoConv2DTranspose,
    OctaveTensor,
    RDFTKernel,
    ScalingNet,
    SignalConv2D,
    convolution_gradients,
    exact,
)


def correlate(x, kernel, stride):
    """Zero-padded "same" correlation; output k is centred on input k * stride."""
    size = kernel.shape[0]
    half = size // 2
    out = np.zeros((x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride), kernel.shape[3]))
    padded = np.pad(x, [(0, 0), (half, half), (half, half), (0, 0)])
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
            out[:, i, j] = np.einsum("bhwi,hwio->bo", window, kernel)
    return out


def scatter(x, kernel, stride):
    """Transposed convolution: every input sample adds the kernel around its place in the output."""
    size = kernel.shape[0]
    half = size // 2
    height, width = x.shape[1] * stride, x.shape[2] * stride
    out = np.zeros((x.shape[0], height + 2 * size, width + 2 * size, kernel.shape[3]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            a, b = i * stride + size - half, j * stride + size - half
            out[:, a : a + size, b : b + size] += np.einsum("bi,hwio->bhwo", x[:, i, j], kernel)
    return out[:, size : size + height, size : size + width]


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def gdn(x, layer, inverse=False):
    pool = np.sqrt(layer.beta().numpy() + np.square(x) @ layer.gamma().numpy())
    return x * pool if inverse else x / pool


def path(layer, name, x, factors=None):
    """One path of a layer: its convolution, its factors, its activation."""
    conv = getattr(layer, name)
    up = name == "up" or (name in ("high", "low") and isinstance(layer, GoConv2DTranspose))
    stride = 2 if name in ("up", "down") else layer.strides
    y = (scatter if up else correlate)(x, conv.kernel.numpy(), stride)
    y = y + (conv.bias.numpy() if conv.use_bias else 0)
    y = y * (1 if factors is None else factors[name])
    activation = getattr(layer, f"{name}_activation")
    if activation is None:
        return y
    return gdn(y, activation, activation.inverse) if isinstance(activation, GDN) else leaky(y)


def equation(layer, x_high, x_low=None, factors=None):
    """Eq. 1 and 2 of arXiv 2009.13074, (Y_H, Y_L)."""
    y_hh = path(layer, "high", x_high, factors)
    y_high, y_low = y_hh, 0.0
    if x_low is not None:
        y_ll = path(layer, "low", x_low, factors)[:, : (y_hh.shape[1] + 1) // 2, : (y_hh.shape[2] + 1) // 2]
        y_high = y_hh + path(layer, "up", y_ll, factors)[:, : y_hh.shape[1], : y_hh.shape[2]]
        y_low = y_ll
    if layer.filters_low:
        y_low = y_low + path(layer, "down", y_hh, factors)
    return y_high, y_low


def random_biases(layer):
    for variable in layer.trainable_variables:
        if "bias" in variable.name:
            variable.assign(tf.random.stateless_normal(variable.shape, [1, len(variable.name)]))


def pair(height, width, high=3, low=2):
    rng = np.random.default_rng(height * 100 + width)
    return OctaveTensor(
        rng.normal(size=(2, height, width, high)).astype(np.float32),
        rng.normal(size=(2, (height + 1) // 2, (width + 1) // 2, low)).astype(np.float32),
    )


@pytest.mark.parametrize("kind", [GoConv2D, GoConv2DTranspose])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(
    ("alpha", "activation", "size"), [(0.5, "gdn", (8, 6)), (0.25, "leaky_relu", (7, 9)), (0.5, "igdn", (5, 4)), (0, None, (6, 5))]
)
def test_octave_equations(kind, strides, alpha, activation, size):
    layer = kind(8, 5, strides, alpha, activation)
    x = pair(*size)
    layer(x)
    random_biases(layer)
    y = layer(x)
    y_high, y_low = equation(layer, *x)
    np.testing.assert_allclose(y.high if alpha else y, y_high, atol=2e-4)
    if alpha:
        np.testing.assert_allclose(y.low, y_low, atol=2e-4)
    assert layer.compute_output_shape([tf.TensorShape(t.shape) for t in x]) == tf.nest.map_structure(lambda t: t.shape, y)


@pytest.mark.parametrize("kind", [GoConv2D, GoConv2DTranspose])
def test_first_layer_takes_one_tensor(kind):
    layer = kind(6, 5, 2, 1 / 3, "gdn")
    x = pair(9, 8).high
    y = layer(x)
    y_high, y_low = equation(layer, x)
    np.testing.assert_allclose(y.high, y_high, atol=1e-4)
    np.testing.assert_allclose(y.low, y_low, atol=1e-4)
    assert (y.high.shape[-1], y.low.shape[-1]) == (4, 2)


@pytest.mark.parametrize("kind", [ModulatedGoConv2D, ModulatedGoConv2DTranspose])
def test_modulation_multiplies_each_path_before_its_activation(kind):
    layer = kind(6, 5, 2, 0.5, "gdn" if kind is ModulatedGoConv2D else "igdn")
    x, lmbda = pair(6, 7), np.array([0.001, 0.2], np.float32)
    layer(x, lmbda)
    random_biases(layer)
    factors = {name: getattr(layer, f"{name}_scaling")(lmbda).numpy() for name in ("high", "low", "up", "down")}
    assert all(np.abs(f[0] - f[1]).max() > 1e-4 and f.min() > 0 for f in factors.values())
    y = layer(x, lmbda)
    y_high, y_low = equation(layer, *x, factors)
    np.testing.assert_allclose(y.high, y_high, atol=1e-4)
    np.testing.assert_allclose(y.low, y_low, atol=1e-4)


def test_which_path_feeds_which():
    """Y_L hears X_H only through `down` of Y_HH, and Y_H hears X_L only through `up` of Y_LL."""
    layer = GoConv2D(4, 3, activation="leaky_relu")
    x = pair(8, 8, 2, 2)
    layer(x)
    for silent, unmoved, moved in (("down", 0, "low"), ("up", 1, "high")):
        saved = [v.numpy() for v in getattr(layer, silent).variables]
        for v in getattr(layer, silent).variables:
            v.assign(tf.zeros_like(v))
        other = [tf.identity(t) for t in x]
        other[unmoved] = other[unmoved] + 1.0
        same, changed = ("low", "high") if silent == "down" else ("high", "low")
        a, b = layer(x), layer(OctaveTensor(*other))
        np.testing.assert_array_equal(getattr(a, same), getattr(b, same))
        assert np.abs(getattr(a, changed) - getattr(b, changed)).max() > 1e-3
        for v, value in zip(getattr(layer, silent).variables, saved):
            v.assign(value)
        a, b = layer(x), layer(OctaveTensor(*other))
        assert np.abs(getattr(a, moved) - getattr(b, moved)).max() > 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (17, 31)])
def test_odd_sizes_stay_in_step(size):
    y = GoConv2D(4, 5, 2)(np.ones((1, *size, 3), np.float32))
    z = GoConv2DTranspose(4, 5, 2)(y)
    for t in (y, z):
        assert t.low.shape[1:3] == [(n + 1) // 2 for n in t.high.shape[1:3]]


@pytest.mark.parametrize(
    "arguments",
    [
        dict(alpha=1.0),
        dict(alpha=-0.1),
        dict(strides=3),
        dict(activation="no-such"),
        dict(filters=0),
        dict(filters=2, alpha=0.1),
        dict(kernel_parameter="x"),
        dict(kernel_size=(3, 3)),
        dict(kernel_size=0),
        dict(inter_kernel_size=0),
        dict(filters=8.5),
        dict(alpha="0.5"),
        dict(alpha=None),
    ],
)
def test_bad_arguments_say_so(arguments):
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        GoConv2D(**{"filters": 8, "kernel_size": 3, **arguments})(np.ones((1, 4, 4, 3), np.float32))


def test_mismatched_pair_says_so():
    with pytest.raises(ValueError, match="low-frequency width must be 4"):
        GoConv2D(4, 3)([np.ones((1, 8, 8, 2), np.float32), np.ones((1, 4, 5, 2), np.float32)])


def test_calls_that_a_layer_was_not_built_for_say_so():
    layer, high = GoConv2D(4, 3), np.ones((1, 8, 8, 2), np.float32)
    layer([high, high[:, ::2, ::2]])
    with pytest.raises(ValueError, match="low-frequency height must be 4"):
        layer([high, high])
    with pytest.raises(ValueError, match="built for a pair"):
        layer(high)
    layer = GoConv2D(4, 3)
    layer(high)
    with pytest.raises(ValueError, match="built for one tensor"):
        layer([high, high[:, ::2, ::2]])
    with pytest.raises(TypeError, match="does not take activation, data_format"):
        SignalConv2D(4, 3, activation=tf.nn.relu, data_format="channels_first")


@tf.keras.saving.register_keras_serializable("test")
class Careless(tf.keras.layers.Layer):
    """Its build does not call super's, as in Keras' own examples."""

    def build(self, input_shape):
        self.gain = self.add_weight("gain", [input_shape[-1]], initializer="random_normal")

    def call(self, x):
        return x * self.gain


@tf.keras.saving.register_keras_serializable("test")
class Bare(Careless):
    """Takes no arguments at all."""

    def __init__(self):
        super().__init__()

    @classmethod
    def from_config(cls, config):
        return cls()


@tf.keras.saving.register_keras_serializable("test")
class Residual(tf.keras.layers.Layer):
    """Its call gets a list where Keras has loaded it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = GoConv2D(4, 3)

    def call(self, x):
        return x + self.inner(x)


@pytest.mark.parametrize("activation", [Careless, Bare])
def test_layers_of_ones_own(activation, tmp_path):
    image = tf.keras.Input([8, 8, 3])
    model = tf.keras.Model(image, list(Residual()(GoConv2D(4, 3, activation=activation)(image))))
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    model.save(tmp_path / "model.keras")
    clone = tf.keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for other in (tf.keras.models.load_model(tmp_path / "model.keras"), clone):
        for ours, theirs in zip(model(x), other(x)):
            np.testing.assert_array_equal(ours, theirs)
    layer = GoConv2D(4, 3, activation=activation)
    layer(x)
    assert layer.high_activation.gain.shape == [2] and layer.high_activation is not layer.down_activation


@pytest.mark.parametrize("make", [lambda **kwargs: GoConv2D(4, 3, alpha=0, **kwargs), GDN])
def test_activity_regularizers_are_kept(make):
    image = tf.keras.Input([8, 8, 3])
    model = tf.keras.Model(image, make(activity_regularizer=tf.keras.regularizers.L2(0.5))(image))
    clone = tf.keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    x = np.ones([1, 8, 8, 3], np.float32)
    for each in (model, clone):
        y = each(x)
        np.testing.assert_allclose(each.losses[0], 0.5 * np.sum(np.square(y)), rtol=1e-5)


@pytest.mark.parametrize("kernel_parameter", ["rdft", "variable"])
def test_initializers_and_regularizers(kernel_parameter):
    image = tf.keras.Input([8, 8, 4])
    initializers = dict(kernel_initializer=tf.keras.initializers.RandomNormal(stddev=2.0), bias_initializer="ones")
    regularizers = dict(kernel_regularizer=tf.keras.regularizers.L2(0.5), bias_regularizer="l1")
    layer = GoConv2D(8, 3, kernel_parameter=kernel_parameter, **initializers, **regularizers)
    model = tf.keras.Model(image, list(layer(image)))
    clone = tf.keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    convs = layer.paths.values()
    kernels = [conv.kernel.numpy() for conv in convs]
    assert 1.8 < np.std(np.concatenate([kernel.ravel() for kernel in kernels])) < 2.2
    assert kernels[0].shape == kernels[1].shape and not np.allclose(kernels[0], kernels[1])  # high, down
    np.testing.assert_array_equal([conv.bias for conv in convs], 1)
    expected = sum(0.5 * np.sum(np.square(kernel)) for kernel in kernels) + 0.01 * sum(conv.bias.shape[0] for conv in convs)
    for each in (model, clone):
        np.testing.assert_allclose(sum(each.losses), expected, rtol=1e-5)
    assert clone.layers[1].get_config() == layer.get_config()


@pytest.mark.parametrize("kernel_parameter", ["rdft", "variable"])
def test_initializers_and_regularizers_of_ones_own(kernel_parameter):
    """They need no config to train with; and what regularizers see has full precision, as in Keras."""

    class Constant(tf.keras.initializers.Initializer):
        def __init__(self, value=1.0):
            self.value = value

        def __call__(self, shape, dtype=None, **kwargs):
            return tf.fill(shape, tf.cast(self.value, dtype))

    class Sum(tf.keras.regularizers.Regularizer):
        def __call__(self, x):
            assert x.dtype == tf.float32
            return tf.reduce_sum(x)

    arguments = dict(kernel_initializer=Constant(0.3), bias_initializer=Constant(0.7), kernel_regularizer=Sum(), bias_regularizer=Sum())
    layer = GoConv2D(4, 3, alpha=0, dtype="mixed_float16", kernel_parameter=kernel_parameter, **arguments)
    assert layer(np.ones([1, 8, 8, 3], np.float32)).dtype == tf.float16
    np.testing.assert_allclose(sum(layer.losses), 0.3 * 108 + 0.7 * 4, rtol=1e-5)


@pytest.mark.parametrize("kernel_parameter", ["rdft", "variable"])
def test_initializers_of_ones_own_with_a_seed(kernel_parameter):
    """Only Keras' are made anew for each path: others need not say in their configs what they were made with."""

    class Gain(tf.keras.initializers.Initializer):
        def __init__(self, gain=1.0, seed=None):
            self.gain, self.seed = gain, seed

        def __call__(self, shape, dtype=None, **kwargs):
            return tf.fill(shape, tf.cast(self.gain, dtype))

    layer = GoConv2D(4, 3, kernel_initializer=Gain(0.3), kernel_parameter=kernel_parameter)
    layer(np.ones([1, 8, 8, 3], np.float32))
    for conv in layer.paths.values():
        np.testing.assert_allclose(conv.kernel, np.full(conv.kernel.shape, 0.3), atol=1e-6)


def test_paths_between_frequencies_have_their_own_kernel_size():
    x = GoConv2D(4, 5, inter_kernel_size=1)(np.ones([1, 8, 8, 3], np.float32))
    for inter in (1, 3, 5):
        layer = GoConv2D(4, 3, inter_kernel_size=inter)
        layer(x)
        sides = {name: tuple(conv.kernel.shape[:2]) for name, conv in layer.paths.items()}
        assert sides == {"high": (3, 3), "low": (3, 3), "up": (inter, inter), "down": (inter, inter)}


@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_of_any_rank(inverse):
    layer, x = GDN(inverse), np.random.default_rng(0).normal(size=[2, 3, 4, 5]).astype(np.float32)
    layer(x)
    layer.gamma.variable.assign(layer.gamma.variable + 0.1)
    y = layer(x)
    assert layer.built and not np.allclose(x, y)
    other = GDN(inverse)
    other(x.reshape(6, 4, 5))
    for mine, theirs in zip(other.weights, layer.weights):
        mine.assign(theirs)
    np.testing.assert_allclose(np.reshape(other(x.reshape(6, 4, 5)), x.shape), y, rtol=1e-5)


def test_pairs_add_to_pairs_only():
    """A tensor of a batch of two is not one for each frequency."""
    pair = GoConv2D(4, 3)(np.ones([2, 8, 8, 3], np.float32))
    np.testing.assert_array_equal((pair + list(pair)).low, 2 * pair.low)
    with pytest.raises((TypeError, ValueError, tf.errors.InvalidArgumentError)):
        pair + tf.ones([2, 1, 1, 2])


def test_kernels_are_set_from_any_floats():
    layer = SignalConv2D(2, 3)
    layer(np.ones([1, 8, 8, 3], np.float32))
    kernel = np.random.default_rng(0).normal(size=[3, 3, 3, 2])
    layer.kernel_parameter.set_value(kernel)
    np.testing.assert_allclose(layer.kernel, kernel, atol=1e-5)


def test_sums_of_pairs_and_layers_for_each_frequency():
    image = tf.keras.Input([9, 7, 3])
    x = GoConv2D(6, 3)(image)
    y = (x + GoConv2D(6, 3)(x)).map(lambda: tf.keras.layers.MaxPool2D(2, padding="same"))
    model = tf.keras.Model(image, [*x, *y])
    clone = tf.keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    inputs = np.random.default_rng(0).normal(size=(1, 9, 7, 3)).astype(np.float32)
    high, low, pooled_high, pooled_low = clone(inputs)
    assert pooled_high.shape == [1, 5, 4, 3] and pooled_low.shape == [1, 3, 2, 3]
    added = OctaveTensor(high, low) + model.layers[2](OctaveTensor(high, low))
    assert isinstance(added, OctaveTensor)
    np.testing.assert_allclose(tf.nn.max_pool2d(added.high, 2, 2, "SAME"), pooled_high, atol=1e-6)
    np.testing.assert_allclose(tf.nn.max_pool2d(added.low, 2, 2, "SAME"), pooled_low, atol=1e-6)
    with pytest.raises(ValueError, match="has not been built"):
        GoConv2D(6, 3).paths  # noqa: B018
    for wrong in (tf.nn.relu, tf.keras.layers.ReLU()):
        with pytest.raises(ValueError, match="map takes what makes a layer"):
            x.map(wrong)


def test_gradients_of_gradients_under_xla():
    """As gradient penalties have them; transposed convolutions of 8 filters and more, and odd sizes, are cut."""
    first, second = GoConv2D(16, 3, 2), GoConv2D(16, 3, 2)
    x = tf.random.stateless_normal([1, 13, 16, 3], [1, 2])

    def penalty(x):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                high, low = second(first(x))
                y = tf.reduce_sum(high**2) + tf.reduce_sum(low**2)
            total = tf.reduce_sum(inner.gradient(y, x) ** 2)
        return outer.gradient(total, first.high.kernel_parameter.trainable_variables)

    for a, b in zip(penalty(x), tf.function(penalty, jit_compile=True)(x)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize("kind", [GoConv2D, GoConv2DTranspose, ModulatedGoConv2D, ModulatedGoConv2DTranspose])
@pytest.mark.parametrize("activation", ["gdn", tf.keras.layers.PReLU, Careless])
def test_build_makes_all_variables(kind, activation):
    """In the order and of the shapes that a call makes them, so that `set_weights` can follow."""
    built, called = kind(6, 5, 2, activation=activation), kind(6, 5, 2, activation=activation)
    built.build([(None, 8, 6, 3), (None, 4, 3, 2)])
    x = [tf.random.normal([1, 8, 6, 3]), tf.random.normal([1, 4, 3, 2])]
    lmbda = (0.02,) if "Modulated" in kind.__name__ else ()
    called(x, *lmbda)
    assert [v.shape for v in built.weights] == [v.shape for v in called.weights] and built.count_params() == called.count_params() > 0
    built.set_weights(called.get_weights())
    for ours, theirs in zip(built(x, *lmbda), called(x, *lmbda)):
        np.testing.assert_array_equal(ours, theirs)


def test_other_channels_than_a_layer_was_built_for():
    """TensorFlow's convolutions take multiples of a kernel's channels for groups."""
    x = np.ones((1, 8, 8, 2), np.float32)
    for layer in (GoConv2D(4, 3), GoConv2DTranspose(4, 3), SignalConv2D(4, 3), GDN(), GDN(inverse=True)):
        layer(x)
        with pytest.raises(ValueError, match="axis -1"):
            layer(np.concatenate([x, x], axis=-1))


def test_weights_are_not_loaded_into_layers_without_variables(tmp_path):
    class Model(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = GoConv2D(4, 3, activation="gdn"), GDN(), GoConv2D(4, 3)

        def call(self, x):
            return self.second(self.first(x).high)

    x, model = tf.random.normal([1, 8, 8, 3]), Model()
    model(x)
    model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match=r"call the model once|0 variables"):
        Model().load_weights(tmp_path / "m.weights.h5")
    again = Model()
    again(x)
    again.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(again(x), model(x))


def test_double_precision():
    x = np.random.default_rng(0).normal(size=(1, 8, 6, 3))
    layer = GoConv2D(4, 3, activation="leaky_relu", dtype="float64")
    high, low = layer(x)
    same = GoConv2D(4, 3, activation="leaky_relu")
    same(x.astype(np.float32))
    same.set_weights(layer.get_weights())
    assert high.dtype == low.dtype == tf.float64
    for ours, single in zip((high, low), same(x.astype(np.float32))):
        np.testing.assert_allclose(ours, single, atol=1e-6)
    made = GoConv2D(4, 3, activation=tf.keras.layers.ReLU, dtype="float64")  # Keras makes it of its own global type
    named = GoConv2D(4, 3, activation="relu", dtype="float64")
    for built in (made, named):
        built(x)
    named.set_weights(made.get_weights())
    for ours, same_one in zip(made(x), named(x)):
        assert ours.dtype == tf.float64
        np.testing.assert_array_equal(ours, same_one)
    smooth = GoConv2D(4, 3, activation=tf.keras.layers.ELU, dtype="float64")
    clone = GoConv2D.from_config(smooth.get_config())
    for built in (smooth, clone):
        built(x)
    clone.set_weights(smooth.get_weights())
    np.testing.assert_array_equal(smooth(x).high, clone(x).high)


@pytest.mark.parametrize("activation", ["gdn", tf.keras.layers.PReLU, lambda: tf.keras.layers.ReLU(6.0), lambda: tf.nn.relu, None])
def test_config_round_trip(activation):
    layer = ModulatedGoConv2DTranspose(6, 5, 2, 0.25, activation, use_bias=False, kernel_parameter="variable", inter_kernel_size=5)
    config = layer.get_config()
    clone = ModulatedGoConv2DTranspose.from_config(config)
    x = pair(4, 4)
    y = layer(x, 0.01)
    clone(x, 0.01)
    clone.set_weights(layer.get_weights())
    np.testing.assert_array_equal(clone(x, 0.01).high, y.high)
    assert clone.get_config() == config


def test_saved_inside_a_keras_model(tmp_path):
    image, lmbda = tf.keras.Input([16, 16, 3]), tf.keras.Input([])
    x = ModulatedGoConv2D(6, 5, 2, activation="gdn")(image, lmbda)
    x = GoConv2D(4, 3, activation=tf.keras.layers.PReLU)(x)
    x = GoConv2DTranspose(3, 5, 2, alpha=0)(x)
    model = tf.keras.Model([image, lmbda], x)
    model.compile("adam", "mse")
    inputs = [np.random.default_rng(0).normal(size=(2, 16, 16, 3)), np.array([0.1, 0.2])]
    model.fit(inputs, inputs[0], verbose=0)
    path = str(tmp_path / "model.keras")
    model.save(path)
    np.testing.assert_allclose(tf.keras.models.load_model(path).predict(inputs, verbose=0), model.predict(inputs, verbose=0), atol=1e-6)


def test_a_model_of_all_layers_trains_is_cloned_and_loads_in_another_process(tmp_path):
    """Of no fixed size, among Keras' own layers, lambda once an input and once a number; trained on odd sizes, in half precision."""
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        image, lmbda = tf.keras.Input([None, None, 3]), tf.keras.Input([])
        x = ModulatedGoConv2D(8, 5, 2, activation="gdn")(tf.keras.layers.Rescaling(1 / 255)(image), lmbda)
        high, low = GoConv2D(8, 3, activation=tf.keras.layers.ReLU)(x)
        high = tf.keras.layers.BatchNormalization()(high)
        x = ModulatedGoConv2DTranspose(8, 5, 2, activation="igdn")([high, low], 0.02)
        x = GDN()(GoConv2DTranspose(8, 3, alpha=0)(x))
        x = tf.keras.layers.Conv2D(3, 3, padding="same", dtype="float32")(x)
        model = tf.keras.Model([image, lmbda], x)
        model.compile("adam", "mse", jit_compile=False)
        inputs = [np.random.default_rng(0).uniform(0, 255, (2, 13, 18, 3)).astype(np.float32), np.array([0.1, 0.2], np.float32)]
        before = model.get_weights()
        model.fit(inputs, np.zeros([2, 14, 18, 3]), verbose=0)
        moved = [np.abs(a - b).max() > 0 for a, b in zip(before, model.get_weights())]
        assert all(moved) and all(np.isfinite(v).all() for v in model.get_weights())
        clone = tf.keras.models.clone_model(model)
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")
    expected = model(inputs)
    assert expected.shape == [2, 14, 18, 3] and expected.dtype == tf.float32
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(inputs), expected)
    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "saved_model")
    np.savez(tmp_path / "data.npz", *inputs, expected)
    code = """
import os, sys, numpy as np, tensorflow as tf
import goconv_tf.layers
image, lmbda, expected = np.load(os.path.join(sys.argv[1], "data.npz")).values()
for name in ("model.keras", "saved_model"):
    model = tf.keras.models.load_model(os.path.join(sys.argv[1], name))
    assert [type(layer).__name__ for layer in model.layers].count("GoConv2D") == 1
    np.testing.assert_allclose(model([image, lmbda]), expected, atol=1e-5)
    print(name, "is the same")
"""
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("is the same") == 2, done.stderr[-2000:]


def test_mixed_precision():
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        layer = ModulatedGoConv2D(8, 5, 2, activation="gdn")
        y = layer(np.ones((1, 8, 8, 3), np.float32), tf.constant([0.01]))
        last = GoConv2DTranspose(3, 5, 2, alpha=0)(y)
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")
    assert y.high.dtype == last.dtype == tf.bfloat16
    assert all(v.dtype == tf.float32 for v in layer.variables)
    assert np.isfinite(tf.cast(last, tf.float32)).all()


@pytest.mark.parametrize(
    "layer",
    [
        SignalConv2D(9, 5, 2),
        SignalConv2D(9, 5, 2, transpose=True),
        SignalConv2D(3, 5, 2, transpose=True),  # to few channels
        SignalConv2D(9, 3, 1, transpose=True),
        Conv2D(9, 3, 2),
        Conv2D(9, 2, padding="valid"),
    ],
)
def test_gradients_in_bfloat16(layer):
    """They are off by what rounding to 8 bits costs, and no more; what the layer gives is not."""
    x = tf.random.stateless_normal([2, 17, 18, 8], [1, 2])
    layer.build(x.shape)

    def outputs_and_gradients(dtype):
        with tf.GradientTape() as tape:
            tape.watch(x)
            with convolution_gradients(dtype):
                y = layer(x)
            loss = tf.reduce_sum(y * tf.random.stateless_normal(y.shape, [3, 4]))
        return y, tape.gradient(loss, [x, *layer.trainable_variables])

    (expected, exact), (y, rounded) = map(outputs_and_gradients, ("float32", "bfloat16"))
    np.testing.assert_array_equal(y, expected)
    assert len(rounded) == 3
    for a, b in zip(rounded, exact):
        error = float(tf.norm(a - b) / tf.norm(b))
        assert a.dtype == tf.float32 and (error < 1e-5 if len(a.shape) == 1 else 1e-4 < error < 0.01), (a.shape, error)


def test_gradients_of_variables_that_have_changed_since():
    """Other losses of a persistent tape have the gradient at the weights that they were computed with."""
    x = tf.random.stateless_normal([1, 9, 9, 4], [1, 2])
    for layer in (Conv2D(3, 3), SignalConv2D(3, 5, 2, transpose=True)):
        layer.build(x.shape)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            with convolution_gradients("bfloat16"):
                y = layer(x)
        before = tape.gradient(y, x)
        for variable in layer.trainable_variables:
            variable.assign_add(tf.ones_like(variable))
        np.testing.assert_array_equal(tape.gradient(y, x), before)


def test_gradients_of_other_convolutions():
    """What bfloat16 gradients are not for has its own: other types than float32, dilated convolutions; nor does the type outlive its block."""
    x = tf.random.stateless_normal([1, 9, 9, 4], [1, 2], dtype=tf.float64)
    layers = SignalConv2D(3, 5, dtype="float64"), Conv2D(3, 3, dilation_rate=2, dtype="float64"), Conv2D(3, 3, dilation_rate=2), Conv2D(3, 3)
    gradients = []
    for dtype in ("float32", "bfloat16"):
        with tf.GradientTape() as tape:
            with pytest.raises(RuntimeError), convolution_gradients(dtype):
                outputs = [layer(x) for layer in layers[:3]]
                raise RuntimeError
            outputs.append(layers[3](x))
        gradients.append(tape.gradient(outputs, [v for layer in layers for v in layer.trainable_variables]))
    for a, b in zip(*gradients):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("transpose", [False, True])
def test_convolution_equals_tfc(kernel_size, strides, transpose):
    layer = SignalConv2D(4, kernel_size, strides, transpose)
    for size in ((8, 9), (1, 3)):
        x = tf.random.stateless_normal([2, *size, 3], [1, 2])
        np.testing.assert_allclose(layer(x), tfc.SignalConv2D.call(layer, x), atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 5, 3, 4), (3, 3, 2, 2), (2, 4, 1, 3), (1, 1, 3, 3)])
def test_rdft_kernel(shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    parameter = RDFTKernel(kernel)
    np.testing.assert_allclose(parameter(), kernel, atol=1e-6)
    np.testing.assert_allclose(tf.norm(parameter.rdft), np.linalg.norm(kernel), rtol=1e-5)
    # The first coefficient is the kernel's sum, scaled to unit length.
    np.testing.assert_allclose(parameter.rdft[0], kernel.sum((0, 1)).ravel() / np.sqrt(shape[0] * shape[1]), rtol=1e-4, atol=1e-5)
    # Power per frequency is that of an FFT.
    if shape[0] == shape[1] == 3:
        power = np.abs(np.fft.fft2(kernel, axes=(0, 1), norm="ortho")) ** 2
        np.testing.assert_allclose(np.square(parameter.rdft[1]) + np.square(parameter.rdft[2]), (power[0, 1] + power[0, 2]).ravel(), rtol=1e-4)


@pytest.mark.parametrize("arguments", [dict(kernel_size=(3, 3)), dict(kernel_size=0), dict(filters=4.0), dict(strides=0)])
def test_bad_arguments_of_a_convolution_say_so(arguments):
    with pytest.raises(ValueError, match="must be one integer, 1 or more"):
        SignalConv2D(**{"filters": 4, "kernel_size": 3, **arguments})


def test_convolution_config_round_trip():
    layer = SignalConv2D(4, 3, 2, True, use_bias=False, kernel_parameter="variable", name="up")
    assert SignalConv2D.from_config(layer.get_config()).get_config() == layer.get_config()
    for wrong in (tf.nn.relu, tf.keras.layers.ReLU()):
        with pytest.raises(ValueError, match="factory"):
            GoConv2D(4, 3, activation=wrong)(np.ones((1, 4, 4, 3), np.float32))


@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_equals_tfc(inverse):
    x = tf.random.stateless_normal([2, 5, 6, 4], [3, 4])
    ours, theirs = GDN(inverse), tfc.GDN(inverse, alpha_parameter=2, epsilon_parameter=0.5)
    ours(x), theirs(x)
    for parameter in ("beta", "gamma"):
        value = tf.random.stateless_uniform(getattr(ours, parameter).variable.shape, [5, 6], 0.1, 1.0)
        getattr(ours, parameter).variable.assign(value)
        getattr(theirs, f"{parameter}_parameter").variable.assign(value)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5)


def test_folding_changes_nothing():
    layer = SignalConv2D(4, 5, 2)
    x = tf.random.stateless_normal([1, 8, 8, 3], [1, 2])
    before = layer(x)
    layer.fold()
    np.testing.assert_array_equal(layer(x), before)
    layer.kernel_parameter.rdft.assign(0 * layer.kernel_parameter.rdft)
    np.testing.assert_array_equal(layer(x), before)


def test_scaling_net_starts_near_one_and_is_positive():
    net = ScalingNet(5)
    factors = net(np.array([1e-6, 1e-3, 0.5], np.float32)).numpy()
    assert factors.shape == (3, 1, 1, 5)
    assert factors.min() > 0.3 and factors.max() < 2.0
    net.factors.bias.assign(tf.fill([5], -30.0))
    assert net(0.01).numpy().min() > 0


def test_what_a_factory_made_is_what_is_saved(tmp_path):
    """Not what it would make by then; and without the sizes that one of the paths was built for."""
    y = image = tf.keras.Input([8, 8, 3])
    for slope in (0.1, 0.3):
        y = GoConv2D(8, 3, activation=lambda: tf.keras.layers.LeakyReLU(slope))(y)  # noqa: B023
    prepared = iter([GDN() for _ in range(4)])
    y = GoConv2D(6, 3, activation=lambda: next(prepared))(y)
    model = tf.keras.Model(image, list(y))
    model.save(tmp_path / "m.keras")
    loaded = tf.keras.models.load_model(tmp_path / "m.keras")
    x = tf.random.stateless_normal([2, 8, 8, 3], [1, 2])
    for ours, theirs in zip(model(x), loaded(x)):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert [float(layer.high_activation.alpha) for layer in loaded.layers[1:3]] == pytest.approx([0.1, 0.3])


@tf.keras.saving.register_keras_serializable("tests")
class Scaled(tf.keras.layers.Layer):
    """Its `from_config` takes the config apart, as Keras' guide has it."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return 2 * self.inner(x)

    def get_config(self):
        return {**super().get_config(), "inner": tf.keras.layers.serialize(self.inner)}

    @classmethod
    def from_config(cls, config):
        return cls(tf.keras.layers.deserialize(config.pop("inner")), **config)


def test_an_activation_whose_config_is_taken_apart():
    layer = GoConv2D(5, 3, activation=lambda: Scaled(GDN()))
    x = tf.random.stateless_normal([1, 8, 8, 3], [1, 2])
    layer(x)
    for _ in range(2):
        copy = GoConv2D.from_config(layer.get_config())
        copy(x)
        copy.set_weights(layer.get_weights())
        for a, b in zip(copy(x), layer(x)):
            np.testing.assert_allclose(a, b, atol=1e-6)
        layer = copy


def test_weights_of_a_frozen_layer_are_in_the_same_order(tmp_path):
    class Holder(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.prior, self.conv, self.gdn = FactorizedPrior(3), SignalConv2D(3, 3), GDN()

        def call(self, x):
            x = self.gdn(self.conv(x))
            return x * self.prior.likelihood(x)

    x = tf.random.stateless_normal([1, 8, 8, 3], [1, 2])
    one, other = Holder(), Holder()
    one(x), other(x)
    other.trainable = False
    other.conv.fold()
    path = str(tmp_path / "m.weights.h5")
    one.prior.quantization_offset.assign([0.1, 0.2, 0.3])
    one.save_weights(path)
    other.load_weights(path)
    np.testing.assert_allclose(one(x), other(x), atol=1e-6)  # also what was folded
    np.testing.assert_allclose(other.prior.quantization_offset, [0.1, 0.2, 0.3], atol=1e-6)


def test_a_failed_first_call_leaves_nothing_behind():
    layer = SignalConv2D(4, 3, kernel_regularizer="l2")
    for wrong in (tf.ones([8, 8, 5]), tf.keras.Input([None, None, None])):
        with pytest.raises(ValueError, match="with known channels"):
            layer(wrong)
    layer(tf.ones([1, 8, 8, 3]))
    assert len(layer.losses) == 1 and layer.get_config()["kernel_regularizer"]
    for make, wrong in (
        (GDN, tf.keras.Input([None, None, None])),
        (lambda: GoConv2D(4, 3), [tf.ones([1, 8, 8, 3]), tf.keras.Input([4, 4, None])]),
    ):
        with pytest.raises(ValueError, match="with known channels"):
            make()(wrong)
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"takes one tensor or a pair of them, not {count}"):
            GoConv2D(4, 3)(count * [tf.ones([1, 8, 8, 3])])


def test_grids_are_in_the_config():
    layer = Conv2D(4, 3, grids=(14, 10))
    assert Conv2D.from_config(layer.get_config()).grids == (14, 10) and Conv2D(4, 3).grids == (exact.GRID_BITS,) * 2
