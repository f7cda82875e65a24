"""CompressAI's side of the comparison, run in its own environment: a JSON request a line in, an answer a line out.

{"model": "mbt2018_mean", "quality": 5}   makes it, untrained
{"image": "kodim01.png"}                  codes a picture and decodes it
"""

import os
import sys
import types

from clock import answer_requests, entropy_coding, measure

# CompressAI imports torchvision for its data sets only; not every torch has one.
vision = types.ModuleType("torchvision")
vision.transforms = types.ModuleType("torchvision.transforms")
sys.modules.update({"torchvision": vision, "torchvision.transforms": vision.transforms})

import numpy as np  # noqa: E402
import torch  # noqa: E402
from compressai import zoo  # noqa: E402
from compressai.entropy_models import EntropyModel  # noqa: E402
from PIL import Image  # noqa: E402

state = {}


def answer(request):
    if "model" in request:
        torch.manual_seed(0)
        state["model"] = model = getattr(zoo, request["model"])(request["quality"], pretrained=False).eval()
        model.update(force=True)
        parameters = sum(p.numel() for p in model.parameters())
        versions = {"compressai": __import__("compressai").__version__, "torch": torch.__version__, "numpy": np.__version__}
        return {"filters": model.N, "latents": model.M, "parameters": parameters, "versions": versions}
    model = state["model"]
    picture = np.asarray(Image.open(request["image"]).convert("RGB"))
    with torch.no_grad():
        coded, encode = measure(lambda: model.compress(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255))
        _, decode = measure(lambda: model.decompress(coded["strings"], coded["shape"]))
    return {"encode": encode, "decode": decode, "bytes": sum(len(strings[0]) for strings in coded["strings"])}


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    EntropyModel.compress, EntropyModel.decompress = entropy_coding(EntropyModel.compress), entropy_coding(EntropyModel.decompress)
    answer_requests(answer)
