"""The choice of the backend of a call: the setting, the table, the timing, and what is said about it."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import make_call, run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import prefix_kernels
from prefix_kernels import attention_backend, explain, prefix_attention
from prefix_kernels.backends import libraries, split, table, timing

CPU = torch.device("cpu")
BIG = table.Shape(batch=8, heads=32, query_len=4096, key_len=4096, head_dim=128, trains=True)


def inputs(**sizes: object) -> tuple[Tensor, ...]:
    return tuple(make_call(**sizes).inputs.values())


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    timing.forget()
    with attention_backend("auto"):
        yield
        assert explain(*inputs()).backend == "fused", "a test left its setting behind"
    timing.forget()


def calls_of_split() -> mock._patch:
    return mock.patch.object(split, "forward", wraps=split.forward)


def test_the_setting_holds_for_calls_that_name_none() -> None:
    with calls_of_split() as spy:
        with attention_backend("split"):
            prefix_attention(*inputs())
            assert spy.call_count == 1
            with attention_backend("fused"):
                prefix_attention(*inputs())
            prefix_attention(*inputs(), backend="fused")
            assert spy.call_count == 1
            prefix_attention(*inputs())
        prefix_attention(*inputs())
        assert spy.call_count == 2
        setting = attention_backend("split")
        prefix_attention(*inputs())
        assert spy.call_count == 3
        setting.__exit__(None, None, None)


def test_an_error_ends_the_setting_too() -> None:
    with pytest.raises(ZeroDivisionError), attention_backend("split"):
        _ = 1 / 0
    assert explain(*inputs()).backend == "fused"
    with pytest.raises(
        ValueError, match=r"backend: expected one of \('auto', 'fused', 'split', 'benchmark'\), got 'x'"
    ):
        attention_backend("x")


def test_everything_that_is_built_on_the_operator_follows_the_setting() -> None:
    layer = prefix_kernels.PrefixTuningAttention(d_model=16, n_heads=2, prefix_len=3)
    x = torch.randn(5, 2, 16)
    expected = layer(x)
    with attention_backend("split"), calls_of_split() as spy:
        torch.testing.assert_close(layer(x), expected)
    assert spy.call_count == 1


def test_a_module_may_have_a_backend_of_its_own() -> None:
    x = torch.randn(5, 2, 16)
    for layer in (
        prefix_kernels.PrefixTuningAttention(16, 2, prefix_len=3, backend="split"),
        prefix_kernels.PrefixMultiheadAttention(16, 2, num_prefix_tokens=3, backend="split"),
    ):
        inputs = (x,) if isinstance(layer, prefix_kernels.PrefixTuningAttention) else (x, x, x, None, False)
        with calls_of_split() as spy:
            layer(*inputs)
        assert spy.call_count == 1
        with pytest.raises(ValueError, match="backend: expected one of"):
            type(layer)(16, 2, backend="none")


def test_a_compiled_function_follows_the_setting() -> None:
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(module.code)
        return module.forward

    compiled = torch.compile(prefix_attention, fullgraph=True, backend=keep)
    expected = prefix_attention(*inputs())
    for backend, operator in (("fused", "prefix_kernels.forward"), ("split", "prefix_kernels.split_forward")):
        with attention_backend(backend):
            torch.testing.assert_close(compiled(*inputs()), expected)
        assert f"torch.ops.{operator}" in graphs[-1], graphs[-1]
    assert len(graphs) == 2


def test_explain_names_what_would_run_and_why() -> None:
    said = str(explain(*inputs()))
    assert said.startswith(f"fused: {table.CPU_MEASURED}")
    assert said.endswith("; sequence by prefix_kernels, prefix by prefix_kernels")
    split_choice = explain(*inputs(), backend="split")
    assert (split_choice.backend, split_choice.reason, split_choice.prefix) == ("split", "asked for", "prefix_kernels")
    assert split_choice.sequence == "PyTorch's flash attention for CPUs"
    long = inputs(batch=1, prefix_len=split.FOLDED_PREFIX_LEN, q_len=2)
    assert explain(*long, backend="split").prefix == "PyTorch's flash attention for CPUs"
    assert explain(*inputs(prefix_len=None), backend="split").prefix == "nothing: there is none"
    with pytest.raises(ValueError, match="backend: 'split' cannot serve this call: softcap"):
        explain(*inputs(), softcap=1.0, backend="split")
    with pytest.raises(TypeError, match=r"query: expected a torch.Tensor, got list"):
        explain([1.0], *inputs()[1:])
    assert "softcap: expected 0" in explain(*inputs(), softcap=1.0, backend="benchmark").reason


def test_a_debug_log_says_what_ran(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "prefix_kernels.backends"):
        prefix_attention(*inputs(), backend="split")
    assert [record.getMessage() for record in caplog.records] == ["prefix_attention: split: asked for"]


@pytest.mark.parametrize("faster", ["fused", "split"])
def test_benchmark_times_a_shape_class_once(faster: str) -> None:
    seconds = {"fused": 1.0, "split": 1.0, faster: 0.5}
    ran = []

    def timed(work: functools.partial, query: Tensor) -> float:
        work()
        ran.append(work.args[-1])
        return seconds[work.args[-1]]

    call = make_call(with_dlse=False)
    with mock.patch.object(timing, "_seconds", timed), calls_of_split() as spy:
        benchmark = functools.partial(prefix_attention, backend="benchmark")
        result = run(call, benchmark)
        assert ran == ["fused", "split"] * 6
        before = spy.call_count
        run(call, benchmark)
        run(make_call(q_len=20, with_dlse=False), benchmark)  # 17 and 20 are both up to 32
        assert len(ran) == 12 and spy.call_count - before == (2 if faster == "split" else 0)
        run(make_call(q_len=40, with_dlse=False), benchmark)
        assert len(ran) == 24
        run(call, benchmark, needs=("prefix_key",))
        assert len(ran) == 36
    for name, tensor in run(call).tensors().items():
        torch.testing.assert_close(result.tensors()[name], tensor, rtol=1e-4, atol=1e-5)
    leaves = (x.detach().requires_grad_() for x in call.inputs.values())
    choice = explain(*leaves, backend="benchmark")
    assert (choice.backend, choice.reason) == (faster, "timed")


def test_benchmark_takes_the_fused_kernels_where_split_cannot_serve() -> None:
    with mock.patch.object(timing, "faster_backend", side_effect=AssertionError):
        prefix_attention(*inputs(), softcap=2.0, backend="benchmark")
        torch.compile(prefix_attention, fullgraph=True, backend="eager")(*inputs(), backend="benchmark")


@pytest.mark.parametrize("backend", ["benchmark", "split"])
def test_bad_shapes_get_the_errors_of_the_operator(backend: str) -> None:
    query, key, value, *prefix = inputs()
    with pytest.raises(ValueError, match="query: expected 4 dimensions"):
        prefix_attention(query[0], key, value, *prefix, backend=backend)
    with pytest.raises(ValueError, match="key: expected"):
        prefix_attention(query, key[..., :3], value, *prefix, backend=backend)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_benchmark_under_activation_checkpointing(use_reentrant: bool) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs()]
    benchmark = functools.partial(prefix_attention, backend="benchmark")
    with mock.patch.object(timing, "faster_backend", wraps=timing.faster_backend) as spy:
        checkpoint(benchmark, *leaves, use_reentrant=use_reentrant).sum().backward()
    # Reentrant checkpointing runs the call without gradients first, which is another class.
    assert spy.call_count == 1 + use_reentrant
    expected = torch.autograd.grad(prefix_attention(*leaves).sum(), leaves)
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-5)


def test_benchmark_times_nothing_that_pytorch_is_told_not_to_use() -> None:
    with sdpa_kernel([SDPBackend.MATH]), mock.patch.object(timing, "faster_backend", side_effect=AssertionError):
        prefix_attention(*inputs(), backend="benchmark")


def test_the_table_for_cpus() -> None:
    assert table.prefers_split(BIG, CPU, torch.bfloat16) == (table.HAS_AMX, mock.ANY)
    with mock.patch.object(table, "HAS_AMX", True):
        assert table.prefers_split(BIG, CPU, torch.bfloat16)[0]
        assert not table.prefers_split(BIG, CPU, torch.float32)[0]


def test_the_model_for_gpus() -> None:
    small = table.Shape(batch=8, heads=12, query_len=128, key_len=128, head_dim=64, trains=True)
    for capability in table.DEVICE_SHARES:
        assert table.split_gain(BIG, capability) > 0
        assert table.split_gain(small, capability) < 0
    longer = [table.split_gain(table.Shape(4, 16, n, n, 128, False), 9) for n in (1024, 4096, 16384)]
    assert longer == sorted(longer) and longer[-1] > 0


def test_a_device_without_a_row_takes_the_fused_kernels() -> None:
    assert table.prefers_split(BIG, torch.device("meta"), torch.bfloat16)[0] is False


OP_SCHEMAS = json.loads((Path(__file__).parent / "attention_op_schemas.json").read_text())


@pytest.mark.parametrize("version", OP_SCHEMAS)
def test_the_operators_are_the_same_in_every_version(version: str) -> None:
    assert OP_SCHEMAS[version] == libraries.SCHEMAS


@pytest.mark.parametrize("library", [libraries.FLASH_CPU, libraries.FLASH, libraries.CUDNN], ids=lambda x: x.name)
def test_the_operators_are_those_of_this_version(library: libraries.Library) -> None:
    assert libraries.unusable_library(library) is None


def test_a_changed_operator_means_fused_and_one_warning() -> None:
    changed = libraries.SCHEMAS | {"_scaled_dot_product_flash_attention_for_cpu": "(Tensor query) -> Tensor"}
    renamed = libraries.Library("gone", "_no_such_attention", "_no_such_attention", None, None)
    libraries.unusable_library.cache_clear()
    try:
        with mock.patch.object(libraries, "SCHEMAS", changed):
            with (
                pytest.warns(UserWarning, match="no operator aten::_scaled_dot_product_flash_attention_for_cpu of the"),
                pytest.raises(ValueError, match="'split' cannot serve this call: PyTorch .* has no operator"),
            ):
                prefix_attention(*inputs(), backend="split")
            assert explain(*inputs(), backend="benchmark").backend == "fused"
            with pytest.warns(UserWarning, match="no operator aten::_no_such_attention"):
                assert libraries.unusable_library(renamed)
    finally:
        libraries.unusable_library.cache_clear()
