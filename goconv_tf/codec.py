"""Picture <-> compressed file: padding, rate control, which model wrote what."""

import math
from typing import TYPE_CHECKING, Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from goconv_tf import bitstream, limits, memory, picture_io, zoo
from goconv_tf.errors import BitstreamError, CheckpointError, ModelMismatchError, RateError, UsageError

if TYPE_CHECKING:
    from goconv_tf.models import Codec

MAX_CODINGS = 12  # of one picture while looking for a rate
TOLERANCE = 0.01  # of a target rate


class Compressed(NamedTuple):
    """A compressed picture.

    data: the file's bytes. lmbda: the operating point; None for models without one. bpp: bits of the whole
    file per pixel. codings: how often it was coded. layers: layers in the file. pictures: uint8 [h, w, 3], what each number
    of layers gives, if asked for. tile: side of the tiles that it was computed in, pixels; 0: whole.
    """

    data: bytes
    lmbda: Optional[float]
    bpp: float
    codings: int
    layers: int = 1
    pictures: Tuple[np.ndarray, ...] = ()
    tile: int = 0

    @property
    def reconstruction(self) -> Optional[np.ndarray]:
        """uint8 [h, w, 3], what decoding gives, if asked for."""
        return self.pictures[-1] if self.pictures else None


def _padded(n, alignment):
    return -(-n // alignment) * alignment


def pad(picture, alignment):
    """Extends uint8 [h, w, 3] downwards and to the right, by its last row and column, to multiples of alignment."""
    height, width = picture.shape[:2]
    return np.pad(picture, [(0, _padded(height, alignment) - height), (0, _padded(width, alignment) - width), (0, 0)], mode="edge")


def check_operating_point(config, lmbda=None, target_bpp=None, layers=None):
    """RateError unless a model of this config can be asked for these."""
    scalable = len(config.layers) > 1
    if target_bpp is not None and (lmbda is not None or layers is not None):
        raise RateError("give target_bpp without lmbda and layers")
    if lmbda is not None:
        if not config.has_lambda:
            raise RateError(f"{config.model} has no lambda to choose" + ("; it has layers" if scalable else ": it was trained for one"))
        rounding = 1 / bitstream.LMBDA_SCALE  # of lambda in files, perhaps to outside the range
        if not config.lmbda_min - rounding < lmbda < config.lmbda_max + rounding:
            raise RateError(f"lambda {lmbda:g} is outside the model's range, {config.lmbda_min:g} to {config.lmbda_max:g}")
    if target_bpp is not None and not (config.has_lambda or scalable):
        raise RateError(f"{config.model} has one rate, which cannot be chosen")
    if layers is not None and not 1 <= layers <= len(config.layers):
        raise RateError(f"{layers} layers were asked for; the model has {len(config.layers)}")


@memory.guarded()
def compress(
    model: "Codec",
    picture: np.ndarray,
    lmbda: Optional[float] = None,
    target_bpp: Optional[float] = None,
    entropy_coder: str = "tfc",
    reconstruct: bool = False,
    layers: Optional[int] = None,
    exact: bool = True,
    tile: Optional[int] = None,
    refine: int = 0,
) -> Compressed:
    """Compresses uint8 [h, w, 3] with a model from `zoo.load_pretrained`.

    Args:
      lmbda: the operating point of a model that has one; default: the geometric middle of its range.
      target_bpp: instead of lmbda, the bits per pixel that the whole file shall have, within 1 %; of a scalable
        model, which it shall not exceed.
      entropy_coder: "tfc" or "range-coder".
      reconstruct: also give the decoded picture.
      layers: how many layers of a scalable model to code; default: all.
      exact: compute entropy parameters with integers, so that every machine decodes the file; False: in floating point.
      tile: side of the tiles that large pictures are coded in, pixels; default: as memory asks for; 0: whole. The file does not
        depend on it but for how floats of the analysis round.
      refine: steps of optimising the latents for this picture first, 0 for none: smaller files, which are decoded as ever, for minutes of work
        (of each coding, where target_bpp takes several); see `goconv_tf.models.refine`. Computed for whole pictures; not for scalable models.

    Raises:
      ImageError: if the picture is something else.
      CheckpointError: if the model has no integers to be exact with.
      UsageError: if the model is of no folder (`info_of`), cannot be tiled or refined, or there is no such entropy coder.
      RateError: if lmbda, target_bpp or layers are out of the model's reach, or target_bpp is given with another.
      GoConvError: if the picture needs more memory than there is.
    """
    from goconv_tf.models.tiles import CELL

    if entropy_coder not in bitstream.CODER_NAMES:
        raise UsageError(f"entropy_coder must be {' or '.join(bitstream.CODER_NAMES)}, not {entropy_coder}")
    picture_io.check_picture(picture)
    check_operating_point(model.config, lmbda, target_bpp, layers)
    info = info_of(model)
    check_exact(model, exact)
    check_refine(model.config, refine)
    height, width = picture.shape[:2]
    padded_size = [_padded(n, model.alignment) for n in (height, width)]
    cells = memory.choose_tile(model, padded_size, tile, exact)
    padded = pad(picture, model.alignment)
    codings = 0

    def code(value):
        nonlocal codings
        codings += 1
        lmbda_code = bitstream.quantize_lmbda(value) if model.has_lambda else 0
        coded_lmbda = bitstream.dequantize_lmbda(lmbda_code)
        latents = refined(model, info, padded, (height, width), coded_lmbda, refine) if refine else None
        coded = model.compress(padded, coded_lmbda, entropy_coder, reconstruct, layers, exact, cells, latents)
        sections = [[coded.strings[name] for name in names] for names in model.config.layers[: len(coded.checksums)]]
        stream = bitstream.Stream(
            entropy_coder,
            info.model_id,
            int(info.fingerprint, 16),
            lmbda_code,
            height,
            width,
            [bitstream.Layer(checksum, strings) for checksum, strings in zip(coded.checksums, sections)],
            exact=exact,
        )
        if target_bpp is not None and not model.has_lambda:
            stream = cut_to_rate(stream, target_bpp)
        data = bitstream.pack(stream)
        pictures = tuple(picture[:height, :width] for picture in coded.pictures[: len(stream.layers)])
        bpp = 8 * len(data) / (height * width)
        return Compressed(data, coded_lmbda or None, bpp, codings, len(stream.layers), pictures, (cells or 0) * CELL)

    if not model.has_lambda:
        return code(None)
    if target_bpp is None:
        return code(model.config.lmbda_middle if lmbda is None else lmbda)
    return search_rate(code, target_bpp, model.config.lmbda_min, model.config.lmbda_max)


@memory.guarded()
def estimate(model: "Codec", picture: np.ndarray, lmbda: Optional[float] = None, layers: Optional[int] = None) -> Dict[str, float]:
    """{latent: bits} that the entropy models ascribe to uint8 [h, w, 3], of the first `layers` layers: what files take, but for headers.

    lmbda: in the model's range, or as a file has it; None is the middle of the range, as for `compress`.

    Raises:
      ImageError: if the picture is something else.
      RateError: if lmbda or layers are not what the model has.
      GoConvError: if the picture needs more memory than there is.
    """
    import tensorflow as tf

    from goconv_tf.models import tiles

    picture_io.check_picture(picture)
    check_operating_point(model.config, lmbda, None, layers)
    value = 0.0
    if model.has_lambda:
        value = bitstream.dequantize_lmbda(bitstream.quantize_lmbda(model.config.lmbda_middle if lmbda is None else lmbda))
    padded = pad(picture, model.alignment)
    with tiles.tiled(memory.choose_tile(model, padded.shape[:2], exact=model.has_exact)):
        rates = model.bits(padded[None], tf.constant([value]))
    return {name: float(rates[name][0]) for names in model.config.layers[:layers] for name in names}


def info_of(model) -> "zoo.ModelInfo":
    """The ModelInfo of the folder that a model is of; UsageError if it has been trained since, or never was in one: files name such folders."""
    info = model.info  # which looks at the weights
    if info is None:
        raise UsageError("the model's weights are those of no model folder, which files would name: save_pretrained them, and load_pretrained that")
    return info


def check_exact(model, exact):
    """CheckpointError if a model has no integers to be exact with."""
    if exact and not model.has_exact:
        raise CheckpointError(
            f"{info_of(model).name} has no integer form of its entropy model: save it again with this version, or code with --noexact"
        )


def check_refine(config, steps):
    """UsageError unless latents of a model of this config can be refined in so many steps."""
    if steps < 0:
        raise UsageError(f"latents are refined in 1 step or more, 0 being none, not in {steps}")
    if steps and not (config.has_lambda or hasattr(config, "lmbda")):
        raise UsageError(f"latents of a {config.model} cannot be refined: each layer's are made of what the layers before it left")


def refined(model, info, padded, size, lmbda, steps):
    """{latent: tensor} of a padded picture, optimised for what its model was trained for.

    size: (height, width) of the picture itself, which counts. lmbda: as the file has it, of models that have one.
    """
    import tensorflow as tf

    from goconv_tf.models import refine

    if info.distortion is None:
        raise UsageError(f"{info.name}'s card does not say which distortion it was trained for: save it again with this version, to refine latents")
    refine.check(model, padded.shape[:2], size, info.distortion)
    x, weight = tf.constant(padded[None]), tf.constant([lmbda if model.has_lambda else model.config.lmbda], tf.float32)
    return refine.refine(model, x, size, weight, model.analysis(x, weight), steps, info.distortion)


def cut_to_rate(stream, target_bpp) -> "bitstream.Stream":
    """The stream with as many layers as fit into target_bpp, bits of the whole file per pixel; RateError if none does."""
    rates = [8 * size / stream.pixels for size in stream.layer_bytes()]
    count = sum(rate <= target_bpp for rate in rates)
    if not count:
        raise RateError(f"{target_bpp:g} bpp is out of reach: the first layer alone takes {rates[0]:.4f} bpp")
    return stream.cut(count)


def search_rate(code, target, lowest, highest) -> Compressed:
    """Finds lambda in [lowest, highest] whose coded file is within 1 % of the target bits per pixel.

    Regula falsi between real codings, in logarithms of both; bisection after a step that did not halve the bracket.

    Args:
      code: lambda -> Compressed.

    Raises:
      RateError: with the range of rates the model reaches, or the nearest rates found.
    """
    if not target > 0 or not math.isfinite(target):
        raise RateError(f"the target rate must be positive, not {target:g}")

    def good(result):
        return abs(result.bpp / target - 1) <= TOLERANCE

    def error(result):
        return math.log(result.bpp / target)

    low, high = code(lowest), code(highest)
    for end in (low, high):
        if good(end):
            return end
    if error(low) > 0 or error(high) < 0:
        raise RateError(f"{target:g} bpp is out of reach for this picture: the model gives {low.bpp:.4f} to {high.bpp:.4f} bpp")
    a, b = math.log(lowest), math.log(highest)
    error_a, error_b = error(low), error(high)
    best = min(low, high, key=lambda r: abs(error(r)))
    halved = True
    for _ in range(MAX_CODINGS - 2):
        share = min(max(error_a / (error_a - error_b), 0.02), 0.98) if halved else 0.5
        middle = a + share * (b - a)
        result = code(math.exp(middle))
        if good(result):
            return result
        best = min(best, result, key=lambda r: abs(error(r)))
        width = b - a
        if error(result) < 0:
            a, error_a = middle, error(result)
        else:
            b, error_b = middle, error(result)
        halved = b - a <= width / 2
    raise RateError(
        f"no file within 1 % of {target:g} bpp was found in {MAX_CODINGS} codings; the nearest has {best.bpp:.4f} bpp (lambda {best.lmbda:g})"
    )


def check_model(stream, info) -> None:
    """ModelMismatchError unless the stream was written by the model and weights that info describes."""
    if stream.model_id != info.model_id:
        raise ModelMismatchError(f"written by another model than {info.name} (id {stream.model_id:08x}, not {info.model_id:08x})")
    if stream.fingerprint != int(info.fingerprint, 16):
        raise ModelMismatchError(f"written by {info.name} with other weights (fingerprint {stream.fingerprint:08x}, not {info.fingerprint})")


def find_stream_model(stream, name=None) -> "zoo.ModelInfo":
    """The model that wrote a stream: of this name, as `zoo.find_model` takes it, or the zoo's; ModelMismatchError if it is not there."""
    if name:
        info = zoo.find_model(name)
        check_model(stream, info)
        return info
    named = [info for info in zoo.all_models() if info.model_id == stream.model_id]
    if not named:
        raise ModelMismatchError(f"written by a model that is not in the zoo (id {stream.model_id:08x}); name its folder with --model")
    exact = [info for info in named if int(info.fingerprint, 16) == stream.fingerprint]
    check_model(stream, (exact or named)[0])
    return exact[0]


def decompress(
    model: "Codec",
    data: bytes,
    max_pixels: int = picture_io.MAX_PIXELS,
    layers: Optional[int] = None,
    allow_truncated: bool = False,
    tile: Optional[int] = None,
    region: Optional[Sequence[int]] = None,
    max_seconds: Optional[float] = None,
) -> np.ndarray:
    """The picture uint8 [h, w, 3] in a compressed file's bytes.

    Args:
      max_pixels: the most that the file may claim.
      layers: decode only so many layers of a scalable stream.
      allow_truncated: decode the whole layers of a scalable stream that is cut short or damaged after them.
      tile: as in `compress`; the encoder's need not be the same.
      region: (x, y, width, height), pixels: only this part of the picture.
      max_seconds: how long decoding may take.

    Raises:
      BitstreamError: if it is not a whole, undamaged stream, or takes too long.
      ModelMismatchError: if another model or other weights wrote it.
      CheckpointError: if the stream needs integers that the model does not have.
      RateError: if it has fewer layers.
      UsageError: if the region is not within the picture, or the model cannot be tiled or is of no folder (`info_of`).
      GoConvError: if the picture needs more memory than there is.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise BitstreamError(f"a compressed file is bytes, not a {type(data).__name__}")
    data = bytes(data)
    with limits.seconds(max_seconds):
        return decode(model, bitstream.unpack(data, max_pixels, allow_truncated), layers, None, tile, region)


@memory.guarded()
def decode(model, stream, layers=None, problems=None, tile=None, region=None):
    """The picture in a `bitstream.Stream`; as `decompress`. problems: a list for what is wrong with it, which is then decoded all the same."""
    check_model(stream, info_of(model))
    names = model.config.layers
    if len(stream.layers) + stream.missing > len(names) or any(len(s.sections) != len(n) for s, n in zip(stream.layers, names)):
        raise BitstreamError(f"the file is damaged: it has other layers than {model.info.name} codes")
    if (stream.lmbda_code > 0) != model.has_lambda:
        raise BitstreamError("the file is damaged: lambda is out of range")
    if layers is not None and not 1 <= layers <= len(stream.layers):
        raise RateError(f"{layers} layers were asked for; the file has {len(stream.layers)}")
    padded_size = [_padded(n, model.alignment) for n in (stream.height, stream.width)]
    if region is not None and len(region) != 4:
        raise UsageError(f"a region is x, y, width and height, not {len(region)} numbers")
    x, y, width, height = (0, 0, stream.width, stream.height) if region is None else region
    if not (0 <= x < x + width <= stream.width and 0 <= y < y + height <= stream.height):
        raise UsageError(f"the region {width} x {height} at {x}, {y} is not within the picture's {stream.width} x {stream.height} pixels")
    check_exact(model, stream.exact)
    cells = memory.choose_tile(model, padded_size, tile, stream.exact)
    window = None
    if region is not None and model.can_tile:
        from goconv_tf.models.tiles import CELL

        window = tuple((start // CELL, -(-(start + length) // CELL)) for start, length in ((y, height), (x, width)))
        x, y = x % CELL, y % CELL
    used = stream.layers[:layers]
    picture = model.decompress(
        {name: section for group, layer in zip(names, used) for name, section in zip(group, layer.sections)},
        [layer.checksum for layer in used],
        *padded_size,
        bitstream.dequantize_lmbda(stream.lmbda_code),
        stream.coder,
        stream.exact,
        problems,
        cells,
        window,
    )
    return picture[y : y + height, x : x + width]
