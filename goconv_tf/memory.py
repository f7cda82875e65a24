"""How much memory there is, and the tiles that large pictures are coded in for the lack of it."""

import contextlib
import math
import os

from goconv_tf.errors import GoConvError, UsageError, first_line

WHOLE_BYTES = 2**32  # pictures that need more memory than this are coded in tiles
TILE_BYTES = 3 * 2**29  # of memory that a tile with a cell around it may need


def available_memory() -> float:
    """Bytes of memory that are free for use, by the machine and by this process' control groups; infinite where the system does not say."""
    available = _number_after("/proc/meminfo", "MemAvailable:") * 1024
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as f:
            groups = [line.rstrip("\n").split(":", 2) for line in f]
    except (OSError, ValueError):
        return available
    for _, controllers, path in groups:
        if controllers == "":
            root, limit, used, inactive = "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used, inactive = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # Limits of all groups above count; a container sees its own as the root, under whatever path.
        parts = [part for part in path.split("/") if part]
        for count in range(len(parts) + 1):
            folder = os.path.join(root, *parts[:count])
            most, now, cached = (_number_after(os.path.join(folder, name), key) for name, key in ((limit, ""), (used, ""), ("memory.stat", inactive)))
            if max(most, now) < math.inf:
                available = min(available, max(most - now + (cached if cached < math.inf else 0), 0.0))
    return available


def _number_after(path, key) -> float:
    """The number in a file's line that begins with key; infinite where there is none."""
    try:
        with open(path, encoding="ascii") as f:
            return next(float(line[len(key) :].split()[0]) for line in f if line.startswith(key))
    except (OSError, StopIteration, ValueError, IndexError):
        return math.inf


def check(needed, what, available=None):
    """GoConvError if so many bytes are more than are available: as just found, or by now."""
    available = available_memory() if available is None else available
    if needed > available:
        raise GoConvError(f"{what} need about {needed / 2**30:.1f} GiB of memory; {available / 2**30:.1f} GiB are available")


@contextlib.contextmanager
def guarded():
    """Inside, or in what this decorates, memory that TensorFlow finds exhausted, such as a GPU's, is a GoConvError."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise GoConvError(f"not enough memory: {first_line(error)}") from error


def choose_tile(model, size, tile=None, exact=True):
    """Cells a side of the tiles (see `goconv_tf.models.tiles`) for a picture of this padded size, (height, width); None: whole.

    tile: pixels a side, 0 for whole pictures, None to choose.

    Raises:
      UsageError: if the model cannot be tiled so.
      GoConvError: where the picture would exhaust the memory, rather than the machine.
    """
    from goconv_tf.models.tiles import CELL

    if tile and (tile < 0 or tile % CELL):
        raise UsageError(f"the side of a tile must be a multiple of {CELL} pixels, not {tile}")
    possible = model.can_tile and exact
    if tile and not possible:
        raise UsageError(f"{model.config.model} cannot be coded in tiles" + ("" if exact else " with --noexact"))
    pixels, available = size[0] * size[1], available_memory()
    whole, tiled = pixels * model.bytes_per_pixel, pixels * model.bytes_per_tiled_pixel if possible else 0
    if tile is None and possible and whole > min(WHOLE_BYTES, available):
        room = max(min(TILE_BYTES, available - tiled), 0)
        tile = max(int(math.sqrt(room / model.bytes_per_pixel) / CELL) - 2, 1) * CELL
    needed = whole if not tile else min((tile + 2 * CELL) ** 2, pixels) * model.bytes_per_pixel + tiled
    check(needed, f"{size[1]} x {size[0]} pixels", available)
    return tile // CELL if tile else None
