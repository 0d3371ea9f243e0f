"""Every dtype, head dimension and length, at and around the edges of the kernels' blocks."""

import pytest
import torch
from helpers import LAYOUTS, check, make_call, run

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BLOCK_EDGES = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 16, 32, 33, 64, 80, 96, 100, 128, 192, 255, 256])
def test_every_head_dim_in_every_dtype(head_dim, dtype):
    check(make_call(q_len=21, k_len=37, prefix_len=5, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix_len", [0, 1, 15, 16, 17, 20, 127, 128, 129, 300])
def test_every_prefix_length(prefix_len, dtype, is_causal):
    check(make_call(q_len=33, k_len=40, prefix_len=prefix_len, head_dim=32, dtype=dtype, is_causal=is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("k_len", [0, *BLOCK_EDGES])
def test_every_key_length(k_len, is_causal):
    check(make_call(q_len=19, k_len=k_len, prefix_len=20, head_dim=32, is_causal=is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [0, *BLOCK_EDGES])
def test_every_query_length(q_len, dtype, is_causal):
    check(make_call(batch=1, q_len=q_len, k_len=47, prefix_len=20, head_dim=32, dtype=dtype, is_causal=is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [128, 160, 257, 513])
def test_square_problems_of_several_blocks(length, dtype, is_causal):
    check(make_call(batch=1, q_len=length, prefix_len=20, head_dim=64, dtype=dtype, is_causal=is_causal))


@pytest.mark.parametrize("k_len", [40, 150])
def test_queries_too_long_for_one_pass_of_the_backward(k_len):
    # More than 128 blocks of 64 queries for each of enough heads to occupy the threads.
    check(make_call(batch=8, q_heads=1, kv_heads=1, q_len=8300, k_len=k_len, prefix_len=5, head_dim=8, is_causal=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_heads, kv_heads", [(1, 1), (4, 2), (6, 2), (8, 1), (5, 5)])
def test_grouped_heads(q_heads, kv_heads, dtype):
    check(make_call(q_heads=q_heads, kv_heads=kv_heads, q_len=35, k_len=50, prefix_len=7, head_dim=32, dtype=dtype))


@pytest.mark.parametrize("prefix_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefix_keeps_its_own_dtype(dtype, prefix_dtype):
    call = make_call(
        q_heads=4, kv_heads=2, q_len=30, k_len=40, prefix_len=20, head_dim=32, dtype=dtype, prefix_dtype=prefix_dtype
    )
    result = check(call)
    assert result.grads["prefix_key"].dtype == result.grads["prefix_value"].dtype == prefix_dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_plain_attention_without_a_prefix(is_causal, dtype):
    check(
        make_call(
            q_heads=4, kv_heads=2, q_len=70, k_len=90, prefix_len=None, head_dim=32, dtype=dtype, is_causal=is_causal
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix_len", [1, 20, 700])
def test_attention_to_the_prefix_alone(prefix_len, dtype):
    check(make_call(q_heads=4, kv_heads=2, q_len=18, k_len=0, prefix_len=prefix_len, head_dim=32, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k_len", [1, 33, 500])
def test_decoding_one_query_with_four_query_heads_per_key_head(k_len, dtype):
    check(
        make_call(q_heads=8, kv_heads=2, q_len=1, k_len=k_len, prefix_len=20, head_dim=64, dtype=dtype, is_causal=True)
    )


def test_a_long_prefix_and_a_short_sequence():
    check(make_call(batch=3, q_len=9, k_len=11, prefix_len=2050, head_dim=32))


@pytest.mark.parametrize("prefix_len", [None, 0, 5])
@pytest.mark.parametrize("batch, q_len, k_len", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (0, 0, 0)])
def test_empty_problems_give_empty_or_zero_results(batch, q_len, k_len, prefix_len):
    check(make_call(batch=batch, q_len=q_len, k_len=k_len, prefix_len=prefix_len))


def test_no_key_at_all_gives_zero_and_minus_infinity():
    result = check(make_call(k_len=0, prefix_len=0))
    assert torch.equal(result.out, torch.zeros_like(result.out))
    assert torch.equal(result.lse, torch.full_like(result.lse, -torch.inf))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_layout_gives_the_same_bits(layout, dtype, is_causal):
    """Contiguous inputs, ``[B, S, H, D]`` seen through a transpose, and slices of tensors full of NaN."""
    shape = dict(
        q_heads=4, kv_heads=2, q_len=70, k_len=75, prefix_len=20, head_dim=40, dtype=dtype, is_causal=is_causal
    )
    expected = run(make_call(**shape, layout="contiguous"))
    for name, tensor in check(make_call(**shape, layout=layout)).tensors().items():
        assert torch.equal(tensor, expected.tensors()[name]), name


@pytest.mark.parametrize("scale", [None, 0.0, 1.0, 0.03, -0.5])
def test_scale(scale):
    check(make_call(q_len=33, k_len=40, scale=scale))


def test_large_scores_do_not_overflow():
    call = make_call(q_len=33, k_len=140, head_dim=32)
    call.inputs["query"] *= 300
    result = run(call)
    assert all(tensor.isfinite().all() for tensor in result.tensors().values())
    top = run(make_call(q_len=33, k_len=140, head_dim=32, scale=300 * 32**-0.5))
    torch.testing.assert_close(result.out, top.out, rtol=1e-3, atol=1e-3)
