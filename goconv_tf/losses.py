"""Distortions of pictures in 8-bit units."""

import tensorflow as tf

# D of the variable-rate paper is 0.9 * MSE + 0.1 * (1 - MS-SSIM) without a scale; with pictures
# in [0, 1] we multiply it by this, so that MSE counts in 8-bit units as in the other models.
DISTORTION_SCALE = 255.0**2
MSE_SHARE = 0.9
MS_SSIM_SCALE = 1280.0

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def mse(original, reconstruction):
    """Mean squared error, [batch], of pictures [batch, h, w, 3] in 8-bit units (0 to 255)."""
    return tf.reduce_mean(tf.math.squared_difference(original, reconstruction), axis=[1, 2, 3])


def luma(rgb):
    """Y of RGB [..., 3], same units, [..., 1] (ITU-R BT.601, full range)."""
    return tf.reduce_sum(rgb * tf.constant(_LUMA, rgb.dtype), axis=-1, keepdims=True)


_MS_SSIM_POWERS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_MS_SSIM_FLOOR = 1e-4


def ms_ssim(a, b):
    """Multi-scale structural similarity (Wang, Simoncelli, Bovik 2003), [batch], of [batch, h, w, 1] in 8-bit units, of 161 pixels a side at least.

    The numbers of tf.image.ssim_multiscale where every scale's mean is above 1e-4; below, a floor keeps
    the gradient finite (there it is NaN, which untrained models meet).
    """
    taps = tf.exp(-tf.square(tf.range(11, dtype=tf.float32) - 5.0) / (2 * 1.5**2))
    taps /= tf.reduce_sum(taps)

    def blur(x):
        return tf.nn.conv2d(tf.nn.conv2d(x, tf.reshape(taps, [11, 1, 1, 1]), 1, "VALID"), tf.reshape(taps, [1, 11, 1, 1]), 1, "VALID")

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    result = 1.0
    for scale, power in enumerate(_MS_SSIM_POWERS):
        mean_a, mean_b = blur(a), blur(b)
        product, squares = mean_a * mean_b, tf.square(mean_a) + tf.square(mean_b)
        contrast = (2 * (blur(a * b) - product) + c2) / (blur(tf.square(a) + tf.square(b)) - squares + c2)
        last = scale == len(_MS_SSIM_POWERS) - 1
        term = contrast * (2 * product + c1) / (squares + c1) if last else contrast
        result *= tf.pow(tf.maximum(tf.reduce_mean(term, axis=[1, 2, 3]), _MS_SSIM_FLOOR), power)
        if not last:
            a, b = (tf.nn.avg_pool2d(x, 2, 2, "SAME") for x in (a, b))
    return result


def distortion(original, reconstruction, kind):
    """D of the loss, [batch], in squared 8-bit units; "mix" and "ms-ssim" need patches of at least 161 pixels a side.

    kind "mse": 255^2 * MSE. kind "mix": 255^2 * (0.9 * MSE + 0.1 * (1 - MS-SSIM of luma)), with MSE on
    [0, 1] (Wang et al., arXiv 2009.13074). kind "ms-ssim": 1280 * (1 - MS-SSIM of RGB), a scale at which a
    lambda gives about the rate it gives with "mse" (ratios of CompressAI's pairs of lambdas: 1222 to 1333).
    """
    if kind == "mse":
        return mse(original, reconstruction)
    if kind == "ms-ssim":
        planes = [tf.concat(tf.split(x, 3, axis=-1), 0) for x in (original, reconstruction)]
        return MS_SSIM_SCALE * (1 - tf.reduce_mean(tf.reshape(ms_ssim(*planes), [3, -1]), 0))
    if kind != "mix":
        raise ValueError(f"distortion must be mse, mix or ms-ssim, not {kind!r}")
    similarity = ms_ssim(luma(original), luma(reconstruction))
    return MSE_SHARE * mse(original, reconstruction) + DISTORTION_SCALE * (1 - MSE_SHARE) * (1 - similarity)
