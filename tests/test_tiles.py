"""Coding in tiles: what a tile's results depend on, equality with whole pictures, regions, limits."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import draw

from goconv_tf import codec, memory
from goconv_tf.errors import UsageError
from goconv_tf.layers import OctaveTensor, exact
from goconv_tf.models import tiles

CELLS, MIDDLE = 9, 4


def inputs_of(model):
    """{stage: (its arguments over CELLS x CELLS cells, positions a cell of each result)}."""
    rng = np.random.default_rng(0)

    def grid(per_cell, channels, spread=3.0):
        return np.floor(rng.normal(0, spread, (1, CELLS * per_cell, CELLS * per_cell, channels)) * exact.GRID)

    def floats(per_cell, channels):
        return tf.constant(rng.normal(0, 3, (1, CELLS * per_cell, CELLS * per_cell, channels)), tf.float32)

    y, z = (model.y_high_channels, model.y_low_channels), (model.z_high_channels, model.z_low_channels)
    lmbda, size = tf.constant([0.01]), tf.constant([CELLS * 8, CELLS * 8])
    picture = rng.integers(0, 256, (1, CELLS * tiles.CELL, CELLS * tiles.CELL, 3)).astype(np.uint8)
    latents = OctaveTensor(floats(8, y[0]), floats(4, y[1]))
    stages = {"transform": (picture, lmbda), "synthesis": (latents, lmbda)}
    if model.config.model == "crpe":
        stages["hyper_analysis1"] = (latents,)
        stages["hyper_synthesis1"] = (grid(2, z[0]), grid(1, z[1]), size)
        stages["estimate_y_low"] = (grid(4, 2 * y[1]), grid(1, 2 * z[1]))
        stages["estimate_y_high"] = (grid(4, y[1]), grid(2, 2 * z[0]), grid(8, 2 * y[0]))
    else:
        stages["hyper_analysis"] = (latents,)
        stages["hyper_synthesis"] = (grid(2, z[0]), grid(1, z[1]), size)
        stages["parameter_estimation"] = (grid(4, y[1]), grid(8, 2 * y[0]))
    return stages


@pytest.mark.parametrize("kind", ["model", "crpe"])
def test_a_margin_holds_all_that_a_tile_depends_on(kind, request):
    """Inputs beyond the margin of the middle cell are exchanged; its results stay the same to the last bit."""
    model = request.getfixturevalue(kind)
    for name, arguments in inputs_of(model).items():
        geometry = getattr(type(model), name).geometry

        def exchange(unit, x, near=geometry.margin):
            if unit is None or isinstance(unit, tiles.Extent):
                return x
            inside = slice((MIDDLE - near) * unit, (MIDDLE + near + 1) * unit)
            other = np.array(x)[:, ::-1, ::-1] * (1 if x.dtype == np.uint8 else -2) + 1
            other[:, inside, inside] = np.array(x)[:, inside, inside]
            return tf.constant(other) if tf.is_tensor(x) else other

        flat = [exchange(unit, x) for unit, x in zip(geometry.inputs, tf.nest.flatten(arguments))]
        results = tf.nest.flatten(getattr(model, name)(*arguments))
        others = tf.nest.flatten(getattr(model, name)(*tf.nest.pack_sequence_as(arguments, flat)))
        for unit, a, b in zip(geometry.outputs, results, others):
            middle = slice(MIDDLE * unit, (MIDDLE + 1) * unit)
            np.testing.assert_array_equal(a[:, middle, middle], b[:, middle, middle], err_msg=name)
            assert (np.array(a) != np.array(b)).any(), name


@pytest.mark.parametrize("kind", ["model", "crpe"])
def test_tiles_give_what_the_whole_picture_gives(kind, request):
    model = request.getfixturevalue(kind)
    picture = draw(500, 700, 3)  # neither cells nor the model's alignment fit
    whole = codec.compress(model, picture, reconstruct=True)
    pieces = codec.compress(model, picture, reconstruct=True, tile=256)
    assert pieces.data == whole.data
    assert np.abs(pieces.reconstruction.astype(int) - whole.reconstruction).max() <= 1
    decoded = codec.decompress(model, whole.data, tile=128)
    assert decoded.shape == picture.shape
    assert np.abs(decoded.astype(int) - whole.reconstruction).max() <= 1
    for region in ((0, 0, 1, 1), (130, 250, 300, 140), (699, 499, 1, 1), (0, 0, 700, 500)):
        x, y, w, h = region
        for tile in (None, 128):
            part = codec.decompress(model, whole.data, region=region, tile=tile)
            assert part.shape == (h, w, 3)
            assert np.abs(part.astype(int) - whole.reconstruction[y : y + h, x : x + w]).max() <= 1


def test_large_pictures_are_tiled_without_asking(model, monkeypatch):
    picture = draw(300, 400)
    asked = []
    original = tiles.tiled
    monkeypatch.setattr(tiles, "tiled", lambda cells, window=None: asked.append(cells) or original(cells, window))
    data = codec.compress(model, picture).data
    assert set(asked) == {None}
    monkeypatch.setattr(memory, "WHOLE_BYTES", 100_000)
    monkeypatch.setattr(memory, "TILE_BYTES", 10 * 128 * 128 * model.bytes_per_pixel)
    asked.clear()
    assert codec.compress(model, picture).data == data
    assert set(asked) == {1}  # 3 x 3 cells with those around it
    asked.clear()
    codec.compress(model, picture, tile=0)
    assert set(asked) == {None}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tile": 100}, "multiple of 128"),
        ({"tile": -128}, "multiple of 128"),
        ({"tile": 128, "exact": False}, "cannot be coded in tiles"),
    ],
)
def test_wrong_tiles(model, options, reason):
    with pytest.raises(UsageError, match=reason):
        codec.compress(model, draw(64, 64), **options)


def test_scalable_pictures_are_whole(rnn):
    with pytest.raises(UsageError, match="cannot be coded in tiles"):
        codec.compress(rnn, draw(64, 64), tile=128)


@pytest.mark.parametrize("region", [(0, 0, 0, 5), (-1, 0, 5, 5), (60, 0, 5, 5), (0, 60, 5, 5)])
def test_wrong_regions(model, region):
    data = codec.compress(model, draw(64, 64)).data
    with pytest.raises(UsageError, match="64 x 64"):
        codec.decompress(model, data, region=np.array(region))


@pytest.mark.parametrize("region", [(), (1, 2, 3), (0, 0, 5, 5, 5)])
def test_regions_are_four_numbers(model, region):
    data = codec.compress(model, draw(64, 64)).data
    with pytest.raises(UsageError, match=f"not {len(region)} numbers"):
        codec.decompress(model, data, region=region)


def test_pictures_are_rounded_and_clipped():
    np.testing.assert_array_equal(tiles.to_uint8(tf.constant([-3.0, 0.4, 0.6, 254.7, 300.0])), [0, 0, 1, 255, 255])
