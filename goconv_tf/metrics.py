"""Measures of pictures, uint8 [h, w, 3]. Depends on no model."""

import functools
import math
from typing import Dict

import numpy as np

from goconv_tf import memory

MS_SSIM_SIDE = 161  # smallest side in pixels for five scales of an 11 x 11 window
MS_SSIM_BYTES = 130  # of memory a pixel
QUALITY_BYTES = MS_SSIM_BYTES + 54  # two pictures and their YUV besides


def _alike(a, b):
    """Both as arrays; ValueError where their shapes differ."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"pictures of different shapes cannot be compared: {list(a.shape)} and {list(b.shape)}")
    return a, b


def mse(a, b) -> float:
    """Mean squared error of all samples; ValueError, as of all measures here, where the pictures' shapes differ."""
    a, b = _alike(a, b)
    rows = [slice(top, top + 256) for top in range(0, len(a), 256)]  # so that memory stays bounded
    return math.fsum(float(np.sum(np.square(a[part].astype(np.float64) - b[part]))) for part in rows) / a.size


def psnr(a, b) -> float:
    """Peak signal-to-noise ratio over all samples, 8-bit units, dB; inf for equal pictures."""
    error = mse(a, b)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def weighted(y: float, u: float, v: float) -> float:
    """A measure of all three channels, 6:1:1."""
    return (6 * y + u + v) / 8


def yuv(rgb):
    """Y, U, V float64 [h, w, 3] of RGB, ITU-R BT.601 full range (JPEG's), not rounded, chroma around 128 and not subsampled."""
    r, g, b = np.moveaxis(np.asarray(rgb, np.float64), -1, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    u = 128 + (0.299 * (b - r) + 0.587 * (b - g)) / 1.772  # b - y, but exactly nothing for grey
    v = 128 + (0.587 * (r - g) + 0.114 * (r - b)) / 1.402
    return np.stack([y, u, v], axis=-1)


@functools.cache
def _compiled_ms_ssim():
    """tf.image.ssim_multiscale as one function for all sizes: half the time of single operations."""
    import tensorflow as tf

    pictures = tf.TensorSpec([1, None, None, None], tf.float32)
    return tf.function(lambda a, b: tf.image.ssim_multiscale(a, b, 255.0)[0], input_signature=[pictures, pictures], autograph=False)


@memory.guarded()
def ms_ssim(a, b) -> float:
    """Multi-scale SSIM (Wang, Simoncelli, Bovik 2003), mean of the channels of [h, w, c] in 8-bit units, linear; nan under 161 pixels a side."""
    a, b = _alike(a, b)
    if min(a.shape[:2]) < MS_SSIM_SIDE:
        return math.nan
    return float(_compiled_ms_ssim()(a[None].astype(np.float32), b[None].astype(np.float32)))


def decibels(similarity: float) -> float:
    """MS-SSIM in dB, -10 log10(1 - MS-SSIM)."""
    return math.inf if similarity >= 1 else -10 * math.log10(1 - similarity)


def bpp(data: bytes, height: int, width: int) -> float:
    """Bits per pixel of a whole file."""
    return 8 * len(data) / (height * width)


def quality(original, decoded) -> Dict[str, float]:
    """All measures of a decoded picture: mse, psnr-rgb, -y, -u, -v, -yuv (6:1:1 of the three), ms-ssim-rgb and -y (linear).

    PSNR in dB is inf for equal pictures; MS-SSIM is nan under 161 pixels a side.
    """
    original, decoded = _alike(original, decoded)
    a, b = yuv(original), yuv(decoded)
    y, u, v = (psnr(a[..., k], b[..., k]) for k in range(3))
    return {
        "mse": mse(original, decoded),
        "psnr-rgb": psnr(original, decoded),
        "psnr-y": y,
        "psnr-u": u,
        "psnr-v": v,
        "psnr-yuv": weighted(y, u, v),
        "ms-ssim-rgb": ms_ssim(original, decoded),
        "ms-ssim-y": ms_ssim(a[..., :1], b[..., :1]),
    }
