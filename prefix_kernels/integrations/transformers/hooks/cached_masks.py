"""Masks of a stack that finds its prefix in the key/value cache: columns for it, before those of the sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_kernels.integrations.transformers.runtime.prefix_cache import RowPrefixes


def with_prefix_columns(mask: object, prefixes: RowPrefixes, batch: int, length: int) -> Tensor | None:
    """Return a mask that shows each row its prefix.

    Args:
        mask: a padding mask ``[B, T]``, a whole mask ``[B, 1, Sq, T]`` (bool, or added to the scores), or None.
        prefixes: of the rows.
        batch: ``B``, for a mask that is None.
        length: ``T``, likewise.

    Returns:
        A mask of ``P + T`` columns, or None where ``mask`` is None and every row sees its whole prefix.

    Raises:
        ValueError: ``mask`` is something else.
    """
    visible = prefixes.visible
    if mask is None:
        if visible is None:
            return None
        mask = torch.ones(batch, length, dtype=torch.int64, device=visible.device)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ValueError(
            "attention_mask: expected a tensor of two or four dimensions where the prefix lies in the key/value cache "
            f"(attention='cache'), got a {type(mask).__name__}"
        )
    if prefixes.length == 0:
        return mask
    if mask.dim() == 2:
        columns = mask.new_ones(mask.shape[0], prefixes.length) if visible is None else visible.to(mask.dtype)
        return torch.cat([columns, mask], dim=1)
    is_bool = mask.dtype is torch.bool
    padded = F.pad(mask, (prefixes.length, 0), value=True if is_bool else 0.0)
    if visible is not None:
        hidden = F.pad(~visible, (0, mask.shape[3]))[:, None, None, :]
        padded = padded.masked_fill(hidden, False if is_bool else torch.finfo(mask.dtype).min)
    return padded


def for_both_sides(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a padding mask ``[B, T]`` as one ``[B, 1, 1, T]`` that is added to scores and hides nothing else."""
    if mask is None or mask.dim() == 4:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask == 0, torch.finfo(dtype).min)[:, None, None, :]
