"""The mask of a call whose scores have a position bias."""

from __future__ import annotations

from torch import Tensor

from prefix_kernels.integrations.transformers.attention.call import AttentionCall
from prefix_kernels.integrations.transformers.runtime.relative_bias import biased_mask, position_bias_of


def with_position_bias(call: AttentionCall, visible: Tensor | None, k_len: int) -> Tensor | None:
    """``visible``, or with a position bias the mask of both, which may have columns for the prefix."""
    bias = position_bias_of(call.module, call.position_bias)
    if bias is None:
        return visible
    if call.prefixes is None or call.prefixes.bias is None:
        return biased_mask(bias, visible, k_len)
    site = call.prefixes.site_of(call.module)
    prefix_len = 0 if site is None else call.prefixes.pairs[site][0].shape[-2]
    return call.prefixes.bias.mask(bias, call.attention_mask, visible, k_len, prefix_len)
