"""Attention of a call whose rows are packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefix_kernels.integrations.transformers.attention.call import AttentionCall
from prefix_kernels.integrations.transformers.attention.masks import rules_of
from prefix_kernels.integrations.transformers.runtime.call_prefixes import prefix_of, rows_of
from prefix_kernels.integrations.transformers.runtime.packed_rows import PackedRows
from prefix_kernels.merge import merge_attention
from prefix_kernels.varlen import prefix_attention_varlen


def packed_attention(call: AttentionCall, packed: PackedRows) -> tuple[Tensor, Tensor]:
    """Attention of each sequence over its own prefix, over the sequences before it in a tree, and over its own keys.

    Returns:
        ``out`` ``[B, Hq, Sq, Dv]`` and ``lse`` ``[B, Hq, Sq]``.

    Raises:
        ValueError: the keys are not those of the queries' tokens.
    """
    batch, heads, length, _ = call.query.shape
    if call.key.shape[2] != length:
        raise ValueError(
            f"{type(call.module).__name__}: key: expected the {length} tokens of the packed rows, got "
            f"{call.key.shape[2]}; call the model without a cache of earlier tokens"
        )
    prefix_key, prefix_value = prefix_of(call.module, call.key, call.value, call.prefixes)
    prefix_ids, prefix_lens = rows_of(call.module, call.prefixes)
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (call.query, call.key, call.value))
    is_causal, window_size = rules_of(call)

    def attend(
        key: Tensor, value: Tensor, prefix_key: Tensor | None, prefix_value: Tensor | None, starts: Tensor, **more: Any
    ) -> tuple[Tensor, Tensor]:
        return prefix_attention_varlen(
            *(query, key, value, prefix_key, prefix_value, packed.starts, starts),
            *(packed.longest, packed.longest, call.dropout, is_causal, call.scaling),
            window_size=window_size,
            softcap=call.softcap,
            return_lse=True,
            **more,
        )

    if packed.tree is None:
        out, lse = attend(
            *(key, value, prefix_key, prefix_value, packed.starts),
            prefix_ids=prefix_ids,
            prefix_lens=prefix_lens,
            window_includes_prefix=call.prefixes is not None and call.prefixes.window_includes_prefix,
        )
    else:
        # The tokens of the nodes before a node are as far from it as tokens of its own would be.
        out, lse = attend(
            *(key, value, key, value, packed.starts),
            prefix_ids=packed.tree.ancestors,
            cu_prefix_lens=packed.starts,
            window_includes_prefix=True,
        )
        if prefix_key is not None:
            no_keys = torch.zeros_like(packed.starts)
            prefix_out, prefix_lse = attend(key[:0], value[:0], prefix_key, prefix_value, no_keys)
            out, merged = merge_attention([out, prefix_out], [lse.mT, prefix_lse.mT])
            lse = merged.mT
    lse = lse.reshape(heads, batch, length).transpose(0, 1)
    return out.view(batch, length, heads, -1).transpose(1, 2), lse
