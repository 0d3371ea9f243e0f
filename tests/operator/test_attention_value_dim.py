"""Values whose head dim is not that of queries and keys, as in multi-head latent attention."""

import itertools
import math

import pytest
import torch
from helpers import INPUT_NAMES, LAYOUTS, check, make_call, run

from prefix_kernels import prefix_attention

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Whole vectors of lanes or not, narrower and wider values, the smallest and the largest.
DIMS = [(8, 16), (16, 8), (24, 16), (192, 128), (64, 1), (1, 64), (5, 7), (256, 3), (3, 256), (256, 255)]
SHAPE = dict(q_heads=4, kv_heads=2, q_len=33, k_len=47, prefix_len=20, head_dim=24, value_dim=40)
DECODING = SHAPE | {"q_len": 1, "k_len": 75, "is_causal": True}
SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(INPUT_NAMES, size)]

GENERATOR = torch.Generator().manual_seed(2)
PADDING = torch.ones(2, 1, 1, 47, dtype=torch.bool)
PADDING[0, ..., 30:] = PADDING[1, ..., :9] = False
OPTIONS = {
    "causal": {"is_causal": True},
    "window": {"window_size": (7, 3), "window_includes_prefix": True},
    "padding": {"attn_mask": PADDING, "is_causal": True},
    "mask": {"attn_mask": torch.rand(2, 4, 33, 47, generator=GENERATOR) < 0.6},
    "additive mask": {"attn_mask": torch.randn(33, 67, generator=GENERATOR)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([5])},
    "softcap": {"softcap": 2.0, "scale": 0.3},
    "ids": {"num_prefixes": 3, "prefix_ids": torch.tensor([2, 0])},
    "slots": {
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([[2, 0], [-1, 1]]),
        "prefix_lens": torch.tensor([20, 7, 0]),
    },
    "a prefix for each row": {"num_prefixes": 2},
    "empty prefix": {"prefix_len": 0},
    "no prefix": {"prefix_len": None},
    "prefix alone": {"k_len": 0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, value_dim", DIMS)
def test_every_pair_of_head_dims_in_every_dtype(head_dim, value_dim, dtype):
    result = check(make_call(**SHAPE | {"head_dim": head_dim, "value_dim": value_dim}, dtype=dtype))
    assert result.out.shape == (2, 4, 33, value_dim)
    assert result.out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, value_dim", DIMS)
def test_every_pair_of_head_dims_for_few_queries(head_dim, value_dim, dtype):
    check(make_call(**DECODING | {"head_dim": head_dim, "value_dim": value_dim}, dtype=dtype), needs=())


@pytest.mark.parametrize("value_dim", [16, 40])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, value_dim):
    check(make_call(**SHAPE | {"value_dim": value_dim} | options))


@pytest.mark.parametrize("value_dim", [3, 24, 40])
@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
def test_every_subset_of_gradients(needs, value_dim):
    call = make_call(**SHAPE | {"head_dim": 16, "value_dim": value_dim}, is_causal=True, prefix_dtype=torch.bfloat16)
    check(call, needs=needs)


@pytest.mark.parametrize("needs", [("value",), ("key",), ("query", "value")], ids="+".join)
def test_subsets_without_a_prefix(needs):
    check(make_call(**SHAPE | {"prefix_len": None}), needs=needs)


def test_gradients_when_only_the_lse_has_one():
    inputs = make_call(**SHAPE, layout="contiguous").inputs
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    _, lse = prefix_attention(**leaves, return_lse=True)
    gradients = dict(zip(INPUT_NAMES, torch.autograd.grad(lse.sum(), leaves.values()), strict=True))
    assert all(gradients[name].shape == leaves[name].shape for name in INPUT_NAMES)
    assert not gradients["value"].any() and not gradients["prefix_value"].any() and gradients["key"].any()


@pytest.mark.parametrize("prefix_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_prefix_keeps_its_own_dtype(dtype, prefix_dtype):
    check(make_call(**SHAPE, dtype=dtype, prefix_dtype=prefix_dtype))
    check(make_call(**DECODING, dtype=dtype, prefix_dtype=prefix_dtype), needs=())


@pytest.mark.parametrize("value_dim", [16, 32, 48])
@pytest.mark.parametrize("q_len", [1, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bits(layout, q_len, value_dim):
    shape = SHAPE | {"head_dim": 32, "value_dim": value_dim, "q_len": q_len}
    expected = run(make_call(**shape, layout="contiguous"))
    for name, tensor in check(make_call(**shape, layout=layout)).tensors().items():
        assert torch.equal(tensor, expected.tensors()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim, value_dim", [(64, 24), (24, 64)])
def test_square_causal_problems_of_several_blocks(head_dim, value_dim, dtype):
    shape = dict(batch=1, q_len=300, prefix_len=150, head_dim=head_dim, value_dim=value_dim)
    check(make_call(**shape, dtype=dtype, is_causal=True))


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("head_dim, value_dim", [(8, 40), (40, 8)])
@pytest.mark.parametrize("q_len", [1, 70])
def test_keys_divided_among_threads(q_len, head_dim, value_dim):
    """Partial results of a few tasks: of the forward pass, of queries, of the sequence's and the prefix's keys."""
    shape = dict(batch=1, q_heads=2, kv_heads=1, q_len=q_len, k_len=1500, prefix_len=1300)
    check(make_call(**shape, head_dim=head_dim, value_dim=value_dim))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("head_dim, value_dim", [(8, 40), (40, 8)])
def test_queries_divided_among_threads(head_dim, value_dim):
    check(make_call(batch=1, q_heads=1, q_len=700, k_len=150, prefix_len=20, head_dim=head_dim, value_dim=value_dim))


def test_queries_too_long_for_one_pass_of_the_backward():
    check(make_call(batch=8, q_heads=1, kv_heads=1, q_len=8300, k_len=150, head_dim=8, value_dim=3, is_causal=True))


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "dropout_p": 0.2, "dropout_seed": torch.tensor([5])}])
@pytest.mark.parametrize("head_dim, value_dim", [(3, 5), (8, 2)])
def test_gradcheck(head_dim, value_dim, options):
    shape = dict(q_heads=2, kv_heads=1, q_len=4, k_len=5, prefix_len=2, layout="contiguous", dtype=torch.float64)
    inputs = make_call(**shape, head_dim=head_dim, value_dim=value_dim).inputs
    leaves = [inputs[name].requires_grad_() for name in INPUT_NAMES]
    attention = lambda *x: prefix_attention(*x, **options, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(attention, leaves, check_batched_grad=True)


@pytest.mark.parametrize("batch, q_len, k_len", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (0, 0, 0)])
def test_empty_problems_give_empty_or_zero_results(batch, q_len, k_len):
    result = check(make_call(batch=batch, q_len=q_len, k_len=k_len, prefix_len=0, head_dim=8, value_dim=3))
    assert result.out.shape == (batch, 2, q_len, 3) and not result.out.any()


@pytest.mark.parametrize("value_dim", [16, 40])
@pytest.mark.parametrize("q_len", [1, 33])
def test_a_row_that_sees_nothing_is_zero(q_len, value_dim):
    hidden = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 67)
    result = check(make_call(**SHAPE | {"q_len": q_len, "value_dim": value_dim}, attn_mask=hidden))
    assert not result.out[1].any() and (result.lse[1] == -math.inf).all()


def test_columns_of_the_values_do_not_depend_on_one_another():
    """Attention to wide values is attention to each half of their columns."""
    call = make_call(**SHAPE | {"value_dim": 48}, dtype=torch.float64)
    halves = []
    for half in range(2):
        part = make_call(**SHAPE | {"value_dim": 48}, dtype=torch.float64)
        for name in ("value", "prefix_value"):
            part.inputs[name] = part.inputs[name][..., half * 24 : (half + 1) * 24]
        part.dout = part.dout[..., half * 24 : (half + 1) * 24]
        part.dlse = part.dlse if half == 0 else torch.zeros_like(part.dlse)
        halves.append(run(part))
    whole = run(call)
    torch.testing.assert_close(whole.out, torch.cat([each.out for each in halves], dim=-1))
    for name in ("value", "prefix_value"):
        torch.testing.assert_close(whole.grads[name], torch.cat([each.grads[name] for each in halves], dim=-1))
    for name in ("query", "key", "prefix_key"):
        torch.testing.assert_close(whole.grads[name], halves[0].grads[name] + halves[1].grads[name])
