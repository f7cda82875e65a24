"""make fuzz: coverage-guided fuzzing (atheris) of the container and of decompression with tiny models.

    python tests/fuzz.py [SECONDS] [FOLDER]

Whatever the bytes, only our own errors may come out, within a second and within bounded memory. Finds are written to FOLDER
(default: fuzz/).
"""

import os
import resource
import sys
import time

import atheris
import numpy as np

with atheris.instrument_imports(include=["goconv_tf.bitstream", "goconv_tf.codec", "goconv_tf.entropy"]):
    from goconv_tf import bitstream, codec, presets, zoo
    from goconv_tf.errors import GoConvError

LIMIT_PIXELS = 64 * 64
LIMIT_SECONDS = 5.0


def tiny_models():
    """{header bytes: model}: one of each kind, whose ids the fuzzer's streams get."""
    import tempfile

    found = []
    for name in ("variable_rate", "crpe", "scalable_rnn"):
        folder = os.path.join(tempfile.mkdtemp(), name)
        zoo.save_pretrained(zoo.new_model(presets.get_preset(name, "tiny")), folder, name)
        found.append(zoo.load_pretrained(folder))
    return found


MODELS = tiny_models()


def resealed(data):
    """The bytes with right checksums, where they are a stream at all: what a hostile hand would send."""
    try:
        return bitstream.pack(bitstream.unpack(data, LIMIT_PIXELS, allow_truncated=True, problems=[]))
    except (GoConvError, ValueError, IndexError):
        return data


def one_input(data):
    begin = time.time()
    for variant in (data, resealed(data)):
        for problems in (None, []):
            try:
                stream = bitstream.unpack(variant, LIMIT_PIXELS, allow_truncated=bool(len(data) % 2), problems=problems)
                model = MODELS[stream.model_id % len(MODELS)]
                stream.model_id, stream.fingerprint = model.info.model_id, int(model.info.fingerprint, 16)
                picture = codec.decode(model, stream, problems=problems)
                assert picture.shape == (stream.height, stream.width, 3) and picture.dtype == np.uint8
            except GoConvError as error:
                assert "\n" not in str(error)
    assert time.time() - begin < LIMIT_SECONDS, "too slow"


def main():
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    folder = sys.argv[2] if len(sys.argv) > 2 else "fuzz"
    os.makedirs(os.path.join(folder, "corpus"), exist_ok=True)
    rng = np.random.default_rng(0)
    for k, model in enumerate(MODELS):
        for size in ((16, 16), (40, 33)):
            data = codec.compress(model, rng.integers(0, 255, (*size, 3)).astype(np.uint8)).data
            with open(os.path.join(folder, "corpus", f"seed-{k}-{size[0]}"), "wb") as f:
                f.write(data)
    resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, resource.RLIM_INFINITY))
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={folder}/", "-max_len=4096", "-timeout=20", os.path.join(folder, "corpus")]
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
