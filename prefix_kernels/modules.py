"""The import path of 0.1.0 of :mod:`prefix_kernels.nn`."""

from prefix_kernels.nn import PrefixMultiheadAttention, PrefixTuningAttention  # noqa: F401
