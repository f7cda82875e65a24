"""What fuzzing and the kept finds share: streams of tiny models, and what may come of any bytes."""

import os
import tempfile
import time

import numpy as np

from goconv_tf import bitstream, codec, presets, zoo
from goconv_tf.errors import GoConvError

LIMIT_PIXELS = 64 * 64
LIMIT_SECONDS = 10.0


def tiny_models():
    """One model of each kind."""
    found = []
    for name in ("variable_rate", "crpe", "scalable_rnn"):
        folder = os.path.join(tempfile.mkdtemp(), name)
        zoo.save_pretrained(zoo.new_model(presets.get_preset(name, "tiny")), folder, name)
        found.append(zoo.load_pretrained(folder))
    return compiled(found)


def compiled(models):
    """The models, after each has decoded a stream: what TensorFlow compiles then takes none of others' time."""
    for model in models:
        codec.decompress(model, codec.compress(model, np.zeros([64, 64, 3], np.uint8)).data)
    return models


def resealed(data):
    """The bytes with right checksums, where they are a stream at all: what a hostile hand would send."""
    try:
        return bitstream.pack(bitstream.unpack(data, LIMIT_PIXELS, allow_truncated=True, problems=[]))
    except (GoConvError, ValueError, IndexError):
        return data


def try_bytes(data, models):
    """Decodes any bytes in every way there is; only our own errors, of one line, may come out, and soon."""
    begin = time.time()
    for variant in (data, resealed(data)):
        for problems in (None, []):
            try:
                stream = bitstream.unpack(variant, LIMIT_PIXELS, allow_truncated=bool(len(data) % 2), problems=problems)
                sections = [len(layer.sections) for layer in stream.layers]
                fitting = [m for m in models if sections == [len(names) for names in m.config.layers][: len(sections)]]
                model = (fitting or models)[stream.model_id % len(fitting or models)]
                stream.model_id, stream.fingerprint = model.info.model_id, int(model.info.fingerprint, 16)
                picture = codec.decode(model, stream, problems=problems)
                assert picture.shape == (stream.height, stream.width, 3) and picture.dtype == np.uint8
            except GoConvError as error:
                assert "\n" not in str(error)
    assert time.time() - begin < LIMIT_SECONDS, "too slow"
