"""Attention layers with a trainable prefix, as ``torch.nn`` modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefix_kernels.backends.setting import Backend, resolved_backend
from prefix_kernels.functional import prefix_attention
from prefix_kernels.nn.multihead_attention import PrefixMultiheadAttention, check_head_dim, merge_masks, split_heads

__all__ = ["PrefixMultiheadAttention", "PrefixTuningAttention"]


class PrefixTuningAttention(nn.Module):
    """Multi-head attention with a trainable prefix in input space: prefix tuning as textbooks write it.

    The prefix ``p [P, d_model]`` passes through the same key and value projections as the input, which are
    frozen (Li and Liang, 2021: "Prefix-Tuning: Optimizing Continuous Prompts for Generation")::

        K' = [p W_k + b_k ; x W_k + b_k]      V' = [p W_v + b_v ; x W_v + b_v]      Q = x W_q + b_q
        out = concat_h softmax(Q_h K'_h^T / sqrt(d_model / n_heads) + mask) V'_h  W_o + b_o

    The prefix is projected once per call, whatever the batch, and ``[ ; ]`` is never built. It is seen by every query:
    masks speak of the sequence alone.

    Args:
        d_model: features of input and output.
        n_heads: number of heads, a divisor of ``d_model``.
        prefix_len: ``P``, the prefix length.
        dropout: probability of dropping an attention weight while training.
        bias: whether the projections have biases.
        batch_first: input and output are ``[B, S, d_model]`` instead of ``[S, B, d_model]``.
        freeze_projections: leave the prefix as the only trainable parameter. Load pretrained weights into ``q_proj``,
            ``k_proj``, ``v_proj`` and ``out_proj`` (each a :class:`torch.nn.Linear`).
        backend: as in :func:`prefix_kernels.prefix_attention`.

    Attributes:
        prefix: parameter ``[P, d_model]``, drawn from N(0, 1), the scale of a normalised input.

    Raises:
        ValueError: ``n_heads`` does not divide ``d_model``, a head has more than 256 features, ``prefix_len`` is
            negative, ``dropout`` is no probability, ``backend`` no backend.
    """

    backend: Backend | None = None  # of modules that were pickled without one

    def __init__(
        self,
        d_model: int = 128,
        n_heads: int = 4,
        prefix_len: int = 5,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        freeze_projections: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        resolved_backend(backend)
        self.backend = backend
        if n_heads < 1 or d_model < 1 or d_model % n_heads:
            raise ValueError(f"n_heads: expected a divisor of d_model={d_model}, got {n_heads}")
        check_head_dim("d_model", d_model, n_heads)
        if prefix_len < 0:
            raise ValueError(f"prefix_len: expected at least 0, got {prefix_len}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")
        self.d_model = d_model
        self.n_heads = n_heads
        self.num_prefix_tokens = prefix_len
        self.dropout = dropout
        self.batch_first = batch_first
        self.q_proj = nn.Linear(d_model, d_model, bias, device, dtype)
        self.k_proj = nn.Linear(d_model, d_model, bias, device, dtype)
        self.v_proj = nn.Linear(d_model, d_model, bias, device, dtype)
        self.out_proj = nn.Linear(d_model, d_model, bias, device, dtype)
        self.requires_grad_(not freeze_projections)
        self.prefix = nn.Parameter(torch.randn(prefix_len, d_model, device=device, dtype=dtype))

    def prefix_parameter_names(self) -> list[str]:
        """Name the parameters of the prefix, as the protocol of :mod:`prefix_kernels.checkpoint` asks."""
        return ["prefix"]

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        context: Tensor | None = None,
    ) -> Tensor:
        """Attend to the prefix and to ``x``, or to ``context`` (cross-attention).

        Args:
            x: ``[S, B, d_model]``, or ``[B, S, d_model]`` with ``batch_first``.
            key_padding_mask: ``[B, T]``, ``T`` being the length of what is attended to; True = ignore this key, or a
                float to add, as in :class:`torch.nn.MultiheadAttention`.
            attn_mask: ``[S, T]`` or ``[B * n_heads, S, T]``; True = do *not* attend, or a float to add.
            is_causal: query ``i`` sees key ``j`` when ``j <= i + T - S``. No mask is needed, and it combines with both.
            context: keys and values come from it instead of from ``x``; laid out like ``x``, of any length.

        Returns:
            ``[S, B, d_model]``, or ``[B, S, d_model]`` with ``batch_first``.

        Raises:
            ValueError: shapes that do not fit.
            TypeError: a mask that is neither bool nor floating point.
        """
        source = x if context is None else context
        for name, tensor in (("x", x), ("context", source)):
            if tensor.dim() != 3 or tensor.shape[-1] != self.d_model:
                layout = "[B, S" if self.batch_first else "[S, B"
                raise ValueError(f"{name}: expected {layout}, {self.d_model}], got {list(tensor.shape)}")
        batch_dim = 0 if self.batch_first else 1
        if source.shape[batch_dim] != x.shape[batch_dim]:
            raise ValueError(
                f"context: expected a batch of {x.shape[batch_dim]} in dimension {batch_dim}, got {list(source.shape)}"
            )

        q, k, v = (
            split_heads(projected, self.n_heads, sequence_first=not self.batch_first)
            for projected in (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        )
        prefix_key, prefix_value = (
            split_heads(projected, self.n_heads, sequence_first=False).squeeze(0)
            for projected in (self.k_proj(self.prefix), self.v_proj(self.prefix))
        )
        mask = merge_masks(attn_mask, key_padding_mask, q, k)
        dropout_p = self.dropout if self.training else 0.0
        prefixes = prefix_key, prefix_value
        out = prefix_attention(q, k, v, *prefixes, mask, dropout_p, is_causal, backend=self.backend)
        out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        projected: Tensor = self.out_proj(out.flatten(2))
        return projected

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_heads={self.n_heads}, prefix_len={self.num_prefix_tokens}"
