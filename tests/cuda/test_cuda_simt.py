"""The float32 and float64 CUDA kernels in the emulator against the oracle: every option, every edge, every gradient."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from emulated import emulated_prefix_attention, load
from helpers import check, make_call, run

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = [torch.float64, torch.float32]
EDGES = [0, 1, 15, 16, 17, 20, 31, 32, 33, 65]
NEEDS = {
    "prefix value": ("prefix_value",),
    "prefix key": ("prefix_key",),
    "prefix": ("prefix_key", "prefix_value"),
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "without query": ("key", "value", "prefix_key", "prefix_value"),
    "without key and value": ("query", "prefix_key", "prefix_value"),
    "none": (),
}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (7, 3)},
    "window over the prefix": {"window_size": (20, 0), "window_includes_prefix": True},
    "offset": {"is_causal": True, "query_offset": -4},
    "offsets": {"is_causal": True, "query_offset": torch.tensor([3, -20], dtype=torch.int32)},
    "scale": {"scale": -0.3},
    "softcap": {"softcap": 1.5},
    "padding": {"attn_mask": torch.arange(40)[None, None, None] < torch.tensor([29, 40])[:, None, None, None]},
    "bool mask": {"attn_mask": torch.rand(2, 4, 35, 40) < 0.6},
    "mask of a row that sees nothing": {"attn_mask": torch.rand(35, 1) < 0.7},
    "additive mask": {"attn_mask": torch.randn(4, 35, 40, dtype=torch.float16)},
    "mask over the prefix": {"attn_mask": torch.randn(2, 1, 1, 45).masked_fill(torch.rand(45) < 0.3, -torch.inf)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([-5])},
    "everything dropped": {"dropout_p": 1.0, "dropout_seed": torch.tensor([1])},
    "bank": {"num_prefixes": 3, "prefix_ids": torch.tensor([2, -1]), "prefix_lens": torch.tensor([5, 3, 4])},
    "composed bank": {"num_prefixes": 3, "prefix_ids": torch.tensor([[2, 0, 2], [-1, 1, 1]], dtype=torch.int32)},
    "one prefix for each row": {"num_prefixes": 2},
    "all at once": {
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([[2, 0], [-1, 1]]),
        "prefix_lens": torch.tensor([5, 0, 3]),
        "attn_mask": torch.randn(2, 4, 35, 50),
        "is_causal": True,
        "window_size": (9, 2),
        "window_includes_prefix": True,
        "softcap": 3.0,
        "dropout_p": 0.2,
        "dropout_seed": torch.tensor([9]),
    },
}


def option_call(name, **shape):
    return make_call(
        **dict(q_heads=4, kv_heads=2, q_len=35, k_len=40, prefix_len=5, head_dim=24) | shape, **OPTIONS[name]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option, dtype):
    check(option_call(option, dtype=dtype), function=emulated_prefix_attention)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("option", ["plain", "causal", "composed bank", "all at once"])
def test_no_races_or_stray_accesses(option, seed):
    call = option_call(option, q_len=9, k_len=10, head_dim=20) if option != "all at once" else option_call(option)
    check(call, function=partial(emulated_prefix_attention, mode="check", seed=seed))


@contextmanager
def several_rows_per_warp(mode):
    """Grids so small that a warp takes rows of all heads and batch rows, one after another."""
    load(mode).device(80, 4, max_grid_yz=1)
    try:
        yield
    finally:
        load(mode).device(80, 4)


SEVERAL_ROWS = {
    "plain": {},
    "last columns hidden": {"attn_mask": (torch.arange(40) < 32).expand(9, 40)},
    "last columns hidden from a query": {"attn_mask": (torch.arange(40) < 32) | (torch.arange(9)[:, None] % 2 == 0)},
    "queries that see nothing": {"attn_mask": (torch.arange(9)[:, None] % 2 == 0).expand(9, 45)},
    "causal": {"is_causal": True, "query_offset": -4},
    "composed bank": OPTIONS["composed bank"],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", SEVERAL_ROWS)
def test_several_rows_per_warp(option, dtype):
    shape = dict(q_heads=4, kv_heads=2, q_len=9, k_len=40, head_dim=20, dtype=dtype)
    with several_rows_per_warp("fast"):
        check(make_call(**shape, **SEVERAL_ROWS[option]), function=emulated_prefix_attention)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("option", SEVERAL_ROWS)
def test_no_races_between_the_rows_of_a_warp(option, seed):
    call = make_call(q_heads=4, kv_heads=2, q_len=9, k_len=40, head_dim=20, **SEVERAL_ROWS[option])
    with several_rows_per_warp("check"):
        check(call, function=partial(emulated_prefix_attention, mode="check", seed=seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 31, 32, 33, 100, 255, 256])
def test_every_head_dim(head_dim, dtype):
    check(make_call(q_len=5, k_len=7, head_dim=head_dim, dtype=dtype), function=emulated_prefix_attention)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("prefix_len", EDGES)
def test_every_prefix_length(prefix_len, is_causal):
    check(make_call(q_len=18, prefix_len=prefix_len, is_causal=is_causal), function=emulated_prefix_attention)


@pytest.mark.parametrize("q_len", EDGES)
@pytest.mark.parametrize("k_len", EDGES)
def test_every_pair_of_lengths(q_len, k_len):
    call = make_call(batch=1, q_len=q_len, k_len=k_len, head_dim=8, is_causal=True)
    check(call, function=emulated_prefix_attention)


@pytest.mark.parametrize("prefix_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefix_keeps_its_own_dtype(dtype, prefix_dtype):
    call = make_call(prefix_len=20, dtype=dtype, prefix_dtype=prefix_dtype)
    result = check(call, function=emulated_prefix_attention)
    assert result.grads["prefix_key"].dtype == prefix_dtype


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_other_layouts(layout):
    check(make_call(q_heads=4, kv_heads=2, layout=layout), function=emulated_prefix_attention)


@pytest.mark.parametrize(
    "shape", [{"prefix_len": None}, {"k_len": 0}, {"k_len": 0, "prefix_len": 0}, {"batch": 0}], ids=str
)
def test_nothing_to_see(shape):
    check(make_call(**shape), function=emulated_prefix_attention)


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_only_the_gradients_that_are_asked_for(needs):
    check(option_call("causal"), needs, function=emulated_prefix_attention)


def test_gradcheck():
    call = option_call("all at once", q_len=5, k_len=6, head_dim=3, dtype=torch.float64, layout="contiguous")
    call.options["attn_mask"] = torch.randn(2, 4, 5, 16, dtype=torch.float64)
    leaves = [tensor.nan_to_num().requires_grad_() for tensor in call.inputs.values()]

    def function(*inputs):
        return emulated_prefix_attention(*inputs, **call.options, return_lse=True)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_same_call_same_bits():
    call = option_call("all at once")
    first = run(call, emulated_prefix_attention).tensors()
    for name, tensor in run(call, partial(emulated_prefix_attention, seed=3)).tensors().items():
        assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prefix_ids": torch.tensor([0, 3])}, "prefix_ids: expected values from -1 to 2, got 3 at flat index 1"),
        ({"prefix_ids": torch.tensor([-2, 0])}, "prefix_ids: expected values from -1 to 2, got -2 at flat index 0"),
        (
            {"prefix_ids": torch.tensor([0, 1]), "prefix_lens": torch.tensor([1, 6, 2])},
            "prefix_lens: expected values from 0 to 5, got 6 at flat index 1",
        ),
    ],
    ids=["id too large", "id too small", "length"],
)
def test_integers_out_of_range_are_refused_on_the_device(options, expected, capfd):
    prefix = torch.randn(3, 2, 5, 16)
    query = torch.randn(2, 2, 4, 16)
    with pytest.raises(RuntimeError):
        emulated_prefix_attention(query, query, query, prefix, prefix, **options)
    # What a kernel prints stands in the buffer of the C library.
    load().emulator.fflush(None)
    assert f"prefix_attention: {expected}" in capfd.readouterr().out


@pytest.mark.parametrize("architecture", [75, 61])
def test_an_older_gpu_gets_a_clear_error(architecture):
    library = load()
    library.device(architecture, 4)
    try:
        with pytest.raises(RuntimeError, match=rf"has compute capability {architecture / 10}, .* need 8.0 or later"):
            emulated_prefix_attention(*[torch.randn(1, 1, 2, 8)] * 3)
    finally:
        library.device(80, 4)


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 120])
def test_later_gpus_run_what_was_compiled(architecture):
    library = load()
    library.device(architecture, 4)
    try:
        emulated_prefix_attention(*[torch.randn(1, 1, 2, 8)] * 3)
    finally:
        library.device(80, 4)
