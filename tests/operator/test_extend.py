"""``extend_``: the prefixes added to attention over the sequence that is there already."""

from __future__ import annotations

import math

import pytest
import torch
from extended import DTYPES, SIZES, extended
from helpers import Call, assert_matches, make_call, run
from torch import Tensor

from prefix_kernels import prefix_attention
from prefix_kernels.reference import prefix_attention_reference

extend_ = torch.ops.prefix_kernels.extend_


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_the_result_is_that_of_one_call(name: str, dtype: torch.dtype) -> None:
    call = make_call(**SIZES[name], dtype=dtype, prefix_dtype=DTYPES[dtype])
    exact = run(call, prefix_attention_reference, torch.float64, needs=())
    eager = run(call, prefix_attention_reference, torch.float32, needs=())
    assert_matches(run(call, extended, needs=()), exact, eager, call)


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
@pytest.mark.parametrize("prefix_len", [3, 0])
def test_rows_that_saw_nothing_before_hold_nothing(infinity: float, prefix_len: int) -> None:
    call = make_call(q_len=40, prefix_len=prefix_len)
    query, key, value, *prefix = call.inputs.values()
    out, lse = prefix_attention(query, key, value, return_lse=True)
    out[:, 1, 3:30], lse[:, 1, 3:30] = math.nan, infinity
    extend_(query, out, lse, *prefix, None, None, None)
    expected = prefix_attention(query, key[:, :, :0], value[:, :, :0], *prefix, return_lse=True)
    torch.testing.assert_close(out[:, 1, 3:30], expected[0][:, 1, 3:30])
    torch.testing.assert_close(lse[:, 1, 3:30], expected[1][:, 1, 3:30])


def refused(call: Call, error: type[Exception], match: str, **changes: Tensor) -> None:
    query, key, value, prefix_key, prefix_value = call.inputs.values()
    out, lse = prefix_attention(query, key, value, return_lse=True)
    arguments = {"query": query, "out": out, "lse": lse, "prefix_key": prefix_key, "prefix_value": prefix_value}
    with pytest.raises(error, match=match):
        extend_(**arguments | changes, prefix_ids=None, prefix_lens=None, scale=None)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    call = make_call(batch=2, q_heads=2, q_len=17, head_dim=16)
    zeros = torch.zeros
    refused(call, ValueError, r"out: expected \[B, Hq, Sq, Dv\] like query", out=zeros(2, 2, 16, 16))
    refused(call, TypeError, "out: expected Float, got Double", out=zeros(2, 2, 17, 16, dtype=torch.float64))
    refused(call, ValueError, "out: expected stride 1", out=zeros(2, 2, 16, 17).transpose(2, 3))
    refused(call, ValueError, r"lse: expected shape \[2, 2, 17\]", lse=zeros(2, 2, 16))
    refused(call, ValueError, "lse: expected a contiguous tensor", lse=zeros(2, 17, 2).transpose(1, 2))
    refused(call, ValueError, r"prefix_key: expected \[Hkv, P, D\]", prefix_key=zeros(5, 16))
    refused(call, ValueError, "prefix_key: expected a number of heads that divides", prefix_key=zeros(3, 5, 16))
    refused(call, ValueError, "prefix_value: expected", prefix_value=zeros(2, 5, 15))
