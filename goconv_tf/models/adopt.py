"""A CRPE from a trained VariableRate."""

import tensorflow as tf

from goconv_tf.models import crpe, variable_rate
from goconv_tf.models.octave import copy_convolution, set_kernel


def adopt(model, source, lmbda):
    """Starts a CRPE from a VariableRate of the same widths, which it then equals at one lambda but for how z1 is coded.

    The modulated convolutions become plain ones at lambda; C passes P1_L on, f_y ignores the second hyper layer. What
    VariableRate does not have (h_a2, h_s2, f_z, the upsamplings) stays as initialised, but for a z2 that is small
    and has the other model's priors of z, so that it costs few bits at first.

    Args:
      model: CRPE with `second_hyper` and `crpe_y`. source: VariableRate of the same widths (others fail in TensorFlow), not folded.
      lmbda: float within the source's range, on the scale of R + lambda * 255^2 * MSE.
    """
    for ours, theirs in zip([*model.g_a, *model.g_s], [*source.g_a, *source.g_s]):
        for path, conv in theirs.paths.items():
            factors = getattr(theirs, f"{path}_scaling")(tf.constant(lmbda))[0, 0, 0]
            copy_convolution(ours.paths[path], conv, factors)
            activation = getattr(theirs, f"{path}_activation")
            if activation is not None:
                getattr(ours, f"{path}_activation").set_weights(activation.get_weights())
    scale = variable_rate.PIXEL_SCALE / crpe.PIXEL_SCALE  # pictures are x / 255 here, x / 256 there
    set_kernel(model.g_a[0].high, model.g_a[0].high.kernel / scale)
    for path in ("high", "up"):
        copy_convolution(model.g_s[-1].paths[path], model.g_s[-1].paths[path], scale)
    for ours, theirs in zip([*model.h_a1, *model.h_s1], [*source.h_a, *source.h_s]):
        for path, conv in theirs.paths.items():
            copy_convolution(ours.paths[path], conv)
    copy_convolution(model.f_y_up, source.f_up)
    first, first_bias = source.f_pe[0].kernel, source.f_pe[0].bias
    ignored = tf.zeros([1, 1, model.config.filters // 2, first.shape[-1]])
    set_kernel(model.f_y[0], tf.concat([first[:, :, : model.y_high_channels], ignored, first[:, :, model.y_high_channels :]], axis=2))
    model.f_y[0].bias_parameter.assign(first_bias)
    for ours, theirs in zip(model.f_y[1:], source.f_pe[1:]):
        copy_convolution(ours, theirs)
    for conv in model.h_a2[-1].paths.values():
        set_kernel(conv, 0.1 * conv.kernel)
    for ours, theirs in ((model.prior_high, source.prior_z_high), (model.prior_low, source.prior_z_low)):
        ours.set_weights(theirs.get_weights())
    passing = tf.pad(tf.eye(model.y_low_channels)[None, None], [[2, 2], [2, 2], [0, model.config.filters // 2], [0, 0]])
    for fusion in [model.fusion, model.fusion_scale] if model.config.separate_fusion else [model.fusion]:
        set_kernel(fusion, passing)
        fusion.bias_parameter.assign(tf.zeros_like(fusion.bias_parameter))
