"""The three systems, one file a paper."""

from goconv_tf.models.base import Codec, Coded, Estimate, named_weights
from goconv_tf.models.scalable_rnn import ScalableRNN
from goconv_tf.models.variable_rate import VariableRate

MODELS = {"variable_rate": VariableRate, "scalable_rnn": ScalableRNN}

__all__ = ["MODELS", "Codec", "Coded", "Estimate", "ScalableRNN", "VariableRate", "named_weights"]
