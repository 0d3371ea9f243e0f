"""The import path of 0.1.0 of :mod:`prefix_kernels.nn.encoder`."""

from prefix_kernels.nn.encoder import PrefixEncoder  # noqa: F401
