"""``torch.nn.MultiheadAttention`` with a trainable key/value prefix."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefix_kernels.backends.setting import Backend, resolved_backend
from prefix_kernels.functional import MAX_HEAD_DIM, prefix_attention

_INITIAL_PREFIX_STD = 0.02


class PrefixMultiheadAttention(nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` whose keys and values are preceded by a trainable prefix.

    For every head ``h``, with the projections of ``torch.nn.MultiheadAttention``::

        out_h = softmax(q_h [prefix_key_h ; k_h]^T / sqrt(D) + mask) [prefix_value_h ; v_h]

    (Li and Liang, 2021: "Prefix-Tuning: Optimizing Continuous Prompts for Generation"). The concatenation is never
    built. The prefix is seen by every query: masks speak of the sequence alone.

    Constructor, ``forward``, results and state-dict keys are those of ``torch.nn.MultiheadAttention``, so that it can
    take its place, also inside ``nn.TransformerEncoderLayer``, ``nn.TransformerDecoderLayer``, ``nn.Transformer``; it
    is a subclass, so that what looks for attention modules by type (initialisers, sharding policies) finds it. With
    ``num_prefix_tokens=0`` it computes the same function.

    ``docs/modules.md`` lists the differences that remain. They concern the state dict, returned weights, queries that
    see no key, masks that require a gradient, ``is_causal``, nested tensors, the fused inference path, errors,
    ``torch.jit``, ``torch.fx``, ``torch.load``, double backward and forward-mode differentiation.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            :class:`torch.nn.MultiheadAttention`.
        num_prefix_tokens: ``P``, the prefix length.
        backend: as in :func:`prefix_kernels.prefix_attention`.

    Attributes:
        prefix_key, prefix_value: parameters ``[num_heads, P, head_dim]``, drawn from N(0, 0.02^2); None if ``P`` is 0.

    Raises:
        ValueError: ``num_prefix_tokens`` is negative, a head has more than 256 features, or ``backend`` is none.
    """

    backend: Backend | None = None  # of modules that were made without one
    prefix_key: nn.Parameter | None
    prefix_value: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_prefix_tokens: int = 0,
        backend: Backend | None = None,
    ) -> None:
        resolved_backend(backend)
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens: expected at least 0, got {num_prefix_tokens}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        check_head_dim("embed_dim", embed_dim, num_heads)
        self._add_prefix(num_prefix_tokens, device, dtype)
        self.backend = backend

    def _add_prefix(self, num_prefix_tokens: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        shape = (self.num_heads, num_prefix_tokens, self.head_dim)
        for name in ("prefix_key", "prefix_value"):
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if num_prefix_tokens else None
            self.register_parameter(name, parameter)
        self._reset_prefix()

    def _reset_prefix(self) -> None:
        for name in self.prefix_parameter_names():
            nn.init.normal_(self.get_parameter(name), std=_INITIAL_PREFIX_STD)
        # nn.TransformerEncoderLayer (in eval mode) and nn.TransformerEncoder (when constructed) ask this flag whether
        # their fused kernel, which reads in_proj_weight and never calls this module, may replace it.
        self._qkv_same_embed_dim = self.in_proj_weight is not None and self.num_prefix_tokens == 0

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        if hasattr(self, "num_prefix_tokens"):
            self._reset_prefix()

    @classmethod
    def from_multihead_attention(
        cls, mha: nn.MultiheadAttention, num_prefix_tokens: int, *, prefix_dtype: torch.dtype | None = None
    ) -> PrefixMultiheadAttention:
        """Take the place of ``mha``: share its parameters, frozen, and add a trainable prefix.

        Args:
            mha: the module to replace. Its parameters stop requiring gradients, since they are the same objects.
            num_prefix_tokens: ``P``, the prefix length.
            prefix_dtype: dtype of the prefix, e.g. float32 for a bfloat16 module. Default: that of ``mha``.

        Example::

            layer.self_attn = PrefixMultiheadAttention.from_multihead_attention(layer.self_attn, num_prefix_tokens=20)

        Raises:
            TypeError: ``mha`` is not a ``torch.nn.MultiheadAttention``, or computes something else than one, or is
                parametrised.
            ValueError: ``mha`` has a prefix already.
        """
        if not isinstance(mha, nn.MultiheadAttention) or (
            type(mha).forward not in (nn.MultiheadAttention.forward, PrefixMultiheadAttention.forward)
        ):
            raise TypeError(f"mha: expected a torch.nn.MultiheadAttention, got {type(mha).__qualname__}")
        if nn.utils.parametrize.is_parametrized(mha):
            raise TypeError("mha: expected plain parameters, got parametrised ones (see torch.nn.utils.parametrize)")
        if getattr(mha, "num_prefix_tokens", 0):
            raise ValueError(f"mha: expected a module without a prefix, got one of {mha.num_prefix_tokens} tokens")
        swapped = cls(
            mha.embed_dim,
            mha.num_heads,
            mha.dropout,
            mha.in_proj_bias is not None,
            mha.bias_k is not None,
            mha.add_zero_attn,
            mha.kdim,
            mha.vdim,
            mha.batch_first,
            device="meta",
        )
        mha.requires_grad_(False)
        for name, parameter in mha.named_parameters(recurse=False):
            setattr(swapped, name, parameter)
        swapped.out_proj = mha.out_proj
        like = next(mha.parameters())
        swapped._add_prefix(num_prefix_tokens, like.device, like.dtype if prefix_dtype is None else prefix_dtype)
        return swapped.train(mha.training)

    def prefix_parameter_names(self) -> list[str]:
        """Name the parameters of the prefix, as the protocol of :mod:`prefix_kernels.checkpoint` asks."""
        return ["prefix_key", "prefix_value"] if self.num_prefix_tokens else []

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the prefix and to ``key``.

        Args:
            query: ``[L, N, E]``, ``[N, L, E]`` with ``batch_first``, or ``[L, E]`` (unbatched).
            key, value: ``[S, N, kdim]`` and ``[S, N, vdim]``, ``[N, S, ...]`` with ``batch_first``, or ``[S, ...]``.
            key_padding_mask: ``[N, S]``, or ``[S]`` for unbatched input; True = ignore this key, or a float to add.
            need_weights: return the attention weights. They take memory for ``N num_heads L (P + S)`` numbers.
            attn_mask: ``[L, S]`` or ``[N * num_heads, L, S]``; True = do *not* attend, or a float to add.
            average_attn_weights: average the returned weights over heads.
            is_causal: ``attn_mask`` is the causal mask: query ``i`` sees key ``j`` when ``j <= i``.

        Returns:
            ``output``, shaped like ``query``, and ``weights [N, L, P + S]`` or ``[N, num_heads, L, P + S]`` (without
            ``N`` for unbatched input) or None. ``add_bias_kv`` and ``add_zero_attn`` each add a column at the end.

        Raises:
            ValueError: shapes that do not fit, ``is_causal`` without ``attn_mask``, a mask that requires a gradient,
                unsupported nested input.
            TypeError: a mask that is neither bool nor floating point.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights
            )
        self._check_shapes(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected the causal mask that is_causal=True speaks of, got None")

        is_batched = query.dim() == 3
        q, k, v = self._project(query, key, value, sequence_first=is_batched and not self.batch_first)
        trust_hint = is_causal and not need_weights
        if key_padding_mask is not None and not is_batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        mask = merge_masks(None if trust_hint else attn_mask, key_padding_mask, q, k)
        row_key, row_value = self._rows_every_query_sees()
        result = prefix_attention(
            q,
            k,
            v,
            row_key,
            row_value,
            mask,
            self.dropout if self.training else 0.0,
            trust_hint,
            query_offset=0 if trust_hint else None,
            return_lse=need_weights,
            backend=self.backend,
        )
        out, lse = result if isinstance(result, tuple) else (result, None)

        # [N, H, L, D] to the layout of the query, with the heads joined.
        out = out.permute(2, 0, 1, 3) if is_batched and not self.batch_first else out.transpose(1, 2)
        out = self.out_proj(out.flatten(2))
        weights = None
        if lse is not None:
            weights = self._weights(q, k, row_key, mask, lse)
            if average_attn_weights:
                weights = weights.mean(dim=1)
        if not is_batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            expected = f"[L, {self.embed_dim}] or 3-D with {self.embed_dim} features"
            raise ValueError(f"query: expected {expected}, got {list(query.shape)}")
        for name, tensor, features in (("key", key, self.kdim), ("value", value, self.vdim)):
            if tensor.dim() != query.dim() or tensor.shape[-1] != features:
                expected = f"{query.dim()}-D like the query, with {features} features"
                raise ValueError(f"{name}: expected {expected}, got {list(tensor.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"value: expected {[*key.shape[:-1], self.vdim]} to fit the key, got {list(value.shape)}")
        batch_dim = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
            raise ValueError(
                f"key: expected a batch of {query.shape[batch_dim]} in dimension {batch_dim}, like the query, "
                f"got {list(key.shape)}"
            )

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, *, sequence_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The projections of the three, each as a strided view ``[N, H, length, D]``."""
        embed_dim, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        b_q, b_kv = (None, None) if bias is None else bias.split([embed_dim, 2 * embed_dim])
        if weight is not None and key is value:
            # One product for both, but not for the query too: where only the prefix asks for gradients, the query alone
            # is kept, and it must not be a view that keeps keys and values alive.
            w_q, w_kv = weight.split([embed_dim, 2 * embed_dim])
            k, v = F.linear(key, w_kv, b_kv).chunk(2, dim=-1)
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            w_q, w_k, w_v = separate if weight is None else weight.chunk(3)
            b_k, b_v = (None, None) if b_kv is None else b_kv.chunk(2)
            k, v = F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)
        q = F.linear(query, w_q, b_q)
        return (
            split_heads(q, self.num_heads, sequence_first=sequence_first),
            split_heads(k, self.num_heads, sequence_first=sequence_first),
            split_heads(v, self.num_heads, sequence_first=sequence_first),
        )

    def _rows_every_query_sees(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values ``[H, P (+ 1) (+ 1), D]``: the prefix, then ``bias_k``/``bias_v``, then the zero key."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        if self.prefix_key is not None and self.prefix_value is not None:
            keys.append(self.prefix_key)
            values.append(self.prefix_value)
        row = (self.num_heads, 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.view(row))
            values.append(self.bias_v.view(row))
        if self.add_zero_attn:
            zero = self.out_proj.weight.new_zeros(row)
            keys.append(zero)
            values.append(zero)
        if len(keys) < 2:
            return (keys[0], values[0]) if keys else (None, None)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def _weights(self, q: Tensor, k: Tensor, row_key: Tensor | None, mask: Tensor | None, lse: Tensor) -> Tensor:
        """``exp(scores - lse)``, ``[N, H, L, P + S (+ 1) (+ 1)]``, in the dtype of ``q``."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            scaled = q.to(dtype) * self.head_dim**-0.5
            scores = scaled @ k.to(dtype).mT
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
            if row_key is not None:
                row_scores = scaled @ row_key.to(q.dtype).to(dtype).mT
                prefix_scores, extra_scores = row_scores.tensor_split([self.num_prefix_tokens], dim=-1)
                scores = torch.cat([prefix_scores, scores, extra_scores], dim=-1)
            # A query that sees nothing has lse = -inf, and all its scores are -inf too.
            lse = lse.masked_fill(lse == -math.inf, 0.0)
            return torch.exp(scores - lse.unsqueeze(-1)).to(q.dtype)

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention on the nested tensor that ``nn.TransformerEncoder`` makes of a padded batch in eval mode."""
        if query is not key or key is not value or not self.batch_first or query.layout == torch.jagged:
            raise ValueError(
                "query: expected a padded tensor (nested ones only in the strided layout, in self-attention with "
                "batch_first=True), got a nested tensor; pad it and pass key_padding_mask"
            )
        if key_padding_mask is not None or attn_mask is not None:
            raise ValueError("attn_mask, key_padding_mask: expected None with a nested query, got a mask")
        if query.size(0) == 0:
            raise ValueError(f"query: expected rows [L, {self.embed_dim}], got a nested tensor without any")
        lengths = [row.shape[0] for row in query.unbind()]
        padded = nn.utils.rnn.pad_sequence(list(query.unbind()), batch_first=True)
        positions = torch.arange(padded.shape[1], device=padded.device)
        padding = positions >= torch.tensor(lengths, device=padded.device)[:, None]
        out, weights = self.forward(padded, padded, padded, padding, need_weights, None, average_attn_weights)
        rows = [row[:length] for row, length in zip(out.unbind(), lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows), weights

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, num_prefix_tokens={self.num_prefix_tokens}"


def check_head_dim(name: str, width: int, num_heads: int) -> None:
    """Raise ValueError where heads of ``width / num_heads`` features are more than the kernels take."""
    if width // num_heads > MAX_HEAD_DIM:
        raise ValueError(
            f"{name}: expected at most {MAX_HEAD_DIM} features for each of {num_heads} heads, got {width // num_heads}"
        )


def split_heads(x: Tensor, num_heads: int, *, sequence_first: bool) -> Tensor:
    """View ``[S, N, E]`` (``sequence_first``), ``[N, S, E]`` or ``[S, E]`` as ``[N, num_heads, S, E / num_heads]``."""
    heads: Tensor = x.unflatten(-1, (num_heads, -1))
    if heads.dim() == 3:
        heads = heads.unsqueeze(0)
    return heads.permute(1, 2, 0, 3) if sequence_first else heads.transpose(1, 2)


def merge_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The masks of ``torch.nn.MultiheadAttention`` as one for :func:`prefix_kernels.prefix_attention`.

    Args:
        attn_mask: ``[L, S]`` or ``[N * H, L, S]``; True = do not attend, or a float to add.
        key_padding_mask: ``[N, S]``; True = ignore, or a float to add.
        query: ``[N, H, L, D]``.
        key: ``[N, H, S, D]``.

    Returns:
        None, or a mask that broadcasts to ``[N, H, L, S]``: bool with True = attend if all that was given is bool, else
        floats to add. A padding mask alone stays ``[N, 1, 1, S]``.
    """
    batch, heads, q_len, _ = query.shape
    k_len = key.shape[2]
    masks = []
    if attn_mask is not None:
        if attn_mask.shape == (q_len, k_len):
            masks.append(attn_mask[None, None])
        elif attn_mask.shape == (batch * heads, q_len, k_len):
            masks.append(attn_mask.unflatten(0, (batch, heads)))
        else:
            expected = f"[{q_len}, {k_len}] or [{batch * heads}, {q_len}, {k_len}]"
            raise ValueError(f"attn_mask: expected {expected}, got {list(attn_mask.shape)}")
    if key_padding_mask is not None:
        if key_padding_mask.shape != (batch, k_len):
            raise ValueError(f"key_padding_mask: expected [{batch}, {k_len}], got {list(key_padding_mask.shape)}")
        masks.append(key_padding_mask[:, None, None, :])
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{name}: expected bool or floating point, got {mask.dtype}")
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
    added = [_to_added(mask, query.dtype) for mask in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _to_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
