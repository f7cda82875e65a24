"""Convolutions whose gradients may be computed in another type than they themselves."""

import contextlib
import contextvars

import tensorflow as tf

_dtype = contextvars.ContextVar("dtype", default=tf.float32)


@contextlib.contextmanager
def convolution_gradients(dtype):
    """Inside, gradients of float32 convolutions of this package's layers are computed from what these see, rounded to `dtype`.

    What convolutions give stays as it is, and so do types and shapes of gradients. It holds for what this thread calls (of a `tf.function`: traces)
    inside, wherever the gradient is taken. Under a `tf.distribute` strategy, which has threads of its own, enter it in the function that `run` gets;
    what `tf.recompute_grad` computes again has it only inside as well.

    dtype: "float32" or "bfloat16". Processors with instructions for bfloat16 (AVX512_BF16, AMX) take about half the time for such gradients. Rounded
    numbers are off by 0.4 % at most; gradients of a whole model were by 1 %.
    """
    token = _dtype.set(tf.as_dtype(dtype))
    try:
        yield
    finally:
        _dtype.reset(token)


def gradient_dtype():
    """The type that gradients of convolutions called here are computed in."""
    return _dtype.get()


def conv2d(x, kernel, strides, padding):
    """tf.nn.conv2d of x [batch, h, w, in] and kernel [k, k, in, out]."""
    dtype = gradient_dtype()
    if x.dtype != tf.float32 or dtype == tf.float32:
        return tf.nn.conv2d(x, kernel, strides, padding)
    how = {"strides": [1, strides, strides, 1], "padding": padding}
    x, kernel = tf.convert_to_tensor(x), tf.convert_to_tensor(kernel)  # variables may have other values by the time of the gradient

    @tf.custom_gradient
    def convolve(x, kernel):
        def gradient(dy):
            dy = tf.cast(dy, dtype)
            dx = tf.raw_ops.Conv2DBackpropInput(input_sizes=tf.shape(x), filter=tf.cast(kernel, dtype), out_backprop=dy, **how)
            dkernel = tf.raw_ops.Conv2DBackpropFilter(input=tf.cast(x, dtype), filter_sizes=tf.shape(kernel), out_backprop=dy, **how)
            return tf.cast(dx, x.dtype), tf.cast(dkernel, kernel.dtype)

        return tf.nn.conv2d(x, kernel, **how), gradient

    return convolve(x, kernel)


def conv2d_transpose(x, kernel, shape, strides, padding):
    """tf.nn.conv2d_transpose of x [batch, h, w, in] and kernel [k, k, out, in], to `shape`."""
    dtype = gradient_dtype()
    if x.dtype != tf.float32 or dtype == tf.float32:
        return tf.nn.conv2d_transpose(x, kernel, shape, strides, padding)
    how = {"strides": [1, strides, strides, 1], "padding": padding}
    x, kernel = tf.convert_to_tensor(x), tf.convert_to_tensor(kernel)

    @tf.custom_gradient
    def convolve(x, kernel):
        def gradient(dy):
            dy = tf.cast(dy, dtype)
            dx = tf.nn.conv2d(dy, tf.cast(kernel, dtype), **how)
            dkernel = tf.raw_ops.Conv2DBackpropFilter(input=dy, filter_sizes=tf.shape(kernel), out_backprop=tf.cast(x, dtype), **how)
            return tf.cast(dx, x.dtype), tf.cast(dkernel, kernel.dtype)

        return tf.nn.conv2d_transpose(x, kernel, shape, **how), gradient

    return convolve(x, kernel)
