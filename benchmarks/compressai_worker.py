"""CompressAI's side of the comparison, run in its own environment: a JSON request a line in, an answer a line out.

{"model": "mbt2018_mean", "quality": 5}   makes it, untrained
{"image": "kodim01.png"}                  codes a picture and decodes it
"""

import os
import sys
import types

from clock import answer_requests, entropy_coding, measure, repeat

# CompressAI imports torchvision for its data sets only; not every torch has one.
vision = types.ModuleType("torchvision")
vision.transforms = types.ModuleType("torchvision.transforms")
sys.modules.update({"torchvision": vision, "torchvision.transforms": vision.transforms})

import numpy as np  # noqa: E402
import torch  # noqa: E402
from compressai import ans as ansmodule  # noqa: E402
from compressai import zoo  # noqa: E402
from compressai.entropy_models import EntropyModel  # noqa: E402
from PIL import Image  # noqa: E402

state = {}


def count_macs(model):
    """Multiply-adds of one 768 x 512 picture, coded and decoded."""
    total, counted = [0], (torch.nn.Conv2d, torch.nn.ConvTranspose2d)

    def count(layer, inputs, outputs):
        positions = inputs[0] if isinstance(layer, torch.nn.ConvTranspose2d) else outputs
        total[0] += positions.shape[2] * positions.shape[3] * layer.weight.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, counted)]
    with torch.no_grad():
        model(torch.zeros(1, 3, 512, 768))
    for hook in hooks:
        hook.remove()
    return total[0]


def ans(path):
    """Symbols a second of CompressAI's rANS coder."""
    arrays = np.load(path)
    symbols, indexes = arrays["symbols"].tolist(), arrays["indexes"].tolist()
    tables = arrays["cdf"].tolist(), arrays["lengths"].tolist(), arrays["offset"].tolist()
    encoder, decoder = ansmodule.RansEncoder(), ansmodule.RansDecoder()
    string = encoder.encode_with_indexes(symbols, indexes, *tables)
    assert list(decoder.decode_with_indexes(string, indexes, *tables)) == symbols
    actions = {
        "encode": lambda: encoder.encode_with_indexes(symbols, indexes, *tables),
        "decode": lambda: decoder.decode_with_indexes(string, indexes, *tables),
    }
    return {**{key: len(symbols) / value for key, value in repeat(actions, 7).items()}, "bytes": len(string)}


def answer(request):
    if "symbols" in request:
        return ans(request["symbols"])
    if "model" in request:
        torch.manual_seed(0)
        state["model"] = model = getattr(zoo, request["model"])(request["quality"], pretrained=False).eval()
        model.update(force=True)
        parameters = sum(p.numel() for p in model.parameters())
        versions = {"compressai": __import__("compressai").__version__, "torch": torch.__version__, "numpy": np.__version__}
        return {"filters": model.N, "latents": model.M, "parameters": parameters, "macs": count_macs(model), "versions": versions}
    model = state["model"]
    picture = np.array(Image.open(request["image"]).convert("RGB"))
    with torch.no_grad():
        coded, encode = measure(lambda: model.compress(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255))
        _, decode = measure(lambda: model.decompress(coded["strings"], coded["shape"]))
    return {"encode": encode, "decode": decode, "bytes": sum(len(strings[0]) for strings in coded["strings"])}


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    EntropyModel.compress, EntropyModel.decompress = entropy_coding(EntropyModel.compress), entropy_coding(EntropyModel.decompress)
    answer_requests(answer)
