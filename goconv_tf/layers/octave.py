"""Generalized octave convolutions (Akbari et al., arXiv 2002.10032).

Two frequencies travel side by side: X_H at full and X_L at half resolution. Unlike in
plain octave convolution the paths between them start from the *outputs* of the paths
within each, and are learned strided convolutions with an activation of their own.
"""

import copy
import functools
import inspect
import numbers
from typing import Any, Callable, Dict, NamedTuple, Union

import tensorflow as tf

from goconv_tf.layers import exact
from goconv_tf.layers.conv import GDN, VARIABLE_ARGUMENTS, Regularized, SignalConv2D, image_shape, serialized


class OctaveTensor(NamedTuple):
    """A pair of feature maps: high [batch, h, w, c_H] and low [batch, ceil(h/2), ceil(w/2), c_L].

    x + y adds two pairs, frequency by frequency, as residual connections do.
    """

    high: Any
    low: Any

    def __add__(self, other):
        if not (isinstance(other, (tuple, list)) and len(other) == 2):  # a tensor would be taken apart along its batch
            return NotImplemented
        high, low = other
        return OctaveTensor(self.high + high, self.low + low)

    __radd__ = __add__  # of pairs that Keras has made lists or tuples of

    def map(self, factory):
        """The pair of what two new layers make of it, one of each frequency: x.map(lambda: tf.keras.layers.Dropout(0.1)).

        For functional models: a `call` runs again and again, and needs two layers that were made once.
        """
        try:
            if isinstance(factory, tf.keras.layers.Layer):
                raise TypeError("one layer would be shared by both")
            high, low = factory(), factory()
        except TypeError as error:
            raise ValueError(f"map takes what makes a layer, such as lambda: tf.keras.layers.ReLU(), not {factory!r}: {error}") from error
        return OctaveTensor(high(self.high), low(self.low))


Activation = Union[None, str, Callable[[], Callable]]

_FACTORIES: Dict[str, Callable[..., Any]] = {
    "gdn": GDN,
    "igdn": lambda **kwargs: GDN(inverse=True, **kwargs),
    "leaky_relu": lambda **kwargs: tf.keras.layers.LeakyReLU(exact.LEAK, **kwargs),
}


def make_activation(activation: Activation, **kwargs):
    """A fresh activation: from "gdn", "igdn", "leaky_relu" (slope 0.2), another Keras name, a factory, or None."""
    if activation is None or activation == "linear":
        return None
    if isinstance(activation, str):
        if activation in _FACTORIES:
            return _FACTORIES[activation](**kwargs)
        try:
            return tf.keras.layers.Activation(activation, **kwargs)
        except ValueError:
            raise ValueError(f"unknown activation {activation!r}: use gdn, igdn, leaky_relu, a Keras name or a factory") from None
    if callable(activation):
        try:
            if isinstance(activation, tf.keras.layers.Layer):
                raise TypeError("a layer would be shared by all paths")
            made = activation(**kwargs)
        except TypeError as error:
            raise ValueError(
                f"activation must be a name or a factory without arguments, such as 'relu' or lambda: tf.nn.relu, not {activation!r}: {error}"
            ) from error
        if not callable(made):
            raise ValueError(f"the activation factory {activation!r} returned {made!r}, which cannot be called")
        return made
    raise ValueError(f"activation must be a name, a factory or None, not {activation!r}")


def _made_of(recipe):
    """A layer of its config, which its `from_config` may take apart."""
    return tf.keras.layers.deserialize(copy.deepcopy(recipe))


def _without_sizes(config):
    """A config without the sizes that layers in it were built for."""
    if isinstance(config, dict):
        return {key: _without_sizes(value) for key, value in config.items() if key != "build_config"}
    return [_without_sizes(value) for value in config] if isinstance(config, list) else config


def split_filters(filters: int, alpha: float):
    """(high, low) numbers of channels for a share `alpha` of low-frequency ones."""
    low = round(alpha * filters)
    if alpha and not 0 < low < filters:
        raise ValueError(f"alpha={alpha} leaves {filters - low} high and {low} low of {filters} filters")
    return filters - low, low


def crop(x, size):
    """The top left [batch, size[0], size[1], c] of x; size: int32 [2]."""
    if exact.is_array(x):
        return x[:, : int(size[0]), : int(size[1])]
    return exact.cut(x, [0, 0, 0, 0], [tf.shape(x)[0], size[0], size[1], x.shape[-1]])


def crop_like(x, other, halved=False):
    """x cut to the spatial size of `other`, or to half of it, rounded up; free where shapes are known to agree."""
    known = list(other.shape[1:3])
    target = list(map(half, known)) if halved else known
    if None not in target and list(x.shape[1:3]) == target:
        return x
    if exact.is_array(x):
        return crop(x, target)
    size = tf.shape(other)[1:3]
    cut = crop(x, (size + 1) // 2 if halved else size)
    cut.set_shape([None, *target, None])
    return cut


def half(n):
    """n / 2, rounded up; None for None."""
    return None if n is None else (n + 1) // 2


def _is_pair(inputs) -> bool:
    return isinstance(inputs, (tuple, list)) and not isinstance(inputs, tf.TensorShape) and len(inputs) == 2


def _add(a, b, exactly):
    return exact.keep(a + b) if exactly else a + b


class _GoConv(Regularized, tf.keras.layers.Layer):
    """What the four public layers share; `_transpose` tells the two kinds of intra path apart."""

    _transpose = False

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        alpha=0.5,
        activation=None,
        use_bias=True,
        kernel_parameter="rdft",
        inter_kernel_size=3,
        **kwargs,
    ):
        variables = {name: module.get(kwargs.pop(name, default)) for name, (default, module) in VARIABLE_ARGUMENTS.items()}
        super().__init__(**kwargs)
        for name, value in variables.items():
            setattr(self, name, value)
        for name, value in (("filters", filters), ("kernel_size", kernel_size), ("inter_kernel_size", inter_kernel_size)):
            if not isinstance(value, numbers.Integral):
                raise ValueError(f"{name} must be one integer, not {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not isinstance(alpha, numbers.Real) or not 0 <= alpha < 1:
            raise ValueError(f"alpha must be a number in [0, 1), not {alpha!r}")
        if strides not in (1, 2):
            raise ValueError(f"strides must be 1 or 2, not {strides}")
        if kernel_parameter not in ("rdft", "variable"):
            raise ValueError(f"kernel_parameter must be 'rdft' or 'variable', not {kernel_parameter!r}")
        self._recipe = activation if isinstance(activation, dict) else None
        if self._recipe:  # from get_config: how to make fresh copies of what the factory made
            activation = functools.partial(_made_of, activation)
        self.filters, self.kernel_size, self.strides, self.alpha = int(filters), int(kernel_size), int(strides), float(alpha)
        self.use_bias, self.kernel_parameter, self.inter_kernel_size = use_bias, kernel_parameter, int(inter_kernel_size)
        self.activation = activation
        self.filters_high, self.filters_low = split_filters(self.filters, self.alpha)

    def _make_path(self, name, filters, kernel_size, strides, transpose):
        conv = SignalConv2D(
            filters,
            kernel_size,
            strides,
            transpose,
            use_bias=self.use_bias,
            kernel_parameter=self.kernel_parameter,
            name=name,
            dtype=self.dtype_policy,
            **{argument: self._own(argument) for argument in VARIABLE_ARGUMENTS},
        )
        return conv, self._make_activation(f"{name}_activation")

    def _own(self, argument):
        """A path's own initializer, if it is Keras' and has no seed: it would give all that share it the same numbers."""
        value = getattr(self, argument)
        fresh = type(value).__module__.startswith("keras.") and getattr(value, "seed", 0) is None
        return type(value).from_config(value.get_config()) if fresh else value

    def _make_activation(self, name):
        keep = {}  # a policy's name, as layers that Keras makes the config of take nothing else
        if isinstance(self.activation, str):
            keep = {"name": name, "dtype": self.dtype_policy.name}
        elif isinstance(self.activation, type) and issubclass(self.activation, tf.keras.layers.Layer):
            takes = inspect.signature(self.activation).parameters.values()
            keep = {"dtype": self.dtype_policy.name} if any(p.name == "dtype" or p.kind is p.VAR_KEYWORD for p in takes) else {}
        return make_activation(self.activation, **keep)

    def build(self, input_shape):
        pair = _is_pair(input_shape)
        try:
            shapes = [image_shape(self.name, shape) for shape in (input_shape if pair else [input_shape])]
        except TypeError:
            raise ValueError(f"{self.name} takes one tensor or a pair of them, not {len(input_shape)}") from None
        if pair:
            self._check_sizes(*shapes)
        k, inter = self.kernel_size, self.inter_kernel_size
        self.high, self.high_activation = self._make_path("high", self.filters_high, k, self.strides, self._transpose)
        self.low = self.up = self.down = None
        if pair:
            # With one output only (alpha = 0) the low path has as many filters as that output.
            low = self.filters_low or self.filters_high
            self.low, self.low_activation = self._make_path("low", low, k, self.strides, self._transpose)
            self.up, self.up_activation = self._make_path("up", self.filters_high, inter, 2, True)
        if self.filters_low:
            self.down, self.down_activation = self._make_path("down", self.filters_low, inter, 2, False)
        self._build_path("high", shapes[0])
        y_high = self.high.compute_output_shape(shapes[0])
        y_low = [y_high[0], *map(half, y_high[1:3])]
        if pair:
            self._build_path("low", shapes[1])
            self._build_path("up", tf.TensorShape([*y_low, low]))
        if self.filters_low:
            self._build_path("down", y_high)
        super().build(input_shape)

    def _build_path(self, name, shape):
        conv, activation = getattr(self, name), getattr(self, f"{name}_activation")
        with tf.name_scope(conv.name):
            conv.build(shape)
        if isinstance(activation, tf.keras.layers.Layer):
            shape = conv.compute_output_shape(shape)
            with tf.name_scope(activation.name):
                activation.build(shape)
            tf.keras.layers.Layer.build(activation, shape)  # which its own need not have called

    @property
    def paths(self):
        """{name: convolution} of the paths within and between frequencies that the layer has; ValueError before it is built."""
        if not hasattr(self, "high"):
            raise ValueError(f"{self.name} has not been built: call it once before you look at its paths")
        return {name: conv for name in ("high", "low", "up", "down") if (conv := getattr(self, name)) is not None}

    def load_own_variables(self, store):
        if not self.built and len(getattr(store, "parent", ())) > 1:  # parts of it were saved, and there are none to load into
            raise ValueError(f"{self.name} has not been built: call the model once before its weights are loaded")
        super().load_own_variables(store)

    def _check_sizes(self, shape_high, shape_low):
        """ValueError if a pair's sizes are known and do not belong together."""
        for high, low, side in zip(shape_high[1:3], shape_low[1:3], ("height", "width")):
            if None not in (high, low) and low != half(high):
                raise ValueError(f"{self.name}: low-frequency {side} must be {half(high)} for a high-frequency {side} of {high}, not {low}")

    def _path(self, name, x, factors, exactly):
        conv, activation = getattr(self, name), getattr(self, f"{name}_activation")
        if exactly:
            if isinstance(activation, tf.keras.layers.LeakyReLU):
                if abs(float(activation.alpha) - exact.LEAK) > 1e-6:
                    raise ValueError(f"{self.name}: the exact form of LeakyReLU has slope {exact.LEAK}, not {float(activation.alpha):g}")
                return conv.exact(x, leaky=True)
            if activation is not None and not hasattr(activation, "exact"):
                raise ValueError(f"{self.name}: there is no exact form of {getattr(activation, 'name', activation)}")
            x = conv.exact(x)
            return x if activation is None else activation.exact(x)
        x = conv(x) if factors is None else conv(x, factors(name))
        return x if activation is None else tf.cast(activation(x), x.dtype)  # what a factory makes may have another

    def _octave(self, inputs, factors=None, exactly=False):
        """factors: path -> what its convolution is multiplied by, if anything. exactly: compute on the grid."""
        path = functools.partial(self._path, factors=factors, exactly=exactly)
        if _is_pair(inputs) != (self.low is not None):
            raise ValueError(f"{self.name} was built for {'one tensor' if self.low is None else 'a pair of them'} and can take nothing else")
        if not _is_pair(inputs):
            y_high = path("high", inputs)
            return OctaveTensor(y_high, path("down", y_high)) if self.filters_low else y_high
        x_high, x_low = inputs
        self._check_sizes(x_high.shape, x_low.shape)
        y_hh = path("high", x_high)
        # Odd sizes: the low frequency always has half the samples of the high one, rounded up.
        y_ll = crop_like(path("low", x_low), y_hh, halved=True)
        y_high = _add(y_hh, crop_like(path("up", y_ll), y_hh), exactly)
        if not self.filters_low:
            return y_high
        return OctaveTensor(y_high, _add(y_ll, path("down", y_hh), exactly))

    def call(self, inputs):
        return self._octave(inputs)

    def exact(self, inputs):
        """The same on the grid (see `goconv_tf.layers.exact`), without modulation; activations may be leaky_relu, gdn, igdn or None."""
        return self._octave(inputs, exactly=True)

    def compute_output_shape(self, input_shape):
        shape = tf.TensorShape(input_shape[0] if _is_pair(input_shape) else input_shape).as_list()
        if self._transpose:
            size = [None if n is None else n * self.strides for n in shape[1:3]]
        else:
            size = [None if n is None else -(-n // self.strides) for n in shape[1:3]]
        high = tf.TensorShape([shape[0], *size, self.filters_high])
        return OctaveTensor(high, tf.TensorShape([shape[0], *map(half, size), self.filters_low])) if self.filters_low else high

    def get_config(self):
        activation = self._recipe or self.activation
        if self._recipe is None and activation is not None and not isinstance(activation, str):
            made = self.high_activation if hasattr(self, "high_activation") else self._make_activation("activation")
            if not isinstance(made, tf.keras.layers.Layer):
                made = tf.keras.layers.Activation(made)
            activation = _without_sizes(tf.keras.layers.serialize(made))
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "alpha": self.alpha,
            "activation": activation,
            "use_bias": self.use_bias,
            "kernel_parameter": self.kernel_parameter,
            "inter_kernel_size": self.inter_kernel_size,
            **serialized(self),
        }


_ARGUMENTS = """

    Args:
      filters: number of output channels of both frequencies together.
      kernel_size: side of the kernels within a frequency.
      strides: 1 or 2, {direction}.
      alpha: share of low-frequency output channels, in [0, 1); round(alpha * filters) of them. With 0 there is
        one output, as in the last layer of a decoder.
      activation: "gdn", "igdn", "leaky_relu" (slope 0.2), another Keras activation's name,
        a factory (called without arguments once a path; layer classes with dtype=, if they take it), or None. Every path has its own.
      use_bias: add biases on every path.
      kernel_parameter: "rdft" (learns faster) or "variable" (plain kernels).
      inter_kernel_size: side of the kernels between frequencies (3 in Akbari et al.).
      kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer: as of Keras' layers, for the convolutions of all paths.

    Input: an `OctaveTensor` (or a pair) of high [batch, h, w, c_H] and low
    [batch, ceil(h/2), ceil(w/2), c_L], or one tensor, as in the first layer of an encoder.
    Output: an `OctaveTensor`, or one tensor when alpha is 0; {sizes}. Odd
    heights and widths work: the low frequency has ceil(h/2) samples throughout.
    Where samples lie, and why kernels of Keras' layers do not fit unshifted: `SignalConv2D`.

    Raises:
      ValueError: for arguments or input shapes outside the above, as far as these are known when a graph is traced."""


@tf.keras.saving.register_keras_serializable("goconv_tf")
class GoConv2D(_GoConv):
    __doc__ = """Generalized octave convolution (Akbari et al., arXiv 2002.10032; Wang et al., arXiv 2009.13074, Eq. 1).

    Y_HH = Act(f(X_H)),  Y_LL = Act(f(X_L)),
    Y_H = Y_HH + Act(g_up2(Y_LL)),  Y_L = Y_LL + Act(f_down2(Y_HH)).""" + _ARGUMENTS.format(
        direction="downwards", sizes="sizes are divided by strides, rounded up"
    )


@tf.keras.saving.register_keras_serializable("goconv_tf")
class GoConv2DTranspose(_GoConv):
    __doc__ = """Generalized octave transposed convolution (GoTConv; Wang et al., arXiv 2009.13074, Eq. 2).

    As `GoConv2D`, with transposed convolutions within each frequency. Activations
    follow each path's convolution, as Eq. 2 says.""" + _ARGUMENTS.format(direction="upwards", sizes="sizes are multiplied by strides")
    _transpose = True
