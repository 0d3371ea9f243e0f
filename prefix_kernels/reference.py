"""The eager oracle: attention over ``[prefix ; sequence]`` written out with ``torch.cat``.

It is plain, slow and differentiable, runs in the dtype of its inputs on any device, and is the only definition of the
result that the kernels are tested against. Use it to check a kernel, never to train.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PHILOX_ROUNDS = 7
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


def _philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """Philox4x32-7 (Salmon et al., 2011) of four broadcastable int64 tensors holding 32-bit words."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _LOW32, (seed >> 32) & _LOW32

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        # The 64-bit product of two 32-bit words, in halves that int64 can hold.
        low, high = a * (b & 0xFFFF), a * (b >> 16)
        total = high + (low >> 16)
        return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)

    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = multiply(_PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = multiply(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _PHILOX_WEYL[0]) & _LOW32, (key1 + _PHILOX_WEYL[1]) & _LOW32
    return [c0, c1, c2, c3]


def dropout_threshold(dropout_p: float) -> int:
    """An element is dropped when its 16 random bits are below this."""
    return int(math.floor(dropout_p * 65536 + 0.5))


def dropout_keep(
    seed: int,
    dropout_p: float,
    head: int,
    segment: int,
    rows: int,
    columns: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Compute the mask of the probabilities of one head that dropout keeps.

    Args:
        seed: 64-bit seed.
        dropout_p: probability of dropping, rounded to a multiple of 1/65536.
        head: ``b * Hq + h``.
        segment: 0 for the sequence, ``1 + m`` for the prefix in slot ``m``; columns count from the segment's start.
        rows: number of queries.
        columns: number of keys in the segment.

    Returns:
        bool ``[rows, columns]``, True where kept.
    """
    i = torch.arange(rows, dtype=torch.int64, device=device)[:, None]
    j = torch.arange(columns, dtype=torch.int64, device=device)[None, :]
    row_group, row_half = (i // 16) * 8 + i % 8, (i // 8) % 2
    column_group, column_sub = (j // 16) * 4 + (j % 8) // 2, ((j % 16) // 8) * 2 + j % 2
    zero = torch.zeros_like(i + j)
    words = _philox([row_group + zero, column_group + zero, zero + head, zero + segment], seed)
    index = row_half * 2 + column_sub // 2
    word = torch.stack(words).gather(0, (index + zero)[None])[0]
    bits = torch.where(column_sub % 2 == 1, word >> 16, word & 0xFFFF)
    return bits >= dropout_threshold(dropout_p)


def _keep_row(
    seed: int, dropout_p: float, head: int, segments: list[tuple[int, int]], rows: int, device: torch.device
) -> Tensor:
    """:func:`dropout_keep` of ``(segment, columns)`` after one another."""
    return torch.cat([dropout_keep(seed, dropout_p, head, s, rows, n, device) for s, n in segments], dim=1)


def _prefix_slots(
    prefix_key: Tensor, prefix_ids: Tensor | None, prefix_lens: Tensor | None, row: int
) -> list[tuple[int, int, int]]:
    """``(slot, prefix, valid length)`` of every prefix that batch row ``row`` sees, in order."""
    length = prefix_key.shape[-2]
    if prefix_ids is None:
        ids = [0 if prefix_key.dim() == 3 else row]
    else:
        ids = prefix_ids[row].reshape(-1).tolist()
    lens = [length] * (1 if prefix_key.dim() == 3 else prefix_key.shape[0])
    if prefix_lens is not None:
        lens = prefix_lens.tolist()
    return [(slot, n, lens[n]) for slot, n in enumerate(ids) if n >= 0]


def prefix_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    prefix_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    query_offset: int | Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    window_includes_prefix: bool = False,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same arguments and results as :func:`prefix_kernels.prefix_attention`, by concatenation, one batch row at a time.

    ``dropout_seed`` must be given when ``dropout_p > 0``. ``lse`` has the query's dtype here.

    Raises:
        ValueError: one of ``prefix_key`` and ``prefix_value`` is missing, or ``dropout_seed`` is.
    """
    if (prefix_key is None) != (prefix_value is None):
        missing, given = ("prefix_key", "prefix_value") if prefix_key is None else ("prefix_value", "prefix_key")
        raise ValueError(f"{missing}: expected a tensor like {given}, got None")
    batch, q_heads, q_len, head_dim = query.shape
    kv_heads, k_len = key.shape[1], key.shape[2]
    group = q_heads // kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    device = query.device
    slots_per_row = 0
    if prefix_key is not None:
        slots_per_row = prefix_ids.shape[1] if prefix_ids is not None and prefix_ids.dim() == 2 else 1
    prefix_len = 0 if prefix_key is None else prefix_key.shape[-2]
    prefix_columns = slots_per_row * prefix_len

    mask = None
    if attn_mask is not None:
        mask_columns = attn_mask.shape[-1] if attn_mask.dim() else 1
        covers_prefix = mask_columns == prefix_columns + k_len and mask_columns != k_len and mask_columns != 1
        mask = attn_mask.expand(batch, q_heads, q_len, prefix_columns + k_len if covers_prefix else k_len)
        if not covers_prefix:
            fill = torch.ones if mask.dtype == torch.bool else torch.zeros
            seen = fill(batch, q_heads, q_len, prefix_columns, dtype=mask.dtype, device=device)
            mask = torch.cat([seen, mask], dim=-1)

    outs, lses = [], []
    for b in range(batch):
        keys, values, columns, segments = [], [], [], []
        if prefix_key is not None and prefix_value is not None:
            for slot, n, length in _prefix_slots(prefix_key, prefix_ids, prefix_lens, b):
                bank_key = prefix_key if prefix_key.dim() == 3 else prefix_key[n]
                bank_value = prefix_value if prefix_value.dim() == 3 else prefix_value[n]
                keys.append(bank_key[:, :length].to(query.dtype))
                values.append(bank_value[:, :length].to(query.dtype))
                columns.append(torch.arange(length, device=device) + slot * prefix_len)
                segments.append((slot + 1, length))
        row_prefix_len = sum(length for _, length in segments)
        keys.append(key[b])
        values.append(value[b])
        columns.append(torch.arange(k_len, device=device) + prefix_columns)
        segments.append((0, k_len))
        all_keys = torch.cat(keys, dim=1).repeat_interleave(group, dim=0)  # [Hq, L, D]
        all_values = torch.cat(values, dim=1).repeat_interleave(group, dim=0)

        scores = (query[b] * scale) @ all_keys.transpose(-1, -2)  # [Hq, Sq, L]
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)

        # Positions on the sequence's axis: the row's prefix ends where the sequence begins.
        k_pos = torch.arange(row_prefix_len + k_len, device=device)[None, :] - row_prefix_len
        offset = k_len - q_len if query_offset is None else query_offset
        offset = int(offset[b]) if isinstance(offset, Tensor) else offset
        q_pos = torch.arange(q_len, device=device)[:, None] + offset
        in_sequence = k_pos >= 0
        visible = torch.ones(q_len, row_prefix_len + k_len, dtype=torch.bool, device=device)
        if is_causal:
            visible &= ~in_sequence | (k_pos <= q_pos)
        left, right = window_size
        if left >= 0:
            limited = in_sequence | window_includes_prefix
            visible &= ~limited | (k_pos >= q_pos - left)
        if right >= 0:
            visible &= ~in_sequence | (k_pos <= q_pos + right)
        visible = visible.expand(q_heads, -1, -1)
        if mask is not None:
            row_mask = mask[b][..., torch.cat(columns)]
            if row_mask.dtype == torch.bool:
                visible = visible & row_mask
            else:
                visible = visible & (row_mask != -math.inf)
                scores = scores + torch.where(visible, row_mask.to(scores.dtype), 0)

        any_visible = visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible, -math.inf).masked_fill(~any_visible, 0.0)
        probabilities = scores.softmax(-1).masked_fill(~any_visible, 0.0)
        lse = scores.new_full(scores.shape[:-1], -math.inf)
        if scores.shape[-1] > 0:
            # Autograd's exp(scores - lse) of scores.logsumexp(-1) is wrong where lse has lost the sum's logarithm.
            largest = scores.detach().amax(-1, keepdim=True)
            lse = (scores - largest).exp().sum(-1).log() + largest[..., 0]
            lse = lse.masked_fill(~any_visible[..., 0], -math.inf)
        threshold = dropout_threshold(dropout_p)
        if threshold > 0:
            if dropout_seed is None:
                raise ValueError(f"dropout_seed: expected an int64 tensor [1] with dropout_p={dropout_p}, got None")
            seed = int(dropout_seed)
            keep = torch.stack(
                [_keep_row(seed, dropout_p, b * q_heads + h, segments, q_len, device) for h in range(q_heads)]
            )
            rescale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
            probabilities = torch.where(keep, probabilities * rescale, 0.0)
        outs.append(probabilities @ all_values)
        lses.append(lse)
    if not outs:
        lse = query.new_zeros(query.shape[:-1])
        out = query.new_zeros(*lse.shape, value.shape[-1])
    else:
        out, lse = torch.stack(outs), torch.stack(lses)
    return (out, lse) if return_lse else out
