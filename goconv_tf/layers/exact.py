"""Integer arithmetic in float64, for what encoder and decoder must compute to the last bit.

Activations are integers on a grid of 2^-10, kept within +-(2^21 - 1) (values up to 2048); kernels are integers with a power of
two as scale, one a layer. As every partial sum of a convolution stays under 2^53, float64 holds all of them exactly, in
whatever order a machine, a library or a number of threads adds them up. After each layer the sum is rounded to the grid again. What is
not a sum of products is one correctly rounded operation of IEEE 754 (a product, a quotient, a square root) or a table.

Layers that can do this have `quantize()`, which makes a `Quantized` from their present weights, and `exact(x)`, which computes
with it; `apply` chooses by the type of x.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

GRID_BITS = 10
GRID = 2.0**GRID_BITS
LIMIT = 2**21 - 1  # of activations, in grid units
KERNEL_BITS = 15
NORM_LIMIT = 2**17  # of what GDN squares, in grid units (values up to 128)
SUM_LIMIT = 2**53

GATE_BITS = 15  # of what the tables of sigmoid and tanh give
TABLE_REACH = 8 * 2**GRID_BITS  # both are flat beyond +-8


class Quantized(NamedTuple):
    """A layer's integers. kernel: any shape; bias: in units of 2^-(grid + shift); shift: the kernel stands for kernel * 2^-shift."""

    kernel: np.ndarray
    bias: np.ndarray
    shift: np.ndarray


def to_grid(x):
    """float tensor -> integers on the grid, float64; halves up."""
    return keep(tf.floor(tf.cast(x, tf.float64) * GRID + 0.5))


def from_grid(x):
    """Integers on the grid -> float32, which holds them exactly."""
    return tf.cast(x / GRID, tf.float32)


def keep(x):
    """x within the grid's limits."""
    return tf.clip_by_value(x, -float(LIMIT), float(LIMIT))


def is_exact(x) -> bool:
    """Whether a tensor, or the first of a pair, holds integers on the grid."""
    return (x[0] if isinstance(x, tuple) else x).dtype == tf.float64


def apply(layer, *inputs):
    """layer(*inputs), or its exact counterpart where the first input is on the grid."""
    return layer.exact(*inputs) if is_exact(inputs[0]) else layer(*inputs)


def leaky_relu(x):
    """LeakyReLU with slope 0.2; on the grid rounded right after."""
    if not is_exact(x):
        return tf.nn.leaky_relu(x, 0.2)
    return tf.where(x < 0, tf.floor(x * 0.2 + 0.5), x)


def quantize_kernel(kernel, bias) -> Quantized:
    """The integers of a convolution whose last kernel axis is its output; bias may be None.

    Raises:
      ValueError: if a sum could reach 2^53, or a weight is not finite.
    """
    kernel = np.asarray(kernel, np.float64)
    bias = np.zeros(kernel.shape[-1]) if bias is None else np.asarray(bias, np.float64)
    if not np.isfinite(kernel).all() or not np.isfinite(bias).all():
        raise ValueError("weights are not finite")
    largest = max(np.abs(kernel).max(initial=0.0), 1e-6)
    shift = min(KERNEL_BITS - 1 - math.floor(math.log2(largest)), 30)
    integers = np.clip(np.floor(kernel * 2.0**shift + 0.5), -(2**KERNEL_BITS) + 1, 2**KERNEL_BITS - 1)
    offsets = np.floor(bias * 2.0 ** (GRID_BITS + shift) + 0.5)
    if np.abs(offsets).max(initial=0.0) >= SUM_LIMIT:
        raise ValueError("weights are too large for exact sums")
    quantized = Quantized(integers.astype(np.int16), offsets.astype(np.int64), np.array(shift, np.int32))
    if sum_bound(quantized) >= SUM_LIMIT:
        raise ValueError("weights are too large for exact sums")
    return quantized


def sum_bound(quantized: Quantized, limit: int = LIMIT) -> float:
    """What no partial sum can exceed, from the integers themselves: sum of |kernel| * limit + |bias|, for the worst output."""
    # In float64, so that hostile integers cannot wrap around; 2^53 is compared with a margin of the sum's own rounding.
    kernel, bias = (np.abs(np.asarray(part, np.float64)) for part in (quantized.kernel, quantized.bias))
    return float((kernel.reshape(-1, kernel.shape[-1]).sum(axis=0) * limit + bias).max() * (1 + 1e-9))


def rescale(total, shift):
    """A sum of products -> the grid."""
    return keep(tf.floor(total * 2.0 ** -float(shift) + 0.5))


def quantize_norm(beta, gamma) -> Quantized:
    """The integers of GDN's beta and gamma [in, out]; as `quantize_kernel`, for squares."""
    beta, gamma = np.asarray(beta, np.float64), np.asarray(gamma, np.float64)
    worst = float((gamma.sum(axis=0) * float(NORM_LIMIT) ** 2 + beta * 2.0 ** (2 * GRID_BITS)).max())
    shift = min(52 - math.ceil(math.log2(worst)) - 1, 14)
    integers, offsets = np.floor(gamma * 2.0**shift + 0.5), np.maximum(np.floor(beta * 2.0 ** (2 * GRID_BITS + shift) + 0.5), 1)
    quantized = Quantized(integers.astype(np.int64), offsets.astype(np.int64), np.array(shift, np.int32))
    if sum_bound(quantized, NORM_LIMIT**2) >= SUM_LIMIT:
        raise ValueError("GDN's weights are too large for exact sums")
    return quantized


def normalize(x, quantized: Quantized, inverse: bool):
    """GDN on the grid: a sum of integers, its square root, one quotient or product, rounded."""
    x = tf.clip_by_value(x, -float(NORM_LIMIT), float(NORM_LIMIT))
    gamma = tf.constant(quantized.kernel[None, None], tf.float64)
    pool = tf.nn.conv2d(tf.square(x), gamma, 1, "VALID") + tf.constant(quantized.bias, tf.float64)
    norm = tf.sqrt(pool * 2.0 ** -(2.0 * GRID_BITS + float(quantized.shift)))
    return keep(tf.floor((x * norm if inverse else x / norm) + 0.5))


@functools.cache
def gate_tables():
    """(sigmoid, tanh) of -8 ... 8 in grid units, integers of 2^-15, float64 [2 * reach + 1].

    No value lies near enough to a half for the last bits of exp and tanh to matter (tested).
    """
    x = np.arange(-TABLE_REACH, TABLE_REACH + 1) / GRID
    sigmoid, tanh = 1 / (1 + np.exp(-x)), np.tanh(x)
    return tuple(np.floor(values * 2.0**GATE_BITS + 0.5) for values in (sigmoid, tanh))


def look_up(table, x):
    """A gate table at integers x on the grid."""
    index = tf.cast(tf.clip_by_value(x, -float(TABLE_REACH), float(TABLE_REACH)), tf.int32) + TABLE_REACH
    return tf.gather(tf.constant(table, tf.float64), index)
