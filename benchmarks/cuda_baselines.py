"""What ``prefix_attention`` is compared with on a GPU.

``torch.cat`` and SDPA with each backend, ``torch.cat`` and FlexAttention, and SDPA's kernel on the sequence alone
merged with a small softmax over the prefix. All take ``query [B, Hq, Sq, D]``, ``key, value [B, Hkv, Sk, D]`` and
``prefix_key, prefix_value [Hkv, P, D]``. A case that a backend does not accept raises, and is left out of the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import baselines
import torch
from baselines import causal_mask, concatenate
from cuda_cells import CudaCell
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

Contender = Callable[..., Tensor]


def _cat_sdpa(backend: SDPBackend, mask: Tensor | None, *inputs: Tensor) -> Tensor:
    query, key, value, prefix_key, prefix_value = inputs
    keys, values = concatenate(prefix_key, key), concatenate(prefix_value, value)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, enable_gqa=key.shape[1] != query.shape[1]
        )


def _cat_flash(cell: CudaCell) -> Contender:
    # One query sees every key of its cache, and without a bias nothing is read for that.
    def flash(*inputs: Tensor) -> Tensor:
        has_bias = cell.is_causal and cell.q_len > 1
        bias = causal_lower_right(cell.q_len, cell.prefix_len + cell.k_len) if has_bias else None
        return _cat_sdpa(SDPBackend.FLASH_ATTENTION, bias, *inputs)

    return flash


def _mask(cell: CudaCell, device: str) -> Tensor | None:
    return causal_mask(cell.q_len, cell.k_len, cell.prefix_len, device) if cell.is_causal and cell.q_len > 1 else None


def _cat_cudnn(cell: CudaCell, device: str) -> Contender:
    # cuDNN's causal flag means the upper left corner, so that bottom-right has to be a mask.
    return functools.partial(_cat_sdpa, SDPBackend.CUDNN_ATTENTION, _mask(cell, device))


def _cat_masked(cell: CudaCell, device: str) -> Contender:
    """As Transformers does it: an explicit mask, keys and values repeated for grouped heads, memory-efficient SDPA."""
    mask, group = _mask(cell, device), cell.q_heads // cell.kv_heads

    def masked(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
        keys, values = concatenate(prefix_key, key), concatenate(prefix_value, value)
        if group > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    return masked


def _cat_flex(cell: CudaCell, device: str) -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Every cell has shapes of its own; what was compiled for another is not wanted, and torch keeps only a few.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if cell.is_causal and cell.q_len > 1:
        shift = cell.prefix_len + cell.k_len - cell.q_len
        block_mask = create_block_mask(
            lambda b, h, i, j: j <= i + shift, None, None, cell.q_len, cell.prefix_len + cell.k_len, device=device
        )

    def flex(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
        keys, values = concatenate(prefix_key, key), concatenate(prefix_value, value)
        return compiled(query, keys, values, block_mask=block_mask, enable_gqa=cell.q_heads != cell.kv_heads)

    return flex


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)
    return out, lse


def _flash_backward(dout, query, key, value, out, lse, dropout_p, is_causal) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the state of the random numbers
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(dout, query, key, value, out, lse, None, None, query.shape[2], key.shape[2], dropout_p, is_causal),
        *(unused, unused),
    )


baselines._flash_forward["cuda"] = _flash_forward
baselines._flash_backward["cuda"] = _flash_backward


def _merged_flash(cell: CudaCell) -> Contender:
    """The split in plain PyTorch; a prefix is repeated for the heads of its group, which is small."""
    group = cell.q_heads // cell.kv_heads

    def merged(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
        if group > 1:
            prefix_key, prefix_value = (each.repeat_interleave(group, 0) for each in (prefix_key, prefix_value))
        is_causal = cell.is_causal and cell.q_len > 1
        return baselines.merged_sdpa(query, key, value, prefix_key, prefix_value, is_causal)

    return merged


def makers(cell: CudaCell, device: str) -> dict[str, Callable[[], Contender]]:
    """Name of every baseline and what makes its function for the cell; making or calling it may raise."""
    return {
        "cat_flash": lambda: _cat_flash(cell),
        "cat_cudnn": lambda: _cat_cudnn(cell, device),
        "cat_masked": lambda: _cat_masked(cell, device),
        "cat_flex": lambda: _cat_flex(cell, device),
        "merged_flash": lambda: _merged_flash(cell),
    }


NAMES = ("cat_flash", "cat_cudnn", "cat_masked", "cat_flex", "merged_flash")
