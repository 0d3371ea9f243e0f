"""Attention in two steps, as a call split between two libraries takes them: the sequence, then ``extend_``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from helpers import lay_out
from torch import Tensor

from prefix_kernels import prefix_attention

# Grouped heads, several blocks, few queries, columns that are split between threads, a value head dim of its own.
SIZES: dict[str, dict[str, Any]] = {
    "grouped": {"batch": 2, "q_heads": 4, "kv_heads": 2, "q_len": 9, "k_len": 11, "prefix_len": 5},
    "blocks": {"batch": 1, "q_heads": 8, "q_len": 130, "k_len": 70, "prefix_len": 20, "layout": "transposed"},
    "decoding": {"batch": 2, "q_heads": 4, "q_len": 1, "k_len": 33, "prefix_len": 70},
    "split": {"batch": 1, "q_heads": 2, "kv_heads": 1, "q_len": 3, "k_len": 5, "prefix_len": 3000},
    "values": {"q_heads": 3, "q_len": 20, "head_dim": 24, "value_dim": 9},
    "no prefix rows": {"prefix_len": 0},
    "scaled": {"scale": -0.7},
    "bank": {
        "batch": 4,
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([[2, 0], [-1, 1], [-1, -1], [1, 1]]),
        "prefix_lens": torch.tensor([5, 0, 3]),
    },
}

# Every dtype of a call, with that of its prefixes; None: the same.
DTYPES = {torch.float64: None, torch.float32: None, torch.bfloat16: torch.float32, torch.float16: torch.float16}


def extended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    return_lse: bool = True,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    extend_: Callable[..., None] = torch.ops.prefix_kernels.extend_,
    out_layout: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The arguments and results of ``prefix_attention``, its prefixes added by ``extend_`` to the sequence on a CPU.

    Args:
        out_layout: of `helpers.lay_out`, for the tensor that is extended; default: as ``prefix_attention`` returns it.
        options: those of the sequence, which the prefixes know nothing of. Rows that see nothing of it are NaN before.
    """
    out, lse = prefix_attention(query, key, value, return_lse=True, **options)
    unseen = lse.isinf()
    out[unseen], lse[unseen] = math.nan, math.inf
    out = out if out_layout is None else lay_out(out, out_layout)
    extend_(query, out, lse, prefix_key, prefix_value, prefix_ids, prefix_lens, options.get("scale"))
    return out, lse
