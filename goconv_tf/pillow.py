"""Pillow reads and writes .gcv once this module is imported.

    import goconv_tf.pillow
    image.save("a.gcv", target_bpp=0.3)
    Image.open("a.gcv").show()

`Image.open` reads the header only, and does not import TensorFlow. The pixels are decoded when they are first asked for, by the zoo's
model that wrote the file ($GOCONV_TF_ZOO included). `info` has what the header says: "model" (its name; None if the zoo does not have it),
"fingerprint", "lmbda" (of models that have one), "layers" (how many the file should have), "entropy_coder" and "exact".

Errors are Pillow's. Open: UnidentifiedImageError for what is no stream of ours, or is damaged in its header; DecompressionBombError
and its warning by Pillow's own limit. Load: OSError for a damaged or cut file, and where the model is not there; with
ImageFile.LOAD_TRUNCATED_IMAGES, the whole layers of a scalable file are shown. `verify` checks the file's checksums, without TensorFlow.

`Image.save` takes

    model: zoo name, model folder or training folder. Default: `DEFAULT_MODEL`, the shipped model that reaches a range of rates.
    lmbda, target_bpp, layers, entropy_coder, exact: as `goconv_tf.compress`.

and, as `goconv_tf.read_picture`, turns pictures as their EXIF says (a .gcv file has none) and refuses transparency and more than 8 bits
a sample with OSError (of pictures opened by name: Pillow cuts others to 8 bits before it asks us); ValueError is for rates that the
model does not reach, and arguments that do not fit together. Pillow itself empties a file that it is to replace before the picture
is coded.
"""

import contextlib
import math

from PIL import Image, ImageFile

from goconv_tf import bitstream, codec, picture_io, zoo
from goconv_tf.errors import BitstreamError, GoConvError, ModelMismatchError, RateError

FORMAT = "GCV"
DEFAULT_MODEL = "variable-rate-small-mse"


@contextlib.contextmanager
def _pillow_errors():
    try:
        yield
    except RateError as error:
        raise ValueError(str(error)) from error
    except GoConvError as error:
        raise OSError(str(error)) from error


def _unpack(data, pixels):
    with _pillow_errors():
        return bitstream.unpack(data, pixels, ImageFile.LOAD_TRUNCATED_IMAGES)


class _Decoder(ImageFile.PyDecoder):
    """Decodes the whole file at once: models are not made to give a picture in parts."""

    _pulls_fd = True

    def decode(self, buffer):
        stream = _unpack(self.fd.read(), self.state.xsize * self.state.ysize)
        with _pillow_errors():
            model = zoo.shared(codec.find_stream_model(stream).path)
            picture = codec.decode(model, stream)
        self.set_as_raw(picture.tobytes())
        return -1, 0


class GoConvImageFile(ImageFile.ImageFile):
    """A .gcv file, RGB."""

    format = FORMAT
    format_description = "goconv_tf learned image compression"

    def _open(self):
        try:
            stream = bitstream.unpack_header(self.fp.read(bitstream.HEADER_BYTES), math.inf)
        except BitstreamError as error:
            raise SyntaxError(str(error)) from error  # Pillow's sign for "not mine"
        self._mode, self._size = "RGB", (stream.width, stream.height)
        self.info.update(model=None, fingerprint=f"{stream.fingerprint:08x}", layers=stream.missing)
        with contextlib.suppress(ModelMismatchError):
            self.info["model"] = codec.find_stream_model(stream).name
        if stream.lmbda_code:
            self.info["lmbda"] = stream.lmbda
        self.info.update(entropy_coder=stream.coder, exact=stream.exact)
        self.tile = [(FORMAT, (0, 0, *self._size), 0, ())]

    def verify(self):
        self.fp.seek(0)
        try:
            _unpack(self.fp.read(), self.width * self.height)
        finally:
            super().verify()


def _save(image, fp, filename):
    options = image.encoderinfo
    rates = {name: options.get(name) for name in ("lmbda", "target_bpp", "layers")}
    settings = {name: options[name] for name in ("entropy_coder", "exact") if name in options}
    with _pillow_errors():
        picture = picture_io.from_pillow(image, filename or "the picture")
        model = zoo.shared(options.get("model") or DEFAULT_MODEL)
        fp.write(codec.compress(model, picture, **rates, **settings).data)


Image.register_open(FORMAT, GoConvImageFile, lambda prefix: prefix.startswith(bitstream.MAGIC))
Image.register_decoder(FORMAT, _Decoder)
Image.register_save(FORMAT, _save)
Image.register_extension(FORMAT, ".gcv")
Image.register_mime(FORMAT, "image/x-gcv")
