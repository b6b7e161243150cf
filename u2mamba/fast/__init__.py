"""Triton kernels; each stands beside the slow definition that a test compares it with, and that runs without Triton."""

from u2mamba.fast.batch_norm_pool import batch_norm_relu_pool
from u2mamba.fast.batch_norm_relu import batch_norm_relu, batch_norm_relu_reference
from u2mamba.fast.convolution import convolution, join, projection
from u2mamba.fast.launch import compile_only
from u2mamba.fast.losses import multi_loss
from u2mamba.fast.max_pool import max_pool2x2_skip
from u2mamba.fast.side_output import side_output
from u2mamba.fast.tokens import conv_silu, layer_norm, rms_norms, rms_norms_reference
from u2mamba.fast.upsample import upsample_cat, upsample_to

__all__ = [
    "batch_norm_relu",
    "batch_norm_relu_pool",
    "batch_norm_relu_reference",
    "compile_only",
    "conv_silu",
    "convolution",
    "join",
    "layer_norm",
    "max_pool2x2_skip",
    "multi_loss",
    "projection",
    "rms_norms",
    "rms_norms_reference",
    "side_output",
    "upsample_cat",
    "upsample_to",
]
