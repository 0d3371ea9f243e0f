"""``extend_`` by the CUDA kernels in the emulator against the oracle: prefixes added to attention over the sequence."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from emulated import emulated_extend_, emulated_prefix_attention, load
from extended import DTYPES, SIZES, extended
from helpers import Result, check, lay_out, make_call

from prefix_kernels import prefix_attention

# 16-bit types go to the tensor core kernels, which take 128 rows to a block where that keeps every multiprocessor at
# work, else 64; the others to the kernels of one warp per row.
HALF, FULL = [torch.float16, torch.bfloat16], [torch.float32, torch.float64]
FEW, MANY = 1, 1000
# Batch rows of two prefixes and of one that is empty.
BANK: dict[str, Any] = {
    "prefix_len": 20,
    "num_prefixes": 3,
    "prefix_ids": torch.tensor([[2, 0], [-1, 1]]),
    "prefix_lens": torch.tensor([20, 0, 13]),
}


@pytest.fixture(autouse=True)
def usual_device() -> None:
    load().device(80, MANY)


@pytest.fixture(params=[FEW, MANY], ids=["sm1", "sm1000"])
def multiprocessors(usual_device: None, request: pytest.FixtureRequest) -> None:
    load().device(80, request.param)


def check_extended(mode: str = "fast", seed: int = 0, out_layout: str | None = None, **shape: Any) -> Result:
    call = make_call(**dict(dtype=torch.float16, layout="aligned", with_dlse=False) | shape)
    extend_ = partial(emulated_extend_, mode=mode, seed=seed)
    return check(call, needs=(), function=partial(extended, extend_=extend_, out_layout=out_layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_the_result_is_that_of_one_call(name: str, dtype: torch.dtype) -> None:
    check_extended(**{"layout": "poisoned"} | SIZES[name], dtype=dtype, prefix_dtype=DTYPES[dtype])


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("out_layout", ["contiguous", "aligned", "poisoned"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 250, 256])
def test_every_head_dim_and_layout_of_out(head_dim: int, dtype: torch.dtype, out_layout: str) -> None:
    """Sequences of which the first queries see nothing, and a last block of rows that is not full."""
    shape = {"batch": 1, "q_len": 67, "k_len": 9, "head_dim": head_dim, "dtype": dtype, "out_layout": out_layout}
    check_extended(**shape, prefix_len=70, is_causal=True)
    check_extended(**shape, prefix_len=20, scale=-0.3)


@pytest.mark.parametrize("out_layout", ["aligned", "poisoned"])
@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_every_head_dim_of_float32(head_dim: int, dtype: torch.dtype, out_layout: str) -> None:
    shape = {"batch": 1, "q_len": 19, "k_len": 9, "head_dim": head_dim, "dtype": dtype, "out_layout": out_layout}
    check_extended(**shape, prefix_len=40, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim, value_dim", [(8, 16), (40, 20), (192, 128), (64, 1), (3, 96), (100, 256)])
def test_values_with_a_head_dim_of_their_own(head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    shape = {"q_heads": 4, "kv_heads": 2, "q_len": 35, "k_len": 20, "prefix_len": 20, "dtype": dtype}
    check_extended(**shape, head_dim=head_dim, value_dim=value_dim)


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("q_len", [1, 5, 19, 150])
@pytest.mark.parametrize("group", [3, 8])
def test_heads_that_share_keys_share_a_tile(group: int, q_len: int) -> None:
    heads = {"q_heads": 2 * group, "kv_heads": 2, "q_len": q_len, "k_len": 30, "head_dim": 64}
    check_extended(**heads, prefix_len=20)
    check_extended(**heads, **BANK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [3.0, 1e-3, 0.0, -0.3, 1e-40, -1e-40])
def test_every_scale(scale: float, dtype: torch.dtype) -> None:
    check_extended(q_len=40, prefix_len=20, dtype=dtype, scale=scale)


@pytest.mark.parametrize("dtype", HALF + FULL, ids=str)
@pytest.mark.parametrize("larger", ["key", "prefix_key"])
def test_one_part_may_outweigh_the_other(larger: str, dtype: torch.dtype) -> None:
    """The maximum that the softmax begins with stays, or shrinks what was there to nothing."""
    call = make_call(q_len=40, k_len=30, prefix_len=20, dtype=dtype, layout="aligned", with_dlse=False)
    call.inputs[larger] *= 20
    check(call, needs=(), function=partial(extended, extend_=emulated_extend_))


@pytest.mark.parametrize("dtype", HALF + FULL, ids=str)
@pytest.mark.parametrize("prefix_len", [20, 0])
@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_rows_that_saw_nothing_before_hold_nothing(infinity: float, prefix_len: int, dtype: torch.dtype) -> None:
    query, key, value, *prefix = make_call(q_len=40, prefix_len=prefix_len, dtype=dtype).inputs.values()
    out, lse = prefix_attention(query, key, value, return_lse=True)
    before = out.clone(), lse.clone()
    out[:, 1, 3:30], lse[:, 1, 3:30] = math.nan, infinity
    emulated_extend_(query, out, lse, *prefix, None, None, None)
    alone = emulated_prefix_attention(query, key[:, :, :0], value[:, :, :0], *prefix, return_lse=True)
    for got, of_prefix, of_sequence in zip((out, lse), alone, before, strict=True):
        assert torch.equal(got[:, 1, 3:30], of_prefix[:, 1, 3:30])
        assert torch.allclose(got[:, 0], of_sequence[:, 0], rtol=1e-6) == (prefix_len == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["aligned", "poisoned"])
def test_nothing_beside_out_is_written(layout: str, dtype: torch.dtype) -> None:
    query, key, value, *prefix = make_call(q_len=40, value_dim=24, dtype=dtype).inputs.values()
    out, lse = prefix_attention(query, key, value, return_lse=True)
    around = (out := lay_out(out, layout))._base
    emulated_extend_(query, out, lse, *prefix, None, None, None)
    assert out.isfinite().all()
    assert around.isnan().sum() == around.numel() - out.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("architecture", [80, 86, 90])
def test_few_queries_of_a_long_prefix_keep_what_was_there(architecture: int, dtype: torch.dtype) -> None:
    """A call that the decode kernel would serve, which does not extend."""
    load().device(architecture, MANY)
    check_extended(batch=3, q_heads=4, kv_heads=1, q_len=1, k_len=50, prefix_len=600, head_dim=64, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_prefixes_added_one_by_one_are_those_of_one_call(dtype: torch.dtype) -> None:
    query, key, value, *prefix = make_call(q_len=40, prefix_len=50, dtype=dtype).inputs.values()
    out, lse = prefix_attention(query, key, value, return_lse=True)
    for part in (slice(0, 20), slice(20, 50)):
        emulated_extend_(query, out, lse, *(each[:, part] for each in prefix), None, None, None)
    expected, expected_lse = emulated_prefix_attention(query, key, value, *prefix, return_lse=True)
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("batch, q_len", [(0, 17), (2, 0)])
def test_a_call_without_queries_does_nothing(batch: int, q_len: int) -> None:
    query, key, value, *prefix = make_call(batch=batch, q_len=q_len, dtype=torch.float16).inputs.values()
    out, lse = prefix_attention(query, key, value, return_lse=True)
    emulated_extend_(query, out, lse, *prefix, None, None, None)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    query, key, value, *prefix = make_call(dtype=torch.float16).inputs.values()
    out, lse = prefix_attention(query, key, value, return_lse=True)
    with pytest.raises(TypeError, match="out: expected Half, got Float"):
        emulated_extend_(query, out.float(), lse, *prefix, None, None, None)


CHECKED: dict[str, dict[str, Any]] = {
    "plain": {"q_len": 70, "k_len": 20, "prefix_len": 20, "is_causal": True, "head_dim": 64},
    "packed heads": {"q_len": 9, "q_heads": 6, "kv_heads": 2, "k_len": 20, **BANK},
    "unaligned": {"q_len": 33, "layout": "poisoned", "out_layout": "poisoned", "head_dim": 40},
    "values, negative scale": {"q_len": 33, "head_dim": 24, "value_dim": 96, "scale": -0.3, "out_layout": "aligned"},
    "head dim 256": {"q_len": 17, "head_dim": 256, "dtype": torch.bfloat16},
    "no prefix rows": {"q_len": 40, "prefix_len": 0, "is_causal": True, "query_offset": -9},
    "float32": {"q_len": 9, "k_len": 5, "dtype": torch.float32, "out_layout": "poisoned", **BANK},
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", CHECKED.values(), ids=CHECKED)
def test_check_mode_finds_nothing(shape: dict[str, Any], seed: int) -> None:
    load("check").device(80, FEW if seed == 1 else MANY)
    check_extended(mode="check", seed=seed, **shape)
