"""What the two octave models share: sizes of their latents, and parameters in halves."""

import tensorflow as tf


def half(n):
    """n / 2, rounded up."""
    return (n + 1) // 2


def halves(parameters):
    """(mean, scale): first and second half of the channels."""
    return tf.split(tf.cast(parameters, tf.float32), 2, axis=-1)


def latent_sizes(height, width):
    """Spatial sizes of (y_H, y_L, z_H, z_L) of a padded picture."""
    y_high = (height // 16, width // 16)
    y_low = tuple(map(half, y_high))
    z_high = tuple(map(half, y_low))
    return y_high, y_low, z_high, tuple(map(half, z_high))
