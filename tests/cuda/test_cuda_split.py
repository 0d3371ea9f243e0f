"""``backend="split"``: the emulated CUDA kernels on the prefix, PyTorch's CPU kernel on the sequence."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from emulated import emulated_extend_, load
from helpers import check, make_call

from prefix_kernels import ops, prefix_attention
from prefix_kernels.backends import split

by_split = functools.partial(prefix_attention, backend="split")
# PyTorch's flash attention for CPUs approximates the exponential of float32 to 20 bits.
EXP_ERROR = 2.0**-20

CALLS = {
    "causal, grouped heads": {"is_causal": True, "q_heads": 4, "kv_heads": 2, "q_len": 70, "prefix_len": 20},
    "float32 prefix": {"prefix_dtype": torch.float32, "q_len": 40},
    "bank": {"num_prefixes": 2, "prefix_ids": torch.tensor([1, -1]), "prefix_lens": torch.tensor([2, 5])},
    "wide heads": {"head_dim": 128, "q_len": 20},
}


@pytest.fixture(autouse=True)
def prefixes_by_the_cuda_kernels() -> Iterator[None]:
    own = SimpleNamespace(**vars(ops) | {"backward": load().backward})
    with mock.patch.multiple(split, extend_=emulated_extend_, ops=own):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_of_the_oracle(name: str, dtype: torch.dtype) -> None:
    call = make_call(**{"dtype": dtype, "layout": "transposed", "with_dlse": False} | CALLS[name])
    with mock.patch.object(split, "extend_", wraps=split.extend_) as spy:
        check(call, function=by_split, exp_error=EXP_ERROR)
    assert spy.call_count == 1


@pytest.mark.parametrize("needs", [("prefix_key", "prefix_value"), ("query",), ("key", "prefix_value")], ids="-".join)
def test_some_gradients(needs: tuple[str, ...]) -> None:
    call = make_call(dtype=torch.bfloat16, with_dlse=False, **CALLS["causal, grouped heads"])
    check(call, needs=needs, function=by_split)


def test_a_gradient_of_lse() -> None:
    check(make_call(dtype=torch.bfloat16, **CALLS["causal, grouped heads"]), function=by_split)
