"""What one timed call of a contender is: ours or a baseline, in one cell, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common.cells import Cell

# Takes query, key, value, prefix_key, prefix_value; returns out.
Contender = Callable[..., Tensor]
Call = Callable[[], object]


def make_inputs(cell: Cell, device: str) -> list[Tensor]:
    """query ``[B, Hq, Sq, D]``, key, value ``[B, Hkv, Sk, D]`` and prefix_key, prefix_value ``[Hkv, P, D]``.

    In memory they are ``[B, S, H, D]``, as a model's projections leave them; keys and values of a decode pass are
    contiguous, as Transformers keeps a cache.
    """
    dtype = getattr(torch, cell.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    query = normal(cell.batch, cell.q_len, cell.q_heads, cell.head_dim).transpose(1, 2)
    keys = [normal(cell.batch, cell.k_len, cell.kv_heads, cell.head_dim).transpose(1, 2) for _ in range(2)]
    if cell.pass_ == "decode":
        keys = [each.contiguous() for each in keys]
    prefix = [normal(cell.kv_heads, cell.prefix_len, cell.head_dim) for _ in range(2)]
    return [query, *keys, *prefix]


def make_dout(query: Tensor) -> Tensor:
    """A gradient of out, laid out as ``[B, S, H, D]``."""
    return torch.randn_like(query.transpose(1, 2)).transpose(1, 2)


def prepare(cell: Cell, function: Contender, inputs: list[Tensor], dout: Tensor) -> Call:
    """The call of the cell's pass; a backward pass is ``torch.autograd.grad`` alone."""
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, cell.needs, strict=True)]
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    if not asked:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*leaves)

        return forward
    if cell.pass_ == "forward_backward":
        return lambda: torch.autograd.grad(function(*leaves), asked, dout)
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, asked, dout, retain_graph=True)


def difference(results: object, others: object) -> float:
    """The largest distance of two results or sets of gradients, over the norm of the second."""
    results, others = ([x] if isinstance(x, Tensor) else x for x in (results, others))
    pairs = [(a.float(), b.float()) for a, b in zip(results, others, strict=True)]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)
