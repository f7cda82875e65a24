"""Published rate-distortion points (published.json), for plots, tables and BD-rates. No TensorFlow."""

import functools
import json
import os
from typing import Dict

from goconv_tf.errors import UsageError

DATASETS = {"kodak": 24, "tecnick": 100}  # and how many pictures they have
_METRICS = ("psnr-rgb", "ms-ssim-rgb")


@functools.cache
def _contents():
    with open(os.path.join(os.path.dirname(__file__), "published.json"), encoding="utf-8") as f:
        return json.load(f)


def is_of(dataset: str, folder: str) -> bool:
    """Whether a folder of pictures is called after the dataset: published figures are of no others."""
    return dataset in os.path.basename(os.path.abspath(folder)).lower()


def names(dataset: str):
    """Names of the published curves on "kodak" or "tecnick"."""
    return sorted(_contents()[dataset])


def curve(dataset: str, name: str) -> Dict:
    """{"name", "source", "dataset", "meta", "results"}; results {"psnr-rgb" or "ms-ssim-rgb": [(bpp, value)]}, MS-SSIM linear.

    UsageError names what there is.
    """
    if name not in _contents()[dataset]:
        raise UsageError(f"no published curve {name!r} on {dataset}: there are {', '.join(names(dataset))}")
    entry = _contents()[dataset][name]
    results = {metric: [tuple(point) for point in entry[metric]] for metric in _METRICS if metric in entry}
    meta = {"dataset": dataset, "pictures": DATASETS[dataset]}
    return {"name": entry["title"], "source": entry["source"], "dataset": dataset, "meta": meta, "results": results}


def tables() -> Dict:
    """The papers' tables, by model."""
    return _contents()["tables"]
