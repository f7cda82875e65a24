"""Distortions and what turns latents' likelihoods into rates, on pictures in 8-bit units."""

import tensorflow as tf

# D of the variable-rate paper is 0.9 * MSE + 0.1 * (1 - MS-SSIM) without a scale; with pictures
# in [0, 1] we multiply it by this, so that MSE counts in 8-bit units as in the other models.
DISTORTION_SCALE = 255.0**2
MSE_SHARE = 0.9

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def mse(original, reconstruction):
    """Mean squared error, [batch], of pictures [batch, h, w, 3] in 8-bit units (0 to 255)."""
    return tf.reduce_mean(tf.math.squared_difference(original, reconstruction), axis=[1, 2, 3])


def luma(rgb):
    """Y of RGB [..., 3], same units, [..., 1] (ITU-R BT.601, full range)."""
    return tf.reduce_sum(rgb * tf.constant(_LUMA, rgb.dtype), axis=-1, keepdims=True)


def distortion(original, reconstruction, kind):
    """D of the loss, [batch], in squared 8-bit units.

    kind "mse": 255^2 * MSE. kind "mix": 255^2 * (0.9 * MSE + 0.1 * (1 - MS-SSIM of luma)), with MSE on
    [0, 1] (Wang et al., arXiv 2009.13074); needs patches of at least 161 pixels a side.
    """
    error = mse(original, reconstruction)
    if kind == "mse":
        return error
    ms_ssim = tf.image.ssim_multiscale(luma(original), luma(reconstruction), 255.0)
    return MSE_SHARE * error + DISTORTION_SCALE * (1 - MSE_SHARE) * (1 - ms_ssim)
