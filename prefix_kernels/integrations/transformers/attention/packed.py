"""Attention of a call whose rows are packed sequences."""

from __future__ import annotations

from torch import Tensor

from prefix_kernels.integrations.transformers.attention.call import AttentionCall
from prefix_kernels.integrations.transformers.attention.masks import rules_of
from prefix_kernels.integrations.transformers.runtime.call_prefixes import prefix_of, rows_of
from prefix_kernels.integrations.transformers.runtime.packed_rows import PackedRows
from prefix_kernels.varlen import prefix_attention_varlen


def packed_attention(call: AttentionCall, packed: PackedRows) -> tuple[Tensor, Tensor]:
    """Attention of each sequence over its own prefix and its own keys.

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
    is_causal, window_size = rules_of(call)
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (call.query, call.key, call.value))
    out, lse = prefix_attention_varlen(
        *(query, key, value, prefix_key, prefix_value, packed.starts, packed.starts),
        *(packed.longest, packed.longest, call.dropout, is_causal, call.scaling),
        prefix_ids=prefix_ids,
        prefix_lens=prefix_lens,
        window_size=window_size,
        softcap=call.softcap,
        return_lse=True,
        window_includes_prefix=call.prefixes is not None and call.prefixes.window_includes_prefix,
    )
    lse = lse.view(heads, batch, length).transpose(0, 1)
    return out.view(batch, length, heads, -1).transpose(1, 2), lse
