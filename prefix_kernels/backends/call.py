"""One call of :func:`prefix_kernels.prefix_attention` as the backends see it, and which of them can serve it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """The arguments, by the names that they have there."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    prefix_ids: Tensor | None
    prefix_lens: Tensor | None
    window_size: tuple[int, int]
    query_offset: int | Tensor | None
    softcap: float

    @property
    def has_four_dimensions(self) -> bool:
        """Query, key and value have the dimensions that the operator asks for."""
        return self.query.dim() == self.key.dim() == self.value.dim() == 4

    @property
    def sees_up_to_itself(self) -> bool:
        """Every query sees the keys up to its position, by ``is_causal`` or by a window that says so."""
        return self.is_causal or self.window_size == (-1, 0)

    @property
    def trains_sequence(self) -> bool:
        """A gradient flows into query, key or value."""
        asks = self.query.requires_grad or self.key.requires_grad or self.value.requires_grad
        return asks and torch.is_grad_enabled()


def why_not_split(call: Call) -> str | None:
    """Name the property of a call that PyTorch's kernels cannot express for the sequence; None: there is none.

    Tensors whose shapes do not fit together are left to the operator, which says so.
    """
    if call.attn_mask is not None:
        return "attn_mask: expected None"
    if call.dropout_p > 0.0:
        return f"dropout_p: expected 0, got {call.dropout_p}"
    if call.softcap != 0.0:
        return f"softcap: expected 0, got {call.softcap}"
    if call.window_size not in ((-1, -1), (-1, 0)):
        return f"window_size: expected (-1, -1), got {call.window_size}"
    if torch._C._are_functorch_transforms_active():
        return "expected no transform of torch.func around it"
    query, key, value, *_ = call
    if not call.has_four_dimensions:
        return None
    if query.shape[-1] != value.shape[-1]:
        return f"value: expected the query's head dim {query.shape[-1]}, got {value.shape[-1]}"
    if query.shape[0] == 0 or query.shape[2] == 0 or key.shape[2] == 0:
        shapes = f"{list(query.shape)} and {list(key.shape)}"
        return f"query, key: expected at least one row, one query and one key, got {shapes}"
    if call.sees_up_to_itself:
        if query.shape[2] != key.shape[2]:
            return f"is_causal: expected as many queries as keys, got {query.shape[2]} and {key.shape[2]}"
        if call.query_offset is not None and (isinstance(call.query_offset, Tensor) or call.query_offset != 0):
            given = "a tensor" if isinstance(call.query_offset, Tensor) else call.query_offset
            return f"query_offset: expected None or 0 with is_causal=True, got {given}"
    return None
