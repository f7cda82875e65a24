"""The convolution and the normalisation that every other layer here is made of."""

import functools
import math
import numbers

import numpy as np
import tensorflow as tf
import tensorflow_compression as tfc

from goconv_tf.layers import exact, gradients

# Of convolutions, what begins and restrains their variables: {argument: (default, what makes it of a name or a config)}.
VARIABLE_ARGUMENTS = {
    "kernel_initializer": ("variance_scaling", tf.keras.initializers),
    "bias_initializer": ("zeros", tf.keras.initializers),
    "kernel_regularizer": (None, tf.keras.regularizers),
    "bias_regularizer": (None, tf.keras.regularizers),
}


@functools.cache
def irdft_matrix(height: int, width: int) -> np.ndarray:
    """Orthonormal inverse real DFT of a height x width kernel, [height*width, height*width].

    Column j is the picture of coefficient j; coefficients of one axis are ordered
    DC, Re 1, Im 1, Re 2, Im 2, ... and the two axes form a tensor product, as in
    tensorflow-compression 1.x.
    """

    def axis(n):
        phase = 2 * np.pi * np.outer(np.arange(n), np.arange(n)) / n
        columns = [np.full(n, np.sqrt(1 / n))]
        for k in range(1, (n - 1) // 2 + 1):
            columns += [np.sqrt(2 / n) * np.cos(phase[k]), -np.sqrt(2 / n) * np.sin(phase[k])]
        if n % 2 == 0 and n > 1:
            columns.append(np.sqrt(1 / n) * np.cos(phase[n // 2]))
        return np.stack(columns, axis=1)

    return np.kron(axis(height), axis(width))


class RDFTKernel(tfc.Parameter):
    """A convolution kernel held as its real DFT (Balle 2018, arXiv 1802.00847, for Sadam).

    The numbers are those of an FFT per kernel, computed as one matrix product, which
    is several times cheaper for kernels this small.

    Args:
      initial_value: float tensor [height, width, in, out], the kernel to start from.
      name: name of the variable.
    """

    def __init__(self, initial_value, name="kernel"):
        super().__init__(name=name)
        initial_value = tf.convert_to_tensor(initial_value)
        self._shape = tuple(int(n) for n in initial_value.shape)
        self._matrix = irdft_matrix(*self._shape[:2])
        self.rdft = tf.Variable(self._transform(initial_value), name=f"{name}_rdft")
        self.rdft.kernel_shape = self._shape  # what an optimizer may want to know of a flat variable

    def _transform(self, kernel):
        flat = tf.reshape(kernel, (self._matrix.shape[0], -1))
        return tf.matmul(tf.constant(self._matrix.T, flat.dtype), flat)

    def to_float64(self):
        """The kernel in float64, near enough to be rounded to the same integers everywhere."""
        return (self._matrix @ self.rdft.numpy().astype(np.float64)).reshape(self._shape)

    def set_value(self, kernel):
        """Makes it the kernel [height, width, in, out]."""
        self.rdft.assign(self._transform(tf.ensure_shape(tf.cast(kernel, self.rdft.dtype), self._shape)))

    def __call__(self, compute_dtype=None):
        matrix = tf.constant(self._matrix, self.rdft.dtype)
        kernel = tf.reshape(tf.matmul(matrix, self.rdft), self._shape)
        return kernel if compute_dtype is None else tf.cast(kernel, compute_dtype)

    def get_config(self):
        raise NotImplementedError("serialise the layer that owns this kernel instead")


def _phases(kernel, before, stride):
    """A transposed convolution's kernel as that of a plain one whose output channels are the phases of the output.

    Returns:
      (kernel [n, n, in, stride^2 * out], for depth-to-space; zeros to add before and after the inputs).
    """
    size = kernel.shape[0]
    taps = {(offset, p): tap for p, sums in enumerate(exact.upsampling_phases(size, before, stride)) for offset, tap in sums}
    offsets = range(min(offset for offset, _ in taps), max(offset for offset, _ in taps) + 1)
    index = tf.constant([[taps.get((offset, p), size) for p in range(stride)] for offset in offsets])
    kernel = tf.pad(kernel, [[0, 1], [0, 1], [0, 0], [0, 0]])  # row and column `size` are zero
    kernel = tf.gather(tf.gather(kernel, index, axis=0), index, axis=2)  # offset, phase, offset, phase, in, out
    kernel = tf.transpose(kernel, [0, 2, 4, 1, 3, 5])
    return tf.reshape(kernel, [*kernel.shape[:3], -1]), -offsets[0], offsets[-1]


def serialized(layer):
    """The config's part of VARIABLE_ARGUMENTS, of a layer whose attributes they are."""
    return {name: module.serialize(getattr(layer, name)) for name, (_, module) in VARIABLE_ARGUMENTS.items()}


def _penalty(regularizer, parameter):
    return regularizer(parameter() if isinstance(parameter, tfc.Parameter) else tf.convert_to_tensor(parameter))


class Regularized:
    """Keeps an activity_regularizer in the config, which Keras' own base class leaves out."""

    def get_config(self):
        config = super().get_config()
        if self.activity_regularizer is not None:
            config["activity_regularizer"] = tf.keras.regularizers.serialize(self.activity_regularizer)
        return config


def image_shape(name, shape):
    """The tf.TensorShape of what a layer is to be built for; ValueError unless it is [batch, height, width, channels] with known channels."""
    shape = tf.TensorShape(shape)
    if shape.rank != 4 or shape[-1] is None:
        raise ValueError(f"{name} needs inputs [batch, height, width, channels] with known channels, not {shape}")
    return shape


class OwnVariables:
    """Saves the variables inside tfc parameters too, which Keras' own format would leave out."""

    def _in_order(self):
        """Its variables; the order of `variables` itself depends on whether the layer is trained."""
        return sorted(self.variables, key=lambda variable: not variable.trainable)

    def save_own_variables(self, store):
        for i, variable in enumerate(self._in_order()):
            store[str(i)] = variable.numpy()

    def load_own_variables(self, store):
        if len(store.keys()) != len(self.variables):  # as Keras; also before the first call, when there are none
            raise ValueError(f"{self.name} has {len(self.variables)} variables, {len(store.keys())} were saved")
        for i, variable in enumerate(self._in_order()):
            variable.assign(store[str(i)])


@tf.keras.saving.register_keras_serializable("goconv_tf")
class SignalConv2D(OwnVariables, tfc.SignalConv2D):
    """tfc.SignalConv2D with zero padding "same", a cheap RDFT kernel, and kernels that can be folded.

    Args:
      filters: number of output channels.
      kernel_size: odd or even side of the square kernel.
      strides: downsampling factor, or upsampling factor when `transpose`.
      transpose: False for a correlation, True for an upsampling (transposed) convolution.
      use_bias: add a bias per channel.
      kernel_parameter: "rdft" or "variable" (plain).
      kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer: as of Keras' layers; of the kernel, not of its DFT.

      name, dtype, trainable: as of any Keras layer. tfc's other arguments are refused: TypeError.

    Input [batch, h, w, c]; output [batch, ceil(h/s), ceil(w/s), filters], or
    [batch, h*s, w*s, filters] when `transpose`. Output k is centred on input k*s (as with PyTorch's padding=k//2);
    TensorFlow's own "same" is one pixel further where sides are even. Kernels are [k, k, c, filters] in both directions.
    """

    def __init__(self, filters, kernel_size, strides=1, transpose=False, use_bias=True, kernel_parameter="rdft", **kwargs):
        if unknown := sorted(kwargs.keys() - {"name", "dtype", "trainable", "dynamic", "autocast", *VARIABLE_ARGUMENTS}):
            raise TypeError(f"SignalConv2D does not take {', '.join(unknown)}")
        for name, value in (("filters", filters), ("kernel_size", kernel_size), ("strides", strides)):
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name} must be one integer, 1 or more, not {value!r}")
        super().__init__(
            filters,
            (kernel_size, kernel_size),
            corr=not transpose,
            strides_up=strides if transpose else 1,
            strides_down=1 if transpose else strides,
            padding="same_zeros",
            use_bias=use_bias,
            kernel_parameter=kernel_parameter,
            **kwargs,
        )
        self._arguments = {
            "filters": filters,
            "kernel_size": kernel_size,
            "strides": strides,
            "transpose": transpose,
            "use_bias": use_bias,
            "kernel_parameter": kernel_parameter,
        }
        self._transpose = transpose
        self._strides = strides
        self._folded = None

    def get_config(self):
        return {**tf.keras.layers.Layer.get_config(self), **self._arguments, **serialized(self)}

    def build(self, input_shape):
        channels = image_shape(self.name, input_shape)[-1]  # before anything is made that a later call would keep
        if isinstance(self.kernel_parameter, str) and self.kernel_parameter == "rdft":
            initial = self.kernel_initializer(shape=(*self.kernel_support, channels, self.filters), dtype=self.variable_dtype)
            self.kernel_parameter = RDFTKernel(initial)
        # Regularizers take variables as they are; tfc would give them what they are in the compute type.
        regularizers, self._kernel_regularizer, self._bias_regularizer = (self.kernel_regularizer, self.bias_regularizer), None, None
        super().build(input_shape)
        self._kernel_regularizer, self._bias_regularizer = regularizers
        for regularizer, parameter in zip(regularizers, (self.kernel_parameter, self.bias_parameter if self.use_bias else None)):
            if regularizer is not None and parameter is not None:
                self.add_loss(functools.partial(_penalty, regularizer, parameter))
        # TensorFlow would take multiples of these channels for groups.
        self.input_spec = tf.keras.layers.InputSpec(ndim=4, axes={-1: channels})

    def call(self, inputs, factors=None):
        """factors: [batch or 1, 1, 1, filters] that the outputs are multiplied by."""
        kernel, bias = self.kernel, self.bias if self.use_bias else None
        fold = factors is not None and factors.shape[0] == 1  # cheaper on kernels than on outputs
        if fold:
            kernel *= tf.cast(factors, kernel.dtype)
            bias = None if bias is None else bias * tf.cast(factors[0, 0, 0], bias.dtype)
        outputs = self._convolve(inputs, kernel)
        outputs = outputs if bias is None else tf.nn.bias_add(outputs, bias)
        return outputs if factors is None or fold else outputs * tf.cast(factors, outputs.dtype)

    def _convolve(self, inputs, kernel):
        # The numbers of tfc's own call, from operations whose gradients are faster on CPUs.
        before, stride = self.kernel_support[0] // 2, self._strides
        if self._transpose and stride > 1 and self.filters < 8:
            # Transposed convolutions to few channels leave most of a processor idle: one channel more for each phase.
            kernel, before, after = _phases(kernel, before, stride)
            outputs = gradients.conv2d(tf.pad(inputs, [[0, 0], [before, after], [before, after], [0, 0]]), kernel, 1, "VALID")
            return tf.nn.depth_to_space(outputs, stride)
        outputs = exact.same(inputs, kernel, before, stride, self._transpose)
        outputs.set_shape(self.compute_output_shape(inputs.shape))
        return outputs

    def quantize(self):
        """The present weights as integers, for `exact`."""
        parameter = self.kernel_parameter
        kernel = parameter.to_float64() if isinstance(parameter, RDFTKernel) else parameter.numpy()
        return exact.quantize_kernel(kernel, self.bias_parameter.numpy() if self.use_bias else None)

    def exact(self, inputs, leaky=False):
        """The same on the grid (see `goconv_tf.layers.exact`); leaky: and then `exact.leaky_relu`."""
        return exact.convolve(inputs, self.quantized, self.kernel_support[0] // 2, self._strides, self._transpose, leaky)

    @property
    def kernel(self):
        return super().kernel if self._folded is None else self._folded

    def fold(self):
        """Fixes the kernel at its present value, so that later calls need not compute it: until weights are loaded; it is not for training."""
        self._folded = tf.constant(super().kernel.numpy())

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self.unfold()

    def unfold(self) -> bool:
        """Has the kernel computed from the parameter again; whether it was folded."""
        folded, self._folded = self._folded is not None, None
        return folded


@tf.keras.saving.register_keras_serializable("goconv_tf")
class GDN(OwnVariables, Regularized, tf.keras.layers.Layer):
    """Generalized divisive normalization, y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2).

    Balle, Laparra, Simoncelli, "End-to-end optimized image compression" (arXiv 1611.01704),
    Eq. 3; with `inverse` the division becomes a product (IGDN). Parameters are tfc's
    non-negative `GDNParameter`s, gamma's with j, the input, first. Computed in float32 whatever the layer's compute type.

    Input and output [batch, ..., channels].

    Args:
      inverse: IGDN.
    """

    def __init__(self, inverse=False, **kwargs):
        super().__init__(**kwargs)
        self.inverse = inverse

    def build(self, input_shape):
        shape = tf.TensorShape(input_shape)
        if not shape.rank or shape[-1] is None:
            raise ValueError(f"{self.name} needs inputs [batch, ..., channels] with known channels, not {shape}")
        channels = shape[-1]
        self.input_spec = tf.keras.layers.InputSpec(axes={-1: channels})
        self.beta = tfc.GDNParameter(tf.ones([channels]), name="beta", minimum=1e-6)
        self.gamma = tfc.GDNParameter(0.1 * tf.eye(channels), name="gamma", minimum=0.0)
        super().build(input_shape)

    def call(self, inputs):
        x = tf.cast(inputs, tf.float32)
        gamma = self.gamma()[None, None] if inputs.shape.rank == 4 else self.gamma()
        square = tf.square(x)
        pool = tf.nn.conv2d(square, gamma, 1, "VALID") if inputs.shape.rank == 4 else tf.linalg.matmul(square, gamma)
        pool = tf.nn.bias_add(pool, self.beta())
        scale = tf.sqrt(pool) if self.inverse else tf.math.rsqrt(pool)
        return tf.cast(x * scale, inputs.dtype)

    def quantize(self):
        """The present parameters as integers, for `exact`."""

        def value(parameter):
            bound = math.sqrt(parameter.minimum + parameter.offset**2)
            return np.square(np.maximum(parameter.variable.numpy().astype(np.float64), bound)) - parameter.offset**2

        return exact.quantize_norm(value(self.beta), value(self.gamma))

    def exact(self, inputs):
        """The same on the grid (see `goconv_tf.layers.exact`); inputs [batch, h, w, channels]."""
        return exact.normalize(inputs, self.quantized, self.inverse)

    def get_config(self):
        return {**super().get_config(), "inverse": self.inverse}


@tf.keras.saving.register_keras_serializable("goconv_tf")
class Conv2D(tf.keras.layers.Conv2D):
    """Keras' convolution, with "same" padding, that can also be computed on the grid.

    Input [batch, h, w, c], output [batch, ceil(h / strides), ceil(w / strides), filters]. `quantize` raises ValueError for strides, dilations,
    other paddings and activations, and kernels that are not square, which have no exact form.

    grids: bits after the point of what `exact` takes and gives.
    """

    def __init__(self, filters, kernel_size, strides=1, padding="same", grids=(exact.GRID_BITS, exact.GRID_BITS), **kwargs):
        super().__init__(filters, kernel_size, strides, padding=padding, **kwargs)
        self.grids = tuple(grids)

    def get_config(self):
        return {**super().get_config(), "grids": self.grids}

    def convolution_op(self, inputs, kernel):
        """Keras' own; called by `call`."""
        plain = {"dilation_rate": (1, 1), "groups": 1, "data_format": "channels_last", "strides": self.strides[:1] * 2}
        if self.padding not in ("same", "valid") or any(getattr(self, name) != value for name, value in plain.items()):
            return super().convolution_op(inputs, kernel)
        return gradients.conv2d(inputs, kernel, self.strides[0], self.padding.upper())

    def quantize(self):
        """The present weights as integers, for `exact`; without strides, as TensorFlow pads those by the input's size."""
        plain = {"strides": (1, 1), "dilation_rate": (1, 1), "padding": "same", "groups": 1, "activation": tf.keras.activations.linear}
        plain.update(kernel_size=2 * self.kernel_size[:1], data_format="channels_last")
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise ValueError(f"there is no exact form with {name} {getattr(self, name)}")
        return exact.quantize_kernel(self.kernel.numpy(), self.bias.numpy() if self.use_bias else None, self.grids)

    def exact(self, inputs):
        """The same on the grid (see `goconv_tf.layers.exact`)."""
        return exact.convolve(inputs, self.quantized, (self.kernel_size[0] - 1) // 2)
