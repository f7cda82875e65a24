"""Our side of the comparisons: a JSON request a line in, an answer a line out.

{"model": "variable_rate", "preset": "base", "filters": 192}   makes it, untrained
{"model": "crpe-small-mse-0.01"}                               loads it
{"image": "kodim01.png", "exact": false, "layers": 2}          codes a picture and decodes it
"""

import os
import tempfile

from clock import answer_requests, entropy_coding, measure

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from goconv_tf import codec, presets, zoo
from goconv_tf.entropy import CODERS

state = {}


def load(request):
    """A model of the zoo, or an untrained one through a folder of its own, as a user would load it."""
    if "preset" not in request:
        return zoo.load_pretrained(request["model"])
    tf.keras.utils.set_random_seed(0)
    config = presets.get_preset(request["model"], request["preset"]).adapt(request.get("filters", 0), request.get("latents", 0), ())
    with tempfile.TemporaryDirectory() as folder:
        zoo.save_pretrained(zoo.new_model(config), folder, "untrained")
        return zoo.load_pretrained(folder)


def answer(request):
    if "model" in request:
        state["model"] = model = load(request)
        latents = getattr(model.config, "latents", model.config.filters)
        versions = {"tensorflow": tf.__version__, "numpy": np.__version__}
        return {"filters": model.config.filters, "latents": latents, "parameters": model.count_params(), "versions": versions}
    model, picture = state["model"], codec.read_picture(request["image"], 10**9)
    options = {"layers": request.get("layers"), "exact": request.get("exact", True)}
    coded, encode = measure(lambda: codec.compress(model, picture, **options))
    _, decode = measure(lambda: codec.decompress(model, coded.data, 10**9))
    return {"encode": encode, "decode": decode, "bytes": len(coded.data)}


if __name__ == "__main__":
    coder = CODERS["tfc"]
    coder.encode, coder.decode = entropy_coding(coder.encode), entropy_coding(coder.decode)
    answer_requests(answer)
