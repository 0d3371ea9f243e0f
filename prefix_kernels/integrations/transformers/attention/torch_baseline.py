"""The baseline, ``attention="torch"``: the same attention by ``torch.cat`` and ``scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefix_kernels.integrations.transformers.attention.call import AttentionCall, read_call
from prefix_kernels.integrations.transformers.attention.masks import visibility_of
from prefix_kernels.integrations.transformers.attention.position_bias import with_position_bias
from prefix_kernels.integrations.transformers.runtime.call_prefixes import prefix_of, record, rows_of


def torch_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """The baseline: the same as :func:`prefix_attention_forward` by ``torch.cat`` and SDPA.

    The prefix is converted to the query's dtype and repeated for every row of the batch, as PEFT does. The mask stays
    ``[B, 1, 1, P + Sk]`` where attention is not causal.
    """
    call = read_call(module, query, key, value, attention_mask, arguments)
    record(module, key, value, call.prefixes)
    key, value, mask, causal, (left, right), offset = visibility_of(call)
    q_len, k_len = query.shape[2], key.shape[2]
    first = k_len - q_len if offset is None else offset[:, None, None, None]
    position = torch.arange(q_len, device=query.device)[:, None] + first
    if (causal and q_len > 1) or left >= 0 or right >= 0:
        column = torch.arange(k_len, device=query.device)
        visible = column <= position if causal else torch.ones_like(column <= position)
        if left >= 0:
            visible = visible & (column >= position - left)
        if right >= 0:
            visible = visible & (column <= position + right)
        mask = visible if mask is None else visible & mask
    mask = with_position_bias(call, mask, k_len)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)

    prefix_key, prefix_value = prefix_of(module, call.key, call.value, call.prefixes)
    if prefix_key is not None and prefix_value is not None:
        ids, lens = rows_of(module, call.prefixes)
        if ids is None or lens is None:
            prefix_key, prefix_value = (x.expand(query.shape[0], -1, -1, -1) for x in (prefix_key, prefix_value))
        else:
            bias = None
            if mask is not None and mask.shape[-1] != k_len:
                bias, mask = mask[..., :-k_len], mask[..., -k_len:]
            mask = _mask_of_columns(mask, query, k_len)
            bank_mask = _bank_mask(ids, lens, prefix_key.shape[2], mask)
            mask = torch.cat([bank_mask if bias is None else bank_mask + bias, mask], dim=-1)
            prefix_key, prefix_value = _of_each_row(prefix_key, ids), _of_each_row(prefix_value, ids)
        if mask is not None and ids is None and mask.shape[-1] == k_len:
            seen = 1.0 if mask.dtype == torch.bool else 0.0
            mask = F.pad(mask, (prefix_key.shape[2], 0), value=seen)
        slides = call.prefixes is not None and call.prefixes.window_includes_prefix
        if slides and mask is not None and left >= 0:
            mask = mask & _prefix_in_window(prefix_key.shape[2], ids, lens, position - left, k_len)
        key = torch.cat([prefix_key.to(key.dtype), key], dim=2)
        value = torch.cat([prefix_value.to(value.dtype), value], dim=2)
    return _attention(call, key, value, mask).transpose(1, 2), None


def _attention(call: AttentionCall, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over all keys ``[B, Hkv, P + Sk, D]``, by SDPA where it can do what the call asks for."""
    query = call.query
    if call.sinks is None and not call.softcap:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=call.dropout, scale=call.scaling, enable_gqa=grouped
        )
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if call.scaling is None else call.scaling)
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if call.sinks is not None:
        sinks = call.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    unseeing = (scores == -torch.inf).all(-1, keepdim=True)  # rows that see nothing get zeros, as from SDPA
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores.masked_fill(unseeing, 0.0), dim=-1, dtype=dtype).masked_fill(unseeing, 0.0)
    weights = weights[..., : key.shape[2]].to(query.dtype)
    return F.dropout(weights, call.dropout) @ value


def _of_each_row(bank: Tensor, ids: Tensor) -> Tensor:
    """Gather from the bank ``[N, Hkv, P, D]`` the prefixes of each row, in order: ``[B, Hkv, M * P, D]``."""
    slots = ids.clamp(min=0).view(ids.shape[0], -1)
    return bank[slots].transpose(1, 2).flatten(2, 3)


def _bank_mask(ids: Tensor, lens: Tensor, length: int, mask: Tensor) -> Tensor:
    """Mask of the valid columns of :func:`_of_each_row`, to stand before ``mask``."""
    slots = ids.view(ids.shape[0], -1)
    valid = torch.arange(length, device=ids.device) < lens[slots.clamp(min=0)][..., None]
    valid = valid & (slots >= 0)[..., None]
    valid = valid.flatten(1)[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    return (
        valid if mask.dtype == torch.bool else torch.zeros_like(valid, dtype=mask.dtype).masked_fill(~valid, -torch.inf)
    )


def _prefix_in_window(length: int, ids: Tensor | None, lens: Tensor | None, first: Tensor, k_len: int) -> Tensor:
    """Mask of the columns, ``length`` of prefixes and ``k_len`` after them, from position ``first`` on.

    The row's prefixes end where the sequence, whose columns are all taken to be visible, begins.
    """
    if ids is None or lens is None:
        position = torch.arange(-length, 0, device=first.device)
    else:
        slots = ids.view(ids.shape[0], -1)
        valid = torch.where(slots >= 0, lens[slots.clamp(min=0)], 0)
        begin = valid.cumsum(1) - valid - valid.sum(1, keepdim=True)
        position = begin[..., None] + torch.arange(length // slots.shape[1], device=first.device)
        position = position.flatten(1)[:, None, None]
    return F.pad(position >= first, (0, k_len), value=1.0)


def _mask_of_columns(mask: Tensor | None, query: Tensor, k_len: int) -> Tensor:
    """Return ``mask`` expanded to all rows and columns, so that a mask of the prefix can be put before it."""
    batch, _, q_len, _ = query.shape
    if mask is None:
        return torch.ones(batch, 1, 1, k_len, dtype=torch.bool, device=query.device)
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.expand(batch, -1, -1, k_len)
