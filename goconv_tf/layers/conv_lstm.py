"""The recurrent convolution of the scalable codec."""

import functools

import numpy as np
import tensorflow as tf

from goconv_tf.layers import exact
from goconv_tf.layers.conv import Conv2D, Regularized


@tf.keras.saving.register_keras_serializable("goconv_tf")
class ConvLSTM2DCell(Regularized, tf.keras.layers.Layer):
    """One step of a convolutional LSTM that may also downsample.

        i, f, o, g = split(W_x * x + b_x + W_h * h + b_h);  c' = sigmoid(f) c + sigmoid(i) tanh(g);  h' = sigmoid(o) tanh(c')

    (in the kernels, the gates' order is i, f, o, g). As in Toderici et al. (arXiv 1608.05148, Eq. 4 to 6)
    and Su et al. (ICIP 2020): no peepholes, no forget bias, zero padding "same".
    Differs from Keras' ConvLSTM2D, which squashes gates by a hard sigmoid.

    Args:
      filters: channels of the output and of both states.
      kernel_size: side of both square kernels.
      strides: of the convolution of the input; that of the hidden state has stride 1.
      grid_bits: 10 to 14, bits after the point of what `exact` takes, keeps and gives.

    Called as cell(inputs, states): inputs [batch, h, w, c], states (hidden, cell), each
    [batch, ceil(h/s), ceil(w/s), filters], or None for zeros. Returns (hidden', (hidden', cell')). A loop over frames is
    `for x in frames: y, states = cell(x, states)`; tf.keras.layers.RNN does not take it.
    """

    def __init__(self, filters, kernel_size=3, strides=1, grid_bits=exact.GRID_BITS, **kwargs):
        super().__init__(**kwargs)
        if not exact.GRID_BITS <= grid_bits <= exact.FINEST_BITS:
            raise ValueError(f"grid_bits must be {exact.GRID_BITS} to {exact.FINEST_BITS}, not {grid_bits}")
        self.filters, self.kernel_size, self.strides, self.grid_bits = filters, kernel_size, strides, grid_bits
        self.conv_inputs = Conv2D(4 * filters, kernel_size, strides, dtype=self.dtype_policy, name="conv_inputs")
        self.conv_hidden = Conv2D(4 * filters, kernel_size, dtype=self.dtype_policy, name="conv_hidden")
        self.conv_inputs.grids = self.conv_hidden.grids = (grid_bits, grid_bits)

    def build(self, input_shape):
        self.conv_inputs.build(input_shape)
        self.conv_hidden.build([None, None, None, self.filters])
        super().build(input_shape)

    def call(self, inputs, states=None):
        gates = self.conv_inputs(inputs)
        # A convolution of zeros need not be computed, and zeros need no size.
        gates += tf.cast(self.conv_hidden.bias, gates.dtype) if states is None else self.conv_hidden(states[0])
        squashed, candidate = tf.split(gates, [3 * self.filters, self.filters], axis=-1)
        i, f, o = tf.split(tf.sigmoid(squashed), 3, axis=-1)
        cell = i * tf.tanh(candidate)
        if states is not None:
            cell += f * states[1]
        hidden = o * tf.tanh(cell)
        return hidden, (hidden, cell)

    def exact(self, inputs, states=None):
        """The same on a grid of 2^-grid_bits (see `goconv_tf.layers.exact`): gates from tables, products of integers."""
        sigmoid, tanh = (functools.partial(exact.look_up, table, bits=self.grid_bits) for table in exact.gate_tables())
        gate_bits = exact.GATE_BITS + self.grid_bits - exact.GRID_BITS
        gates = self.conv_inputs.exact(inputs)
        if states is None:
            bias = exact.rescale(self.conv_hidden.quantized.bias.astype(np.float64), self.conv_hidden.quantized.shift)
            gates = exact.keep(gates + bias)
        else:
            gates = exact.keep(gates + self.conv_hidden.exact(states[0]))
        squashed, candidate = exact.split(gates, [3 * self.filters, self.filters])
        i, f, o = exact.split(sigmoid(squashed), 3 * [self.filters])
        # Gates are in units of 2^-gate_bits, states in those of the grid.
        cell = i * tanh(candidate) * 2.0 ** (self.grid_bits - gate_bits)
        if states is not None:
            cell += f * states[1]
        cell = exact.rescale(cell, gate_bits)
        hidden = exact.rescale(o * tanh(cell), 2 * gate_bits - self.grid_bits)
        return hidden, (hidden, cell)

    def get_config(self):
        own = {"filters": self.filters, "kernel_size": self.kernel_size, "strides": self.strides, "grid_bits": self.grid_bits}
        return {**super().get_config(), **own}
