"""Multi-layer hyper-priors with cross-resolution parameter estimation (Fu et al., arXiv 2209.03353)."""

import functools

import tensorflow as tf

from goconv_tf.entropy import FactorizedPrior, GaussianConditional
from goconv_tf.layers import GDN, GoConv2D, GoConv2DTranspose, OctaveTensor, SignalConv2D, exact
from goconv_tf.layers.octave import crop, crop_like, split_filters
from goconv_tf.models.base import Codec, stage
from goconv_tf.models.octave import chain, estimate_parameters, estimation, halves, latent_sizes
from goconv_tf.models.tiles import CELL, Extent
from goconv_tf.presets import CRPEConfig

PIXEL_SCALE = 255.0


@tf.keras.saving.register_keras_serializable("goconv_tf")
class CRPE(Codec):
    """Octave codec with two layers of hyper-priors; the high resolution's parameters are estimated from the decoded low one.

        x --g_a--> y_H, y_L --h_a1--> z1_H, z1_L --h_a2--> z2_H, z2_L
        z2_H, z2_L: factorized priors;                          P2 = h_s2(z2~)
        z1_L ~ N(halves of P2_L);  z1_H ~ N(f_z(up(z1_L~), P2_H))       CRPE at level z;   P1 = h_s1(z1~)
        y_L ~ N(C(m(P1_L), up4(m(P2_L))), C(s(P1_L), up4(s(P2_L))))     m, s: halves of the channels
        y_H ~ N(f_y(up(y_L~), up4(P2_H), P1_H))                         CRPE at level y;   x^ = g_s(y_H~, y_L~)

    y_H has h/16 x w/16 positions, z1_H and z2_H a quarter as many a side, low resolutions half of theirs,
    all rounded up: pictures of any size are one stream (the original cuts those over 5000 pixels a side in two, for
    memory's sake; here large ones are computed in tiles, which changes nothing of it). They are padded to multiples of 16, below
    and right with their edges (the original: of 128, on all sides with zeros). In shapes, h and w are the padded picture's; N_H, N_L, M_H,
    M_L the shares of N and M, half of each with alpha 0.5.

    What the paper ablates is in the config: `second_hyper` (without: z1 has factorized priors, y_L halves of P1_L),
    `crpe_z` and `crpe_y` (without: f sees no decoded low resolution), `if_weight` (0: no information-fidelity
    loss), `separate_fusion` (two convolutions C, one for means and one for scales; the original shares one).

    Args:
      config: CRPEConfig; None for the paper's at high rates (N = 448).
    """

    can_tile = True
    exact_parts = ("h_s1", "h_s2", "f_y", "f_y_up", "f_z", "f_z_up", "up4_mean", "up4_scale", "up4_high", "fusion", "fusion_scale")

    def __init__(self, config=None, **kwargs):
        super().__init__(config or CRPEConfig(), **kwargs)
        c = self.config
        n, m = c.filters, c.latents
        self.y_high_channels, self.y_low_channels = split_filters(m, c.alpha)
        self.z_high_channels, self.z_low_channels = split_filters(n, c.alpha)
        conv, up = (functools.partial(kind, alpha=c.alpha) for kind in (GoConv2D, GoConv2DTranspose))
        leaky, plain = {"activation": "leaky_relu"}, {"kernel_parameter": "variable"}  # the hyper syntheses have plain kernels
        self.g_a = [conv(n, 5, 2, activation="gdn") for _ in range(3)] + [conv(m, 5, 2)]
        self.g_s = [up(n, 5, 2, activation="igdn") for _ in range(3)] + [up(3, 5, 2, alpha=0)]
        self.h_a1 = [conv(n, 3, **leaky), conv(n, 5, 2, **leaky), conv(n, 5, 2, use_bias=False)]
        self.h_s1 = [up(n, 5, 2, **leaky, **plain), up(c.hyper_width, 5, 2, **leaky, **plain), up(2 * m, 3, **plain)]
        self.f_y = estimation(c.estimation_widths, self.y_high_channels)
        if c.crpe_y:
            self.f_y_up = SignalConv2D(self.y_high_channels, 5, 2, transpose=True)
        if c.second_hyper:
            self.h_a2 = [conv(n, 3, **leaky), conv(n, 3, **leaky), conv(n, 3, use_bias=False)]
            self.h_s2 = [up(n, 3, **leaky, **plain), up(c.hyper_width, 3, **leaky, **plain), up(2 * n, 3, **plain)]
            self.f_z = estimation(c.estimation_widths, self.z_high_channels)
            if c.crpe_z:
                self.f_z_up = SignalConv2D(self.z_high_channels, 5, 2, transpose=True)
            self.up4_mean, self.up4_scale, self.up4_high = ([_up(n // 2), GDN(), _up(n // 2), GDN()] for _ in range(3))
            self.fusion = SignalConv2D(self.y_low_channels, 5)
            if c.separate_fusion:
                self.fusion_scale = SignalConv2D(self.y_low_channels, 5)
        if c.if_weight:
            # Of use in training only.
            self.if_y, self.if_z = (SignalConv2D(channels, 5, 2, transpose=True) for channels in (self.y_high_channels, self.z_high_channels))
        self.prior_low, self.prior_high = FactorizedPrior(self.z_low_channels), FactorizedPrior(self.z_high_channels)
        self.conditional = GaussianConditional()

    def analysis(self, x, lmbda):
        y = self.transform(x, lmbda)
        z1 = self.hyper_analysis1(y)
        latents = {"z1_low": z1.low, "z1_high": z1.high, "y_low": y.low, "y_high": y.high}
        if self.config.second_hyper:
            z2 = self.hyper_analysis2(z1)
            latents.update(z2_high=z2.high, z2_low=z2.low)
        return latents

    @stage(inputs=(CELL, None), outputs=(8, 4), margin=1)
    def transform(self, x, lmbda):
        """Pictures [batch, h, w, 3], 0 to 255 -> OctaveTensor y, [batch, h/16, w/16, M_H] and [batch, h/32, w/32, M_L]."""
        del lmbda
        return chain(self.g_a, tf.cast(x, tf.float32) / PIXEL_SCALE)

    @stage(inputs=(8, 4), outputs=(2, 1), margin=2)
    def hyper_analysis1(self, y):
        """OctaveTensor y -> OctaveTensor z1, [batch, h/64, w/64, N_H] and [batch, h/128, w/128, N_L]."""
        return chain(self.h_a1, y)

    @stage
    def hyper_analysis2(self, z1):
        """OctaveTensor z1 -> OctaveTensor z2, of the same shapes."""
        return chain(self.h_a2, z1)

    @stage
    def hyper_synthesis2(self, z2_high, z2_low):
        """(P2_H [batch, h/64, w/64, 2 N_H], P2_L [batch, h/128, w/128, 2 N_L])."""
        return tuple(chain(self.h_s2, OctaveTensor(z2_high, z2_low)))

    @stage
    def estimate_z_high(self, z1_low, p2_high):
        """Means and then scales of z1_H, [batch, h/64, w/64, 2 N_H]."""
        inputs = [crop_like(exact.apply(self.f_z_up, z1_low), p2_high), p2_high] if self.config.crpe_z else [p2_high]
        return estimate_parameters(self.f_z, inputs)

    @stage(inputs=(2, 1, Extent(8)), outputs=(8, 4), margin=3)
    def hyper_synthesis1(self, z1_high, z1_low, size):
        """(P1_H [batch, *size, 2 M_H], P1_L [batch, *size/2, 2 M_L]) for y_H of spatial size `size`, int32 [2]."""
        p = chain(self.h_s1, OctaveTensor(z1_high, z1_low))
        return crop(p.high, size), crop(p.low, (size + 1) // 2)

    @stage(inputs=(4, 1), outputs=(4,), margin=2)
    def estimate_y_low(self, p1_low, p2_low):
        """Means and then scales of y_L, [batch, h/32, w/32, 2 M_L], from both hyper layers' P1_L and P2_L."""
        (mean1, scale1), (mean2, scale2) = (exact.split(p, 2 * [p.shape[-1] // 2]) for p in (p1_low, p2_low))
        fuse_scale = self.fusion_scale if self.config.separate_fusion else self.fusion
        mean = exact.apply(self.fusion, exact.concat([mean1, crop_like(chain(self.up4_mean, mean2), mean1)]))
        scale = exact.apply(fuse_scale, exact.concat([scale1, crop_like(chain(self.up4_scale, scale2), scale1)]))
        return exact.concat([mean, scale])

    @stage(inputs=(4, 2, 8), outputs=(8,), margin=2)
    def estimate_y_high(self, y_low, p2_high, p1_high):
        """Means and then scales of y_H, [batch, h/16, w/16, 2 M_H]."""
        inputs = [crop_like(exact.apply(self.f_y_up, y_low), p1_high)] if self.config.crpe_y else []
        inputs += [] if p2_high is None else [crop_like(chain(self.up4_high, p2_high), p1_high)]
        return estimate_parameters(self.f_y, [*inputs, p1_high])

    def walk(self, walker):
        p2_high = None
        if self.config.second_hyper:
            z2_high = walker("z2_high", self.prior_high)
            z2_low = walker("z2_low", self.prior_low)
            p2_high, p2_low = self.hyper_synthesis2(walker.enter(z2_high), walker.enter(z2_low))
            z1_low = walker("z1_low", self.conditional, *halves(p2_low))
            z1_high = walker("z1_high", self.conditional, *halves(self.estimate_z_high(walker.enter(z1_low), p2_high)))
        else:
            z1_low = walker("z1_low", self.prior_low)
            z1_high = walker("z1_high", self.prior_high)
        p1_high, p1_low = self.hyper_synthesis1(walker.enter(z1_high), walker.enter(z1_low), walker.size("y_high"))
        if self.config.second_hyper:
            p1_low = self.estimate_y_low(p1_low, p2_low)
        y_low = walker("y_low", self.conditional, *halves(p1_low))
        y_high = walker("y_high", self.conditional, *halves(self.estimate_y_high(walker.enter(y_low), p2_high, p1_high)))
        return OctaveTensor(y_high, y_low)

    @stage(inputs=(8, 4, None), outputs=(CELL,), margin=1)
    def synthesis(self, latents, lmbda):
        """OctaveTensor y~ -> pictures [batch, h, w, 3], 0 to 255 and beyond."""
        del lmbda
        return tf.cast(chain(self.g_s, latents), tf.float32) * PIXEL_SCALE

    def latent_shapes(self, height, width):
        y_high, y_low, z_high, z_low = latent_sizes(height, width)
        shapes = {"y_high": (*y_high, self.y_high_channels), "y_low": (*y_low, self.y_low_channels)}
        for z in ("z1", "z2"):
            shapes.update({f"{z}_high": (*z_high, self.z_high_channels), f"{z}_low": (*z_low, self.z_low_channels)})
        return {name: shapes[name] for name in self.latent_names}

    def rates(self, walker, x):
        bpp, metrics = super().rates(walker, x)
        for frequency in ("high", "low"):
            metrics[f"bpp_{frequency}"] = tf.add_n([metrics[f"bpp_{name}"] for name in self.latent_names if name.endswith(frequency)])
        return bpp, metrics

    def auxiliary_loss(self, values, step):
        """Information fidelity, w * (IF_y + IF_z): how far T(low~) is from high~; w falls to 0 after `if_steps` steps."""
        c = self.config
        if not c.if_weight:
            return 0.0, {}
        fidelity = 0.0
        for level, transform in (("y", self.if_y), ("z1", self.if_z)):
            high = values[f"{level}_high"]
            fidelity += tf.reduce_mean(tf.math.squared_difference(crop_like(tf.cast(transform(values[f"{level}_low"]), tf.float32), high), high))
        weight = tf.where(step < c.if_steps, c.if_weight, 0.0)
        return weight * fidelity, {"info_fidelity": fidelity}


def _up(filters):
    return SignalConv2D(filters, 3, 2, transpose=True)
