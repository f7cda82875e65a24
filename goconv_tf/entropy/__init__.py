"""Entropy models and coders. They know tensors, no networks."""

from goconv_tf.entropy.coders import CODERS
from goconv_tf.entropy.priors import FactorizedPrior, GaussianConditional
from goconv_tf.entropy.tables import CodingTable
from goconv_tf.entropy.walkers import AnnealingWalker, Decoder, Encoder, NoisyWalker, RoundingWalker

__all__ = [
    "CODERS",
    "AnnealingWalker",
    "CodingTable",
    "Decoder",
    "Encoder",
    "FactorizedPrior",
    "GaussianConditional",
    "NoisyWalker",
    "RoundingWalker",
]
