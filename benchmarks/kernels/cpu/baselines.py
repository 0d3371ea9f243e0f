"""Baselines of ``prefix_attention`` in each cell of the CPU's grid."""

from __future__ import annotations

import functools

import torch

from benchmarks.common.baselines import (
    cat_sdpa,
    cat_sdpa_causal_bias,
    causal_mask,
    matmul_decode,
    merged_decode,
    merged_float32,
    merged_kernels,
    merged_sdpa,
    padding_mask,
)
from benchmarks.common.cells import Cell
from benchmarks.common.contenders import Contender
from benchmarks.kernels.cpu.ceilings import has_bfloat16_dot
from prefix_kernels import prefix_attention

# Ways that people write today.
CAT = ("cat_sdpa", "cat_sdpa_causal_bias")
# Ways that they could write in plain PyTorch.
ALTERNATIVES = ("merged_sdpa", "merged_kernels", "merged_float32", "merged_decode", "matmul_decode")
BASELINES = CAT + ALTERNATIVES


def ours(cell: Cell) -> Contender:
    """``prefix_attention`` with the mask, dropout and causality of the cell."""
    mask = padding_mask(cell.key_lengths(), cell.k_len, 0) if cell.is_padded else None
    return functools.partial(prefix_attention, attn_mask=mask, dropout_p=cell.dropout_p, is_causal=cell.is_causal)


def _cat(cell: Cell) -> dict[str, Contender]:
    """``torch.cat`` and SDPA; grouped heads go by ``enable_gqa``, which is no slower than repeating keys and values."""
    if cell.is_padded:
        mask = padding_mask(cell.key_lengths(), cell.k_len, cell.prefix_len)
        return {"cat_sdpa": functools.partial(cat_sdpa, mask=mask, dropout_p=cell.dropout_p)}
    if not cell.has_diagonal:
        return {"cat_sdpa": cat_sdpa}
    masked = {"cat_sdpa": functools.partial(cat_sdpa, mask=causal_mask(cell.q_len, cell.k_len, cell.prefix_len))}
    # On a CPU the bias becomes the mask as it is called: their backward passes are one.
    return {**masked, "cat_sdpa_causal_bias": cat_sdpa_causal_bias} if cell.pass_ == "forward" else masked


def _alternatives(cell: Cell) -> dict[str, Contender]:
    if cell.is_padded:  # SDPA's kernel has no dropout, and merging needs it
        return {}
    if cell.pass_ == "decode":
        # Products of float16 matrices are 20 times slower here than the others.
        matmul = {} if cell.dtype == "float16" else {"matmul_decode": matmul_decode}
        return {"merged_decode": merged_decode, **matmul}
    functions = {"merged_sdpa": merged_sdpa, "merged_kernels": merged_kernels}
    if cell.dtype in ("bfloat16", "float16"):
        functions["merged_float32"] = merged_float32
        if not has_bfloat16_dot(torch.ops.prefix_kernels.cpu_isa()):
            # Then the backward of SDPA's kernel takes 2 (bfloat16) to 14 (float16) times as long as in float32.
            slow = {"backward": ("merged_sdpa", "merged_kernels"), "prefix_backward": ("merged_kernels",)}
            for name in slow.get(cell.pass_, ()):
                del functions[name]
    return {name: functools.partial(function, is_causal=cell.is_causal) for name, function in functions.items()}


def baselines_of(cell: Cell) -> dict[str, Contender]:
    """Name and function of every baseline that computes the cell, in the order of ``BASELINES``."""
    return {**_cat(cell), **_alternatives(cell)}
