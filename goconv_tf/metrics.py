"""Measures of pictures, uint8 [h, w, 3]. Depends on nothing else here."""

import math

import numpy as np


def psnr(a, b) -> float:
    """Peak signal-to-noise ratio over all RGB samples, dB; inf for equal pictures."""
    error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ms_ssim(a, b) -> float:
    """Multi-scale SSIM of the RGB channels' mean (Wang et al. 2003), linear; nan under 161 pixels a side."""
    if min(a.shape[:2]) < 161:
        return math.nan
    import tensorflow as tf

    return float(tf.image.ssim_multiscale(tf.constant(a, tf.float32)[None], tf.constant(b, tf.float32)[None], 255.0)[0])


def bpp(data: bytes, height: int, width: int) -> float:
    """Bits per pixel of a whole file."""
    return 8 * len(data) / (height * width)
