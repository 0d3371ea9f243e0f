"""Backends of :func:`prefix_kernels.prefix_attention`: the fused kernels, or PyTorch's and ours together.

Attention over disjoint sets of keys merges exactly by the logsumexps of the scores. So the backend ``"split"`` lets
PyTorch's fastest kernel attend to the sequence, and the kernels of this package add the prefix to its result.
"""
