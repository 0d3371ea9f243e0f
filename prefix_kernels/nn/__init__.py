"""Attention layers and encoders with a trainable prefix, as ``torch.nn`` modules."""

from prefix_kernels.nn.encoder import PrefixEncoder
from prefix_kernels.nn.multihead_attention import PrefixMultiheadAttention
from prefix_kernels.nn.prefix_tuning_attention import PrefixTuningAttention
from prefix_kernels.nn.replacement import replace_multihead_attention, restore_multihead_attention

__all__ = [
    "PrefixEncoder",
    "PrefixMultiheadAttention",
    "PrefixTuningAttention",
    "replace_multihead_attention",
    "restore_multihead_attention",
]
