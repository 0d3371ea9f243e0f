"""The oracle for models with a prefix: the model's own masks and positions, attention written out with torch.cat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "eager_prefix_of_the_tests"
Pairs = Sequence[tuple[Tensor, Tensor]]


@contextmanager
def eager_prefix(model: PreTrainedModel, prefixes: dict[nn.Module, Pairs]) -> Iterator[None]:
    """While it is open, the plain ``model`` attends to ``prefixes`` too.

    Args:
        prefixes: by attention module, the ``(prefix_key, prefix_value)`` ``[Hkv, P, D]`` of its first, second, ... call
            in a forward pass (most are called once; the layers of ALBERT share a module). They are always visible.
    """
    calls: Counter[nn.Module] = Counter()

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        position_bias: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        scores_mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
        if attention_mask is not None:
            scores_mask = scores_mask.masked_fill(~attention_mask, -torch.inf)
        if position_bias is not None:
            scores_mask = scores_mask + position_bias
        if module in prefixes:
            pairs = prefixes[module]
            prefix_key, prefix_value = (
                tensor.to(key.dtype).expand(key.shape[0], -1, -1, -1) for tensor in pairs[calls[module] % len(pairs)]
            )
            calls[module] += 1
            key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
            scores_mask = F.pad(scores_mask, (prefix_key.shape[2], 0))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # Rows of padding see nothing, or only the prefix: what they give is not looked at, but must not be NaN.
        weights = torch.softmax(scores + scores_mask, dim=-1).nan_to_num(0.0)
        return (weights @ value).transpose(1, 2), None

    def mask(**kwargs: object) -> Tensor | None:
        return sdpa_mask(**(kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}))

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
