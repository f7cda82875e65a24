"""Integer arithmetic in float64, for what encoder and decoder must compute to the last bit.

Activations are integers on a grid of 2^-10, kept within +-(2^21 - 1) (values up to 2048); kernels are integers of 15 bits with a power of
two as scale, one a layer. Recurrent cells, whose values are small for tanh's sake, may have a finer grid, of up to 2^-14, and with it as many more
bits in kernels and gates (values up to 128). As every partial sum of a convolution stays under 2^53, float64 holds all of them exactly, in
whatever order a machine, a library or a number of threads adds them up. After each layer the sum is rounded to the grid again. What is
not a sum of products is one correctly rounded operation of IEEE 754 (a product, a quotient, a square root) or a table.

Layers that can do this have `quantize()`, which makes a `Quantized` from their present weights, or parts that have, and `exact(x)`, which
computes with it after `layer.quantized = layer.quantize()` for the layer or each of those parts; `apply` chooses by the type of x.

All of this is done by NumPy on arrays and by TensorFlow on tensors, in graphs or inside `tensorflow_only`. As sums are exact, both give
the same integers; NumPy's float64 matrix products take a fraction of the time of TensorFlow's float64 convolutions.
"""

import concurrent.futures
import contextlib
import functools
import math
import os
import threading

import numpy as np
import tensorflow as tf
from threadpoolctl import ThreadpoolController

from goconv_tf.layers import gradients

GRID_BITS = 10
GRID = 2.0**GRID_BITS
LIMIT = 2**21 - 1  # of activations, in grid units
FINEST_BITS = 14
KERNEL_BITS = 15  # on the grid; as many more as a finer one has
LEAK = 0.2  # slope of LeakyReLU
NORM_LIMIT = 2**17  # of what GDN squares, in grid units (values up to 128)
SUM_LIMIT = 2**53

GATE_BITS = 15  # of what the tables of sigmoid and tanh hold
TABLE_REACH = 8 * 2**GRID_BITS  # both are flat beyond +-8


class Quantized:
    """A layer's integers. kernel: any shape; bias: in units of its sums; shift: these times 2^-shift are on the grid of the output."""

    def __init__(self, kernel: np.ndarray, bias: np.ndarray, shift: np.ndarray):
        self.kernel, self.bias, self.shift = kernel, bias, shift
        self.convolution = None  # what `convolve` made of them

    def __iter__(self):
        return iter((self.kernel, self.bias, self.shift))


_tensorflow_only = False  # what a machine without NumPy's fast products would do; tests compare the two


@contextlib.contextmanager
def tensorflow_only():
    """Inside, what is computed or traced has TensorFlow's own operations only."""
    global _tensorflow_only
    before, _tensorflow_only = _tensorflow_only, True
    try:
        yield
    finally:
        _tensorflow_only = before


def is_array(x) -> bool:
    """Whether NumPy computes with x: an array of floats (float32 holds all of the grid, too), or a tuple that begins with one."""
    x = x[0] if isinstance(x, tuple) else x
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def is_exact(x) -> bool:
    """Whether a tensor or an array, or the first of a tuple, holds integers on the grid."""
    return is_array(x) or (x[0] if isinstance(x, tuple) else x).dtype == tf.float64


def to_grid(x):
    """Floats -> integers on the grid, float64; halves up."""
    if tf.executing_eagerly() and not _tensorflow_only:
        return rescale(np.asarray(x, np.float64) * GRID, 0)
    return rescale(tf.cast(x, tf.float64) * GRID, 0)


def from_grid(x):
    """Integers on the grid -> float32, which holds them exactly."""
    return (x / GRID).astype(np.float32) if is_array(x) else tf.cast(x / GRID, tf.float32)


def leave(x):
    """float32: x itself, or what x on the grid stands for."""
    return from_grid(x) if is_exact(x) else tf.cast(x, tf.float32)


def keep(x):
    """x within the grid's limits."""
    return np.clip(x, -LIMIT, LIMIT) if is_array(x) else tf.clip_by_value(x, -float(LIMIT), float(LIMIT))


def rescale(total, shift):
    """A sum of products -> the grid."""
    floor = np.floor if is_array(total) else tf.floor
    return keep(floor(total * 2.0 ** -float(shift) + 0.5))


def apply(layer, *inputs):
    """layer(*inputs), or its exact counterpart where the first input is on the grid."""
    return layer.exact(*inputs) if is_exact(inputs[0]) else layer(*inputs)


def leaky_relu(x):
    """LeakyReLU on the grid, rounded right after."""
    if not is_array(x):
        return tf.maximum(x, tf.floor(x * LEAK + 0.5))
    leak = x * LEAK  # never near a half, so that any rounding does
    return np.maximum(x, np.rint(leak, out=leak), out=leak)


def concat(parts):
    """Parts one after another on the last axis."""
    return np.concatenate(parts, axis=-1) if is_array(parts[0]) else tf.concat(parts, axis=-1)


def split(x, sizes):
    """x in parts of `sizes` channels."""
    return np.split(x, np.cumsum(sizes)[:-1], axis=-1) if is_array(x) else tf.split(x, sizes, axis=-1)


def depth_to_space(x):
    """[batch, h, w, 4 c] -> [batch, 2 h, 2 w, c], as tf.nn.depth_to_space."""
    if not is_array(x):
        return tf.nn.depth_to_space(x, 2)
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def quantize_kernel(kernel, bias, grids=(GRID_BITS, GRID_BITS)) -> Quantized:
    """The integers of a convolution whose last kernel axis is its output; bias may be None.

    grids: bits after the point of its input and of its output.

    Raises:
      ValueError: if a sum could reach 2^53, or a weight is not finite.
    """
    kernel = np.asarray(kernel, np.float64)
    bias = np.zeros(kernel.shape[-1]) if bias is None else np.asarray(bias, np.float64)
    if not np.isfinite(kernel).all() or not np.isfinite(bias).all():
        raise ValueError("weights are not finite")
    largest = max(np.abs(kernel).max(initial=0.0), 1e-6)
    kernel_bits = KERNEL_BITS + max(grids) - GRID_BITS
    shift = min(kernel_bits - 1 - math.floor(math.log2(largest)), 30)
    integers = np.clip(np.floor(kernel * 2.0**shift + 0.5), -(2**kernel_bits) + 1, 2**kernel_bits - 1)
    offsets = np.floor(bias * 2.0 ** (grids[0] + shift) + 0.5)
    if np.abs(offsets).max(initial=0.0) >= SUM_LIMIT:
        raise ValueError("weights are too large for exact sums")
    quantized = Quantized(integers.astype(np.int32), offsets.astype(np.int64), np.array(shift + grids[0] - grids[1], np.int32))
    if sum_bound(quantized) >= SUM_LIMIT:
        raise ValueError("weights are too large for exact sums")
    return quantized


def sum_bound(quantized: Quantized, limit: int = LIMIT) -> float:
    """What no partial sum can exceed, from the integers themselves: sum of |kernel| * limit + |bias|, for the worst output."""
    # In float64, so that hostile integers cannot wrap around; 2^53 is compared with a margin of the sum's own rounding.
    kernel, bias = (np.abs(np.asarray(part, np.float64)) for part in (quantized.kernel, quantized.bias))
    return float((kernel.reshape(-1, kernel.shape[-1]).sum(axis=0) * limit + bias).max() * (1 + 1e-9))


def convolve(x, quantized: Quantized, before: int, strides: int = 1, transpose: bool = False, leaky: bool = False):
    """A convolution with zero padding "same", back on the grid.

    Args:
      x: [batch, h, w, in], integers.
      quantized: of a kernel [k, k, in, out]; always used with the same further arguments.
      before: zeros above and left of x; for `transpose`, rows and columns of the full result that are cut off there.
      strides: 1 or 2.
      transpose: a transposed convolution, which upsamples by `strides`.
      leaky: apply `leaky_relu` to the result.

    Returns:
      [batch, ceil(h / strides), ceil(w / strides), out], or [batch, h * strides, w * strides, out].
    """
    if is_array(x):
        if quantized.convolution is None:
            quantized.convolution = _numpy_convolution(quantized, before, strides, transpose, leaky)
        return quantized.convolution(x)
    total = same(x, quantized.kernel.astype(np.float64), before, strides, transpose)
    result = rescale(total + quantized.bias.astype(np.float64), quantized.shift)
    return leaky_relu(result) if leaky else result


def cut(x, begin, size):
    """tf.slice, with a gradient that has one of its own under XLA, too (as gradient penalties need)."""

    @tf.custom_gradient
    def sliced(x):
        y = tf.slice(x, begin, size)

        def gradient(dy):
            after = tf.shape(x) - begin - tf.shape(y)
            return tf.pad(dy, tf.stack([tf.constant(begin), after], axis=1))

        return y, gradient

    return sliced(x)


def same(x, kernel, before, strides, transpose):
    """The sums of `convolve`, of tensors and any kernel [k, k, in, out], without what makes them integers.

    On CPUs a padded "VALID" convolution's gradient is faster than that of explicit padding, and tf.slice's than a strided slice's.
    """
    size, channels = kernel.shape[0], kernel.shape[-1]
    if transpose and strides > 1:
        shape = tf.shape(x)
        inside = shape[1:3] * strides
        length = inside + (before + max(size - strides - before, 0))
        kernel = tf.transpose(kernel, [0, 1, 3, 2])
        total = gradients.conv2d_transpose(x, kernel, [shape[0], length[0], length[1], channels], strides, "VALID")
        return cut(total, [0, before, before, 0], [shape[0], inside[0], inside[1], channels]) if size > 1 else total
    if transpose:
        kernel, before = kernel[::-1, ::-1], size - 1 - before
    if size > 1:
        after = size - 1 - before
        x = tf.pad(x, [[0, 0], [before, after], [before, after], [0, 0]])
    return gradients.conv2d(x, kernel, strides, "VALID")


def upsampling_phases(size, before, strides):
    """A transposed convolution along one axis, as sums: for each phase of the output its (offset of the input, tap of the kernel).

    Output strides * q + phase is the sum over those of input q + offset, times the tap.
    """
    return [[((p + before - t) // strides, t) for t in range(size) if (p + before - t) % strides == 0] for p in range(strides)]


_CHUNK = 2**17  # numbers of a matrix that is multiplied at once, so that it stays in cache
_LEAST = 96  # of its rows, as each product reads its other factor anew
_SMALL = 2**23  # multiply-adds that are not worth a second thread


def _numpy_convolution(quantized, before, strides, transpose, leaky):
    """The function x -> `convolve` of it: one matrix product for each phase of the output and some rows at a time."""
    # A power of two as a factor costs no bit, so that the sums come out on the grid; the half rounds them.
    scale = 2.0 ** -float(quantized.shift)
    kernel, half = quantized.kernel * scale, quantized.bias * scale + 0.5
    size, channels = kernel.shape[0], kernel.shape[-1]
    step = 1 if transpose else strides  # between the inputs of neighbouring outputs of a phase
    lowest = float(leaky_relu(np.array([-LIMIT]))[0]) if leaky else -LIMIT
    phases = upsampling_phases(size, before, strides) if transpose else [[(t - before, t) for t in range(size)]]
    reach = max((abs(offset) for taps in phases for offset, _ in taps), default=0)
    products = []  # (phase of rows, of columns, corners of the inputs in the padded x, matrix)
    for i, taps_y in enumerate(phases):
        for j, taps_x in enumerate(phases):
            taps = [(dy + reach, dx + reach, kernel[ty, tx]) for dy, ty in taps_y for dx, tx in taps_x]
            matrix = np.concatenate([tap for _, _, tap in taps] or [np.zeros((0, channels))])
            products.append((i, j, [tap[:2] for tap in taps], matrix))

    def convolution(x):
        batch, height, width, depth = x.shape
        rows, columns = -(-height // step), -(-width // step)
        if size > 1 or step > 1 or transpose:
            padded = np.zeros((batch, height + 2 * reach + step, width + 2 * reach + step, depth))
            padded[:, reach : reach + height, reach : reach + width] = x
        result = np.empty((batch, rows * len(phases), columns * len(phases), channels))

        def compute(task):
            b, top, i, j, corners, matrix, count = task
            n = min(count, rows - top)
            if size == step == len(phases) == 1:
                inputs = x[b, top : top + n]
            else:
                inputs = np.empty((n, columns, len(corners) * depth))
                for k, (y, z) in enumerate(corners):
                    y += top * step
                    inputs[:, :, k * depth : (k + 1) * depth] = padded[b, y : y + n * step : step, z : z + columns * step : step]
            total = inputs.reshape(n * columns, -1) @ matrix
            total += half
            np.floor(total, out=total)
            if leaky:
                total = leaky_relu(total)
            view = result[b, top * len(phases) + i : (top + n) * len(phases) : len(phases), j :: len(phases)]
            np.clip(total.reshape(n, columns, channels), lowest, LIMIT, out=view)

        tasks = []
        for product in products:
            positions = rows * columns
            pieces = max(min(-(-positions * max(len(product[3]), channels) // _CHUNK), rows, positions // _LEAST), 1)
            count = -(-rows // pieces)
            tasks += [(b, top, *product, count) for b in range(batch) for top in range(0, rows, count)]
        with _one_thread_per_product():
            if rows * columns * kernel.size < _SMALL:
                list(map(compute, tasks))
            else:
                list(_threads().map(compute, tasks))
        return result

    return convolution


@functools.cache
def _threads():
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="exact")


_blas = functools.cache(ThreadpoolController)
_products: dict = {"running": 0, "limit": None, "lock": threading.Lock()}


@contextlib.contextmanager
def _one_thread_per_product():
    """Inside, BLAS starts no threads: ours share the work, and its own would spin on beside TensorFlow's."""
    with _products["lock"]:
        if not _products["running"]:
            _products["limit"] = _blas().limit(limits=1, user_api="blas")
        _products["running"] += 1
    try:
        yield
    finally:
        with _products["lock"]:
            _products["running"] -= 1
            if not _products["running"]:
                _products["limit"].restore_original_limits()


def quantize_norm(beta, gamma) -> Quantized:
    """The integers of GDN's beta and gamma [in, out]; as `quantize_kernel`, for squares."""
    beta, gamma = np.asarray(beta, np.float64), np.asarray(gamma, np.float64)
    if not (np.isfinite(beta).all() and np.isfinite(gamma).all()):
        raise ValueError("weights are not finite")
    worst = float((gamma.sum(axis=0) * float(NORM_LIMIT) ** 2 + beta * 2.0 ** (2 * GRID_BITS)).max())
    shift = min(52 - math.ceil(math.log2(worst)) - 1, 14)
    integers, offsets = np.floor(gamma * 2.0**shift + 0.5), np.maximum(np.floor(beta * 2.0 ** (2 * GRID_BITS + shift) + 0.5), 1)
    quantized = Quantized(integers.astype(np.int64), offsets.astype(np.int64), np.array(shift, np.int32))
    if sum_bound(quantized, NORM_LIMIT**2) >= SUM_LIMIT:
        raise ValueError("GDN's weights are too large for exact sums")
    return quantized


def normalize(x, quantized: Quantized, inverse: bool):
    """GDN on the grid: a sum of integers, its square root, one quotient or product, rounded."""
    gamma, beta = quantized.kernel.astype(np.float64), quantized.bias.astype(np.float64)
    scale = 2.0 ** -(2.0 * GRID_BITS + float(quantized.shift))
    if is_array(x):
        x = np.clip(x, -NORM_LIMIT, NORM_LIMIT)
        with _one_thread_per_product():
            norm = np.sqrt((np.square(x) @ gamma + beta) * scale)
    else:
        x = tf.clip_by_value(x, -float(NORM_LIMIT), float(NORM_LIMIT))
        norm = tf.sqrt((tf.nn.conv2d(tf.square(x), gamma[None, None], 1, "VALID") + beta) * scale)
    return rescale(x * norm if inverse else x / norm, 0)


@functools.cache
def gate_tables():
    """(sigmoid, tanh) of -8 ... 8 in grid units, integers of 2^-15, float64 [2 * reach + 1].

    No value lies near enough to a half for the last bits of exp and tanh to matter (tested).
    """
    x = np.arange(-TABLE_REACH, TABLE_REACH + 1) / GRID
    sigmoid, tanh = 1 / (1 + np.exp(-x)), np.tanh(x)
    return tuple(np.floor(values * 2.0**GATE_BITS + 0.5) for values in (sigmoid, tanh))


def look_up(table, x, bits=GRID_BITS):
    """A gate table at integers x of a grid of 2^-bits, in units of 2^-(GATE_BITS + bits - GRID_BITS); between its entries, linear."""
    parts, last = 2 ** (bits - GRID_BITS), 2 * TABLE_REACH
    reach = TABLE_REACH * parts
    if is_array(x):
        x = np.clip(x, -reach, reach).astype(np.intp) + reach
        if parts == 1:
            return table[x]
        index = x // parts
        rest = x - index * parts
        return table[index] * (parts - rest) + table[np.minimum(index + 1, last)] * rest
    x = tf.cast(tf.clip_by_value(x, -float(reach), float(reach)), tf.int32) + reach
    table = tf.constant(table)
    if parts == 1:
        return tf.gather(table, x)
    index = x // parts
    rest = tf.cast(x - index * parts, tf.float64)
    return tf.gather(table, index) * (parts - rest) + tf.gather(table, tf.minimum(index + 1, last)) * rest
