"""The mask function that Transformers calls by name: padding, and as little else as possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask


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


def _cut(padding: Tensor, begin: int, end: int) -> Tensor:
    """Columns ``[begin, end)``; those that are not there are padding."""
    padding = padding[:, begin:end]
    return padding if padding.shape[1] == end - begin else F.pad(padding, (0, end - begin - padding.shape[1]))


_warned_dense: set[str] = set()


def _warn_dense_mask(model_type: str) -> None:
    if not torch.compiler.is_compiling() and model_type not in _warned_dense:
        _warned_dense.add(model_type)
        warnings.warn(
            f"{model_type}: its attention pattern (packed sequences, or a mask of its own) is given to the kernels as "
            "a [B, 1, Sq, Sk] mask: right, but slower and larger",
            stacklevel=2,
        )
