"""Compiling and packaging prefix_kernels; used by setup.py and pip, not installed."""
