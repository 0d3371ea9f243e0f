"""``backend="split"``: PyTorch's kernel on the sequence, ours on the prefix, against the oracle."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from helpers import INPUT_NAMES, Call, check, make_call, nan_filled, run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from prefix_kernels import prefix_attention
from prefix_kernels.backends import libraries, split

by_split = functools.partial(prefix_attention, backend="split")
# PyTorch's flash attention for CPUs approximates the exponential of float32 to 20 bits.
check_split = functools.partial(check, function=by_split, exp_error=2.0**-20)

CALLS = {
    "one prefix": {},
    "grouped heads": {"q_heads": 6, "kv_heads": 2, "layout": "transposed"},
    "causal": {"is_causal": True, "q_len": 33, "layout": "transposed"},
    "causal by its window": {"window_size": (-1, 0), "query_offset": 0},
    "other lengths": {"q_len": 20, "k_len": 7},
    "one query": {"q_len": 1, "k_len": 9},
    "scaled": {"scale": 0.9},
    "no prefix": {"prefix_len": None},
    "no prefix rows": {"prefix_len": 0},
    "one prefix per row": {"batch": 3, "num_prefixes": 3},
    "bank": {
        "batch": 3,
        "num_prefixes": 2,
        "prefix_ids": torch.tensor([1, -1, 0]),
        "prefix_lens": torch.tensor([2, 5]),
        "query_offset": torch.tensor([4, 0, 1]),
    },
    "several prefixes": {"num_prefixes": 3, "prefix_ids": torch.tensor([[2, 0], [-1, 1]]), "is_causal": True},
    "folded": {"batch": 3, "q_heads": 4, "kv_heads": 2, "prefix_len": 12, "layout": "transposed"},
    "folded, one row": {"batch": 1, "prefix_len": 12, "is_causal": True},
    "long, not foldable": {"batch": 2, "prefix_len": 12},
}


@pytest.fixture(autouse=True)
def folds_from_twelve() -> Iterator[None]:
    with mock.patch.object(split, "FOLDED_PREFIX_LEN", 12):
        yield


def call_named(name: str, **changes: object) -> Call:
    return make_call(**CALLS[name] | changes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_of_the_oracle(name: str, dtype: torch.dtype) -> None:
    with used_libraries() as used:
        check_split(call_named(name, dtype=dtype, with_dlse=False))
    folded = name.startswith("folded")
    assert used == ["forward"] * (1 + folded) + ["backward"] * (1 + folded)


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_of_lse_goes_through_the_fused_kernels(name: str) -> None:
    with used_libraries() as used:
        check_split(call_named(name))
    assert "backward" not in used


@pytest.mark.parametrize("name", ["causal", "folded", "bank"])
@pytest.mark.parametrize("prefix_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefix_of_another_dtype(name: str, prefix_dtype: torch.dtype) -> None:
    dtype = torch.bfloat16 if prefix_dtype == torch.float32 else torch.float32
    check_split(call_named(name, dtype=dtype, prefix_dtype=prefix_dtype, with_dlse=False))


SUBSETS = [needs for n in range(1, 6) for needs in itertools.combinations(INPUT_NAMES, n)]


@pytest.mark.parametrize("name", ["causal", "folded"])
@pytest.mark.parametrize("needs", SUBSETS, ids="-".join)
def test_every_subset_of_gradients(name: str, needs: tuple[str, ...]) -> None:
    with used_libraries() as used:
        check_split(call_named(name, with_dlse=False), needs=needs)
    if not {"query", "key", "value"}.intersection(needs):
        assert "backward" not in used, "the kernels for the prefix alone do this"


def test_gradients_are_exact() -> None:
    call = call_named("grouped heads", dtype=torch.float64, q_len=5, head_dim=4, prefix_len=3)
    inputs = [x.detach().contiguous().requires_grad_() for x in call.inputs.values()]
    for is_causal, with_lse in itertools.product((False, True), repeat=2):
        function = functools.partial(by_split, is_causal=is_causal, return_lse=with_lse)
        assert torch.autograd.gradcheck(function, inputs)


class used_libraries:  # noqa: N801
    """The calls of PyTorch's operators within, in order."""

    def __enter__(self) -> list[str]:
        self.used: list[str] = []
        original = libraries._operator

        def operator(name: str) -> object:
            self.used.append("backward" if name.endswith("backward") else "forward")
            return original(name)

        self.patch = mock.patch.object(libraries, "_operator", operator)
        self.patch.__enter__()
        return self.used

    def __exit__(self, *error: object) -> None:
        self.patch.__exit__(*error)


@pytest.mark.parametrize("name", CALLS)
def test_deterministic_algorithms_go_through_the_fused_backward(name: str) -> None:
    # The memory of every result is full of NaN before.
    with nan_filled(), used_libraries() as used:
        check_split(call_named(name, with_dlse=False))
    assert "backward" not in used


REFUSED = {
    "attn_mask: expected None": {"attn_mask": torch.ones(17, 17, dtype=torch.bool)},
    "dropout_p: expected 0, got 0.1": {"dropout_p": 0.1, "dropout_seed": torch.tensor([3])},
    "softcap: expected 0, got 2.0": {"softcap": 2.0},
    r"window_size: expected \(-1, -1\), got \(3, 0\)": {"window_size": (3, 0)},
    "value: expected the query's head dim 16, got 8": {"value_dim": 8},
    "query, key: expected at least one row": {"k_len": 0},
    "is_causal: expected as many queries as keys, got 17 and 19": {"k_len": 19, "is_causal": True},
    "query_offset: expected None or 0 with is_causal=True, got 3": {"query_offset": 3, "is_causal": True},
    "query_offset: expected None or 0 with is_causal=True, got a tensor": {
        "query_offset": torch.zeros(2, dtype=torch.int64),
        "is_causal": True,
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_cannot_serve_is_refused_with_the_reason(reason: str) -> None:
    call = make_call(**REFUSED[reason])
    with pytest.raises(ValueError, match=f"backend: 'split' cannot serve this call: {reason}"):
        run(call, by_split)
    check(call, function=functools.partial(prefix_attention, backend="auto"))


def test_what_pytorch_is_told_not_to_use_is_not_used() -> None:
    call = make_call(with_dlse=False)
    reason = "'split' cannot serve this call: PyTorch chooses MATH"
    with sdpa_kernel([SDPBackend.MATH]), pytest.raises(ValueError, match=reason):
        run(call, by_split)
    function = functools.partial(split.forward, prefix_ids=None, prefix_lens=None, is_causal=False, scale=None)

    def automatic(return_lse: bool = True, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        return function(**inputs, required=False)

    with sdpa_kernel([SDPBackend.MATH]), used_libraries() as used:
        check(call, function=automatic)
    assert not used


def test_bad_inputs_get_the_errors_of_every_backend() -> None:
    query, key, value, prefix_key, prefix_value = make_call().inputs.values()
    with pytest.raises(ValueError, match="key: expected"):
        by_split(query, key[..., :8], value, prefix_key, prefix_value)
    with pytest.raises(ValueError, match="prefix_value: expected"):
        by_split(query, key, value, prefix_key, prefix_value[:, :2])
    with pytest.raises(TypeError, match="query: expected a torch.Tensor, got list"):
        by_split([1.0], key, value)
    with pytest.raises(IndexError, match="prefix_lens: expected values from 0 to 5, got 6"):
        by_split(query, key, value, prefix_key, prefix_value, prefix_lens=torch.tensor([6]))
    with pytest.raises(ValueError, match=r"backend: expected one of \('auto', .*got 'flash'"):
        prefix_attention(query, key, value, backend="flash")
    with pytest.raises(ValueError, match=r"expected no transform of torch.func"):
        torch.func.vmap(by_split)(*(torch.randn(2, 1, 2, 3, 8) for _ in range(3)))


@pytest.mark.parametrize("name", ["causal", "folded", "bank", "grouped heads"])
def test_opcheck(name: str) -> None:
    call = call_named(name, q_len=6)
    query, key, value, *prefix = (x.detach().requires_grad_() for x in call.inputs.values())
    selection = call.options.get("prefix_ids"), call.options.get("prefix_lens")
    arguments = (query, key, value, *prefix, *selection, call.options.get("is_causal", False), None, True)
    torch.library.opcheck(split.forward, arguments)


@pytest.mark.parametrize("name", ["causal", "folded"])
def test_compiled_without_a_break(name: str) -> None:
    call = call_named(name, with_dlse=False)
    expected = run(call, by_split)
    compiled = run(call, torch.compile(by_split, fullgraph=True, backend="aot_eager"))
    for key, tensor in expected.tensors().items():
        torch.testing.assert_close(compiled.tensors()[key], tensor)


def test_activation_checkpointing_and_autocast() -> None:
    call = call_named("causal", layout="transposed", with_dlse=False)
    leaves = [x.detach().requires_grad_() for x in call.inputs.values()]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = by_split(*leaves, is_causal=True, return_lse=True)
        again = checkpoint(by_split, *leaves, is_causal=True, use_reentrant=False)
    assert out.dtype == again.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, again)
    gradients = torch.autograd.grad(again, leaves, call.dout.bfloat16())
    for x, y in zip(gradients, torch.autograd.grad(out, leaves, call.dout.bfloat16()), strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)


def test_the_gradient_of_a_sum_has_no_rows_of_its_own() -> None:
    call = call_named("causal", dtype=torch.float64)
    leaves = [x.detach().requires_grad_() for x in call.inputs.values()]
    expected = torch.autograd.grad(prefix_attention(*leaves, is_causal=True).sum(), leaves)
    got = torch.autograd.grad(by_split(*leaves, is_causal=True).sum(), leaves)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_what_is_computed_for_the_flop_counter() -> None:
    counts = {}
    for backend in ("fused", "split"):
        inputs = [x.detach().requires_grad_() for x in call_named("folded").inputs.values()]
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            prefix_attention(*inputs, backend=backend).sum().backward()
        counts[backend] = counter.get_total_flops()
    assert counts["split"] == counts["fused"] > 0


def test_a_fake_call_promises_the_layout_of_the_real_one() -> None:
    for name, layout in itertools.product(("causal", "folded"), ("contiguous", "transposed")):
        call = call_named(name, layout=layout, with_dlse=False)
        result = run(call, by_split)
        assert result.out.transpose(1, 2).is_contiguous() and result.lse.is_contiguous()
        for key, gradient in result.grads.items():
            like = torch.empty_like(call.inputs[key])
            assert gradient.stride() == like.stride() and math.prod(gradient.shape) > 0, (name, layout, key)
