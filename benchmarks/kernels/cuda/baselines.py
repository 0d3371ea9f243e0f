"""Baselines of ``prefix_attention`` on a GPU.

``torch.cat`` and SDPA with each backend, ``torch.cat`` and FlexAttention, and SDPA's kernel on the sequence alone
merged with a small softmax over the prefix. All take ``query [B, Hq, Sq, D]``, ``key, value [B, Hkv, Sk, D]`` and
``prefix_key, prefix_value [Hkv, P, D]``. A case that a backend does not accept raises, and is left out of the table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common.baselines import SdpaKernel, causal_mask, concatenate, merged_sdpa
from benchmarks.common.cells import Cell
from benchmarks.common.contenders import Contender
from prefix_kernels import prefix_attention


def _mask(cell: Cell, device: str) -> Tensor | None:
    return causal_mask(cell.q_len, cell.k_len, cell.prefix_len, device) if cell.has_diagonal else None


def _cat_sdpa(backend: SDPBackend, make_mask: Callable[[], Tensor | None]) -> Contender:
    def cat_sdpa(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
        keys, values = concatenate(prefix_key, key), concatenate(prefix_value, value)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                query, keys, values, attn_mask=make_mask(), enable_gqa=key.shape[1] != query.shape[1]
            )

    return cat_sdpa


def _cat_flash(cell: Cell, device: str) -> Contender:
    def bias() -> Tensor | None:
        return causal_lower_right(cell.q_len, cell.prefix_len + cell.k_len) if cell.has_diagonal else None

    return _cat_sdpa(SDPBackend.FLASH_ATTENTION, bias)


def _cat_cudnn(cell: Cell, device: str) -> Contender:
    # PyTorch's bottom-right bias becomes a mask for cuDNN too, anew in every call: here it is made once.
    mask = _mask(cell, device)
    return _cat_sdpa(SDPBackend.CUDNN_ATTENTION, lambda: mask)


def _cat_masked(cell: Cell, device: str) -> Contender:
    """Attention as Transformers calls it: an explicit mask, grouped keys and values repeated, memory-efficient SDPA."""
    mask, group = _mask(cell, device), cell.q_heads // cell.kv_heads

    def masked(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
        keys, values = concatenate(prefix_key, key), concatenate(prefix_value, value)
        if group > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    return masked


@functools.lru_cache(maxsize=1)
def _compiled_flex(cell: Cell, device: str) -> Callable[..., Tensor]:
    """FlexAttention compiled for one shape; the code of other shapes is dropped, because torch keeps only a few."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    block_mask = None
    if cell.has_diagonal:
        columns = cell.prefix_len + cell.k_len
        shift = columns - cell.q_len
        block_mask = create_block_mask(
            lambda b, h, i, j: j <= i + shift, None, None, cell.q_len, columns, device=device
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=block_mask, enable_gqa=cell.q_heads != cell.kv_heads)


def _cat_flex(cell: Cell, device: str) -> Contender:
    compiled = _compiled_flex(dataclasses.replace(cell, pass_="any"), device)

    def flex(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
        return compiled(query, concatenate(prefix_key, key), concatenate(prefix_value, value))

    return flex


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)
    return out, lse


def _flash_backward(dout, query, key, value, out, lse, dropout_p, is_causal) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the state of the random numbers
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        # The kernel takes lse for contiguous without looking.
        *(dout, query, key, value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2], dropout_p),
        *(is_causal, unused, unused),
    )


class _CudnnKernel:
    """cuDNN's kernel. Its lse is ``[B, H, S]`` or ``[B, H, S, 1]``, by the version of PyTorch, for backward too."""

    columns: tuple[int, ...] = ()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, dropout_p, is_causal
        )
        self.columns = lse.shape[3:]
        return out, lse.reshape(lse.shape[:3])

    def backward(self, dout, query, key, value, out, lse, dropout_p, is_causal) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.zeros((), dtype=torch.int64, device=query.device)
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(dout, query, key, value, out, lse.reshape(lse.shape + self.columns).contiguous(), unused, unused),
            *(None, None, None, query.shape[2], key.shape[2], dropout_p, is_causal),
        )


_FLASH = SdpaKernel(_flash_forward, _flash_backward)
_cudnn = _CudnnKernel()
_CUDNN = SdpaKernel(_cudnn.forward, _cudnn.backward)


def _merged(kernel: SdpaKernel, cell: Cell, device: str) -> Contender:
    return functools.partial(merged_sdpa, is_causal=cell.has_diagonal, kernel=kernel)


def _split(cell: Cell, device: str) -> Contender:
    return functools.partial(prefix_attention, is_causal=cell.is_causal, backend="split")


# Makers of each baseline's function for a cell on a device; making or calling it may raise.
BASELINES: dict[str, Callable[[Cell, str], Contender]] = {
    "cat_flash": _cat_flash,
    "cat_cudnn": _cat_cudnn,
    "cat_masked": _cat_masked,
    "cat_flex": _cat_flex,
    "merged_flash": functools.partial(_merged, _FLASH),
    "merged_cudnn": functools.partial(_merged, _CUDNN),
    "split": _split,
}
