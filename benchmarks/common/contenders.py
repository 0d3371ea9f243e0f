"""One timed call of a contender, ours or a baseline: its inputs, its pass and the comparison of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from benchmarks.common.cells import Cell

# Takes query, key, value, prefix_key, prefix_value; returns out.
Contender = Callable[..., Tensor]
Call = Callable[[], object]
# Largest distance of two results of the same attention, over their Euclidean norm: 16-bit types round so much.
_MAX_DIFFERENCE = 0.05


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


def check_same(results: object, ours: object) -> None:
    """Compare a baseline's result with ours.

    Raises:
        ValueError: they differ by more than rounding, or one is NaN.
    """
    # Written so that NaN is refused.
    if not (distance := difference(results, ours)) < _MAX_DIFFERENCE:
        raise ValueError(f"differs from ours by {distance:.2g} of its size")


def in_turns(calls: Iterable[str], rounds: int) -> Iterator[list[str]]:
    """The names of all calls for each round.

    Rounds begin with another one in turn, and every second round goes backwards: no call always follows the same one,
    which leaves the caches full of its own tensors or of the call's.
    """
    names = list(calls)
    for turn in range(rounds):
        first = turn // 2 % len(names)
        order = names[first:] + names[:first]
        yield order[::-1] if turn % 2 else order
