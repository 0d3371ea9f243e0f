"""The benchmark's baselines compute what is compared: prefix attention and its gradients."""

import pytest
import torch
from helpers import INPUT_NAMES, check, make_call

from benchmarks.common.baselines import (
    cat_sdpa,
    cat_sdpa_causal_bias,
    causal_mask,
    matmul_decode,
    merged_decode,
    merged_float32,
    merged_kernels,
    merged_sdpa,
    padding_mask,
)
from prefix_kernels.reference import prefix_attention_reference

LENGTHS = [40, 23, 1]
# Whether the call is causal, and the baseline.
BASELINES = {
    "cat_sdpa": (False, lambda *inputs: cat_sdpa(*inputs)),
    "cat_sdpa causal": (True, lambda *inputs: cat_sdpa(*inputs, causal_mask(40, 40, 7))),
    "cat_sdpa_causal_bias": (True, lambda *inputs: cat_sdpa_causal_bias(*inputs)),
    "merged_sdpa": (False, lambda *inputs: merged_sdpa(*inputs)),
    "merged_sdpa causal": (True, lambda *inputs: merged_sdpa(*inputs, is_causal=True)),
    "merged_kernels": (False, lambda *inputs: merged_kernels(*inputs)),
    "merged_kernels causal": (True, lambda *inputs: merged_kernels(*inputs, is_causal=True)),
    "merged_float32": (False, lambda *inputs: merged_float32(*inputs)),
    "merged_float32 causal": (True, lambda *inputs: merged_float32(*inputs, is_causal=True)),
}
DECODING = {"cat_sdpa": cat_sdpa, "merged_decode": merged_decode, "matmul_decode": matmul_decode}


def check_baseline(baseline, call, needs):
    def with_lse(query, key, value, prefix_key, prefix_value, **options):
        inputs = query, key, value, prefix_key, prefix_value
        return baseline(*inputs), prefix_attention_reference(*inputs, **options)[1].detach()

    check(call, needs=needs, function=with_lse)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("needs", [INPUT_NAMES, ("prefix_key", "prefix_value")], ids=["all", "prefix"])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)], ids=["3/3", "6/2"])
@pytest.mark.parametrize("name", BASELINES)
def test_baseline_computes_prefix_attention(name, heads, needs, dtype, layout):
    is_causal, baseline = BASELINES[name]
    shape = dict(zip(("q_heads", "kv_heads"), heads, strict=True), q_len=40, prefix_len=7, head_dim=32)
    call = make_call(**shape, dtype=dtype, is_causal=is_causal, layout=layout, with_dlse=False)
    check_baseline(baseline, call, needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)], ids=["3/3", "6/2"])
@pytest.mark.parametrize("name", DECODING)
def test_baseline_of_decoding_computes_prefix_attention(name, heads, dtype):
    shape = dict(zip(("q_heads", "kv_heads"), heads, strict=True), q_len=1, k_len=40, prefix_len=7, head_dim=32)
    check_baseline(DECODING[name], make_call(**shape, dtype=dtype, is_causal=True, with_dlse=False), needs=())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q_heads", [2, 4])
def test_baseline_with_padding_computes_prefix_attention(q_heads, dtype):
    mask = padding_mask(LENGTHS, 40, 7)
    shape = dict(batch=len(LENGTHS), q_heads=q_heads, kv_heads=2, q_len=40, prefix_len=7, head_dim=32)
    call = make_call(**shape, dtype=dtype, attn_mask=mask, with_dlse=False)
    check_baseline(lambda *inputs: cat_sdpa(*inputs, mask), call, INPUT_NAMES)


def test_the_padding_mask_shows_the_prefix_and_the_keys_of_each_row():
    mask = padding_mask([3, 1], 4, 2)
    assert mask.shape == (2, 1, 1, 6)
    assert mask[:, 0, 0].int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
