"""Learned image compression with generalized octave convolutions, in TensorFlow 2.

    import goconv_tf
    model = goconv_tf.load_pretrained("variable-rate-small-mse")
    picture = goconv_tf.read_picture("photo.png")
    data = goconv_tf.compress(model, picture, target_bpp=0.3).data
    decoded = goconv_tf.decompress(model, data)

Importing this package is cheap: TensorFlow is loaded by what needs it.
"""

import importlib
from typing import TYPE_CHECKING

from goconv_tf.blas import choose_kernels

__version__ = "0.1.0"

choose_kernels()

_HOME = {
    "compress": "codec",
    "decompress": "codec",
    "read_picture": "picture_io",
    "load_pretrained": "zoo",
    "save_pretrained": "zoo",
    "list_models": "zoo",
    "new_model": "zoo",
    "GoConvError": "errors",
}
_MODULES = ["layers", "entropy", "models", "errors", "presets", "zoo", "codec", "picture_io", "memory", "bitstream"]
_MODULES += ["metrics", "losses", "data", "training"]

if TYPE_CHECKING:  # what `__getattr__` gives
    from goconv_tf import bitstream, codec, data, entropy, errors, layers, losses, memory, metrics, models, picture_io, presets, training, zoo  # noqa: F401
    from goconv_tf.codec import compress, decompress  # noqa: F401
    from goconv_tf.errors import GoConvError  # noqa: F401
    from goconv_tf.picture_io import read_picture  # noqa: F401
    from goconv_tf.zoo import list_models, load_pretrained, new_model, save_pretrained  # noqa: F401

__all__ = sorted([*_HOME, *_MODULES, "__version__"])


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"goconv_tf.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"goconv_tf.{name}")
    raise AttributeError(f"module 'goconv_tf' has no attribute {name!r}")


def __dir__():
    return __all__
