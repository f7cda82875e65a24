"""Coding as TensorFlow graph operations alone: the same walk, the same tables, the same bytes as `TfcCoder`'s.

Tensors are compared by tf.equal: where TensorFlow is first imported inside absl's app.run, `==` between them compares objects.
"""

import tensorflow as tf
from tensorflow_compression.python.ops import gen_ops

from goconv_tf.crc import crc32
from goconv_tf.entropy.tables import ESCAPE_DIGITS
from goconv_tf.entropy.walkers import Decoder, Encoder


def require(condition, message, value):
    """The tensor `value`, once the condition (bool []) holds; otherwise InvalidArgumentError with the message."""
    if not tf.is_tensor(condition):
        raise TypeError(f"{message}: the condition is no tensor")
    with tf.control_dependencies([tf.debugging.Assert(condition, [message])]):
        return tf.identity(value)


def _escape_bits(digits):
    """bool [n, ESCAPE_DIGITS]: which binary digits of each excess are sent, lowest first."""
    return tf.range(ESCAPE_DIGITS) < digits[:, None]


def encode(symbols, indexes, table):
    """A string [] of symbols int32 [n], of at most 2^20, with the rows of a CodingTable in indexes int32 [n]."""
    values = symbols - tf.gather(tf.constant(table.offset), indexes)
    escape = tf.gather(tf.constant(table.escape), indexes)
    outside = (values < 0) | (values >= escape)
    value, limit = tf.boolean_mask(values, outside), tf.boolean_mask(escape, outside)
    excess = tf.where(value < 0, -value, value - limit + 1)
    digits = tf.reduce_sum(tf.cast(excess[:, None] >= 2 ** tf.range(1, ESCAPE_DIGITS), tf.int32), axis=1)
    bits = tf.boolean_mask(tf.bitwise.right_shift(excess[:, None], tf.range(ESCAPE_DIGITS)) & 1, _escape_bits(digits))
    digits_row, bit_row = len(table.rows) - 2, len(table.rows) - 1
    sent = tf.concat([tf.where(outside, escape, values), digits, tf.cast(value < 0, tf.int32), bits], axis=0)
    rows = tf.concat([indexes, tf.fill([tf.size(digits)], digits_row), tf.fill([tf.size(digits) + tf.size(bits)], bit_row)], axis=0)
    handle = gen_ops.create_range_encoder([], tf.constant(table.lookup))
    return gen_ops.entropy_encode_finalize(gen_ops.entropy_encode_index(handle, rows, sent))


def decode(string, indexes, table):
    """(symbols int32 [n], whether the string ended where it should, bool []); the inverse of `encode`."""
    handle = gen_ops.create_range_decoder(string, tf.constant(table.lookup))

    def take(handle, rows):
        return gen_ops.entropy_decode_index(handle, rows, tf.shape(rows), tf.int32)

    handle, values = take(handle, indexes)
    escape = tf.gather(tf.constant(table.escape), indexes)
    where = tf.where(tf.equal(values, escape))
    limit = tf.gather_nd(escape, where)
    handle, digits = take(handle, tf.fill([tf.size(limit)], len(table.rows) - 2))
    handle, bits = take(handle, tf.fill([tf.size(limit) + tf.reduce_sum(digits)], len(table.rows) - 1))
    below, bits = bits[: tf.size(limit)], bits[tf.size(limit) :]
    bits = tf.scatter_nd(tf.where(_escape_bits(digits)), bits, [tf.size(limit), ESCAPE_DIGITS])
    excess = tf.bitwise.left_shift(1, digits) + tf.reduce_sum(tf.bitwise.left_shift(bits, tf.range(ESCAPE_DIGITS)), axis=1)
    values = tf.tensor_scatter_nd_update(values, where, tf.where(below > 0, -excess, limit + excess - 1))
    return values + tf.gather(tf.constant(table.offset), indexes), gen_ops.entropy_decode_finalize(handle)


class GraphEncoder(Encoder):
    """An Encoder inside a graph: `strings` and `checksums` are tensors."""

    def __init__(self, latents):
        super().__init__(latents, None)

    def write(self, name, symbols, indexes, table):
        self.strings[name] = encode(symbols, indexes, table)
        self.checksums[name] = self.checksum = crc32(symbols, self.checksum)


class GraphDecoder(Decoder):
    """A Decoder inside a graph: strings and sizes are tensors.

    present: {name: whether the latent is in the file, bool []}; one that is not is zero. Names that are not in it always are.
    """

    def __init__(self, strings, shapes, present):
        super().__init__(strings, shapes, None)
        self.present = present

    def read(self, name, indexes, table):
        def decoded():
            return decode(self.strings[name], indexes, table)

        def absent():
            return tf.zeros_like(indexes), tf.constant(True)

        symbols, whole = tf.cond(self.present[name], decoded, absent) if name in self.present else decoded()
        symbols = require(whole, "the entropy coded data does not end where it should", symbols)
        self.checksums[name] = self.checksum = crc32(symbols, self.checksum)
        return symbols
