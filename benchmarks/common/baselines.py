"""Baselines of ``prefix_attention``: the other ways to write prefix attention in plain PyTorch.

All take ``query [B, Hq, Sq, D]``, ``key, value [B, Hkv, Sk, D]`` and ``prefix_key, prefix_value [Hkv, P, D]``, and
return ``out [B, Hq, Sq, D]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class SdpaKernel:
    """SDPA's kernel of one backend, as SDPA itself calls it.

    Attributes:
        forward: ``query, key, value, dropout_p, is_causal`` to ``out`` and ``lse [B, Hq, Sq]``.
        backward: ``dout, query, key, value, out, lse, dropout_p, is_causal`` to ``dquery, dkey, dvalue``.
        products: the least dtype in which the prefix's own products are formed; default: that of the operands.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    products: torch.dtype | None = None

    def for_products(self, tensor: Tensor) -> Tensor:
        return tensor if self.products is None else tensor.to(torch.promote_types(tensor.dtype, self.products))


# Batched products of 16-bit operands with so few columns take 2 (bfloat16) to 40 (float16) times as long on a CPU.
CPU_KERNEL = SdpaKernel(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    products=torch.float32,
)


def concatenate(prefix: Tensor, sequence: Tensor) -> Tensor:
    """``[prefix ; sequence]``, ``[B, H, P + S, D]``, in the sequence's dtype."""
    return torch.cat([prefix.to(sequence.dtype).expand(sequence.shape[0], -1, -1, -1), sequence], dim=2)


def causal_mask(q_len: int, k_len: int, prefix_len: int, device: torch.device | str = "cpu") -> Tensor:
    """The mask that model libraries build once per step: bool ``[1, 1, Sq, P + Sk]``, True where attended."""
    every = torch.ones(q_len, prefix_len + k_len, dtype=torch.bool, device=device)
    return every.tril(prefix_len + k_len - q_len)[None, None]


def padding_mask(key_lengths: list[int], k_len: int, prefix_len: int) -> Tensor:
    """bool ``[B, 1, 1, P + Sk]``: every row sees the prefix and so many of its keys."""
    positions = torch.arange(-prefix_len, k_len)
    return (positions < torch.tensor(key_lengths)[:, None])[:, None, None]


def cat_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``torch.cat`` and SDPA, masked as Transformers does it: an explicit mask for causal attention, else none."""
    keys, values = concatenate(prefix_key, key), concatenate(prefix_value, value)
    return scaled_dot_product_attention(query, keys, values, mask, dropout_p, enable_gqa=_group(query, key) > 1)


def cat_sdpa_causal_bias(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
    """``torch.cat`` and SDPA with PyTorch's bottom-right causal bias, which a kernel may use without reading a mask."""
    bias = causal_lower_right(query.shape[2], prefix_key.shape[1] + key.shape[2])
    return cat_sdpa(query, key, value, prefix_key, prefix_value, bias)


def _group(query: Tensor, key: Tensor) -> int:
    """Query heads that share a head of keys."""
    return query.shape[1] // key.shape[1]


def _by_head(tensor: Tensor) -> Tensor:
    """``[B, H, S, ...]`` as ``[H, B * S, ...]``: no copy where it lies in memory as ``[B, S, H, ...]``."""
    return tensor.transpose(1, 2).flatten(0, 1).transpose(0, 1)


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b``; on a GPU in place, which leaves the layout that SDPA's backward wants and saves a copy."""
    return total.baddbmm_(a, b) if total.is_cuda else torch.baddbmm(total, a, b)


def _by_row(tensor: Tensor, batch: int) -> Tensor:
    """``[H, B * S, ...]`` as ``[B, H, S, ...]``."""
    return tensor.unflatten(1, (batch, -1)).transpose(0, 1)


class _MergedSdpa(torch.autograd.Function):
    """SDPA's kernel on the sequence, a small softmax on the prefix, merged by their logsumexp.

    Given the merged out and lse, the kernel's own backward is exact for the sequence: with ``p = exp(s - lse)`` and
    ``delta = rowsum(dout * out)`` it needs nothing else of the columns that it does not see. The prefix's products
    take all rows of a head at once, so that each is one batched multiplication and a gradient needs no sum.
    """

    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, is_causal, kernel):
        batch, scale = query.shape[0], query.shape[-1] ** -0.5
        own_out, own_lse = kernel.forward(query, key, value, 0.0, is_causal)
        own_out, own_lse = _by_head(own_out), _by_head(own_lse)
        prefix_key, prefix_value = (
            kernel.for_products(prefix.to(query.dtype)) for prefix in (prefix_key, prefix_value)
        )
        query_by_head = kernel.for_products(_by_head(query))
        scores = torch.bmm(query_by_head, prefix_key.transpose(1, 2)).float().mul_(scale)  # [H, B * S, P]
        lse = torch.logaddexp(own_lse, scores.logsumexp(-1))
        probabilities = scores.sub_(lse[..., None]).exp_().to(prefix_key.dtype)
        weight = (own_lse - lse).exp_()[..., None].to(prefix_key.dtype)
        out = _by_row(_add_products(own_out * weight, probabilities, prefix_value).to(query.dtype), batch)
        lse = _by_row(lse, batch)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, out, lse, probabilities)
        ctx.is_causal, ctx.kernel = is_causal, kernel
        return out

    @staticmethod
    def backward(ctx, dout):
        query, key, value, prefix_key, prefix_value, out, lse, probabilities = ctx.saved_tensors
        batch, scale = query.shape[0], query.shape[-1] ** -0.5
        dquery = dkey = dvalue = dprefix_key = dprefix_value = None
        if any(ctx.needs_input_grad[:3]):
            arguments = dout, query, key, value, out, lse, 0.0, ctx.is_causal
            dquery, dkey, dvalue = ctx.kernel.backward(*arguments)
        dout_by_head = ctx.kernel.for_products(_by_head(dout))
        delta = (dout_by_head * _by_head(out)).sum(-1, keepdim=True)
        dprobabilities = torch.bmm(dout_by_head, prefix_value.transpose(1, 2))
        dscores = dprobabilities.sub_(delta).mul_(probabilities).mul_(scale)
        if ctx.needs_input_grad[0]:
            dquery = _add_products(ctx.kernel.for_products(_by_head(dquery)), dscores, prefix_key)
            dquery = _by_row(dquery.to(query.dtype), batch)
        if ctx.needs_input_grad[3]:
            dprefix_key = torch.bmm(dscores.transpose(1, 2), ctx.kernel.for_products(_by_head(query)))
        if ctx.needs_input_grad[4]:
            dprefix_value = torch.bmm(probabilities.transpose(1, 2), dout_by_head)
        return dquery, dkey, dvalue, dprefix_key, dprefix_value, None, None


def merged_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    is_causal: bool = False,
    kernel: SdpaKernel = CPU_KERNEL,
) -> Tensor:
    """No concatenation, no mask, SDPA's fastest kernel; the prefix's backward is three products.

    Causal attention needs Sq = Sk. A prefix is repeated for the heads of its group, which is small.
    """
    group = _group(query, key)
    if group > 1:
        prefix_key, prefix_value = (each.repeat_interleave(group, 0) for each in (prefix_key, prefix_value))
    return _MergedSdpa.apply(query, key, value, prefix_key, prefix_value, is_causal, kernel)


class _MergedKernels(torch.autograd.Function):
    """SDPA's kernel on the sequence and on the prefix, merged by their logsumexp.

    The prefix's call takes all rows of a head at once, as one long row. Its gradients are the kernel's own too, given
    the merged out and lse.
    """

    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, is_causal, kernel):
        out, lse = (_by_head(each) for each in kernel.forward(query, key, value, 0.0, is_causal))
        prefix_key, prefix_value = prefix_key.to(query.dtype)[None], prefix_value.to(query.dtype)[None]
        prefix_out, prefix_lse = kernel.forward(_by_head(query)[None], prefix_key, prefix_value, 0.0, False)
        weight = (prefix_lse[0] - lse).sigmoid_()[..., None].to(query.dtype)
        lse = _by_row(torch.logaddexp(lse, prefix_lse[0]), query.shape[0])
        out = _by_row(torch.lerp(out, prefix_out[0], weight), query.shape[0])
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, out, lse)
        ctx.is_causal, ctx.kernel = is_causal, kernel
        return out

    @staticmethod
    def backward(ctx, dout):
        query, key, value, prefix_key, prefix_value, out, lse = ctx.saved_tensors
        by_head = [_by_head(each)[None] for each in (dout, query, out, lse)]
        dquery = dkey = dvalue = None
        dprefix_query, dprefix_key, dprefix_value = ctx.kernel.backward(
            *by_head[:2], prefix_key, prefix_value, *by_head[2:], 0.0, False
        )
        if any(ctx.needs_input_grad[:3]):
            dquery, dkey, dvalue = ctx.kernel.backward(dout, query, key, value, out, lse, 0.0, ctx.is_causal)
            dquery = dquery + _by_row(dprefix_query[0], query.shape[0])
        return dquery, dkey, dvalue, dprefix_key[0], dprefix_value[0], None, None


def merged_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    is_causal: bool = False,
    kernel: SdpaKernel = CPU_KERNEL,
) -> Tensor:
    """``merged_sdpa`` with SDPA's kernel for the prefix too, which is faster where the prefix is long."""
    return _MergedKernels.apply(query, key, value, prefix_key, prefix_value, is_causal, kernel)


def merged_float32(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, is_causal: bool = False
) -> Tensor:
    """``merged_sdpa`` in float32 for 16-bit operands: faster where the processor has no instructions for these."""
    operands = (each.float() for each in (query, key, value, prefix_key, prefix_value))
    return merged_sdpa(*operands, is_causal).to(query.dtype)


def _heads_as_rows(query: Tensor, key: Tensor) -> Tensor:
    """``[B, Hq, 1, D]`` as ``[B, Hkv, Hq / Hkv, D]``: the heads of a group are queries of their head of keys."""
    return query.unflatten(1, (key.shape[1], -1)).squeeze(3)


def merged_decode(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
    """``merged_sdpa`` for Sq = 1, which reads a key once for all heads of its group."""
    return merged_sdpa(_heads_as_rows(query, key), key, value, prefix_key, prefix_value).reshape(query.shape)


def matmul_decode(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
    """Products and one softmax for Sq = 1: the scores are concatenated, not the keys."""
    rows, prefix_len = _heads_as_rows(query, key), prefix_key.shape[1]
    prefix_key, prefix_value = prefix_key.to(query.dtype), prefix_value.to(query.dtype)
    scores = torch.cat([rows @ prefix_key.transpose(-1, -2), rows @ key.transpose(-1, -2)], -1)
    probabilities = scores.mul_(query.shape[-1] ** -0.5).softmax(-1)
    prefix, sequence = probabilities.split([prefix_len, key.shape[2]], -1)
    return (prefix @ prefix_value + sequence @ value).reshape(query.shape)
