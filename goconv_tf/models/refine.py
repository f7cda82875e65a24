"""Latents that are optimised for the picture at hand before they are coded: smaller files of the same format, for much more work of the encoder.

Stochastic Gumbel annealing (Yang, Bamler and Mandt, "Improving inference for neural image compression", arXiv 2006.04240). The
decoder, and the time that it takes, stay as they are.
"""

import functools
import math

import tensorflow as tf

from goconv_tf import entropy, losses, memory, metrics
from goconv_tf.errors import UsageError

RATE = 2.5  # of Adam, over the number of steps, so that latents can go as far whatever that is
RATES = (0.002, 0.02)
COOLING = 0.3  # share of the steps after which the temperature falls
TEMPERATURES = (0.5, 0.03)
BETAS = (0.9, 0.999)
SLOW, SLOWER = 0.6, 0.3  # share of the steps after which the rate is less, and what of it is left
COST = 3.0  # memory beside that of coding, of what gradients need


def check(model, padded_size, size, distortion):
    """UsageError where D is not defined for a picture this small, GoConvError where refining it needs more memory than there is."""
    if distortion != "mse" and min(size) < metrics.MS_SSIM_SIDE:
        raise UsageError(f"{size[1]} x {size[0]} pixels cannot be refined for MS-SSIM, which needs {metrics.MS_SSIM_SIDE} a side")
    memory.check(COST * model.bytes_per_pixel * math.prod(padded_size), f"refining {size[1]} x {size[0]} pixels")


def refine(model, x, size, lmbda, latents, steps, distortion="mse"):
    """Latents of one picture that R + lambda D, as files have it, is no larger with.

    Args:
      model: a Codec whose `analysis` gives all latents, with weights; its compiled step is kept with its other stages.
      x: uint8 [1, h, w, 3], padded to what `analysis` takes. size: (height, width) of the picture at its top left, which counts.
      lmbda: float32 [1], the Lagrangian of R (bits per pixel) + lambda D.
      latents: what its `analysis` gives for them.
      steps: how many of Adam.
      distortion: D, as `losses.distortion` knows it; but for "mse", of 161 pixels a side at least.

    Returns:
      {latent: float32 tensor}, as given where no better ones were found.
    """
    first = {name: tf.cast(latent, tf.float32) for name, latent in latents.items()}
    functions, keys = model.__dict__.setdefault("_stages", {}), [(what, distortion) for what in ("refine", "refined")]
    if keys[1] not in functions:
        functions.update(zip(keys, _compiled(model, distortion, first)))
    step, loss = (functions[key] for key in keys)
    picture = (x, tf.constant(size), lmbda)
    state = (first, *2 * [{name: tf.zeros_like(latent) for name, latent in first.items()}])
    for number in range(steps):
        share = number / steps
        temperature = TEMPERATURES[0] * (TEMPERATURES[1] / TEMPERATURES[0]) ** max((share - COOLING) / (1 - COOLING), 0.0)
        rate = min(max(RATE / steps, RATES[0]), RATES[1]) * (SLOWER if share >= SLOW else 1.0)
        state = step(picture, state, tf.constant(number), tf.constant(temperature, tf.float32), tf.constant(rate, tf.float32))
    return state[0] if loss(picture, state[0]) < loss(picture, first) else first


def _compiled(model, distortion, latents):
    """(`_step`, `_loss`) of one picture of any size."""
    picture = (tf.TensorSpec([1, None, None, 3], tf.uint8), tf.TensorSpec([2], tf.int32), tf.TensorSpec([1], tf.float32))
    values = {name: tf.TensorSpec([1, None, None, latent.shape[-1]], tf.float32) for name, latent in latents.items()}
    numbers = [tf.TensorSpec([], kind) for kind in (tf.int32, tf.float32, tf.float32)]
    step, loss = (functools.partial(function, model, distortion) for function in (_step, _loss))
    return (
        tf.function(step, input_signature=[picture, 3 * (values,), *numbers], autograph=False),
        tf.function(loss, input_signature=[picture, values], autograph=False),
    )


def _objective(model, distortion, picture, walker, limit=lambda decoded: decoded):
    """R + lambda D of what a walker makes of the latents, in bits; limit: what becomes of the decoded picture before D is measured."""
    x, size, lmbda = picture
    decoded = limit(model.synthesis(model.walk(walker), lmbda))
    x, decoded = (whole[:, : size[0], : size[1]] for whole in (x, decoded))
    rate, _ = model.rates(walker, x)
    cost = rate + lmbda * losses.distortion(tf.cast(x, tf.float32), decoded, distortion)
    return tf.cast(size[0] * size[1], tf.float32) * cost[0]


def _step(model, distortion, picture, state, number, temperature, rate):
    """One of Adam: (latents, means of gradients, of their squares)."""
    latents, means, squares = state
    with tf.GradientTape() as tape:
        tape.watch(latents)
        objective = _objective(model, distortion, picture, entropy.AnnealingWalker(latents, tf.stack([0, number]), temperature))
    gradients = tape.gradient(objective, latents)
    means = {name: BETAS[0] * means[name] + (1 - BETAS[0]) * gradient for name, gradient in gradients.items()}
    squares = {name: BETAS[1] * squares[name] + (1 - BETAS[1]) * tf.square(gradient) for name, gradient in gradients.items()}
    count = tf.cast(number + 1, tf.float32)
    factor = rate * tf.sqrt(1 - BETAS[1] ** count) / (1 - BETAS[0] ** count)
    return {name: latents[name] - factor * means[name] / (tf.sqrt(squares[name]) + 1e-8) for name in latents}, means, squares


def _loss(model, distortion, picture, latents):
    """R + lambda D of rounded latents and an 8-bit picture."""
    return _objective(model, distortion, picture, entropy.RoundingWalker(latents), lambda decoded: tf.clip_by_value(tf.round(decoded), 0.0, 255.0))
