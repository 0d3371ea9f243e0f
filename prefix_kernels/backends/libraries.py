"""PyTorch's own attention operators, forward and backward, by one interface.

They are private to PyTorch, so each is looked up by name, and its schema is compared with the one that the calls below
were written for. An operator that is not there or has changed is not used.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

_Gradients = tuple[Tensor, Tensor, Tensor]

# Those of PyTorch 2.11 to 2.14: tests/operator/attention_op_schemas.json.
SCHEMAS = {
    "_scaled_dot_product_flash_attention_for_cpu": (
        "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, *, Tensor? attn_mask=None, "
        "float? scale=None) -> (Tensor output, Tensor logsumexp)"
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, float dropout_p, "
        "bool is_causal, *, Tensor? attn_mask=None, float? scale=None) -> "
        "(Tensor grad_query, Tensor grad_key, Tensor grad_value)"
    ),
    "_scaled_dot_product_flash_attention": (
        "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, "
        "bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, "
        "Tensor cum_seq_k, SymInt max_q, SymInt max_k, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
    ),
    "_scaled_dot_product_flash_attention_backward": (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, "
        "Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor philox_seed, "
        "Tensor philox_offset, *, float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
    ),
    "_scaled_dot_product_cudnn_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float dropout_p=0., "
        "bool is_causal=False, bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, "
        "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, Tensor philox_seed, "
        "Tensor philox_offset, Tensor debug_attn_mask)"
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor philox_seed, "
        "Tensor philox_offset, Tensor attn_bias, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, "
        "float dropout_p, bool is_causal, *, float? scale=None) -> (Tensor, Tensor, Tensor)"
    ),
    "_fused_sdp_choice": (
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0., bool is_causal=False, *, "
        "float? scale=None, bool enable_gqa=False) -> int"
    ),
}


@dataclass(frozen=True)
class Library:
    """One of PyTorch's attention implementations.

    Attributes:
        name: as messages call it.
        forward_name, backward_name: its operators in ``torch.ops.aten``.
        forward: ``(query, key, value, is_causal, scale) -> (out, lse [B, Hq, Sq])``.
        backward: ``(dout, query, key, value, out, lse, is_causal, scale) -> (dquery, dkey, dvalue)``; ``out`` and
            ``lse``, which is contiguous, may be those of attention over more keys: the gradients are then exact for the
            keys given.
    """

    name: str
    forward_name: str
    backward_name: str
    forward: Callable[[Tensor, Tensor, Tensor, bool, float | None], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float | None], _Gradients]


def _operator(name: str) -> Any:
    return getattr(torch.ops.aten, name).default


def _flash_cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    forward = _operator("_scaled_dot_product_flash_attention_for_cpu")
    out, lse = forward(query, key, value, 0.0, is_causal, scale=scale)
    return out, lse


def _flash_cpu_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float | None,
) -> _Gradients:
    backward = _operator("_scaled_dot_product_flash_attention_for_cpu_backward")
    gradients: _Gradients = backward(dout, query, key, value, out, lse, 0.0, is_causal, scale=scale)
    return gradients


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _operator("_scaled_dot_product_flash_attention")(
        query, key, value, 0.0, is_causal, False, scale=scale
    )
    return out, lse


def _flash_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float | None,
) -> _Gradients:
    lengths = query.shape[2], key.shape[2]
    unread = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the random state of dropout
    gradients: _Gradients = _operator("_scaled_dot_product_flash_attention_backward")(
        *(dout, query, key, value, out, lse, None, None, *lengths, 0.0, is_causal, unread, unread), scale=scale
    )
    return gradients


class _Cudnn:
    """cuDNN's kernel. Its logsumexp is ``[B, H, S]`` or ``[B, H, S, 1]`` by the version of PyTorch, backward too."""

    lse_columns: tuple[int, ...] = (1,)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _operator("_scaled_dot_product_cudnn_attention")(
            query, key, value, None, True, 0.0, is_causal, False, scale=scale
        )
        self.lse_columns = lse.shape[3:]
        return out, lse.reshape(lse.shape[:3])

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        is_causal: bool,
        scale: float | None,
    ) -> _Gradients:
        unread = torch.zeros((), dtype=torch.int64, device=query.device)  # the random state of dropout
        lengths = query.shape[2], key.shape[2]
        gradients: _Gradients = _operator("_scaled_dot_product_cudnn_attention_backward")(
            *(dout, query, key, value, out, lse.reshape(lse.shape + self.lse_columns), unread, unread),
            *(None, None, None, *lengths, 0.0, is_causal),
            scale=scale,
        )
        return gradients


_cudnn = _Cudnn()
FLASH_CPU = Library(
    "PyTorch's flash attention for CPUs",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    _flash_cpu_forward,
    _flash_cpu_backward,
)
FLASH = Library(
    "PyTorch's flash attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_backward",
    _flash_forward,
    _flash_backward,
)
CUDNN = Library(
    "cuDNN's attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_cudnn_attention_backward",
    _cudnn.forward,
    _cudnn.backward,
)
_LIBRARIES = {
    ("cpu", SDPBackend.FLASH_ATTENTION): FLASH_CPU,
    ("cuda", SDPBackend.FLASH_ATTENTION): FLASH,
    ("cuda", SDPBackend.CUDNN_ATTENTION): CUDNN,
}


def _changed_operator(*names: str) -> str | None:
    """Name the first of these operators that is not as :data:`SCHEMAS` says."""
    for name in names:
        packet = getattr(torch.ops.aten, name, None)
        if packet is None or str(packet.default._schema) != f"aten::{name}{SCHEMAS[name]}":
            return name
    return None


@functools.cache
def unusable_library(library: Library) -> str | None:
    """Say why a library's operators cannot be called in this version of PyTorch, in a warning too; None: they can."""
    changed = _changed_operator("_fused_sdp_choice", library.forward_name, library.backward_name)
    if changed is None:
        return None
    reason = f"PyTorch {torch.__version__} has no operator aten::{changed} of the expected signature"
    warnings.warn(f"prefix_attention: {reason}; its kernels are not used, only those of prefix_kernels", stacklevel=2)
    return reason


def library_for(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Library | str:
    """The implementation that PyTorch itself would take for the sequence, or the reason why there is none.

    ``torch.nn.attention.sdpa_kernel`` and the flags of ``torch.backends.cuda`` are followed.
    """
    known = [library for (device, _), library in _LIBRARIES.items() if device == query.device.type]
    if not known:
        return f"PyTorch has no fused attention for device {query.device.type!r} that returns a logsumexp"
    for library in known:
        reason = unusable_library(library)
        if reason is not None:
            return reason
    grouped = query.shape[1] != key.shape[1]
    choice = SDPBackend(
        torch._fused_sdp_choice(query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=grouped)
    )
    chosen = _LIBRARIES.get((query.device.type, choice))
    if chosen is None:
        return f"PyTorch chooses {choice.name} for the sequence, which returns no logsumexp or is switched off"
    return chosen
