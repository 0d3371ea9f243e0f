"""Gradients: every subset of the five, what is kept alive for them, gradcheck, checkpointing, and what is refused."""

import gc
import itertools
import re

import pytest
import torch
from helpers import INPUT_NAMES, Call, check, make_call, run
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from prefix_kernels import prefix_attention

SUBSETS = [
    subset for size in range(1, 6) for subset in itertools.combinations(INPUT_NAMES, size)
]  # all 31, from one gradient to five

OPTIONS = {
    "full": {},
    "causal": {"is_causal": True},
    "offset": {"is_causal": True, "query_offset": 1},
    "window": {"window_size": (2, 1)},
    "window with prefix": {"window_size": (3, -1), "is_causal": True, "window_includes_prefix": True},
    "softcap": {"softcap": 1.5},
    "bool mask": {"attn_mask": torch.tensor([True, False, True, True, False])},
    "additive mask": {"attn_mask": torch.linspace(-1, 1, 7, dtype=torch.float64), "is_causal": True},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([5])},
    "bank": {"prefix_ids": torch.tensor([[1, 0], [-1, 1]]), "prefix_lens": torch.tensor([2, 1])},
    "value dim": {"value_dim": 5},
    "row without prefix": {"prefix_ids": torch.tensor([-1, 1])},
    "everything": {
        "prefix_ids": torch.tensor([[1, 0], [-1, 1]]),
        "prefix_lens": torch.tensor([2, 1]),
        "is_causal": True,
        "window_size": (3, 3),
        "query_offset": torch.tensor([1, 3]),
        "softcap": 1.5,
        "dropout_p": 0.2,
        "dropout_seed": torch.tensor([5]),
        "scale": 0.7,
    },
}


def small_call(options: dict, head_dim: int = 3, **shape: object) -> Call:
    bank = 2 if "prefix_ids" in options else None
    shape = (
        dict(q_heads=2, kv_heads=1, q_len=4, k_len=5, prefix_len=2, layout="contiguous", dtype=torch.float64) | shape
    )
    return make_call(num_prefixes=bank, head_dim=head_dim, **shape, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("head_dim", [3, 8])
def test_gradcheck(options, head_dim):
    call = small_call(options, head_dim)
    if "prefix_lens" in options:  # gradcheck perturbs every element, and NaN stays NaN
        call.inputs["prefix_key"], call.inputs["prefix_value"] = torch.randn(2, 2, 1, 2, head_dim, dtype=torch.float64)

    def attention(*inputs):
        return prefix_attention(*inputs, **call.options, return_lse=True)

    assert torch.autograd.gradcheck(attention, [call.inputs[name].requires_grad_() for name in INPUT_NAMES])


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"dropout_p": 0.2, "dropout_seed": torch.tensor([5])}], ids=str
)
@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
def test_every_subset_of_gradients_is_that_of_the_full_set(needs, options):
    check(make_call(q_heads=4, kv_heads=2, q_len=40, k_len=60, prefix_len=20, head_dim=32, **options), needs=needs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
def test_every_subset_of_gradients_in_the_other_dtypes(needs, dtype):
    call = make_call(
        q_heads=4,
        kv_heads=2,
        q_len=40,
        k_len=60,
        prefix_len=20,
        head_dim=32,
        dtype=dtype,
        is_causal=True,
        prefix_dtype=torch.float32,
    )
    check(call, needs=needs)


@pytest.mark.parametrize("needs", [("query",), ("key",), ("value",), ("key", "value")], ids="+".join)
def test_subsets_without_a_prefix(needs):
    check(make_call(q_len=40, k_len=60, prefix_len=None, head_dim=32), needs=needs)


def test_no_graph_when_nothing_asks_for_a_gradient():
    assert prefix_attention(**make_call().inputs).grad_fn is None
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in make_call().inputs.items()}
    with torch.no_grad():
        assert prefix_attention(**leaves).grad_fn is None


def test_gradients_accumulate_in_grad():
    call = make_call(q_len=20)
    leaf = call.inputs["prefix_key"].detach().requires_grad_()
    for _ in range(2):
        prefix_attention(**{**call.inputs, "prefix_key": leaf}).backward(call.dout.float())
    torch.testing.assert_close(leaf.grad, 2 * run(Call(call.inputs, {}, call.dout)).grads["prefix_key"])


def test_backward_twice_over_a_retained_graph_gives_the_same_bits():
    call = make_call(q_len=40, dropout_p=0.3)
    leaf = call.inputs["prefix_key"].detach().requires_grad_()
    out = prefix_attention(**{**call.inputs, "prefix_key": leaf}, **call.options)
    first, second = (torch.autograd.grad(out, leaf, call.dout.float(), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_changing_an_input_that_backward_needs_is_noticed():
    call = make_call()
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in call.inputs.items()}
    key = leaves["key"] * 1
    out = prefix_attention(**{**leaves, "key": key})
    with torch.no_grad():
        key.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# What the backward pass reads besides dout, as design.md's table says.
KEPT = {
    ("prefix_value",): {"query", "lse", "prefix_key"},
    ("prefix_key", "prefix_value"): {"query", "out", "lse", "prefix_key", "prefix_value"},
    ("prefix_key",): {"query", "out", "lse", "prefix_key", "prefix_value"},
    ("value",): {"query", "key", "lse"},
    ("key", "value"): {"query", "key", "value", "out", "lse"},
    ("value", "prefix_value"): {"query", "key", "lse", "prefix_key"},
    INPUT_NAMES: {*INPUT_NAMES, "out", "lse"},
}


def test_forward_keeps_no_more_alive_than_the_asked_for_gradients_need():
    for needs, kept in KEPT.items():
        inputs = make_call(layout="contiguous").inputs
        leaves = {name: tensor.requires_grad_(name in needs) for name, tensor in inputs.items()}
        out, lse = prefix_attention(**leaves, return_lse=True)
        tensors = {**leaves, "out": out, "lse": lse}
        storages = {name: StorageWeakRef(tensor.untyped_storage()) for name, tensor in tensors.items()}
        node = out.grad_fn
        del inputs, leaves, tensors, out, lse
        gc.collect()
        # Leaves that ask for a gradient are reached from the graph's end points.
        alive = {name for name, storage in storages.items() if not storage.expired()} - set(needs)
        assert alive == kept - set(needs), f"{needs}: expected {sorted(kept - set(needs))}, got {sorted(alive)}"
        del node


@pytest.mark.parametrize("needs", KEPT, ids="+".join)
def test_saved_tensors_are_those_of_the_asked_for_gradients(needs):
    inputs = make_call(layout="contiguous").inputs
    leaves = {name: tensor.requires_grad_(name in needs) for name, tensor in inputs.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda x: x
    ):
        out, lse = prefix_attention(**leaves, return_lse=True)
    tensors = {**leaves, "out": out, "lse": lse}
    assert {name for name, tensor in tensors.items() if tensor.data_ptr() in saved} == KEPT[needs]
    assert set(saved) == {tensors[name].data_ptr() for name in KEPT[needs]}, "something else is saved too"


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_activation_checkpointing(dropout_p, use_reentrant):
    call = make_call(q_len=40, k_len=60, prefix_len=20, head_dim=32, is_causal=True)

    def gradients(around) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(3)
        leaves = [call.inputs[name].detach().requires_grad_() for name in INPUT_NAMES]

        def attention(query, key, value, prefix_key, prefix_value):
            return prefix_attention(
                query * 2, key, value, prefix_key, prefix_value, is_causal=True, dropout_p=dropout_p
            )

        out = around(attention, leaves)
        return (
            (out.detach(), *torch.autograd.grad(out, leaves, call.dout.float()))
            if not use_reentrant
            else backward(out, leaves)
        )

    def backward(out, leaves) -> tuple[torch.Tensor, ...]:
        out.backward(call.dout.float())
        return (out.detach(), *(leaf.grad for leaf in leaves))

    plain = gradients(lambda function, leaves: function(*leaves))
    checkpointed = gradients(lambda function, leaves: checkpoint(function, *leaves, use_reentrant=use_reentrant))
    for expected, got in zip(plain, checkpointed, strict=True):
        assert torch.equal(got, expected)


def test_saved_tensors_may_live_elsewhere():
    call = make_call(q_len=20)
    expected = run(call)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.numpy().copy(), torch.from_numpy):
        got = run(call)
    assert all(torch.equal(got.grads[name], expected.grads[name]) for name in INPUT_NAMES)


def test_double_backward_is_refused():
    call = make_call(dtype=torch.float64)
    leaves = [call.inputs[name].detach().requires_grad_() for name in INPUT_NAMES]
    out = prefix_attention(*leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="(?i)prefix_attention.*(double|second)"):
        grads[0].sum().backward()


def test_forward_mode_is_refused():
    call = make_call(dtype=torch.float64)
    inputs = [call.inputs[name] for name in INPUT_NAMES]
    tangents = [torch.ones_like(tensor) for tensor in inputs]
    refusal = pytest.raises((RuntimeError, NotImplementedError), match="(?i)forward.?mode")
    with refusal:
        torch.func.jvp(prefix_attention, tuple(inputs), tuple(tangents))
    for needs_gradient in (False, True):
        with torch.autograd.forward_ad.dual_level(), refusal:
            query = torch.autograd.forward_ad.make_dual(inputs[0].clone().requires_grad_(needs_gradient), tangents[0])
            prefix_attention(query, *inputs[1:])


def test_function_transforms_give_the_result_or_refuse():
    inputs = make_call(batch=3, layout="contiguous").inputs
    leaf = inputs["prefix_key"].clone().requires_grad_()
    prefix_attention(**{**inputs, "prefix_key": leaf}).sum().backward()

    def one_row(query, key, value):
        return prefix_attention(query[None], key[None], value[None], inputs["prefix_key"], inputs["prefix_value"])[0]

    def loss(prefix_key):
        return prefix_attention(**{**inputs, "prefix_key": prefix_key}).sum()

    for transform, arguments, expected in [
        (torch.vmap(one_row), (inputs["query"], inputs["key"], inputs["value"]), prefix_attention(**inputs)),
        (torch.func.grad(loss), (inputs["prefix_key"],), leaf.grad),
    ]:
        try:
            got = transform(*arguments)
        except (RuntimeError, NotImplementedError) as error:
            assert re.search("vmap|functorch|batching rule", str(error)), error
        else:
            assert torch.equal(got, expected)


@pytest.mark.parametrize("prefix_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_in_bfloat16_and_leaves_the_prefix_as_it_is(prefix_dtype):
    call = make_call(q_len=40, k_len=60, prefix_len=20, head_dim=32, prefix_dtype=prefix_dtype)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = prefix_attention(**leaves)
    out.backward(call.dout.bfloat16())
    assert out.dtype == torch.bfloat16
    assert {name: leaf.grad.dtype for name, leaf in leaves.items()} == {
        name: leaf.dtype for name, leaf in leaves.items()
    }

    halves = {name: tensor if name.startswith("prefix") else tensor.bfloat16() for name, tensor in call.inputs.items()}
    expected = run(Call(halves, {}, call.dout))
    assert torch.equal(out, expected.out)
    for name in INPUT_NAMES:
        assert torch.equal(leaves[name].grad, expected.grads[name].to(leaves[name].dtype)), name


def test_autocast_joins_inputs_of_different_dtypes():
    inputs = make_call().inputs
    mixed = {**inputs, "query": inputs["query"].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prefix_attention(**mixed).dtype == torch.bfloat16
    with torch.autocast("cpu", enabled=False), pytest.raises((TypeError, RuntimeError), match="key"):
        prefix_attention(**mixed)


def flops(needs: tuple[str, ...], **options: object) -> tuple[int, int]:
    call = make_call(batch=2, q_heads=4, kv_heads=2, q_len=40, k_len=60, prefix_len=20, head_dim=32, **options)
    leaves = {name: tensor.detach().requires_grad_(name in needs) for name, tensor in call.inputs.items()}
    with FlopCounterMode(display=False) as forward:
        out = prefix_attention(**leaves, **call.options)
    with FlopCounterMode(display=False) as backward:
        if needs:
            out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_flop_counter_counts_prefix_and_sequence_columns():
    queries = 2 * 4 * 40 * 32
    forward, backward = flops(INPUT_NAMES)
    assert forward == 4 * queries * (20 + 60)
    assert backward == 10 * queries * (20 + 60)


def test_flop_counter_knows_the_head_dim_of_the_values():
    queries = 2 * 4 * 40
    forward, backward = flops(INPUT_NAMES, value_dim=8)
    assert forward == 2 * queries * (32 + 8) * (20 + 60)
    assert backward == queries * (6 * 32 + 4 * 8) * (20 + 60)
    assert flops(("prefix_value",), value_dim=8)[1] == 2 * queries * (32 + 8) * 20


def test_flop_counter_knows_that_prefix_gradients_visit_the_prefix_alone():
    assert flops(("prefix_key", "prefix_value"))[1] == 8 * 2 * 4 * 40 * 32 * 20
