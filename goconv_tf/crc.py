"""The checksums of a stream as TensorFlow graph operations: CRC-16 as `binascii.crc_hqx`, CRC-32 as `zlib.crc32`.

A CRC is linear: the states of two halves of the data give that of the whole, once the first is carried over the zeros that
stand for the second. So neighbours are joined in a tree, all pairs of a level at once, by tables for 1, 2, 4, ... units of zeros.
"""

import numpy as np
import tensorflow as tf

LEVELS = 31  # data of up to 2^31 - 1 units


def _join(tables, states):
    """States carried over zeros. tables: [bytes of a state, 256], what a byte of it becomes."""
    carried = tables[0][states & 255]
    for k in range(1, len(tables)):
        carried ^= tables[k][states >> 8 * k & 255]
    return carried


def _make_tables(step, width, unit):
    """int64 [LEVELS, width, 256]; step: a state of `width` bytes -> that after a zero byte; unit: bytes of data a leaf."""
    level = np.arange(256, dtype=np.int64) << 8 * np.arange(width)[:, None]
    for _ in range(unit):
        level = step(level)
    levels = [level]
    while len(levels) < LEVELS:
        levels.append(_join(levels[-1], levels[-1]))
    return np.stack(levels)


def _step16(state):
    for _ in range(8):
        state = (state << 1 & 0xFFFF) ^ 0x1021 * (state >> 15)
    return state


def _step32(state):
    for _ in range(8):
        state = (state >> 1) ^ 0xEDB88320 * (state & 1)
    return state


_TABLES16 = _make_tables(_step16, 2, 1)
_TABLES32 = _make_tables(_step32, 4, 4)


def _carry(tables, states):
    carried = tf.gather(tables[0], states & 255)
    for k in range(1, tables.shape[0]):
        carried ^= tf.gather(tables[k], tf.bitwise.right_shift(states, tf.constant(8 * k, tf.int64)) & 255)
    return carried


def _fold(tables, state, units):
    """State int64 [] after data: units int64 [n], each at that end of a state where data enters."""
    tables = tf.constant(tables)
    states = tf.concat([[state], _carry(tables[0], units)], axis=0)

    def join(level, states):
        states = tf.pad(states, [[tf.size(states) % 2, 0]])  # zeros in front change nothing
        pairs = tf.reshape(states, [-1, 2])
        return level + 1, _carry(tables[level], pairs[:, 0]) ^ pairs[:, 1]

    shapes = [tf.TensorShape([]), tf.TensorShape([None])]
    _, states = tf.while_loop(lambda level, states: tf.size(states) > 1, join, [0, states], shape_invariants=shapes)
    return states[0]


@tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int64)], autograph=False)
def crc16(data, before):
    """CRC-16, int64 [], of a string [] that continues what gave the CRC `before`; 0 at the beginning."""
    return _fold(_TABLES16, before, tf.cast(tf.io.decode_raw(data, tf.uint8), tf.int64) * 256)


@tf.function(input_signature=[tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int64)], autograph=False)
def crc32(integers, before):
    """CRC-32, int64 [], of the little-endian bytes of integers [n]; `before` as in `crc16`."""
    every = tf.constant(0xFFFFFFFF, tf.int64)
    return _fold(_TABLES32, before ^ every, tf.cast(integers, tf.int64) & every) ^ every
