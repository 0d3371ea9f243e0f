"""Attention over ``[prefix ; sequence]`` keys and values without the concatenation, and what is built from it."""

from prefix_kernels._library import load as _load

_load()  # before anything imports torch: it says in one sentence what is wrong with the installation

from prefix_kernels._version import __version__  # noqa: E402
from prefix_kernels.functional import prefix_attention  # noqa: E402

__all__ = ["__version__", "prefix_attention"]
