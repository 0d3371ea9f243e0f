"""The mask of a call whose scores have a position bias."""

from __future__ import annotations

from torch import Tensor

from prefix_kernels.integrations.transformers.attention.call import AttentionCall
from prefix_kernels.integrations.transformers.runtime.relative_bias import biased_mask, position_bias_of


def with_position_bias(call: AttentionCall, visible: Tensor | None, k_len: int) -> Tensor | None:
    """Return the mask ``visible``, plus the call's position bias if it has one; then with columns for the prefix.

    Raises:
        ValueError: the prefix is to have the bias of positions before the sequence, and how to make it is not known.
    """
    bias = position_bias_of(call.module, call.position_bias)
    if bias is None:
        return visible
    site = None if call.prefixes is None else call.prefixes.site_of(call.module)
    if call.prefixes is None or call.prefixes.bias is None:
        if site is not None and call.prefixes is not None and call.prefixes.counts_positions:
            raise ValueError(
                f"position_offset: expected 'none', because the position bias that {type(call.module).__name__} would "
                "have for positions before the sequence is not known, got 'peft'"
            )
        return biased_mask(bias, visible, k_len)
    prefix_len = 0 if site is None else call.prefixes.pairs[site][0].shape[-2]
    return call.prefixes.bias.mask(bias, call.attention_mask, visible, k_len, prefix_len, call.module)
