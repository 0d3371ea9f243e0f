"""What the caller gets: memory layout, dtypes, repeatable bits, untouched inputs, lse where it is wanted."""

import pytest
import torch
from helpers import INPUT_NAMES, Call, check, make_call, run

from prefix_kernels import prefix_attention

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("k_len", [0, 9])
def test_out_lies_in_memory_as_batch_sequence_heads_dim(k_len):
    out = prefix_attention(**make_call(batch=2, q_heads=4, q_len=7, k_len=k_len, head_dim=16).inputs)
    assert out.shape == (2, 4, 7, 16)
    assert out.stride() == (7 * 4 * 16, 16, 4 * 16, 1)
    assert out.transpose(1, 2).reshape(2, 7, 64).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_out_and_lse(dtype):
    out, lse = prefix_attention(**make_call(dtype=dtype).inputs, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lse.shape == out.shape[:3] and lse.is_contiguous()


def test_out_alone_unless_lse_is_asked_for():
    call = make_call()
    out = prefix_attention(**call.inputs)
    with_lse, _ = prefix_attention(**call.inputs, return_lse=True)
    assert isinstance(out, torch.Tensor) and torch.equal(out, with_lse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_results_too_large_for_the_caches(is_causal, dtype):
    """Over a megabyte each: the kernels write such results past the caches."""
    check(make_call(q_heads=4, kv_heads=4, q_len=600, head_dim=64, is_causal=is_causal, layout="aligned", dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lse_of_half_precision_inputs_is_as_good_as_float32(dtype):
    call = make_call(q_len=64, k_len=200, prefix_len=20, head_dim=64, dtype=dtype)
    lse = run(call, needs=()).lse
    call.inputs = {name: tensor.double() for name, tensor in call.inputs.items()}
    torch.testing.assert_close(lse.double(), run(call, needs=()).lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_dlse", [False, True])
def test_gradient_of_lse(with_dlse, dtype):
    check(make_call(q_heads=4, kv_heads=2, q_len=40, k_len=70, dtype=dtype, with_dlse=with_dlse))


def test_gradient_of_lse_alone():
    call = make_call(q_len=40, k_len=70)
    call.dout = torch.zeros_like(call.dout)
    result = check(call)
    assert (result.grads["value"] == 0).all() and (result.grads["prefix_value"] == 0).all()

    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.inputs.items()}
    _, lse = prefix_attention(**leaves, return_lse=True)
    grads = torch.autograd.grad(lse, [leaves["query"], leaves["prefix_key"]], call.dlse.float())
    assert torch.equal(grads[0], result.grads["query"]) and torch.equal(grads[1], result.grads["prefix_key"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs", [INPUT_NAMES, ("prefix_key", "prefix_value")], ids=["all", "prefix"])
def test_gradient_that_is_expanded_from_a_scalar(needs, dtype):
    """``out.sum().backward()`` hands over a dout whose strides are all zero."""
    call = make_call(q_heads=4, kv_heads=2, q_len=40, k_len=70, dtype=dtype, with_dlse=False)
    call.dout = torch.ones((), dtype=torch.float64).expand_as(call.dout)
    expected = check(call, needs=needs)
    leaves = {name: tensor.detach().requires_grad_(name in needs) for name, tensor in call.inputs.items()}
    prefix_attention(**leaves).sum().backward()
    for name in needs:
        assert torch.equal(leaves[name].grad, expected.grads[name]), name


@pytest.mark.parametrize("permutation", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0), (1, 3, 0, 2)], ids=str)
def test_gradient_with_any_strides(permutation):
    call = make_call(q_heads=4, kv_heads=2, q_len=40, k_len=70)
    inverse = [permutation.index(axis) for axis in range(4)]
    call.dout = call.dout.permute(permutation).contiguous().permute(inverse)
    check(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_same_call_gives_the_same_bits(is_causal, dropout_p, dtype):
    call = make_call(
        batch=5,
        q_heads=4,
        kv_heads=2,
        q_len=150,
        k_len=170,
        prefix_len=40,
        head_dim=32,
        dtype=dtype,
        is_causal=is_causal,
        dropout_p=dropout_p,
        dropout_seed=torch.tensor([3]),
    )
    first = run(call).tensors()
    for _ in range(3):
        for name, tensor in run(call).tensors().items():
            assert torch.equal(tensor, first[name]), name


def test_rows_of_a_batch_do_not_depend_on_each_other():
    call = make_call(batch=3, q_heads=4, kv_heads=2, q_len=70, k_len=75, prefix_len=20, head_dim=32)
    together = run(call)
    for b in range(3):
        row = {name: tensor if name.startswith("prefix") else tensor[b : b + 1] for name, tensor in call.inputs.items()}
        alone = run(Call(row, {}, call.dout[b : b + 1], call.dlse[b : b + 1]))
        torch.testing.assert_close(alone.out[0], together.out[b])
        torch.testing.assert_close(alone.grads["key"][0], together.grads["key"][b])


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"dropout_p": 0.2, "dropout_seed": torch.tensor([5])}], ids=str
)
def test_inputs_are_left_as_they_were(options):
    call = make_call(q_heads=4, kv_heads=2, q_len=40, k_len=70, **options)
    before = {name: tensor.clone() for name, tensor in call.inputs.items()}
    dout = call.dout.clone()
    run(call)
    assert all(torch.equal(call.inputs[name], before[name]) for name in INPUT_NAMES) and torch.equal(call.dout, dout)


def test_one_tensor_as_key_and_value_gets_both_gradients():
    call = make_call(q_len=20, k_len=30)
    expected = run(
        Call({**call.inputs, "value": call.inputs["key"], "prefix_value": call.inputs["prefix_key"]}, {}, call.dout)
    )
    query, shared, prefix = (call.inputs[name].detach().requires_grad_() for name in ("query", "key", "prefix_key"))
    prefix_attention(query, shared, shared, prefix, prefix).backward(call.dout.float())
    torch.testing.assert_close(shared.grad, expected.grads["key"] + expected.grads["value"])
    torch.testing.assert_close(prefix.grad, expected.grads["prefix_key"] + expected.grads["prefix_value"])


def test_key_broadcast_over_the_batch_is_read_in_place():
    call = make_call(batch=4, q_len=20, k_len=30, layout="contiguous")
    for name in ("key", "value"):
        call.inputs[name] = call.inputs[name][:1].expand(4, -1, -1, -1)
    check(call, needs=("query", "prefix_key", "prefix_value"))


def test_query_of_sdpa_is_served_without_a_prefix():
    """The call of ``F.scaled_dot_product_attention``, argument for argument."""
    query, key, value = (torch.randn(2, 4, 40, 32) for _ in range(3))
    mask = torch.rand(2, 1, 40, 40) < 0.8
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(prefix_attention(query, key, value), sdpa(query, key, value))
    torch.testing.assert_close(
        prefix_attention(query, key, value, is_causal=True), sdpa(query, key, value, is_causal=True)
    )
    torch.testing.assert_close(
        prefix_attention(query, key, value, attn_mask=mask, scale=0.3),
        sdpa(query, key, value, attn_mask=mask, scale=0.3),
    )
