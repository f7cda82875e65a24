"""Picture files: what is read, as what, and how pictures are written."""

import contextlib
import io
import os
import threading

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from goconv_tf import memory
from goconv_tf.errors import GoConvError, ImageError

MAX_PIXELS = 200_000_000
MARK = "goconv_tf"  # in decoded PNG files

_PILLOWS_LIMIT = threading.Lock()
_TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}  # EXIF's
# Those of `files.PICTURE_EXTENSIONS`, and SGI; TGA, which much looks like, is last. Pillow goes by a file's content, whatever its name, and has
# Ghostscript run what is in EPS.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "QOI", "SGI", "TGA")
_READING_BYTES = 15  # a pixel, that it takes to read a picture
_PLAIN_MODES = ("RGB", "L", "P", "1", "CMYK", "YCbCr")


def _is_deep(image):
    """Whether an opened picture has more than 8 bits a sample, which Pillow would cut off for RGB."""
    if getattr(image, "filename", "") and not getattr(image, "fp", None):  # its pixels have been read, and with them what said so
        with contextlib.suppress(Exception), Image.open(image.filename) as again:
            if again.format == image.format and _is_deep(again):
                return True
    depths = getattr(image, "tag_v2", {}).get(258, (8,))  # TIFF's BitsPerSample
    arguments = [str(part) for tile in getattr(image, "tile", []) for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    maximum = [int(a) for a in arguments if a.isdigit()] if image.format == "PPM" else []
    if image.format in ("SGI", "JPEG2000", "AVIF") and getattr(image, "fp", None):  # these say it in the file only
        image.fp.seek(0)
        data = image.fp.read()
        if image.format == "SGI":
            return data[3] > 1
        if image.format == "AVIF":  # the third byte of each av1C box has a bit for it
            return any(len(box) > 2 and box[2] & 0x40 for box in data.split(b"av1C")[1:])
        start = data.find(b"\xff\x4f\xff\x51")  # of the codestream; 42 bytes on is the depth of each component, less one
        return start < 0 or any(depth & 0x7F > 7 for depth in data[start + 42 :: 3][: len(image.getbands())])
    return (
        max(depths if isinstance(depths, tuple) else (depths,)) > 8
        or any(";16" in a and a != "BGR;16" for a in arguments)
        or max(maximum, default=0) > 255
    )


def open_picture(file):
    """Pillow's image of a file, or its name, in one of the formats that photographs come in; Pillow's errors."""
    Image.init()
    return Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])


@contextlib.contextmanager
def pillow_limit(max_pixels):
    """Our own limit decides, not Pillow's, which is one for all threads: they take turns. (Pillow decodes some files when it opens them.)"""
    with _PILLOWS_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextlib.contextmanager
def _of_tiff(max_pixels):
    """Pillow holds TIFFs against its limit again when it loads them, and libtiff has lines of its own for stderr."""
    with pillow_limit(max_pixels), open(os.devnull, "wb") as nothing:
        kept = None
        if threading.active_count() == 1:  # others may have something to say
            with contextlib.suppress(OSError):  # there need not be a stderr
                kept = os.dup(2)
                os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            if kept is not None:
                os.dup2(kept, 2)
                os.close(kept)


def from_pillow(image, name):
    """A Pillow image as `read_picture` gives it; ImageError, about `name`, if it has transparency or more than 8 bits a sample."""
    if image.format == "IPTC":  # would become, when it is loaded, whatever picture lies in it
        raise ImageError(f"{name}: is a picture within IPTC data, which is not read")
    bands = (*image.getbands(), *(image.palette.mode if image.mode == "P" and image.palette else ""))
    if image.mode == "LAB":  # whose second band is called A
        bands = ()
    if "A" in bands or "a" in bands or "transparency" in image.info:
        raise ImageError(f"{name}: has transparency, which is not coded; flatten the picture first")
    if image.mode not in _PLAIN_MODES or _is_deep(image):
        raise ImageError(f"{name}: mode {image.mode} with its depth is not supported; convert it to 8 bits a sample, RGB or grey")
    image.load()  # a TIFF is turned by that, and no longer says that it should be
    turn = None
    with contextlib.suppress(Exception):  # ImageOps.exif_transpose writes all tags anew, which odd ones do not survive
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return np.array((image.transpose(Image.Transpose[turn]) if turn else image).convert("RGB"))


def is_decoded(file, size=None) -> bool:
    """Whether a file is a PNG that decompressing wrote, which may be replaced: the stream gives it again. size: (width, height) that it must have."""
    with contextlib.suppress(Exception), pillow_limit(None), Image.open(file, formats=["PNG"]) as image:
        return image.info.get("Software") == MARK and size in (None, image.size)
    return False


def read_picture(path, max_pixels: int = MAX_PIXELS, file=None) -> np.ndarray:
    """A picture file as uint8 [h, w, 3], turned as its EXIF says; greyscale and palette pictures are converted.

    Args:
      max_pixels: the most that it may have.
      file: the opened file, where path is only what messages call it.

    Raises:
      ImageError: if it cannot be read, has transparency, several pictures (a JPEG's first is read) or more than 8 bits a sample, or is too large.
      GoConvError: if it needs more memory than there is.
    """
    try:
        with pillow_limit(max_pixels):
            opened = open_picture(path if file is None else file)
        with opened as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"{path}: {image.width} x {image.height} pixels; the limit is {max_pixels} (see --max_megapixels)")
            if getattr(image, "is_animated", False) and image.format != "MPO":  # what cameras add to a JPEG may be left
                raise ImageError(f"{path}: has several pictures; save the one that is meant by itself")
            memory.check(_READING_BYTES * image.width * image.height, f"{path}: {image.width} x {image.height} pixels")
            with _of_tiff(max_pixels) if image.format == "TIFF" else contextlib.nullcontext():
                return from_pillow(image, path)
    except GoConvError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path}: cannot be read as a picture (it is none of {', '.join(_FORMATS)})") from None
    except MemoryError:
        raise GoConvError(f"{path}: not enough memory") from None
    except Image.DecompressionBombError:  # from twice the limit on
        raise ImageError(f"{path}: the limit is {max_pixels} pixels, which it exceeds (see --max_megapixels)") from None
    except Exception as error:  # Pillow raises almost anything on damaged files
        raise ImageError(f"{path}: cannot be read as a picture ({error})") from error


def picture_bytes(picture, picture_format="PNG", decoded=False, **options) -> bytes:
    """uint8 [h, w, 3] as a file of one of Pillow's formats; decoded: PNG with the mark that `is_decoded` looks for."""
    if picture_format == "PNG" and decoded:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("Software", MARK)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, picture_format, **options)
    return buffer.getvalue()


def check_picture(picture):
    """ImageError unless it is uint8 [h, w, 3]."""
    if not isinstance(picture, np.ndarray):
        raise ImageError(f"a picture is a NumPy array, uint8 [h, w, 3], not a {type(picture).__name__}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ImageError(f"a picture is uint8 [h, w, 3], not {picture.dtype} {list(picture.shape)}")
