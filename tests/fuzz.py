"""make fuzz: coverage-guided fuzzing (atheris) of the container and of decompression with tiny models.

    python tests/fuzz.py [SECONDS] [FOLDER]

Finds are written to FOLDER (default: fuzz/), what was tried to FOLDER/corpus. Mended finds, and streams made by hand, are kept in
tests/streams/, which tests/test_hostile.py tries.
"""

import os
import random
import resource
import sys

import atheris
import numpy as np

with atheris.instrument_imports(include=["goconv_tf.bitstream", "goconv_tf.codec", "goconv_tf.entropy"]):
    from hostile import LIMIT_PIXELS, tiny_models, try_bytes

    from goconv_tf import bitstream, codec
    from goconv_tf.errors import GoConvError

MODELS = tiny_models()


def mutate(data, max_size, seed):
    """Bytes anywhere, or, three times in four, what a whole stream holds, in a container that is right again."""
    rng = random.Random(seed)
    try:
        stream = bitstream.unpack(data, LIMIT_PIXELS, allow_truncated=True, problems=[])
    except GoConvError:
        stream = None
    choice = rng.randrange(8)
    if stream is None or choice < 2:
        return atheris.Mutate(data, max_size)
    if choice == 2:
        stream.lmbda_code = rng.choice([0, 1, rng.randrange(bitstream.LMBDA_SCALE)])
    elif choice == 3:
        stream.height, stream.width = (rng.randrange(1, 65) for _ in range(2))
    else:
        layer = rng.choice(stream.layers)
        number = rng.randrange(len(layer.sections))
        layer.sections[number] = atheris.Mutate(layer.sections[number], max(max_size - len(data) + len(layer.sections[number]), 1))
    return bitstream.pack(stream)[:max_size]


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
    kept = os.path.join(os.path.dirname(os.path.abspath(__file__)), "streams")
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={folder}/", "-max_len=4096", "-timeout=20", os.path.join(folder, "corpus"), kept]
    atheris.Setup([sys.argv[0], *options], lambda data: try_bytes(data, MODELS), custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
