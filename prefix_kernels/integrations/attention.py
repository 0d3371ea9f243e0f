"""The attention functions and the mask function that Transformers calls by name.

They are registered, under the names in :data:`prefix_kernels.integrations.config.ATTENTIONS`, with Transformers'
``AttentionInterface`` and ``AttentionMaskInterface``. The prefixes of a forward pass travel as the keyword argument
:data:`PREFIX_ARGUMENT` from the backbone through every layer to the attention function. So they belong to that one
call: nothing is left behind by an exception, shared between threads or missing when activation checkpointing runs a
layer again during the backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from prefix_kernels.functional import prefix_attention
from prefix_kernels.integrations.layout import PrefixPair

PREFIX_ARGUMENT = "layer_prefixes"
# Set on every attention module with a prefix: its index in PrefixLayout.sites.
PREFIX_SITE_ATTRIBUTE = "prefix_site"


@dataclass(eq=False)
class LayerPrefixes:
    """The prefixes of a stack of layers for one call of it.

    Attributes:
        pairs: ``(prefix_key, prefix_value)`` of each attention, ``[Hkv, P, D]``, by its index among the sites.
        window_includes_prefix: of :class:`prefix_kernels.integrations.config.PrefixTuningConfig`.
        detached_from: what ``pairs`` were detached from, until their gradients have been given a way back (see
            :func:`prefix_kernels.integrations.hooks.first_layer_hook`); otherwise None.
    """

    pairs: dict[int, PrefixPair]
    window_includes_prefix: bool = False
    detached_from: dict[int, PrefixPair] | None = None


def _prefix_of(module: nn.Module, prefixes: LayerPrefixes | None) -> PrefixPair | tuple[None, None]:
    site = getattr(module, PREFIX_SITE_ATTRIBUTE, None)
    if site is None:
        return None, None
    if prefixes is None:
        raise RuntimeError(
            f"{type(module).__name__} of prefix {site} was called without its prefix: call the model itself or its "
            "backbone, not a single layer. If you did, this model does not hand keyword arguments on to its attention"
        )
    if prefixes.detached_from is not None:
        raise RuntimeError(
            f"{type(module).__name__} of prefix {site} ran before the first layer was called: reentrant activation "
            "checkpointing would lose the gradient of the prefix; use use_reentrant=False"
        )
    return prefixes.pairs[site]


def _visibility(
    module: nn.Module, attention_mask: Tensor | None, is_causal: bool | None, sliding_window: int | None
) -> tuple[Tensor | None, bool, tuple[int, int]]:
    """``(attn_mask, is_causal, window_size)`` as :func:`prefix_kernels.prefix_attention` takes them."""
    if attention_mask is not None and attention_mask.dim() == 4:
        # A mask of four dimensions says everything: it is the caller's own, or `prefix_mask` built it to.
        return attention_mask, False, (-1, -1)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
    padding = None if attention_mask is None else attention_mask[:, None, None, :]
    return padding, causal, window


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
    layer_prefixes: LayerPrefixes | None = None,
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
    _refuse(module, kwargs)
    prefix_key, prefix_value = _prefix_of(module, layer_prefixes)
    mask, causal, window = _visibility(module, attention_mask, is_causal, sliding_window)
    out = prefix_attention(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        window_size=window,
        softcap=softcap or 0.0,
        window_includes_prefix=layer_prefixes is not None and layer_prefixes.window_includes_prefix,
    )
    return out.transpose(1, 2), None


def torch_attention_forward(
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
    layer_prefixes: LayerPrefixes | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The baseline: the same as :func:`prefix_attention_forward` by ``torch.cat`` and SDPA.

    The prefix is converted to the query's dtype and repeated for every row of the batch, as PEFT does. The mask stays
    ``[B, 1, 1, P + Sk]`` where attention is not causal.
    """
    _refuse(module, kwargs)
    if softcap:
        raise ValueError(
            'attention="torch": scaled_dot_product_attention has no softcap; use attention="prefix_kernels"'
        )
    mask, causal, (left, right) = _visibility(module, attention_mask, is_causal, sliding_window)
    q_len, k_len = query.shape[2], key.shape[2]
    if (causal and q_len > 1) or left >= 0 or right >= 0:
        position = torch.arange(q_len, device=query.device)[:, None] + (k_len - q_len)
        column = torch.arange(k_len, device=query.device)
        visible = column <= position if causal else torch.ones_like(column <= position)
        if left >= 0:
            visible = visible & (column >= position - left)
        if right >= 0:
            visible = visible & (column <= position + right)
        mask = visible if mask is None else visible & mask

    prefix_key, prefix_value = _prefix_of(module, layer_prefixes)
    if prefix_key is not None:
        batch = query.shape[0]
        key = torch.cat([prefix_key.to(key.dtype).expand(batch, -1, -1, -1), key], dim=2)
        value = torch.cat([prefix_value.to(value.dtype).expand(batch, -1, -1, -1), value], dim=2)
        if mask is not None:
            seen = 1.0 if mask.dtype == torch.bool else 0.0
            mask = F.pad(mask, (prefix_key.shape[1], 0), value=seen)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2), None


def _refuse(module: nn.Module, arguments: dict[str, object]) -> None:
    if arguments.get("position_bias") is not None:
        raise NotImplementedError(
            f"{type(module).__name__} adds a position bias, which has no columns for the prefix: not supported"
        )
    if arguments.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: the attention weights are never formed, so they cannot be returned; use the model "
            'without a prefix and attn_implementation="eager" to look at them'
        )


def prefix_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: object = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: object,
) -> Tensor | None:
    """Transformers' mask function: the padding, and nothing of size Sq x Sk where a rule can say the rest.

    Returns:
        One of

        - None: no padding; the attention function applies the module's own causality, with its last query at the last
          key.
        - bool ``[B, Sk]``: padding, and the same causality.
        - bool ``[B, 1, 1, Sk]``: padding and no causality.
        - bool ``[B, 1, Sq, Sk]``: everything, for what has no rule here: packed sequences, masks changed by the model
          or a static cache, whose keys go on behind the last query.
    """
    bidirectional = mask_function is bidirectional_mask_function
    # A static cache gives its offset as a tensor.
    aligned = not isinstance(q_offset, Tensor) and kv_length + kv_offset == q_length + q_offset
    if not bidirectional and not (mask_function is causal_mask_function and aligned):
        if mask_function is not causal_mask_function:
            _warn_dense_mask(getattr(config, "model_type", "this model"))
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length]
    if padding.shape[1] < kv_length:
        padding = F.pad(padding, (0, kv_length - padding.shape[1]))
    return padding[:, None, None, :] if bidirectional else padding


_warned_dense: set[str] = set()


def _warn_dense_mask(model_type: str) -> None:
    if not torch.compiler.is_compiling() and model_type not in _warned_dense:
        _warned_dense.add(model_type)
        warnings.warn(
            f"{model_type}: its attention pattern (packed sequences, or a mask of its own) is given to the kernels as "
            "a [B, 1, Sq, Sk] mask: right, but slower and larger",
            stacklevel=2,
        )


def register() -> None:
    """Make both attention functions and their mask function known to Transformers."""
    for name, function in {"prefix_kernels": prefix_attention_forward, "torch": torch_attention_forward}.items():
        AttentionInterface.register(implementation_name(name), function)
        AttentionMaskInterface.register(implementation_name(name), prefix_mask)


def implementation_name(attention: str) -> str:
    """The name of ``PrefixTuningConfig.attention`` in Transformers' registries."""
    return "prefix_kernels" if attention == "prefix_kernels" else f"prefix_kernels_{attention}"
