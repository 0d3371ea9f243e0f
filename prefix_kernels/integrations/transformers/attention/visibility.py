"""The keys that a call of Transformers' attention function sees, as ``prefix_attention`` takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefix_kernels.integrations.transformers.runtime.call_prefixes import CallPrefixes
from prefix_kernels.integrations.transformers.runtime.relative_bias import biased_mask, position_bias_of


class Visibility(NamedTuple):
    """The keys that a call sees, as :func:`prefix_kernels.prefix_attention` takes them."""

    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    window_size: tuple[int, int]
    query_offset: Tensor | None = None


def visibility_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
    prefixes: CallPrefixes | None,
) -> Visibility:
    if attention_mask is not None and attention_mask.dim() == 4:
        # A mask of four dimensions says everything about the sequence: it is the caller's own, or `prefix_mask` built
        # it to.
        slides = prefixes is not None and prefixes.window_includes_prefix and prefixes.site_of(module) is not None
        if sliding_window is None or not slides:
            return Visibility(key, value, attention_mask, False, (-1, -1))
        offset = _position_of_the_query(module, query, attention_mask)
        return Visibility(key, value, attention_mask, False, (sliding_window - 1, -1), offset)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
    if attention_mask is None:
        return Visibility(key, value, None, causal, window)
    # The mask ends with the last query. A static cache has room for more keys behind it; a sliding cache has dropped
    # the first ones.
    end = attention_mask.shape[1]
    key, value = key[:, :, :end], value[:, :, :end]
    padding = attention_mask[:, end - key.shape[2] :]
    return Visibility(key, value, padding[:, None, None, :], causal, window)


def _position_of_the_query(module: nn.Module, query: Tensor, mask: Tensor) -> Tensor:
    """Position of the only query of each row among the keys: that of the last key that it sees.

    Raises:
        NotImplementedError: there are more queries, or the mask is not boolean.
    """
    if query.shape[2] != 1 or mask.dtype != torch.bool:
        raise NotImplementedError(
            f"{type(module).__name__}: window_includes_prefix=True: a mask of four dimensions (packed sequences, or "
            "one given as attention_mask) does not say how much of the prefix is inside the window; give a padding "
            "mask [B, Sk], or use window_includes_prefix=False"
        )
    column = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(mask[:, 0, 0], column, 0).amax(-1)
    return last.expand(query.shape[0])


def with_position_bias(
    module: nn.Module,
    visible: Tensor | None,
    attention_mask: Tensor | None,
    k_len: int,
    prefixes: CallPrefixes | None,
    arguments: dict[str, object],
) -> Tensor | None:
    """``visible``, or with a position bias the mask of both, which may have columns for the prefix."""
    bias = position_bias_of(module, arguments)
    if bias is None:
        return visible
    if prefixes is None or prefixes.bias is None:
        return biased_mask(bias, visible, k_len)
    site = prefixes.site_of(module)
    prefix_len = 0 if site is None else prefixes.pairs[site][0].shape[-2]
    return prefixes.bias.mask(bias, attention_mask, visible, k_len, prefix_len)


def refuse_attention_weights(module: nn.Module, arguments: dict[str, object]) -> None:
    if arguments.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: the attention weights are never formed, so they cannot be returned; use the model "
            'without a prefix and attn_implementation="eager" to look at them'
        )
