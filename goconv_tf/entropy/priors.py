"""Probability models of latents: a factorized prior and a Gaussian conditional.

Both answer the same calls, so that one walk over the latents serves every mode:
`likelihood`, `offset` (what is subtracted before rounding), `indexes` (the row of the
coding table for every latent) and `table`, which `build_table` makes: coding needs it, and Keras does not save it.
They compute in float32, whatever they are given. As layers they are not called: that is a TypeError.
"""

import functools
import math

import numpy as np
import tensorflow as tf
import tensorflow_compression as tfc

from goconv_tf.entropy import tables
from goconv_tf.layers import exact
from goconv_tf.layers.conv import OwnVariables

LIKELIHOOD_BOUND = 1e-9
SCALES_MIN, SCALES_MAX, SCALES_LEVELS = 0.11, 256.0, 64


class _EntropyModel(tf.keras.layers.Layer):
    def call(self, *_, **__):
        raise TypeError(f"{type(self).__name__} makes nothing of its input: use `likelihood`, or a walker")


@tf.keras.saving.register_keras_serializable("goconv_tf")
class FactorizedPrior(OwnVariables, _EntropyModel):
    """Fully factorized density, one per channel (Balle et al., arXiv 1802.01436, appendix 6.1).

    Args:
      channels: number of channels of the latent [batch, h, w, channels].
      filters: widths of the hidden layers of the network that is the cumulative density; here two, as in tfc 2, where
        tfc 1's (and so the originals') have three.
    """

    def __init__(self, channels, filters=(3, 3), **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.channels, self.filters = channels, tuple(filters)
        self.prior = tfc.NoisyDeepFactorized(batch_shape=(channels,), num_filters=filters)
        self.table = None
        # Fraction of each channel's median; zero until it is computed.
        self.quantization_offset = tf.Variable(tf.zeros([channels]), trainable=False, name="quantization_offset")

    def get_config(self):
        return {**super().get_config(), "channels": self.channels, "filters": self.filters}

    @property
    def table_rows(self):
        return self.channels

    def parameters(self):
        """{"matrix", "bias", "factor": variables of each layer} of the density (there: H, b, a)."""
        base = self.prior.base
        return {"matrix": base._matrices, "bias": base._biases, "factor": base._factors}

    def likelihood(self, values):
        """Probability of each of values [batch, h, w, channels], at least 1e-9."""
        return tfc.lower_bound(self.prior.prob(tf.cast(values, tf.float32)), LIKELIHOOD_BOUND)

    def offset(self):
        return self.quantization_offset

    def indexes(self, shape):
        return tf.broadcast_to(tf.range(self.channels), shape)

    def update_offset(self):
        """Makes `offset` that of the present parameters, as coding will have it."""
        self.quantization_offset.assign(tables.factorized_offset(self.prior))

    def build_table(self):
        """Makes the coding table, and the offset, from the present parameters."""
        self.table, offset = tables.factorized_table(self.prior)
        self.quantization_offset.assign(offset)


@tf.keras.saving.register_keras_serializable("goconv_tf")
class GaussianConditional(_EntropyModel):
    """Normal density with a predicted mean and scale per latent (Minnen et al., arXiv 1809.02736).

    Scales are bounded below by 0.11, with tfc's gradient through the bound; for coding each
    is rounded up to one of 64 values, exp(linspace(log 0.11, log 256, 64)).
    """

    table_rows = SCALES_LEVELS

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.scale_table = np.exp(np.linspace(math.log(SCALES_MIN), math.log(SCALES_MAX), SCALES_LEVELS)).astype(np.float32)
        self.table = None

    def likelihood(self, values, mean, scale):
        """Probability of each of values, at least 1e-9; values and scale [batch, h, w, channels], as mean unless it is one number."""
        values, mean, scale = (tf.cast(part, tf.float32) for part in (values, mean, scale))
        prior = tfc.NoisyNormal(loc=mean, scale=tfc.lower_bound(scale, SCALES_MIN))
        return tfc.lower_bound(prior.prob(values), LIKELIHOOD_BOUND)

    def offset(self, mean, scale):
        del scale
        return tf.cast(mean, tf.float32)

    def indexes(self, shape, mean, scale):
        """int32 of `shape`: the smallest entry of the scale table that is not below the scale, a tensor, or an array of that shape on the grid."""
        del mean
        if exact.is_array(scale):  # one look into a table instead of a search
            return self._index_table[np.clip(scale * exact.GRID, 0, len(self._index_table) - 1).astype(np.int32)]
        scale = tf.broadcast_to(tf.cast(scale, tf.float32), shape)
        return tf.reshape(tf.searchsorted(self.scale_table[:-1], tf.reshape(scale, [-1]), side="left"), tf.shape(scale))

    @functools.cached_property
    def _index_table(self):
        """`indexes` of 0, 1, 2, ... on the grid, up to the last scale."""
        scales = np.arange(math.ceil(SCALES_MAX * exact.GRID) + 1) / exact.GRID
        return np.searchsorted(self.scale_table[:-1], scales.astype(np.float32), side="left").astype(np.int32)

    def build_table(self):
        """Makes the coding table, which depends on the scale table only."""
        self.table = tables.scale_table(self.scale_table)
