"""What the two octave models share: sizes of their latents, parameters in halves, kernels that are copied."""

import tensorflow as tf

from goconv_tf.layers import RDFTKernel, SignalConv2D, exact
from goconv_tf.layers.octave import half


def halves(parameters):
    """(mean, scale), float32: first and second half of the channels, which may be on the grid."""
    parameters = exact.leave(parameters)
    return exact.split(parameters, 2 * [parameters.shape[-1] // 2])


def estimation(widths, channels):
    """The three 1x1 convolutions of the parameter estimation of a latent of so many channels: means, then scales."""
    return [SignalConv2D(widths[0], 1), SignalConv2D(widths[1], 1), SignalConv2D(2 * channels, 1, use_bias=False)]


def estimate_parameters(layers, inputs):
    """What an `estimation` gives, LeakyReLU between its layers."""
    p = exact.concat(inputs)
    for layer in layers[:-1]:
        p = layer.exact(p, leaky=True) if exact.is_exact(p) else tf.nn.leaky_relu(layer(p), exact.LEAK)
    return exact.apply(layers[-1], p)


def chain(layers, x):
    """Layers one after another."""
    for layer in layers:
        x = exact.apply(layer, x)
    return x


def latent_sizes(height, width):
    """Spatial sizes of (y_H, y_L, z_H, z_L) of a padded picture."""
    y_high = (height // 16, width // 16)
    y_low = tuple(map(half, y_high))
    z_high = tuple(map(half, y_low))
    return y_high, y_low, z_high, tuple(map(half, z_high))


def set_kernel(conv, kernel):
    """Makes `kernel` that of a SignalConv2D."""
    parameter = conv.kernel_parameter
    if isinstance(parameter, RDFTKernel):
        parameter.set_value(kernel)
    else:
        parameter.assign(kernel)


def copy_convolution(ours, theirs, factors=1.0):
    """Gives a SignalConv2D another's kernel and bias, output channels multiplied by factors."""
    set_kernel(ours, theirs.kernel * factors)
    if theirs.use_bias:
        ours.bias_parameter.assign(theirs.bias * factors)
