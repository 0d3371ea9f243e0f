"""Masks: the function that makes them for Transformers, and what the attention function reads in them.

A mask says as little as possible beside the padding; causality and windows stay rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from prefix_kernels.integrations.transformers.attention.call import AttentionCall


def prefix_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[[int, int, int, int], bool] = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: object = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: object,
) -> Tensor | None:
    """Transformers' mask function: the padding, and nothing of size Sq x Sk where a rule can say the rest.

    The size of a sliding window is left to the attention function, whose module hands it over.

    Returns:
        One of

        - None: no padding; the attention function applies the module's own causality and window, with its last query
          at the last key.
        - bool ``[B, T]``: padding of all ``T`` positions up to the last query, and the same causality and window. A
          static cache has room for more keys than ``T``; a sliding cache has fewer, having dropped the first.
        - bool ``[B, 1, 1, Sk]``: padding and no causality.
        - bool ``[B, 1, Sq, Sk]``: everything, for what has no rule here: packed sequences, masks changed by the model,
          and the single query of a static cache, whose mask must keep its shape from step to step.
    """
    if mask_function is bidirectional_mask_function:
        if attention_mask is None:
            return None
        return _cut(attention_mask, kv_offset, kv_offset + kv_length)[:, None, None, :]

    # Transformers allows these skips where nothing is laid over the plain rule. The third kind of local attention
    # comes in chunks.
    skips = allow_is_causal_skip or (allow_is_bidirectional_skip and getattr(config, "is_causal", True))
    is_window = local_size is not None and skips and getattr(config, "attention_chunk_size", None) is None
    if mask_function is causal_mask_function or is_window:
        # A static cache gives its offset as a tensor, once it has one.
        end = None if isinstance(q_offset, Tensor) else q_offset + q_length
        if end == kv_offset + kv_length:
            return None if attention_mask is None else _cut(attention_mask, 0, end)
        if end is not None and kv_offset == 0 and end < kv_length:
            if attention_mask is None:
                return torch.ones(batch_size, end, dtype=torch.bool, device=device)
            if attention_mask.shape[1] == end:
                return attention_mask
    elif q_length > 1:
        _warn_dense_mask(getattr(config, "model_type", "this model"))
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=cast(int, q_offset),  # Transformers hands tensors on too
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )


def dense_prefix_mask(mask_function: Callable[..., Any] = causal_mask_function, **arguments: Any) -> Tensor | None:
    """The mask function for attention that knows neither causality nor its window: the mask has both.

    Returns:
        Bool ``[B, 1, Sq, Sk]``; where attention sees both sides, the result of :func:`prefix_mask`.
    """
    arguments["mask_function"] = mask_function
    if mask_function is bidirectional_mask_function:
        return prefix_mask(**arguments)
    if arguments["q_length"] > 1:
        _warn_dense_mask(getattr(arguments.get("config"), "model_type", "this model"))
    mask: Tensor | None = sdpa_mask(**arguments | {"allow_is_causal_skip": False})
    return mask


def _cut(padding: Tensor, begin: int, end: int) -> Tensor:
    """Columns ``[begin, end)``; those that are not there are padding."""
    padding = padding[:, begin:end]
    return padding if padding.shape[1] == end - begin else F.pad(padding, (0, end - begin - padding.shape[1]))


_warned_dense: set[str] = set()


def _warn_dense_mask(model_type: str) -> None:
    if not torch.compiler.is_compiling() and model_type not in _warned_dense:
        _warned_dense.add(model_type)
        warnings.warn(
            f"{model_type}: its attention pattern (packed sequences, or causality, a window or a mask that its "
            "attention does not name) is given to the kernels as a [B, 1, Sq, Sk] mask: right, but slower and larger",
            stacklevel=2,
        )


class Visibility(NamedTuple):
    """The keys that a call sees, as :func:`prefix_kernels.prefix_attention` takes them."""

    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    window_size: tuple[int, int]
    query_offset: Tensor | None = None


def visibility_of(call: AttentionCall) -> Visibility:
    """Read ``call.attention_mask``, the result of :func:`prefix_mask` or a mask of the user's own."""
    key, value, mask, window = call.key, call.value, call.attention_mask, call.sliding_window
    if mask is not None and mask.dim() == 4:
        # A mask of four dimensions says everything about the sequence: it is the caller's own, or `prefix_mask` built
        # it to.
        prefixes = call.prefixes
        slides = prefixes is not None and prefixes.window_includes_prefix and prefixes.site_of(call.module) is not None
        if window is None or not slides:
            return Visibility(key, value, mask, False, (-1, -1))
        offset = _position_of_the_query(call.module, call.query, mask)
        return Visibility(key, value, mask, False, (window - 1, -1), offset)
    causal, window_size = rules_of(call)
    if mask is None:
        return Visibility(key, value, None, causal, window_size)
    # The mask ends with the last query. A static cache has room for more keys behind it; a sliding cache has dropped
    # the first ones.
    end = mask.shape[1]
    key, value = key[:, :, :end], value[:, :, :end]
    padding = mask[:, end - key.shape[2] :]
    return Visibility(key, value, padding[:, None, None, :], causal, window_size)


def rules_of(call: AttentionCall) -> tuple[bool, tuple[int, int]]:
    """Causality, and the window to the left and to the right, that ``call`` has beside its mask."""
    causal = getattr(call.module, "is_causal", True) if call.is_causal is None else call.is_causal
    window = call.sliding_window
    return causal, (-1, -1) if window is None else (window - 1, 0 if causal else window - 1)


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
