"""The operators on tensors of device ``cuda`` that hold nothing: results as on the CPU, on a machine without a GPU.

The two operators are called one after the other, because the autograd engine asks the device for a stream.
"""

import pytest
import torch
from helpers import INPUT_NAMES
from operator_samples import SAMPLES, operator_arguments, sample_call
from torch._subclasses.fake_tensor import FakeTensorMode

from prefix_kernels import prefix_attention


def like_on_cuda(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def properties(arguments, needs):
    """Shape, strides and dtype of every result of both operators."""
    inputs, options = arguments[:5], arguments[5:]
    out, lse, _ = torch.ops.prefix_kernels.forward(*arguments)
    gradients = torch.ops.prefix_kernels.backward(
        torch.empty_like(out), torch.empty_like(lse), *inputs, out, lse, *options, inputs[1].shape[2], needs
    )
    assert [each.shape != (0,) for each in gradients] == needs
    results = [out, lse, *gradients]
    assert {each.device for each in results} == {arguments[0].device}
    return [(each.shape, each.stride(), each.dtype) for each in results]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "poisoned"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_fake_results_on_cuda_are_those_of_the_cpu(sample, layout):
    call = sample_call(sample, layout=layout)
    needs = [call.inputs[name] is not None for name in INPUT_NAMES]
    real = properties(operator_arguments(call), needs)
    with FakeTensorMode():
        assert properties(tuple(map(like_on_cuda, operator_arguments(call))), needs) == real


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_fake_results_of_the_split_on_cuda_are_those_of_the_cpu(layout):
    call = sample_call("full", layout=layout, with_dlse=False)
    inputs, options = operator_arguments(call)[:5], (None, None, False, None)

    def both(tensors):
        out, lse = torch.ops.prefix_kernels.split_forward(*tensors, *options, True)
        gradients = torch.ops.prefix_kernels.split_backward(
            torch.empty_like(out), None, *tensors, out, lse, *options, tensors[1].shape[2], [True] * 5
        )
        assert {x.device for x in (out, lse, *gradients)} == {tensors[0].device}
        return [(x.shape, x.stride(), x.dtype) for x in (out, lse, *gradients)]

    real = both(inputs)
    with FakeTensorMode():
        assert both([like_on_cuda(x) for x in inputs]) == real
        assert prefix_attention(*map(like_on_cuda, inputs)).device.type == "cuda"  # auto, without a GPU to ask


@pytest.mark.parametrize("name", INPUT_NAMES[1:])
def test_an_input_on_another_device_is_refused(name):
    call = sample_call("full")
    with FakeTensorMode():
        inputs = {each: like_on_cuda(tensor) for each, tensor in call.inputs.items()}
        inputs[name] = torch.empty(call.inputs[name].shape)
        with pytest.raises(ValueError, match=f"{name}: expected a tensor on cuda:0 like query, got one on cpu"):
            prefix_attention(**inputs)
