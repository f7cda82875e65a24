"""The three systems, one file a paper."""

from goconv_tf.models.base import Codec, Coded, Estimate, named_weights
from goconv_tf.models.crpe import CRPE
from goconv_tf.models.scalable_rnn import ScalableRNN
from goconv_tf.models.variable_rate import VariableRate

MODELS = {"variable_rate": VariableRate, "crpe": CRPE, "scalable_rnn": ScalableRNN}

__all__ = ["CRPE", "MODELS", "Codec", "Coded", "Estimate", "ScalableRNN", "VariableRate", "named_weights"]
