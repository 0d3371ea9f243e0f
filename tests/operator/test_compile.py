"""The operator inside the compiler: fake kernels, opcheck, ``torch.compile`` with and without fixed shapes, export."""

import pytest
import torch
from helpers import INPUT_NAMES, check, make_call, run
from torch._subclasses.fake_tensor import FakeTensorMode

from prefix_kernels import prefix_attention

SAMPLES = {
    "full": {},
    "causal": {"is_causal": True, "dtype": torch.bfloat16},
    "no prefix": {"prefix_len": None, "is_causal": True},
    "prefix alone": {"k_len": 0},
    "offset": {"is_causal": True, "query_offset": 3, "window_size": (5, 2)},
    "offsets": {"is_causal": True, "query_offset": torch.tensor([3, 5])},
    "mask": {"attn_mask": torch.rand(2, 1, 1, 9) < 0.7, "softcap": 2.0},
    "additive mask": {"attn_mask": torch.randn(8, 14), "prefix_dtype": torch.bfloat16},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([5])},
    "value dim": {"value_dim": 24, "is_causal": True},
    "value dim below": {"value_dim": 3, "prefix_dtype": torch.bfloat16},
    "bank": {
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([[0, 2], [-1, 1]]),
        "prefix_lens": torch.tensor([5, 0, 3]),
    },
}


def sample_call(name: str, **shape: object):
    shape = dict(q_heads=4, kv_heads=2, q_len=8, k_len=9, prefix_len=5, head_dim=8, layout="transposed") | shape
    return make_call(**shape | SAMPLES[name])


def operator_arguments(call) -> tuple:
    """The call as the registered operator's positional arguments."""
    options = {
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "prefix_ids": None,
    } | call.options
    offset = options.get("query_offset")
    offsets, offset = (offset, None) if isinstance(offset, torch.Tensor) else (None, offset)
    left, right = options.get("window_size", (-1, -1))
    return (
        *(call.inputs[name] for name in INPUT_NAMES),
        options["attn_mask"],
        options["prefix_ids"],
        options.get("prefix_lens"),
        offsets,
        options.get("dropout_seed"),
        options["dropout_p"],
        options["is_causal"],
        options["scale"],
        offset,
        left,
        right,
        options.get("window_includes_prefix", False),
        options.get("softcap", 0.0),
    )


def without_nan(call):
    """opcheck compares with ``==``, so rows beyond the valid lengths must be numbers."""
    for name, tensor in call.inputs.items():
        call.inputs[name] = None if tensor is None else tensor.nan_to_num(0.5)
    return call


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_of_forward(sample):
    call = without_nan(sample_call(sample))
    for tensor in call.inputs.values():
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(torch.ops.prefix_kernels.forward.default, operator_arguments(call))


@pytest.mark.parametrize(
    "needs", [[True] * 5, [False, False, False, True, True], [False, True, False, False, True]], ids=str
)
@pytest.mark.parametrize("sample", [name for name in SAMPLES if name != "no prefix"])
def test_opcheck_of_backward(sample, needs):
    call = without_nan(sample_call(sample))
    arguments = operator_arguments(call)
    out, lse, _ = torch.ops.prefix_kernels.forward(*arguments)
    inputs, options = arguments[:5], arguments[5:]
    torch.library.opcheck(
        torch.ops.prefix_kernels.backward.default,
        (torch.randn_like(out), torch.randn_like(lse), *inputs, out, lse, *options, call.inputs["key"].shape[2], needs),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def strides(function, tensors: dict) -> list:
    leaves = {name: tensor if tensor is None else tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out, lse = function(leaves)
    leaves = [leaf for leaf in leaves.values() if leaf is not None]
    return [
        (each.shape, each.stride(), each.dtype)
        for each in (out, lse, *torch.autograd.grad([out, lse], leaves, [out, lse]))
    ]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "poisoned"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_fake_results_have_the_true_shapes_strides_and_dtypes(sample, layout):
    call = sample_call(sample, layout=layout)
    real = strides(lambda leaves: prefix_attention(**leaves, **call.options, return_lse=True), call.inputs)
    with FakeTensorMode() as mode:
        fakes = {name: tensor if tensor is None else mode.from_tensor(tensor) for name, tensor in call.inputs.items()}
        options = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in call.options.items()
        }
        fake = strides(lambda leaves: prefix_attention(**leaves, **options, return_lse=True), fakes)
    assert fake == real


def test_meta_tensors():
    inputs = {name: tensor.to("meta") for name, tensor in sample_call("full").inputs.items()}
    out, lse = prefix_attention(**inputs, return_lse=True)
    assert out.is_meta and out.shape == (2, 4, 8, 8) and lse.shape == (2, 4, 8)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("sample", SAMPLES)
def test_compiled_without_graph_breaks_forward_and_backward(fresh_compiler, sample):
    call = sample_call(sample)
    expected = run(call).tensors()
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    for name, tensor in run(call, compiled).tensors().items():
        assert torch.equal(tensor.nan_to_num(), expected[name].nan_to_num()), name


@pytest.mark.parametrize("needs", [INPUT_NAMES, ("prefix_key", "prefix_value"), ()], ids=["all", "prefix", "none"])
def test_compiled_by_inductor_in_the_middle_of_a_model(fresh_compiler, needs):
    """As a model calls it: projections before, a reshape of the free transpose after."""

    def layer(query, key, value, prefix_key, prefix_value, return_lse):
        out, lse = prefix_attention(
            query * 2, key, value + 1, prefix_key, prefix_value, is_causal=True, return_lse=True
        )
        return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1).sin().view_as(out.transpose(1, 2)).transpose(
            1, 2
        ), lse

    call = make_call(q_heads=4, kv_heads=2, q_len=20, prefix_len=5, head_dim=16, layout="transposed")
    expected = run(call, layer, needs=needs).tensors()
    for name, tensor in run(call, torch.compile(layer, fullgraph=True), needs=needs).tensors().items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_dynamic_shapes_compile_once(fresh_compiler, options):
    graphs = []

    def counting_backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(prefix_attention, fullgraph=True, backend=counting_backend)
    for batch, length, prefix_len in [(2, 20, 5), (3, 33, 7), (5, 150, 20)]:
        call = make_call(batch=batch, q_len=length, k_len=length, prefix_len=prefix_len, layout="contiguous", **options)
        for name, tensor in call.inputs.items():
            torch._dynamo.mark_dynamic(tensor, 1 if name.startswith("prefix") else 2)
            if not name.startswith("prefix"):
                torch._dynamo.mark_dynamic(tensor, 0)
        got = compiled(**call.inputs, **options)
        assert torch.equal(got, prefix_attention(**call.inputs, **options))
    assert len(graphs) == 1, f"expected one graph, got {len(graphs)}"


def test_dynamic_shapes_through_forward_and_backward(fresh_compiler):
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (20, 33, 150):
        call = make_call(q_heads=4, kv_heads=2, q_len=length, k_len=length + 3, prefix_len=7, is_causal=True)
        check(call, function=compiled)


def test_compiled_dropout_uses_the_same_bits_in_forward_and_backward(fresh_compiler):
    """out is linear in the values, so dout * out is the sum of dvalue * value if, and only if, the bits agree."""
    call = make_call(q_len=40, k_len=50, prefix_len=20, head_dim=32, dtype=torch.float64, layout="contiguous")
    leaves = {name: tensor.requires_grad_() for name, tensor in call.inputs.items()}
    out = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")(**leaves, dropout_p=0.4)
    out.backward(call.dout)
    values = sum((leaves[name] * leaves[name].grad).sum() for name in ("value", "prefix_value"))
    torch.testing.assert_close((out * call.dout).sum(), values)
    assert not torch.allclose(out, prefix_attention(**call.inputs))


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, query, key, value, prefix_key, prefix_value):
            return prefix_attention(query, key, value, prefix_key, prefix_value, is_causal=True)

    inputs = tuple(sample_call("full").inputs.values())
    program = torch.export.export(Layer(), inputs)
    assert torch.equal(program.module()(*inputs), prefix_attention(*inputs, is_causal=True))
