"""The attention function that Transformers calls by name, and how it comes to know it.

It is registered, with the baseline and the mask function, under the names in
:data:`prefix_kernels.integrations.transformers.config.ATTENTIONS`. The prefixes of a forward pass travel as a keyword
argument from the stack through every layer to the attention function. So they belong to that one call: nothing is left
behind by an exception, shared between threads or missing when activation checkpointing runs a layer again during the
backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from prefix_kernels.functional import prefix_attention
from prefix_kernels.integrations.transformers.attention.call import AttentionCall, read_call
from prefix_kernels.integrations.transformers.attention.masks import (
    dense_prefix_mask,
    prefix_mask,
    visibility_of,
)
from prefix_kernels.integrations.transformers.attention.packed import packed_attention
from prefix_kernels.integrations.transformers.attention.position_bias import with_position_bias
from prefix_kernels.integrations.transformers.attention.torch_baseline import torch_attention_forward
from prefix_kernels.integrations.transformers.runtime.call_prefixes import prefix_of, record, rows_of


def prefix_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Transformers' attention function, by :func:`prefix_kernels.prefix_attention`.

    The arguments are those of :class:`prefix_kernels.integrations.transformers.attention.call.AttentionCall`.

    Returns:
        The output ``[B, Sq, Hq, D]``, and None for the attention weights, which the kernels never form.
    """
    call = read_call(module, query, key, value, attention_mask, arguments)
    record(module, call.key, call.value, call.prefixes)
    packed = None if call.prefixes is None else call.prefixes.packed
    out, lse = _attention_of_rows(call) if packed is None else packed_attention(call, packed)
    if call.sinks is not None and lse is not None:
        # The sink is one more term of the softmax's denominator: exp(lse) / (exp(lse) + exp(sink)) of the rest is left.
        share = torch.sigmoid(lse - call.sinks.to(lse.dtype).view(1, -1, 1))
        out = (out * share.unsqueeze(-1)).to(out.dtype)
    return out.transpose(1, 2), None


def _attention_of_rows(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """``out`` ``[B, Hq, Sq, Dv]``, and ``lse`` ``[B, Hq, Sq]`` where the call needs it."""
    module = call.module
    prefix_key, prefix_value = prefix_of(module, call.key, call.value, call.prefixes)
    prefix_ids, prefix_lens = rows_of(module, call.prefixes)
    seen = visibility_of(call)
    result = prefix_attention(
        call.query,
        seen.key,
        seen.value,
        prefix_key,
        prefix_value,
        attn_mask=with_position_bias(call, seen.attn_mask, seen.key.shape[2]),
        dropout_p=call.dropout,
        is_causal=seen.is_causal,
        scale=call.scaling,
        prefix_ids=prefix_ids,
        prefix_lens=prefix_lens,
        window_size=seen.window_size,
        query_offset=seen.query_offset,
        softcap=call.softcap,
        return_lse=call.sinks is not None,
        window_includes_prefix=call.prefixes is not None and call.prefixes.window_includes_prefix,
    )
    return result if isinstance(result, tuple) else (result, None)


def register() -> None:
    """Make both attention functions and their mask functions known to Transformers."""
    for name, function in {"prefix_kernels": prefix_attention_forward, "torch": torch_attention_forward}.items():
        for dense_masks, mask in ((False, prefix_mask), (True, dense_prefix_mask)):
            implementation = implementation_name(name, dense_masks=dense_masks)
            AttentionInterface.register(implementation, function)
            AttentionMaskInterface.register(implementation, mask)


def implementation_name(attention: str, *, dense_masks: bool = False) -> str:
    """The name of ``PrefixTuningConfig.attention`` in Transformers' registries.

    Args:
        attention: as in the config.
        dense_masks: True where masks say everything, because attention knows neither causality nor its window.
    """
    name = "prefix_kernels" if attention == "prefix_kernels" else f"prefix_kernels_{attention}"
    return f"{name}_dense_masks" if dense_masks else name
