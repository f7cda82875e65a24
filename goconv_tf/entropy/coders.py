"""Range coders: tfc's ops, and the range-coder package. Both code the same integers with the same tables.

Integers outside a row's range are sent as its escape symbol; after all symbols follow, for the
escaped ones in order, how many binary digits lie outside, then their signs and digits. Damaged
data can therefore give wrong integers, but never more or larger ones than the tables allow.
(tfc's own overflow code does not end on some damaged strings.)
"""

import os
import tempfile

import numpy as np
import tensorflow as tf
from tensorflow_compression.python.ops import gen_ops

from goconv_tf import limits
from goconv_tf.entropy.tables import ESCAPE_DIGITS
from goconv_tf.errors import BitstreamError


class _Coder:
    """What both coders share: blocks of symbols, and escapes."""

    def encode(self, symbols, indexes, table):
        """Bytes of symbols, int32 [n], each by the row of the `CodingTable` that indexes, int32 [n], give.

        Raises:
          ValueError: if a symbol lies 2^22 - 1 or further outside its row.
        """
        escaped = []  # (how far outside, at least 1, so that the leading digit need not be sent; whether below)

        def batches():
            for block in _blocks(len(symbols)):
                rows = indexes[block]
                values, escape = symbols[block] - table.offset[rows], table.escape[rows]
                outside = np.flatnonzero((values < 0) | (values >= escape))
                if len(outside):
                    far = values[outside]
                    below = far < 0
                    escaped.append((np.where(below, -far, far - escape[outside] + 1).astype(np.int64), below))
                    values[outside] = escape[outside]
                yield values, rows
            excess, below = (np.concatenate(parts) for parts in zip(*escaped)) if escaped else (np.zeros(0, np.int64), np.zeros(0, bool))
            if (excess >= 2**ESCAPE_DIGITS).any():
                raise ValueError("a latent is too large to be coded")
            digits = np.floor(np.log2(np.maximum(excess, 1))).astype(np.int64)
            bits = [excess[k] >> shift & 1 for k, n in enumerate(digits) for shift in range(n)]
            digits_row, bit_row = len(table.rows) - 2, len(table.rows) - 1
            rows = [np.full(len(digits), digits_row), np.full(len(digits) + len(bits), bit_row)]
            yield np.concatenate([digits, below, bits]).astype(np.int32), np.concatenate(rows).astype(np.int32)

        return self._encode(batches(), table)

    def decode(self, string, indexes, table, strict=True):
        """The symbols, int32 [n], in an encoder's bytes.

        Raises:
          BitstreamError: where it notices that the bytes are not an encoder's (never with strict=False), or at the end of `limits.seconds`.
        """
        decode, close = self._open(string, table)
        values = np.empty(len(indexes), np.int32)
        outside = []
        try:
            for block in _blocks(len(indexes)):
                limits.check()
                values[block] = decode(indexes[block])
                outside.append((block.start + np.flatnonzero(values[block] == table.escape[indexes[block]])).astype(np.uint32))
                values[block] += table.offset[indexes[block]]
            self._decode_escapes(decode, np.concatenate(outside) if outside else np.zeros(0, np.uint32), values, indexes, table)
        finally:
            ended = close()
        if strict and not ended:
            raise BitstreamError("the entropy coded data does not end where it should")
        return values

    @staticmethod
    def _decode_escapes(decode, outside, values, indexes, table):
        """Adds how far outside its row each of the `values` at `outside` lies; hostile data may have escaped all of them."""
        digits, below = np.empty((2, len(outside)), np.uint8)
        for part, row in ((digits, len(table.rows) - 2), (below, len(table.rows) - 1)):
            for block in _blocks(len(outside)):
                limits.check()
                part[block] = decode(np.full(block.stop - block.start, row))
        for block in _blocks(len(outside), 2**18):
            limits.check()
            n = digits[block].astype(np.int64)
            ends = n.cumsum()
            owner = np.repeat(np.arange(len(n)), n)
            shift = np.arange(len(owner)) - (ends - n)[owner]
            bits = decode(np.full(len(owner), len(table.rows) - 1))
            excess = 2**n + np.bincount(owner, bits * 2.0**shift, len(n)).astype(np.int64)
            escape = table.escape[indexes[outside[block]]]
            values[outside[block]] += np.where(below[block], -excess - escape, excess - 1).astype(np.int32)


def _blocks(count, size=2**22):
    """Slices of what is coded at once, so that memory stays bounded."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class TfcCoder(_Coder):
    """tensorflow-compression's range coder ops."""

    name = "tfc"

    def _encode(self, batches, table):
        handle = gen_ops.create_range_encoder([], table.lookup)
        for values, rows in batches:
            handle = gen_ops.entropy_encode_index(handle, rows, values)
        return gen_ops.entropy_encode_finalize(handle).numpy()

    def _open(self, string, table):
        handle = gen_ops.create_range_decoder(tf.constant(string), table.lookup)

        def decode(rows):
            nonlocal handle
            handle, values = gen_ops.entropy_decode_index(handle, rows.astype(np.int32), rows.shape, tf.int32)
            return values.numpy()

        def close():
            return bool(gen_ops.entropy_decode_finalize(handle))

        return decode, close


class RangeCoderCoder(_Coder):
    """The range-coder package, which works on files and takes one row of the table a call.

    Symbols of a batch are therefore sent row by row, in order within each. Its decoder takes
    rows of at most 1024 symbols: longer ones are sent as a block of 1024 and a symbol within.
    """

    name = "range-coder"
    _block = 1024

    def encode(self, symbols, indexes, table):
        string = super().encode(symbols, indexes, table)
        # The package does not tell when its file could not be written.
        if (self.decode(string, indexes, table, strict=False) != symbols).any():
            raise OSError(f"{tempfile.gettempdir()}: what is coded there does not decode again; is there space left?")
        return string

    @classmethod
    def _split(cls, cdf):
        """Cumulative frequencies of the blocks, and of the symbols within each block."""
        blocks = [cdf[a : a + cls._block + 1] for a in range(0, len(cdf) - 1, cls._block)]
        return [block[0] for block in blocks] + cdf[-1:], [[n - block[0] for n in block] for block in blocks]

    @staticmethod
    def _batches(rows, table):
        """Yields (cumulative frequencies, positions) for every row in use."""
        order = np.argsort(rows, kind="stable")
        used, starts = np.unique(rows[order], return_index=True)
        for row, where in zip(used, np.split(order, starts[1:])):
            yield table.rows[row], where

    def _encode(self, batches, table):
        import range_coder

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "stream")
            encoder = range_coder.RangeEncoder(path)
            for values, rows in batches:
                for cdf, where in self._batches(rows, table):
                    if len(cdf) - 1 <= self._block:
                        encoder.encode(values[where].tolist(), cdf)
                    else:
                        coarse, fine = self._split(cdf)
                        block, rest = np.divmod(values[where], self._block)
                        encoder.encode(block.tolist(), coarse)
                        for k, n in zip(block, rest.tolist()):
                            encoder.encode([n], fine[k])
            encoder.close()
            with open(path, "rb") as f:
                return f.read()

    def _open(self, string, table):
        import range_coder

        folder = tempfile.TemporaryDirectory()
        path = os.path.join(folder.name, "stream")
        with open(path, "wb") as f:
            f.write(string)
        decoder = range_coder.RangeDecoder(path)

        def decode(rows):
            values = np.zeros(len(rows), np.int32)
            for cdf, where in self._batches(rows, table):
                if len(cdf) - 1 <= self._block:
                    values[where] = decoder.decode(len(where), cdf)
                else:
                    coarse, fine = self._split(cdf)
                    block = np.array(decoder.decode(len(where), coarse))
                    for some in _blocks(len(where), 2**12):  # a call a symbol is slow
                        limits.check()
                        values[where[some]] = [k * self._block + decoder.decode(1, fine[k])[0] for k in block[some]]
            return values

        def close():
            decoder.close()
            folder.cleanup()
            return True

        return decode, close


CODERS = {coder.name: coder for coder in (TfcCoder(), RangeCoderCoder())}
