"""The benchmark's baselines compute what is compared: prefix attention and its gradients."""

import pytest
import torch
from baselines import cat_sdpa, cat_sdpa_causal_bias, causal_mask, merged_sdpa
from helpers import INPUT_NAMES, check, make_call

from prefix_kernels.reference import prefix_attention_reference

BASELINES = {
    "cat_sdpa": (False, lambda *inputs: cat_sdpa(*inputs)),
    "cat_sdpa causal": (True, lambda *inputs: cat_sdpa(*inputs, causal_mask(40, 40, 7))),
    "cat_sdpa_causal_bias": (True, lambda *inputs: cat_sdpa_causal_bias(*inputs)),
    "merged_sdpa": (False, lambda *inputs: merged_sdpa(*inputs)),
    "merged_sdpa causal": (True, lambda *inputs: merged_sdpa(*inputs, is_causal=True)),
}


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", [INPUT_NAMES, ("prefix_key", "prefix_value")], ids=["all", "prefix"])
@pytest.mark.parametrize("name", BASELINES)
def test_baseline_computes_prefix_attention(name, needs, dtype, layout):
    is_causal, baseline = BASELINES[name]
    shape = dict(q_heads=3, q_len=40, prefix_len=7, head_dim=32)
    call = make_call(**shape, dtype=dtype, is_causal=is_causal, layout=layout, with_dlse=False)

    def with_lse(query, key, value, prefix_key, prefix_value, **options):
        inputs = query, key, value, prefix_key, prefix_value
        return baseline(*inputs), prefix_attention_reference(*inputs, **options)[1].detach()

    check(call, needs=needs, function=with_lse)
