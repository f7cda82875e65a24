"""A model as a SavedModel that compresses and decompresses where only TensorFlow and TensorFlow Compression are installed.

Everything between pixels and the bytes of a `.gcv` file is graph operations: the model's own walk over its latents, with its
integers, and what `goconv_tf.codec` and `goconv_tf.bitstream` do around it. Files travel both ways.
"""

import contextlib
import os
import shutil

import tensorflow as tf
from absl import logging

from goconv_tf import bitstream, codec, picture_io
from goconv_tf.crc import crc16
from goconv_tf.entropy.graph import GraphDecoder, GraphEncoder, require
from goconv_tf.errors import UsageError
from goconv_tf.files import check_new_folder, check_parent, temporary_name
from goconv_tf.layers.exact import to_grid

_BYTES = [bytes([k]) for k in range(256)]
_VARINT_BYTES = 5
_DAMAGED = "the file is damaged: "


def make_signatures(model, max_pixels: int = picture_io.MAX_PIXELS):
    """{name: tf.function} of a model from `zoo.load_pretrained`, each giving {name: tensor}.

    compress(image uint8 [h, w, 3], lmbda float32 []) -> data string []: a file's bytes. Of models without a lambda to choose
    compress(image); of scalable ones compress(image, layers int32 []), the first layers of which are written.
    decompress(data string []) -> image uint8 [h, w, 3].
    info() -> what files are written and read with: name, model, fingerprint, format_version, layers, max_pixels, lmbda_min, lmbda_max.

    What cannot be coded, and data that is damaged or not this model's, raises tf.errors.InvalidArgumentError. Pictures and
    files of more than max_pixels are refused.

    Raises:
      CheckpointError: if the model has no integers to be exact with.
      UsageError: if it is of no folder (`codec.info_of`).
    """
    info, config = codec.info_of(model), model.config
    codec.check_exact(model, True)
    model.keeps_stages = True
    compressions = {
        "lmbda": (lambda image, lmbda: {"data": _compress(model, max_pixels, image, lmbda)}, tf.float32),
        "layers": (lambda image, layers: {"data": _compress(model, max_pixels, image, layers)}, tf.int32),
        "": (lambda image: {"data": _compress(model, max_pixels, image)}, None),
    }
    point = "lmbda" if model.has_lambda else "layers" if len(config.layers) > 1 else ""
    compress, dtype = compressions[point]
    # Loaded signatures do not look at shapes, so that `_compress` has to.
    specs = [tf.TensorSpec(None, tf.uint8, "image")] + ([tf.TensorSpec([], dtype, point)] if point else [])
    facts = {
        "name": info.name,
        "model": info.model,
        "fingerprint": info.fingerprint,
        "format_version": bitstream.VERSION,
        "layers": len(config.layers),
        "max_pixels": max_pixels,
    }
    if model.has_lambda:
        facts.update(lmbda_min=config.lmbda_min, lmbda_max=config.lmbda_max)

    def function(run, *specs):
        return tf.function(run, input_signature=specs, autograph=False)

    return {
        "compress": function(compress, *specs),
        "decompress": function(lambda data: {"image": _decompress(model, max_pixels, data)}, tf.TensorSpec([], tf.string, "data")),
        "info": function(lambda: {name: tf.constant(value) for name, value in facts.items()}),
    }


def save(model, path: str, max_pixels: int = picture_io.MAX_PIXELS) -> None:
    """Writes a SavedModel with the signatures of `make_signatures` as a new folder, whole or not at all.

    Raises:
      CheckpointError: as `make_signatures`.
      UsageError: if path is a file or a folder that is not empty, or lies in a folder that is not there.
    """
    check_target(path)
    module = tf.Module()
    module.weights = list(model.variables)
    signatures = make_signatures(model, max_pixels)
    path = os.path.abspath(path)
    temporary = temporary_name(path)
    os.mkdir(temporary)
    try:
        with _quiet():
            tf.saved_model.save(module, temporary, signatures, tf.saved_model.SaveOptions(experimental_custom_gradients=False))
        os.rename(temporary, path)
    except tf.errors.OpError as error:
        raise OSError(f"{path}: cannot be written: {error.message}") from error
    except UnicodeEncodeError as error:
        raise UsageError(f"{path}: TensorFlow writes only where names of folders are UTF-8") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(path):
    """UsageError unless a folder can be renamed to path."""
    check_new_folder(path)
    if os.path.islink(path):
        raise UsageError(f"{path}: exists; name a new folder")
    check_parent(path)


@contextlib.contextmanager
def _quiet():
    """Keeps what TensorFlow tells of saving off the terminal."""
    levels = tf.get_logger().level, logging.get_verbosity()
    tf.get_logger().setLevel("ERROR")
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        tf.get_logger().setLevel(levels[0])
        logging.set_verbosity(levels[1])


# Pixels.


def _pad(image, alignment):
    """As `codec.pad`."""
    for axis in (0, 1):
        size = tf.shape(image)[axis]
        image = tf.gather(image, tf.minimum(tf.range(-(-size // alignment) * alignment), size - 1), axis=axis)
    return image


def _fits(height, width, alignment, max_pixels):
    """Whether a picture of these sides, int64, is within the limit, and hardly above it with the sides that it is computed with."""
    largest = min(max_pixels, 2**31 - 1)  # products of sides that are not within the limit could wrap around
    fits = (height > 0) & (width > 0) & (height <= largest) & (width <= largest // tf.maximum(height, 1))
    height, width = (-(-tf.minimum(n, largest) // alignment) * alignment for n in (height, width))
    return fits & (width <= (largest + largest // 3 + 4096) // tf.maximum(height, 1))


def _known_lmbda(code):
    """lambda, float32 [1], as encoder and decoder know it."""
    return tf.reshape(tf.cast(tf.cast(code, tf.float64) / bitstream.LMBDA_SCALE, tf.float32), [1])


def _compress(model, max_pixels, image, point=None):
    config, shape = model.config, tf.shape(image, tf.int64)
    whole = tf.equal(tf.size(shape), 3) & tf.reduce_all(tf.equal(shape[2:], 3))
    image = tf.ensure_shape(require(whole, "the picture must be [height, width, 3]", image), [None, None, 3])
    shape = tf.shape(image, tf.int64)
    fits = _fits(shape[0], shape[1], model.alignment, max_pixels)
    image = require(fits, f"the picture must have 1 to {max_pixels} pixels, and not be far narrower than {model.alignment}", image)
    code, count = tf.constant(0, tf.int64), tf.constant(len(config.layers))
    if model.has_lambda:
        low, high = (tf.constant(bound, tf.float32) for bound in (config.lmbda_min, config.lmbda_max))
        point = require((low <= point) & (point <= high), f"lambda is outside the model's range, {config.lmbda_min:g} to {config.lmbda_max:g}", point)
        exactly = tf.round(tf.cast(point, tf.float64) * bitstream.LMBDA_SCALE)
        code = tf.cast(tf.clip_by_value(exactly, 1.0, bitstream.LMBDA_SCALE - 1.0), tf.int64)
    elif point is not None:
        count = require((point >= 1) & (point <= len(config.layers)), f"layers must be 1 to {len(config.layers)}", point)
    walker = GraphEncoder(model.analysis(_pad(image, model.alignment)[None], _known_lmbda(code)))
    walker.enter = to_grid
    model.walk(walker)
    return _pack(model, walker, code, shape, count)


def _decompress(model, max_pixels, data):
    code, size, count, strings, checksums = _unpack(model, data, max_pixels)
    height, width = (-(-n // model.alignment) * model.alignment for n in tf.unstack(size))
    present = {name: k < count for k, names in enumerate(model.config.layers) for name in names if k}
    walker = GraphDecoder(strings, model.latent_shapes(height, width), present)
    walker.enter = to_grid
    latents = model.walk(walker)
    ours = [walker.checksums[names[-1]] for names in model.config.layers]
    same = tf.equal(tf.stack(ours), tf.stack(checksums)) | (tf.range(len(ours)) >= count)
    pictures = model.pictures(latents, _known_lmbda(code))
    picture = pictures[0] if len(pictures) == 1 else tf.stack(pictures)[count - 1]
    picture = tf.cast(tf.round(tf.clip_by_value(picture[0, : size[0], : size[1]], 0.0, 255.0)), tf.uint8)
    problem = "decoded latents differ from the coded ones: entropy parameters differ between encoder and decoder"
    return require(tf.reduce_all(same), problem, picture)


# Bytes.


def _to_string(numbers):
    """A string [] of bytes, integers [n]."""
    return tf.strings.reduce_join(tf.gather(tf.constant(_BYTES), numbers))


def _little_endian(number, width):
    return _to_string(tf.bitwise.right_shift(number, 8 * tf.range(width, dtype=tf.int64)) & 255)


def _varint(number):
    groups = tf.bitwise.right_shift(number, 7 * tf.range(_VARINT_BYTES, dtype=tf.int64))
    groups = groups[: tf.maximum(tf.math.count_nonzero(groups), 1)]
    more = tf.cast(groups > 127, tf.int64)
    return _to_string(groups & 127 | 128 * more)


def _prefix(info):
    """The bytes of every file of a model, up to lambda."""
    return bitstream.pack(bitstream.Stream("tfc", info.model_id, int(info.fingerprint, 16), 0, 1, 1, [bitstream.Layer(0, [b""])]))[:14]


def _pack(model, walker, code, shape, count):
    """As `bitstream.pack`: what a walker coded, of its first `count` layers."""
    layers = model.config.layers
    header = [_prefix(model.info), _little_endian(code, 4), _varint(shape[0]), _varint(shape[1])]
    header += [_varint(tf.cast(count, tf.int64)), _varint(tf.constant(len(layers[0]), tf.int64))]
    unchecked, crc = tf.strings.join(header), tf.constant(0, tf.int64)
    parts = []
    for k, names in enumerate(layers):
        unchecked = tf.strings.join([unchecked, _little_endian(walker.checksums[names[-1]], 4)])
        layer = []
        for name in names:
            section = walker.strings[name]
            unchecked = tf.strings.join([unchecked, _varint(tf.cast(tf.strings.length(section), tf.int64))])
            crc = crc16(tf.strings.join([unchecked, section]), crc)
            layer += [unchecked, _little_endian(crc, 2), section]
            unchecked = tf.constant("")
        parts.append(tf.where(k < count, tf.strings.join(layer), ""))
    return tf.strings.join(parts)


class _Reader:
    """Takes a file apart, as `bitstream.unpack` does. What is absent is read as nothing, at the same place."""

    def __init__(self, data):
        self.data = data
        self.bytes = tf.cast(tf.io.decode_raw(data, tf.uint8), tf.int64)
        self.position = tf.constant(0, tf.int64)

    def take(self, count):
        """bytes, int64 [count]."""
        end = require(self.position + count <= tf.size(self.bytes, tf.int64), "the file is cut short", self.position + count)
        taken = self.bytes[end - count : end]
        self.position = end
        return taken

    def number(self, width, present=True):
        """A number of so many bytes; 0 if not present."""
        taken = self.take(tf.where(present, tf.constant(width, tf.int64), 0))
        return tf.reduce_sum(tf.bitwise.left_shift(taken, 8 * tf.range(tf.size(taken, tf.int64))))

    def varint(self, present=True):
        """A number of one to five bytes; 0 if not present."""
        window = self.bytes[self.position : self.position + _VARINT_BYTES]
        follows = tf.math.cumprod(tf.cast(window > 127, tf.int64))
        count = require(tf.reduce_sum(follows) < _VARINT_BYTES, _DAMAGED + "a number in it is too long", tf.reduce_sum(follows) + 1)
        taken = self.take(tf.where(present, count, 0))
        return tf.reduce_sum(tf.bitwise.left_shift(taken & 127, 7 * tf.range(tf.size(taken, tf.int64))))

    def since(self, start):
        """The string from a position to here."""
        return tf.strings.substr(self.data, tf.cast(start, tf.int32), tf.cast(self.position - start, tf.int32))


def _unpack(model, data, max_pixels):
    """(code of lambda, size int32 [2], number of layers int32, {name: string}, checksums of the layers) of a file; as `bitstream.unpack`."""
    layers, info = model.config.layers, model.info
    data = require(tf.strings.length(data) > 0, "the file is empty", data)
    magic = tf.strings.substr(bitstream.MAGIC, 0, tf.strings.length(data))
    data = require(tf.equal(tf.strings.substr(data, 0, len(bitstream.MAGIC)), magic), "not a goconv_tf file", data)
    reader = _Reader(data)
    reader.take(len(bitstream.MAGIC))
    known = tf.equal(reader.number(1), bitstream.VERSION)
    reader.position = require(known, f"a goconv_tf file of another version than {bitstream.VERSION}", reader.position)
    coder, model_id, fingerprint, code = (reader.number(width) for width in (1, 4, 4, 4))
    height, width, count, sections = (reader.varint() for _ in range(4))
    ours = tf.equal(model_id, info.model_id)
    known = (count > 0) & (count <= len(layers)) & tf.equal(sections, len(layers[0]))
    other_model = f"written by another model than {info.name} (id not {info.model_id:08x})"
    count = require(known | ~ours, f"{_DAMAGED}it has other layers than {info.name} codes", count)
    count = require(known, other_model, count)
    fits = _fits(height, width, model.alignment, max_pixels)
    reader.position = require(fits, f"the file claims more pixels than {max_pixels}, or none", reader.position)
    crc, strings, checksums = tf.constant(0, tf.int64), {}, []
    checked = tf.constant(0, tf.int64)
    for k, names in enumerate(layers):
        present = k < count
        checksums.append(reader.number(4, present))
        for name in names:
            length = reader.varint(present)
            before = crc16(reader.since(checked), crc)
            stored = reader.number(2, present)
            checked = reader.position
            reader.take(length)
            crc = crc16(reader.since(checked), before)
            # What is absent adds nothing to the checksum, and none is stored.
            sound = tf.equal(crc, stored) | ~present
            strings[name] = require(sound, f"{_DAMAGED}the checksum of {name} is wrong", reader.since(checked))
            checked = reader.position = require(sound, f"{_DAMAGED}the checksum of {name} is wrong", reader.position)
    problems = (
        (tf.equal(reader.position, tf.size(reader.bytes, tf.int64)), _DAMAGED + "other data follows its end"),
        (tf.equal(coder, 0), "the file was written with another entropy coder, or without exact entropy parameters"),
        (ours, other_model),
        (tf.equal(fingerprint, int(info.fingerprint, 16)), f"written by {info.name} with other weights (fingerprint not {info.fingerprint})"),
        ((code > 0) if model.has_lambda else (code <= 0), _DAMAGED + "lambda is out of range"),
        (code < bitstream.LMBDA_SCALE, _DAMAGED + "lambda is out of range"),
    )
    size = tf.stack([height, width])
    for condition, problem in problems:
        size = require(condition, problem, size)
    return code, tf.cast(size, tf.int32), tf.cast(count, tf.int32), strings, checksums
