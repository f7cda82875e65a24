"""Keras layers: what the papers draw as one box. They know nothing of models."""

from goconv_tf.layers.conv import GDN, Conv2D, RDFTKernel, SignalConv2D
from goconv_tf.layers.conv_lstm import ConvLSTM2DCell
from goconv_tf.layers.gradients import convolution_gradients
from goconv_tf.layers.modulated import ModulatedGoConv2D, ModulatedGoConv2DTranspose, ScalingNet
from goconv_tf.layers.octave import GoConv2D, GoConv2DTranspose, OctaveTensor

__all__ = [
    "GDN",
    "Conv2D",
    "ConvLSTM2DCell",
    "GoConv2D",
    "GoConv2DTranspose",
    "ModulatedGoConv2D",
    "ModulatedGoConv2DTranspose",
    "OctaveTensor",
    "RDFTKernel",
    "ScalingNet",
    "SignalConv2D",
    "convolution_gradients",
]
