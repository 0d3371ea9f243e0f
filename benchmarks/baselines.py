"""What ``prefix_attention`` is compared with: the other ways to write prefix attention in plain PyTorch.

All take ``query, key, value [B, H, S, D]`` and ``prefix_key, prefix_value [H, P, D]`` and return ``out [B, H, Sq, D]``.
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
        forward: ``query, key, value, dropout_p, is_causal`` to ``out`` and ``lse [B, H, Sq]``.
        backward: ``dout, query, key, value, out, lse, dropout_p, is_causal`` to ``dquery, dkey, dvalue``.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


CPU_KERNEL = SdpaKernel(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
)


def concatenate(prefix: Tensor, sequence: Tensor) -> Tensor:
    """``[prefix ; sequence]``, ``[B, H, P + S, D]``, in the sequence's dtype."""
    return torch.cat([prefix.to(sequence.dtype).expand(sequence.shape[0], -1, -1, -1), sequence], dim=2)


def causal_mask(q_len: int, k_len: int, prefix_len: int, device: torch.device | str = "cpu") -> Tensor:
    """The mask that model libraries build once per step: bool ``[1, 1, Sq, P + Sk]``, True where attended."""
    every = torch.ones(q_len, prefix_len + k_len, dtype=torch.bool, device=device)
    return every.tril(prefix_len + k_len - q_len)[None, None]


def cat_sdpa(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """``torch.cat`` and SDPA, masked as Transformers does it: an explicit mask for causal attention, else none."""
    return scaled_dot_product_attention(
        query, concatenate(prefix_key, key), concatenate(prefix_value, value), attn_mask=mask
    )


def cat_sdpa_causal_bias(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
    """``torch.cat`` and SDPA with PyTorch's bottom-right causal bias, which a kernel may use without reading a mask."""
    keys = concatenate(prefix_key, key)
    bias = causal_lower_right(query.shape[2], keys.shape[2])
    return scaled_dot_product_attention(query, keys, concatenate(prefix_value, value), attn_mask=bias)


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
        prefix_key, prefix_value = prefix_key.to(query.dtype), prefix_value.to(query.dtype)
        scores = torch.bmm(_by_head(query), prefix_key.transpose(1, 2)).float().mul_(scale)  # [H, B * S, P]
        lse = torch.logaddexp(own_lse, scores.logsumexp(-1))
        probabilities = scores.sub_(lse[..., None]).exp_().to(query.dtype)
        weight = (own_lse - lse).exp_()[..., None].to(query.dtype)
        out = _by_row(_add_products(own_out * weight, probabilities, prefix_value), batch)
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
        dout_by_head = _by_head(dout)
        delta = (dout_by_head * _by_head(out)).sum(-1, keepdim=True)
        dprobabilities = torch.bmm(dout_by_head, prefix_value.transpose(1, 2))
        dscores = dprobabilities.sub_(delta).mul_(probabilities).mul_(scale)
        if ctx.needs_input_grad[0]:
            dquery = _by_row(_add_products(_by_head(dquery), dscores, prefix_key), batch)
        if ctx.needs_input_grad[3]:
            dprefix_key = torch.bmm(dscores.transpose(1, 2), _by_head(query))
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
    """The strongest alternative in plain PyTorch: no concatenation, no mask, SDPA's fastest kernel; needs Sq = Sk."""
    return _MergedSdpa.apply(query, key, value, prefix_key, prefix_value, is_causal, kernel)
