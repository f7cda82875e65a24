"""Rate and distortion of whole files, really coded and decoded, over a set of pictures."""

import io
import time
from typing import Dict, List

import numpy as np

from goconv_tf import codec, metrics


def _mean(rows: List[dict]) -> Dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def operating_points(config, count: int = 8) -> List[dict]:
    """What `codec.compress` is to be asked for, so that it spans a model's rates: lambdas, numbers of layers, or nothing.

    count: how many lambdas, spread evenly over the logarithm of the range.
    """
    if hasattr(config, "lmbda_min"):
        lambdas = np.exp(np.linspace(np.log(config.lmbda_min), np.log(config.lmbda_max), count))
        return [{"lmbda": float(min(max(lmbda, config.lmbda_min), config.lmbda_max))} for lmbda in lambdas]
    if len(config.layers) > 1:
        return [{"layers": count} for count in range(1, len(config.layers) + 1)]
    return [{}]


def measure_model(model, pictures, entropy_coder="tfc", **point) -> Dict[str, float]:
    """Means over pictures, uint8 [h, w, 3]: bpp of the whole file, `metrics.quality`, seconds.

    point: one of `operating_points`.
    """
    rows = []
    for picture in pictures:
        begin = time.time()
        data = codec.compress(model, picture, entropy_coder=entropy_coder, **point).data
        middle = time.time()
        decoded = codec.decompress(model, data)
        rows.append(_row(picture, decoded, data, middle - begin, time.time() - middle))
    return {**point, **_mean(rows)}


def measure_jpeg(pictures, quality) -> Dict[str, float]:
    """The same of Pillow's JPEG, default subsampling (4:2:0)."""
    from PIL import Image

    rows = []
    for picture in pictures:
        buffer = io.BytesIO()
        begin = time.time()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        middle = time.time()
        decoded = np.asarray(Image.open(buffer))
        rows.append(_row(picture, decoded, buffer.getvalue(), middle - begin, time.time() - middle))
    return {"quality": quality, **_mean(rows)}


def _row(picture, decoded, data, encoding_time, decoding_time):
    return {
        "bpp": metrics.bpp(data, *picture.shape[:2]),
        **metrics.quality(picture, decoded),
        "encoding_time": encoding_time,
        "decoding_time": decoding_time,
    }


def gain_at(rows, reference, bpp, metric="psnr-rgb") -> float:
    """How much higher `metric` is than the reference's at a rate, both interpolated over log bpp; nan outside either."""

    def at(curve):
        curve = sorted(curve, key=lambda row: row["bpp"])
        rates = [row["bpp"] for row in curve]
        if not rates[0] <= bpp <= rates[-1]:
            return float("nan")
        return float(np.interp(np.log(bpp), np.log(rates), [row[metric] for row in curve]))

    return at(rows) - at(reference)
