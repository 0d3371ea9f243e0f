"""The import path of 0.1.0 of :mod:`prefix_kernels.nn.replacement`."""

from prefix_kernels.nn.replacement import replace_multihead_attention, restore_multihead_attention  # noqa: F401
