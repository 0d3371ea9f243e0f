"""Partial attentions to merge, and the check of a merge and its gradients against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from helpers import lay_out
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """Arguments of ``prefix_kernels::merge``, and the gradients that arrive for its results."""

    outs: list[Tensor]
    lses: list[Tensor]
    dout: Tensor
    dlse: Tensor


def make_parts(
    parts: int = 2,
    shape: tuple[int, ...] = (2, 3, 5, 24),
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: torch.device | str = "cpu",
) -> Parts:
    """Random parts, in which a fifth of the rows sees nothing: NaN, with an infinite lse of either sign.

    Args:
        layout: one of ``lay_out`` for tensors ``[..., Dv]``; unless it is ``contiguous``, lses ``[B, H, S]`` lie in
            memory as ``[B, S, H]``.
    """
    generator = torch.Generator().manual_seed(0)

    def random(sizes: tuple[int, ...]) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    def numbers(x: Tensor) -> Tensor:
        x = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return (x if layout == "contiguous" or x.dim() < 2 else x.mT.contiguous().mT).to(device)

    def rows(x: Tensor) -> Tensor:
        return (x.to(dtype) if layout == "contiguous" else lay_out(x.to(dtype), layout)).to(device)

    outs, lses = [], []
    for _ in range(parts):
        out, lse, hidden = random(shape), 3 * random(shape[:-1]), random(shape[:-1])
        outs.append(rows(out.masked_fill(hidden.abs().unsqueeze(-1) > 1.3, math.nan)))
        lses.append(numbers(lse.masked_fill(hidden > 1.3, math.inf).masked_fill(hidden < -1.3, -math.inf)))
    return Parts(outs, lses, rows(random(shape)), numbers(random(shape[:-1])))


def expected(parts: Parts) -> list[Tensor]:
    """``out``, ``lse``, and the gradients of all outs and lses, in float64."""
    scores = torch.stack([lse.double() for lse in parts.lses])
    scores = scores.masked_fill(scores == math.inf, -math.inf)
    lse = scores.logsumexp(0)
    shares = (scores - lse).exp().masked_fill(scores == -math.inf, 0.0)
    outs = torch.stack([out.double() for out in parts.outs]).masked_fill((shares == 0).unsqueeze(-1), 0.0)
    out = (shares.unsqueeze(-1) * outs).sum(0)
    dout = parts.dout.double()
    dlses = shares * ((dout * (outs - out)).sum(-1) + parts.dlse.double())
    return [out, lse, *(shares.unsqueeze(-1) * dout), *dlses]


def check_merge(parts: Parts, merge: Callable[..., Any], merge_backward: Callable[..., Any]) -> None:
    """Compare both operators with float64: results, then all gradients, then each alone."""
    count, dtype = len(parts.outs), parts.outs[0].dtype
    wide = parts.lses[0].dtype
    got = [*merge(parts.outs, parts.lses)]
    arguments = (parts.dout, parts.dlse, parts.outs, parts.lses)
    gradients = merge_backward(*arguments, [True] * 2 * count)
    assert [x.dtype for x in (*got, *gradients)] == [dtype, wide, *[dtype] * count, *[wide] * count]
    for ours, exact in zip([*got, *gradients], expected(parts), strict=True):
        # Rounded once in the end, or a sum of products over the last dimension.
        roundings = 1 if ours.dtype != wide else 16
        size = exact.masked_fill(exact.isinf(), 1.0).abs().max() if exact.numel() else 1.0
        tolerance = roundings * torch.finfo(ours.dtype).eps * max(1.0, float(size))
        torch.testing.assert_close(ours.double(), exact, rtol=0.0, atol=tolerance)
    for i in range(2 * count):
        alone = merge_backward(*arguments, [i == j for j in range(2 * count)])
        assert [x.shape == (0,) for x in alone] == [i != j for j in range(2 * count)]
        torch.testing.assert_close(alone[i], gradients[i], rtol=0.0, atol=0.0)
    needs_outs = [True] * count + [False] * count
    without_outs = merge_backward(parts.dout, None, [], parts.lses, needs_outs)
    torch.testing.assert_close(without_outs[:count], gradients[:count], rtol=0.0, atol=0.0)
