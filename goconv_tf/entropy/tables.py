"""Integer coding tables: built once from a trained prior, then stored and never rebuilt."""

import functools

import numpy as np
import tensorflow as tf
import tensorflow_compression as tfc

PRECISION = 16  # bits of a cumulative frequency
TAIL_MASS = 2.0**-12  # probability left to the escape code (2^-8 in tfc 1, which the originals used)
ESCAPE_DIGITS = 22  # integers outside a row by less than 2**22 - 1 can be sent


def _escape_rows():
    """Rows for what lies outside a row: its number of binary digits less one, and fair bits."""
    frequencies = [max(2 ** (PRECISION - 1 - k), 1) for k in range(ESCAPE_DIGITS)]
    frequencies[0] -= sum(frequencies) - 2**PRECISION
    return [[0, *np.cumsum(frequencies).tolist()], [0, 2 ** (PRECISION - 1), 2**PRECISION]]


class CodingTable:
    """Cumulative frequencies of one entropy model.

    Args:
      cdf: int32 [n], in tfc's form: for each row a negative precision, then 0 ... 2**precision.
        A row's last symbol is its escape.
      offset: int32 [rows], the integer that a row's symbol 0 stands for.
    """

    def __init__(self, cdf, offset):
        self.cdf = np.asarray(cdf, np.int32)
        self.offset = np.asarray(offset, np.int32)

    def check(self, rows):
        """ValueError unless these are so many rows, each of rising cumulative frequencies from 0 to 2**PRECISION."""
        starts = self.cdf[self.cdf < 0]
        if self.cdf.ndim != 1 or self.offset.shape != (rows,) or len(starts) != rows or (starts != -PRECISION).any() or self.cdf[0] >= 0:
            raise ValueError(f"cdf {list(self.cdf.shape)} with offset {list(self.offset.shape)} is not a table of {rows} rows")
        if (abs(self.offset.astype(np.int64)) > 2 ** (ESCAPE_DIGITS - 2)).any():  # what is about 0 would be out of reach
            raise ValueError("an offset is too large")
        for row in self.rows[:-2]:
            if len(row) < 2 or row[0] != 0 or row[-1] != 2**PRECISION or (np.diff(row) <= 0).any():
                raise ValueError(f"not cumulative frequencies of {PRECISION} bits")

    @functools.cached_property
    def rows(self):
        """Cumulative frequencies [0 ... 2**precision] as lists: the table's own, then the two of `_escape_rows`."""
        starts = np.append(np.flatnonzero(self.cdf < 0), len(self.cdf))
        own = [self.cdf[a + 1 : b].tolist() for a, b in zip(starts[:-1], starts[1:])]
        return [*own, *_escape_rows()]

    @functools.cached_property
    def escape(self):
        """int32 [rows]: each row's escape symbol."""
        return np.array([len(row) - 2 for row in self.rows[:-2]], np.int32)

    @functools.cached_property
    def lookup(self):
        """All rows as tfc's range coder ops take them."""
        return np.concatenate([[PRECISION, *row] for row in self.rows]).astype(np.int32)


def _compiled(build):
    """build(), compiled: searches for medians and tails are loops of thousands of steps. (The partial keeps TensorFlow from warning of retracing.)"""
    return tf.function(functools.partial(build))()


def factorized_offset(prior):
    """float32 [channels]: the fraction of each channel's median, which a tfc distribution is rounded about."""
    return _compiled(lambda: tf.broadcast_to(tfc.quantization_offset(prior), prior.batch_shape))


def factorized_table(prior) -> tuple:
    """(CodingTable, quantization offset float32 [channels]) of a tfc distribution per channel."""

    def build():
        model = tfc.ContinuousBatchedEntropyModel(
            prior, coding_rank=3, compression=True, stateless=True, tail_mass=TAIL_MASS, range_coder_precision=PRECISION
        )
        return model.cdf, model.cdf_offset, tf.broadcast_to(model.quantization_offset, prior.batch_shape)

    cdf, cdf_offset, offset = (value.numpy() for value in _compiled(build))
    return CodingTable(cdf, cdf_offset), offset


def scale_table(scales) -> CodingTable:
    """CodingTable with one row for each zero-mean normal distribution of the given scales."""
    scales = tf.constant(scales, tf.float32)
    model = tfc.ContinuousIndexedEntropyModel(
        prior_fn=tfc.NoisyNormal,
        index_ranges=(len(scales),),
        parameter_fns=dict(loc=lambda _: 0.0, scale=lambda i: tf.gather(scales, tf.cast(i, tf.int32))),
        coding_rank=3,
        channel_axis=None,
        compression=True,
        tail_mass=TAIL_MASS,
        range_coder_precision=PRECISION,
    )
    return CodingTable(model.cdf.numpy(), model.cdf_offset.numpy())
