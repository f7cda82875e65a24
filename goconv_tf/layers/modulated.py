"""Octave convolutions modulated by lambda (Wang et al., arXiv 2009.13074, Eq. 1 and 2)."""

import math

import tensorflow as tf

from goconv_tf.layers import octave
from goconv_tf.layers.conv import Regularized


@tf.keras.saving.register_keras_serializable("goconv_tf")
class ScalingNet(Regularized, tf.keras.layers.Layer):
    """sigma(lambda; theta): one positive factor per channel from the scalar lambda.

    log10(lambda) + 2, so that 0.01 is zero and a decade is one, goes through a dense layer
    of `units` with tanh and a dense layer with softplus (as in Choi et al., ICCV 2019). Starts at 1
    for every lambda but for small random differences.

    Args:
      channels: number of factors.
      units: width of the hidden layer.

    Input: lambda, above 0 (at 0 gradients are not finite), [batch] or scalar. Output [batch or 1, 1, 1, channels].
    """

    def __init__(self, channels, units=16, **kwargs):
        super().__init__(**kwargs)
        self.channels, self.units = int(channels), int(units)
        one = math.log(math.e - 1)  # softplus(one) = 1
        self.hidden = tf.keras.layers.Dense(self.units, activation="tanh", name="hidden", dtype="float32")
        self.factors = tf.keras.layers.Dense(
            self.channels,
            activation="softplus",
            kernel_initializer=tf.keras.initializers.RandomNormal(stddev=0.05),
            bias_initializer=tf.keras.initializers.Constant(one),
            name="factors",
            dtype="float32",
        )

    def build(self, input_shape):
        self.hidden.build([None, 1])
        self.factors.build([None, self.units])
        super().build(input_shape)

    def call(self, lmbda):
        decades = tf.math.log(tf.cast(lmbda, tf.float32)) / math.log(10.0) + 2.0
        factors = self.factors(self.hidden(tf.reshape(decades, [-1, 1])))
        return tf.reshape(factors, [-1, 1, 1, self.channels])

    def get_config(self):
        return {**super().get_config(), "channels": self.channels, "units": self.units}


class _Modulated(octave._GoConv):
    """Adds one Scaling-Net a path; the convolution's output is multiplied before its activation."""

    def _build_path(self, name, shape):
        net = ScalingNet(getattr(self, name).filters, name=f"{name}_scaling", dtype="float32")
        setattr(self, f"{name}_scaling", net)
        with tf.name_scope(net.name):
            net.build([None])
        super()._build_path(name, shape)

    def call(self, inputs, lmbda):
        return self._octave(inputs, lambda name: getattr(self, f"{name}_scaling")(lmbda))


_CALL = """

    Called as layer(inputs, lmbda): inputs and outputs as there, lmbda positive, [batch] or scalar.
    """


@tf.keras.saving.register_keras_serializable("goconv_tf")
class ModulatedGoConv2D(_Modulated, octave.GoConv2D):
    __doc__ = """M-GoConv (Wang et al., arXiv 2009.13074, Eq. 1): `GoConv2D` with every path Act(conv(x) * sigma(lambda)).""" + _CALL


@tf.keras.saving.register_keras_serializable("goconv_tf")
class ModulatedGoConv2DTranspose(_Modulated, octave.GoConv2DTranspose):
    __doc__ = """M-GoTConv (Wang et al., arXiv 2009.13074, Eq. 2): `GoConv2DTranspose` with every path Act(conv(x) * sigma(lambda)).""" + _CALL
