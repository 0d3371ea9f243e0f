"""The attention function that Transformers calls by name, and how it comes to know it.

It is registered, with the baseline and the mask function, under the names in
:data:`prefix_kernels.integrations.transformers.config.ATTENTIONS`. The prefixes of a forward pass travel as a keyword
argument from the stack through every layer to the attention function. So they belong to that one call: nothing is left
behind by an exception, shared between threads or missing when activation checkpointing runs a layer again during the
backward pass.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from prefix_kernels.functional import prefix_attention
from prefix_kernels.integrations.transformers.attention.masks import prefix_mask
from prefix_kernels.integrations.transformers.attention.torch_baseline import torch_attention_forward
from prefix_kernels.integrations.transformers.attention.visibility import (
    refuse_attention_weights,
    visibility_of,
    with_position_bias,
)
from prefix_kernels.integrations.transformers.runtime.call_prefixes import CallPrefixes, prefix_of, record, rows_of


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    call_prefixes: CallPrefixes | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Transformers' attention function, by :func:`prefix_kernels.prefix_attention`.

    Args:
        module: the attention module that calls; it says which layer's prefix to use and whether it is causal.
        query: ``[B, Hq, Sq, D]``.
        key, value: ``[B, Hkv, Sk, D]``, including what a cache holds, which is never the prefix.
        attention_mask: what :func:`prefix_mask` returned, or a mask of four dimensions given by the user.

    Returns:
        The output ``[B, Sq, Hq, D]``, and None for the attention weights, which the kernels never form.
    """
    refuse_attention_weights(module, kwargs)
    prefix_key, prefix_value = prefix_of(module, call_prefixes)
    prefix_ids, prefix_lens = rows_of(module, call_prefixes)
    record(module, key, value, call_prefixes)
    seen = visibility_of(module, query, key, value, attention_mask, is_causal, sliding_window, call_prefixes)
    out = prefix_attention(
        query,
        seen.key,
        seen.value,
        prefix_key,
        prefix_value,
        attn_mask=with_position_bias(module, seen.attn_mask, attention_mask, seen.key.shape[2], call_prefixes, kwargs),
        dropout_p=dropout,
        is_causal=seen.is_causal,
        scale=scaling,
        prefix_ids=prefix_ids,
        prefix_lens=prefix_lens,
        window_size=seen.window_size,
        query_offset=seen.query_offset,
        softcap=softcap or 0.0,
        window_includes_prefix=call_prefixes is not None and call_prefixes.window_includes_prefix,
    )
    return out.transpose(1, 2), None


def register() -> None:
    """Make both attention functions and their mask function known to Transformers."""
    for name, function in {"prefix_kernels": prefix_attention_forward, "torch": torch_attention_forward}.items():
        AttentionInterface.register(implementation_name(name), function)
        AttentionMaskInterface.register(implementation_name(name), prefix_mask)


def implementation_name(attention: str) -> str:
    """The name of ``PrefixTuningConfig.attention`` in Transformers' registries."""
    return "prefix_kernels" if attention == "prefix_kernels" else f"prefix_kernels_{attention}"
