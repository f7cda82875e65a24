"""Scalable coding by a recurrent network with an RNN-based hyperprior (Su et al., ICIP 2020)."""

import tensorflow as tf

from goconv_tf import entropy, losses
from goconv_tf.entropy import FactorizedPrior, GaussianConditional
from goconv_tf.layers import Conv2D, ConvLSTM2DCell, exact
from goconv_tf.models.base import Codec, stage
from goconv_tf.presets import ScalableRNNConfig


@tf.keras.saving.register_keras_serializable("goconv_tf")
class ScalableRNN(Codec):
    """Codes a picture in layers, each what the layers before left over.

        r_0 = x - 0.5;  for every layer k:
          r_k --g_a--> y_k;  |y_k| --h_a--> z_k
          z_k: factorized prior of its own;  sigma_k = h_s(z_k~);  y_k ~ N(0, sigma_k)
          x_k = g_s(y_k~);  r_(k+1) = r_k - x_k;  x^ after layer k: 0.5 + x_0 + ... + x_k

    The four networks share their weights over the layers and keep their ConvLSTM states from one to
    the next, which start at zero. y has h/16 x w/16 positions, z a quarter as many a side, both
    rounded up. Without `config.hyperprior`, y_k has a factorized prior of its own instead.

    TensorFlow's "same" strides pad odd sides before as well, so that what they give is shifted against what depth-to-space
    puts together. Hence pictures are padded to multiples of 16, and y, for h_a, to multiples of 4: of the sizes that the original
    accepts, this one differs from it where h or w is odd or h/16 or w/16 is not a multiple of 4, and codes those in far fewer bits with
    weights that were trained here (with some of the original's in up to 2 % more).

    Args:
      config: ScalableRNNConfig; None for the paper's.
    """

    pads_magnitudes = True  # for h_a; without, z is the original's where h/16 or w/16 is not a multiple of 4, too, as tests against it have it
    exact_parts = ("h_s_input", "h_s_cells", "h_s_output")

    def __init__(self, config=None, **kwargs):
        super().__init__(config or ScalableRNNConfig(), **kwargs)
        c = self.config
        self.g_a_input = Conv2D(c.input_filters, 3, 2)
        self.g_a_cells = [ConvLSTM2DCell(n, 3, 2) for n in c.encoder_filters]
        self.g_a_output = Conv2D(c.filters, 1)
        self.g_s_input = Conv2D(c.filters, 3)
        self.g_s_cells = [ConvLSTM2DCell(n, 3 if k else 2) for k, n in enumerate(c.decoder_filters)]
        self.g_s_output = Conv2D(3, 3)
        if c.hyperprior:
            self.h_a_input = Conv2D(c.filters, 3)
            self.h_a_cells = [ConvLSTM2DCell(c.filters, 3, 2) for _ in range(2)]
            self.h_a_output = Conv2D(c.filters, 1)
            self.h_s_input = Conv2D(c.filters, 3)
            self.h_s_cells = [ConvLSTM2DCell(c.filters, 3, grid_bits=c.grid_bits) for _ in range(2)]
            self.h_s_output = Conv2D(c.filters, 3)
            self.h_s_input.grids, self.h_s_output.grids = (exact.GRID_BITS, c.grid_bits), (c.grid_bits, exact.GRID_BITS)
            self.conditional = GaussianConditional()
        self.priors = [FactorizedPrior(c.filters, (3, 3, 3)) for _ in range(c.iterations)]

    def analysis(self, x, lmbda):
        """Pictures uint8 [batch, h, w, 3] -> {"residual": the same in [-0.5, 0.5]}: latents follow one from another, in `walk`."""
        del lmbda
        return {"residual": tf.cast(x, tf.float32) / 255.0 - 0.5}

    @stage
    def layer_analysis(self, residual, states):
        """(y [batch, h/16, w/16, filters], z [batch, h/64, w/64, filters] or None, states) of one layer; residual: [batch, h, w, 3]."""
        y, y_states = _recur(self.g_a_input, self.g_a_cells, self.g_a_output, residual, states and states[0])
        if not self.config.hyperprior:
            return y, None, (y_states, None)
        magnitudes = tf.abs(y)
        if self.pads_magnitudes:
            height, width = tf.unstack(-tf.shape(y)[1:3] % 4)
            magnitudes = tf.pad(magnitudes, [[0, 0], [0, height], [0, width], [0, 0]])
        z, z_states = _recur(self.h_a_input, self.h_a_cells, self.h_a_output, magnitudes, states and states[1])
        return y, z, (y_states, z_states)

    @stage
    def hyper_synthesis(self, z, size, states):
        """(sigma [batch, *size, filters] of y, which has spatial size `size`, int32 [2]; states)."""
        sigma, states = _recur(self.h_s_input, self.h_s_cells, self.h_s_output, z, states, upsample=True)
        return sigma[:, : size[0], : size[1]], states

    @stage
    def layer_synthesis(self, y, size, states):
        """(what one layer adds to the picture, float32 [batch, *size, 3] in [-0.5, 0.5]; states); size: the picture's, int32 [2]."""
        x, states = _recur(self.g_s_input, self.g_s_cells, self.g_s_output, y, states, upsample=True)
        return tf.tanh(tf.cast(x[:, : size[0], : size[1]], tf.float32)) / 2.0, states

    def walk(self, walker):
        residual = walker.latents.get("residual")  # a decoder has none
        size = walker.size("residual")
        states_a = states_h = states_s = None
        picture, pictures = 0.5, []
        for k in range(self.config.iterations)[: walker.layers]:
            z_name, y_name = f"z_{k}", f"y_{k}"
            if residual is not None:
                walker.latents[y_name], walker.latents[z_name], states_a = self.layer_analysis(residual, states_a)
            if self.config.hyperprior:
                z = walker(z_name, self.priors[k])
                sigma, states_h = self.hyper_synthesis(walker.enter(z), walker.size(y_name), states_h)
                y = walker(y_name, self.conditional, 0.0, exact.leave(sigma))
            else:
                y = walker(y_name, self.priors[k])
            x, states_s = self.layer_synthesis(y, size, states_s)
            if residual is not None:
                residual -= x
            picture += x
            pictures.append(picture)
        return pictures  # after each layer, in [0, 1]

    def pictures(self, latents, lmbda):
        return [255.0 * picture for picture in latents]

    def synthesis(self, latents, lmbda):
        return 255.0 * latents[-1]

    def latent_shapes(self, height, width):
        y = (-(-height // 16), -(-width // 16))
        z = tuple(-(-n // 4) for n in y)
        shapes = {"residual": (height, width, 3)}
        for name in self.latent_names:
            shapes[name] = (*(y if name.startswith("y") else z), self.config.filters)
        return shapes

    @property
    def bytes_per_pixel(self):
        """Peak memory of coding, bytes per pixel: measured as 680 to 740 with 24 filters in the decoder's last cell, and in proportion to them."""
        return 31 * self.config.decoder_filters[-1]

    @tf.autograph.experimental.do_not_convert
    def loss_fn(self, x, lmbda, seed, step):
        """Sum over layers of lambda_k * D_k + (bpp_0 + ... + bpp_k), averaged over the batch (the original's loss).

        Lambdas are the config's; `lmbda` is not used. Otherwise as `Codec.loss_fn`; metrics mse_k and bpp_to_k
        are those after layer k.
        """
        del lmbda, step
        walker = entropy.NoisyWalker(self.analysis(x, None), seed, self.quantization == "mixed")
        pictures = self.pictures(self.walk(walker), None)
        original = tf.cast(x, tf.float32)
        _, metrics = self.rates(walker, x)
        loss, bpp = 0.0, 0.0
        for k, (weight, names, picture) in enumerate(zip(self.config.lambdas, self.config.layers, pictures)):
            bpp += tf.add_n([metrics[f"bpp_{name}"] for name in names])
            loss += weight * tf.reduce_mean(losses.distortion(original, picture, self.distortion)) + bpp
            metrics[f"bpp_to_{k}"] = bpp
            metrics[f"mse_{k}"] = tf.reduce_mean(losses.mse(original, picture))
        metrics["mse"] = metrics[f"mse_{k}"]
        return loss, metrics


def _recur(first, cells, last, x, states, upsample=False):
    """(output, states): a convolution, ConvLSTM cells, each followed by depth-to-space when `upsample`, a convolution."""
    x = exact.apply(first, x)
    after = []
    for k, cell in enumerate(cells):
        x, state = exact.apply(cell, x, None if states is None else states[k])
        after.append(state)
        if upsample:
            x = exact.depth_to_space(x)
    return exact.apply(last, x), tuple(after)
