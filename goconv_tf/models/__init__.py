"""The three systems, one file a paper."""

from goconv_tf.models.base import Codec, Coded, Estimate, named_weights
from goconv_tf.models.variable_rate import VariableRate

MODELS = {"variable_rate": VariableRate}

__all__ = ["MODELS", "Codec", "Coded", "Estimate", "VariableRate", "named_weights"]
