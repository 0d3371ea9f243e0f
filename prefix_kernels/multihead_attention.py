"""The import path of 0.1.0 of :mod:`prefix_kernels.nn.multihead_attention`."""

from prefix_kernels.nn.multihead_attention import PrefixMultiheadAttention  # noqa: F401
