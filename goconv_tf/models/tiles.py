"""Large pictures: the stages of a model computed tile by tile, each with as much around it as its results depend on.

A tile is a number of cells of CELL x CELL pixels. Every latent of the octave models has a whole number of positions in a
cell, so that strided convolutions fall on the same positions within a tile as in the whole picture, and zero padding
meets the picture's own borders only.
"""

import contextlib
import contextvars
import dataclasses
import itertools
from typing import Optional, Tuple

import numpy as np
import tensorflow as tf

from goconv_tf import limits

CELL = 128


class Extent(int):
    """For an argument that is a spatial size, int32 [2], of something with so many positions a side of a cell."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a stage's arguments and results lie over the cells.

    inputs: for each argument (flattened) its positions a side of a cell, an Extent, or None where it is not spatial.
    outputs: positions a side of a cell of each result.
    margin: cells around a tile that its results depend on.
    """

    inputs: Tuple[Optional[int], ...]
    outputs: Tuple[int, ...]
    margin: int


_tile: contextvars.ContextVar = contextvars.ContextVar("tile", default=None)


@contextlib.contextmanager
def tiled(cells: Optional[int], window=None):
    """Inside, stages are computed in tiles of `cells` x `cells` cells; None: whole.

    window: ((top, bottom), (left, right)) in cells: stages give this part of their results only.
    """
    token = _tile.set(None if cells is None else (cells, window))
    try:
        yield
    finally:
        _tile.reset(token)


def is_tiled() -> bool:
    """Whether stages are computed in tiles now."""
    return _tile.get() is not None


def _extent(unit, value):
    return [int(n) for n in (value if isinstance(unit, Extent) else value.shape[1:3])]


def run(function, geometry: Geometry, args):
    """function(*args) tile by tile: tensors where it gives tensors, arrays where it gives arrays; pictures are rounded to uint8."""
    cells, window = _tile.get()
    flat = tf.nest.flatten(args)
    spatial = [(unit, x) for unit, x in zip(geometry.inputs, flat) if unit is not None and x is not None]
    finest, value = max(spatial, key=lambda pair: pair[0])
    sizes = _extent(finest, value)
    counts = [-(-n // finest) for n in sizes]
    window = window or tuple((0, n) for n in counts)
    outputs = None
    for top, left in itertools.product(*(range(first, last, cells) for first, last in window)):
        limits.check()
        starts = [max(first - geometry.margin, 0) for first in (top, left)]
        ends = [min(first + cells, last) for first, (_, last) in zip((top, left), window)]
        stops = [min(end + geometry.margin, count) for end, count in zip(ends, counts)]

        def cut(unit, x, starts=starts, stops=stops):
            if unit is None or x is None:
                return x
            if isinstance(unit, Extent):
                return tf.constant([min(int(n), b * unit) - a * unit for n, a, b in zip(x, starts, stops)])
            return x[:, starts[0] * unit : stops[0] * unit, starts[1] * unit : stops[1] * unit]

        pieces = [cut(unit, x) for unit, x in zip(geometry.inputs, flat)]
        results = function(*tf.nest.pack_sequence_as(args, pieces))
        if outputs is None:
            form, are_tensors = results, tf.is_tensor(tf.nest.flatten(results)[0])
            outputs = []
            for unit, result in zip(geometry.outputs, tf.nest.flatten(results)):
                shape = [-(-min(n * unit, last * unit * finest) // finest) - first * unit for n, (first, last) in zip(sizes, window)]
                outputs.append(np.empty((1, *shape, result.shape[-1]), np.uint8 if unit == CELL else np.float32))
        for unit, output, result in zip(geometry.outputs, outputs, tf.nest.flatten(results)):
            y, x = ((first - start) * unit for first, start in zip((top, left), starts))
            into = output[
                :, (top - window[0][0]) * unit : (ends[0] - window[0][0]) * unit, (left - window[1][0]) * unit : (ends[1] - window[1][0]) * unit
            ]
            piece = np.asarray(result)[:, y : y + into.shape[1], x : x + into.shape[2]]
            into[:] = to_uint8(piece) if unit == CELL else piece
    return tf.nest.pack_sequence_as(form, [tf.constant(x) if are_tensors and x.dtype != np.uint8 else x for x in outputs])


def to_uint8(pictures):
    """Pictures in 8-bit units, float or already uint8 -> uint8 array."""
    if pictures.dtype == np.uint8:
        return pictures
    return tf.cast(tf.round(tf.clip_by_value(pictures, 0.0, 255.0)), tf.uint8).numpy()
