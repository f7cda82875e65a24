"""Training patches from folders of photographs.

Every batch is a function of a seed and the step's number, so that a run that was stopped and
started again sees the batches an unbroken one would have seen.
"""

import collections
import glob
import os
import threading
import time

import numpy as np

from goconv_tf import picture_io
from goconv_tf.errors import DataError, GoConvError, ImageError, printable

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
MEMORY_TRIES, MEMORY_SECONDS = 7, 10.0  # how often, and how far apart, a picture is read that memory is too short for


def find_pictures(patterns):
    """Sorted paths of the PNG, JPEG and WebP files that match glob patterns or lie in folders; DataError if one of these has none."""
    found = set()
    for pattern in patterns:
        files = os.path.join(glob.escape(pattern), "**", "*") if os.path.isdir(pattern) else pattern
        matches = [p for p in glob.glob(files, recursive=True) if p.lower().endswith(EXTENSIONS)]
        if not matches:
            raise DataError(f"no PNG, JPEG or WebP pictures match {pattern}")
        found.update(matches)
    return sorted(found)


def read_rgb(path):
    """A picture as `picture_io.read_picture` gives it; DataError if that refuses it."""
    try:
        return picture_io.read_picture(path)
    except ImageError as error:
        raise DataError(str(error)) from error


def vivid(patch, rng):
    """A patch with its channels in another order and its saturation multiplied by 1 to 16: photographs hold few saturated colours.

    Args:
      patch: uint8 [h, w, 3].
      rng: numpy Generator.

    Returns:
      uint8 [h, w, 3]; the mean of the three channels is kept where nothing is clipped.
    """
    patch = patch[..., rng.permutation(3)].astype(np.float32)
    grey = patch.mean(-1, keepdims=True)
    return np.clip(np.rint(grey + 16 ** rng.random() * (patch - grey)), 0, 255).astype(np.uint8)


class PatchSource:
    """Draws training batches; decoded pictures are kept only while they fit a cache.

    Args:
      paths: picture files. Those that cannot be read, or with a side under `patch`, are left out;
        `unreadable` and `too_small` count them. Those that turn out to be damaged when decoded are
        replaced by the next one drawn, and named in `damaged`.
      patch: side of the square patches, pixels.
      batch: patches a step.
      lambdas: Lagrangians, one of which is drawn for each patch.
      seed: of everything drawn.
      flip: mirror half of the patches left to right.
      vivid: share of the patches, 0 to 1, that go through `vivid`.
      cache_mb: memory for decoded pictures, MiB.

    Raises:
      DataError: if no picture is left.
    """

    def __init__(self, paths, patch, batch, lambdas, seed=0, flip=True, vivid=0.0, cache_mb=1024):
        self.patch, self.batch, self.seed, self.flip, self.vivid = patch, batch, seed, flip, vivid
        self.lambdas = np.array(lambdas, np.float32)
        self.paths, self.too_small, self.unreadable, self.damaged = [], 0, 0, set()
        for path in paths:
            try:
                with picture_io.pillow_limit(picture_io.MAX_PIXELS), picture_io.open_picture(path) as image:
                    size = image.size
                if size[0] * size[1] > picture_io.MAX_PIXELS:  # Pillow warns up to twice the limit
                    raise ImageError(f"{path}: too large")
            except Exception:  # Pillow raises almost anything on damaged files
                self.unreadable += 1
                continue
            if min(size) >= patch:
                self.paths.append(path)
            else:
                self.too_small += 1
        if not self.paths:
            raise DataError(f"none of {len(paths)} pictures is readable with both sides at least {patch} pixels")
        self._cache = collections.OrderedDict()
        self._room = cache_mb * 2**20
        self._lock = threading.Lock()

    def _picture(self, path):
        with self._lock:
            if path in self.damaged:
                return None
            if path in self._cache:
                self._cache.move_to_end(path)
                return self._cache[path]
        for left in reversed(range(MEMORY_TRIES)):
            try:
                picture = read_rgb(path)
                break
            except GoConvError as error:
                if left and not isinstance(error, DataError):  # memory, which a validation may have just now
                    time.sleep(MEMORY_SECONDS)
                    continue
                with self._lock:
                    if path not in self.damaged:
                        self.damaged.add(path)
                        print(f"left out: {printable(error)}", flush=True)
                return None
        with self._lock:
            if path not in self._cache:
                self._cache[path] = picture
                self._room -= picture.nbytes
            while self._room < 0:
                self._room += self._cache.popitem(last=False)[1].nbytes
        return picture

    def _draw(self, rng):
        for _ in range(1000):
            picture = self._picture(self.paths[rng.integers(len(self.paths))])
            if picture is not None:
                return picture
        raise DataError("the training pictures cannot be decoded")

    def __call__(self, step):
        """(patches uint8 [batch, patch, patch, 3], lambdas float32 [batch], noise seeds int32 [batch, 2]); DataError if none can be decoded."""
        rng = np.random.default_rng([self.seed, int(step)])
        lambdas = rng.choice(self.lambdas, self.batch)
        noise = rng.integers(2**30, size=(self.batch, 2)).astype(np.int32)
        patches = np.empty((self.batch, self.patch, self.patch, 3), np.uint8)
        for i in range(self.batch):
            picture = self._draw(rng)
            top, left = (rng.integers(n - self.patch + 1) for n in picture.shape[:2])
            patch = picture[top : top + self.patch, left : left + self.patch]
            patch = patch[:, ::-1] if self.flip and rng.random() < 0.5 else patch
            patches[i] = vivid(patch, rng) if self.vivid and rng.random() < self.vivid else patch
        return patches, lambdas, noise

    def dataset(self, start):
        """tf.data.Dataset of (patches, lambdas, noise seeds, step [batch]), endless, from step `start` on.

        All have a batch axis, so that a strategy can split them over devices.
        """
        import tensorflow as tf

        def draw(step):
            x, lmbda, noise = tf.numpy_function(self, [step], [tf.uint8, tf.float32, tf.int32], stateful=False)
            x.set_shape([self.batch, self.patch, self.patch, 3])
            lmbda.set_shape([self.batch])
            noise.set_shape([self.batch, 2])
            return x, lmbda, noise, tf.fill([self.batch], tf.cast(step, tf.int32))

        steps = tf.data.Dataset.counter(start=start, dtype=tf.int64)
        return steps.map(draw, num_parallel_calls=2, deterministic=True).prefetch(4)
