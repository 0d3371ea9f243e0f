"""The CUDA kernels in the emulator with values whose head dim is not that of queries and keys, against the oracle."""

from functools import partial

import pytest
import torch
from emulated import emulated_prefix_attention, load
from helpers import check, make_call, run

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# Both in one tile size, in two, aligned to chunks of eight elements or not, the smallest and the largest.
DIMS = [(8, 16), (24, 16), (40, 20), (20, 40), (192, 128), (64, 1), (3, 96), (256, 3), (100, 256)]
FEW, MANY = 1, 1000
SEED = torch.tensor([5])
PADDING = torch.arange(75) < torch.tensor([40, 75])[:, None, None, None]
OPTIONS = {
    "causal": {"is_causal": True},
    "all at once": {
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([[2, 0], [-1, 1]]),
        "prefix_lens": torch.tensor([20, 0, 13]),
        "attn_mask": PADDING,
        "is_causal": True,
        "window_size": (60, 2),
        "window_includes_prefix": True,
        "softcap": 3.0,
        "dropout_p": 0.2,
        "dropout_seed": SEED,
    },
}


@pytest.fixture(params=[FEW, MANY], ids=["sm1", "sm1000"])
def multiprocessors(request):
    """Blocks of many rows and of few; prefixes whose visits one block makes or several."""
    load().device(80, request.param)
    yield
    load().device(80, 4)


def value_dim_call(head_dim, value_dim, **shape):
    defaults = dict(q_heads=4, kv_heads=2, q_len=35, k_len=75, prefix_len=20, dtype=torch.float16, layout="aligned")
    return make_call(**defaults | dict(head_dim=head_dim, value_dim=value_dim) | shape)


check_emulated = partial(check, function=emulated_prefix_attention)


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("head_dim, value_dim", DIMS)
def test_every_pair_of_head_dims(head_dim, value_dim, option):
    check_emulated(value_dim_call(head_dim, value_dim, **OPTIONS[option]))
    check_emulated(value_dim_call(head_dim, value_dim, q_len=2, **OPTIONS[option]), needs=())


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "poisoned"])
@pytest.mark.parametrize("head_dim, value_dim", [(40, 20), (32, 64), (192, 128)])
def test_every_layout(head_dim, value_dim, layout):
    shape = dict(layout=layout, dtype=torch.bfloat16)
    check_emulated(value_dim_call(head_dim, value_dim, **shape))
    check_emulated(value_dim_call(head_dim, value_dim, q_len=2, **shape), needs=())


@pytest.mark.parametrize("prefix_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim, value_dim", [(24, 64), (64, 20)])
def test_a_prefix_of_another_dtype(head_dim, value_dim, prefix_dtype):
    shape = dict(prefix_dtype=prefix_dtype, prefix_len=70, k_len=20)
    check_emulated(value_dim_call(head_dim, value_dim, **shape))
    check_emulated(value_dim_call(head_dim, value_dim, q_len=2, **shape), needs=())


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize(
    "needs",
    [("prefix_value",), ("prefix_key", "prefix_value"), ("value",), ("key", "value"), ("query",), ("query", "value")],
    ids="+".join,
)
@pytest.mark.parametrize("head_dim, value_dim", [(24, 64), (192, 128)])
def test_sets_of_gradients(head_dim, value_dim, needs):
    check_emulated(value_dim_call(head_dim, value_dim), needs=needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("head_dim, value_dim", [(8, 16), (40, 5), (3, 256)])
def test_wide_types(head_dim, value_dim, option, dtype):
    shape = dict(dtype=dtype, layout="poisoned", q_heads=2, q_len=9)
    check_emulated(value_dim_call(head_dim, value_dim, **shape, **OPTIONS[option]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["aligned", "poisoned"])
@pytest.mark.parametrize("head_dim, value_dim", [(24, 64), (64, 24)])
def test_no_races_or_stray_accesses(head_dim, value_dim, layout, dtype):
    shape = dict(layout=layout, dtype=dtype, prefix_len=17, k_len=33)
    in_check_mode = partial(emulated_prefix_attention, mode="check", seed=3)
    check(value_dim_call(head_dim, value_dim, q_len=9, **shape), function=in_check_mode)
    if dtype == torch.float16:
        check(value_dim_call(head_dim, value_dim, q_len=2, **shape), needs=(), function=in_check_mode)


def test_gradients_repeat_bit_for_bit():
    call = value_dim_call(24, 64, **OPTIONS["all at once"])
    expected = run(call, emulated_prefix_attention).tensors()
    for name, tensor in run(call, partial(emulated_prefix_attention, seed=2)).tensors().items():
        assert torch.equal(tensor, expected[name]), name
