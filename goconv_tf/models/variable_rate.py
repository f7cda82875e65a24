"""Variable-rate compression with modulated generalized octave convolution (Wang et al., arXiv 2009.13074)."""

import functools

import tensorflow as tf

from goconv_tf.entropy import FactorizedPrior, GaussianConditional
from goconv_tf.layers import GoConv2D, GoConv2DTranspose, ModulatedGoConv2D, ModulatedGoConv2DTranspose, OctaveTensor, SignalConv2D, exact
from goconv_tf.layers.octave import crop, crop_like, split_filters
from goconv_tf.models.base import Codec, stage
from goconv_tf.models.octave import chain, estimate_parameters, estimation, halves, latent_sizes
from goconv_tf.models.tiles import CELL, Extent
from goconv_tf.presets import VariableRateConfig

PIXEL_SCALE = 256.0  # x / 256, as in the paper


@tf.keras.saving.register_keras_serializable("goconv_tf")
class VariableRate(Codec):
    """One model for a range of rates: every core layer is scaled, channel by channel, by lambda.

        x --g_a(lambda)--> y_H, y_L --h_a--> z_H, z_L
        z_L, z_H: factorized priors
        psi_H, P_L = h_s(z~);  y_L ~ N(mean, scale of P_L)
        y_H ~ N(f_pe(up(y_L~), psi_H));  x^ = g_s(y_H~, y_L~; lambda)

    y_H has h/16 x w/16 positions, y_L half as many a side; z a quarter of y's, rounded up. In shapes, h and w are the
    picture's, padded to multiples of 16; N_H, N_L, M_H, M_L the shares of N and M, half of each with alpha 0.5. Trained for D = MSE
    unless `distortion` says otherwise; the paper's D is "mix", which `experiments/variable_rate.py` trains for.

    Args:
      config: VariableRateConfig; None for the paper's (N = 448).
    """

    can_tile = True
    exact_parts = ("h_s", "f_up", "f_pe")

    def __init__(self, config=None, **kwargs):
        super().__init__(config or VariableRateConfig(), **kwargs)
        c = self.config
        n, m = c.filters, c.latents
        self.y_high_channels, self.y_low_channels = split_filters(m, c.alpha)
        self.z_high_channels, self.z_low_channels = split_filters(n, c.alpha)
        kinds = (ModulatedGoConv2D, ModulatedGoConv2DTranspose, GoConv2D, GoConv2DTranspose)
        modulated, modulated_up, conv, up = (functools.partial(kind, alpha=c.alpha) for kind in kinds)
        leaky, plain = {"activation": "leaky_relu"}, {"kernel_parameter": "variable"}  # the hyper synthesis has plain kernels
        self.g_a = [modulated(n, 5, 2, activation="gdn") for _ in range(3)] + [modulated(m, 5, 2)]
        self.g_s = [modulated_up(n, 5, 2, activation="igdn") for _ in range(3)] + [modulated_up(3, 5, 2, alpha=0)]
        self.h_a = [conv(n, 3, **leaky), conv(n, 5, 2, **leaky), conv(n, 5, 2, use_bias=False)]
        self.h_s = [up(n, 5, 2, **leaky, **plain), up(c.hyper_width, 5, 2, **leaky, **plain), up(2 * m, 3, **plain)]
        self.f_up = SignalConv2D(self.y_high_channels, 5, 2, transpose=True)
        self.f_pe = estimation(c.estimation_widths, self.y_high_channels)
        self.prior_z_low = FactorizedPrior(self.z_low_channels)
        self.prior_z_high = FactorizedPrior(self.z_high_channels)
        self.conditional = GaussianConditional()

    def analysis(self, x, lmbda):
        y = self.transform(x, lmbda)
        z = self.hyper_analysis(y)
        return {"z_low": z.low, "z_high": z.high, "y_low": y.low, "y_high": y.high}

    @stage(inputs=(CELL, None), outputs=(8, 4), margin=1)
    def transform(self, x, lmbda):
        """Pictures [batch, h, w, 3], 0 to 255, lmbda [batch] -> OctaveTensor y, [batch, h/16, w/16, M_H] and [batch, h/32, w/32, M_L]."""
        y = tf.cast(x, tf.float32) / PIXEL_SCALE
        for layer in self.g_a:
            y = layer(y, lmbda)
        return y

    @stage(inputs=(8, 4), outputs=(2, 1), margin=2)
    def hyper_analysis(self, y):
        """OctaveTensor y -> OctaveTensor z, [batch, h/64, w/64, N_H] and [batch, h/128, w/128, N_L]."""
        return chain(self.h_a, y)

    @stage(inputs=(2, 1, Extent(8)), outputs=(8, 4), margin=3)
    def hyper_synthesis(self, z_high, z_low, size):
        """(psi_H [batch, *size, 2 M_H], P_L [batch, *size/2, 2 M_L]: means, then scales) for y_H of spatial size `size`, int32 [2]."""
        p = chain(self.h_s, OctaveTensor(z_high, z_low))
        return crop(p.high, size), crop(p.low, (size + 1) // 2)

    @stage(inputs=(4, 8), outputs=(8,), margin=1)
    def parameter_estimation(self, y_low, psi_high):
        """Means and then scales of y_H, [batch, h/16, w/16, 2 M_H], from the decoded y_L and psi_H."""
        return estimate_parameters(self.f_pe, [crop_like(exact.apply(self.f_up, y_low), psi_high), psi_high])

    def walk(self, walker):
        z_low = walker("z_low", self.prior_z_low)
        z_high = walker("z_high", self.prior_z_high)
        psi_high, p_low = self.hyper_synthesis(walker.enter(z_high), walker.enter(z_low), walker.size("y_high"))
        y_low = walker("y_low", self.conditional, *halves(p_low))
        y_high = walker("y_high", self.conditional, *halves(self.parameter_estimation(walker.enter(y_low), psi_high)))
        return OctaveTensor(y_high, y_low)

    @stage(inputs=(8, 4, None), outputs=(CELL,), margin=1)
    def synthesis(self, latents, lmbda):
        """OctaveTensor y, lmbda [batch] -> pictures float [batch, h, w, 3] in 8-bit units."""
        x = latents
        for layer in self.g_s:
            x = layer(x, lmbda)
        return tf.cast(x, tf.float32) * PIXEL_SCALE

    def latent_shapes(self, height, width):
        y_high, y_low, z_high, z_low = latent_sizes(height, width)
        return {
            "z_low": (*z_low, self.z_low_channels),
            "z_high": (*z_high, self.z_high_channels),
            "y_low": (*y_low, self.y_low_channels),
            "y_high": (*y_high, self.y_high_channels),
        }
