"""The arguments of Transformers' attention function: understood, harmless or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prefix_kernels.integrations.transformers.attention.call import HARMLESS_ARGUMENTS
from prefix_kernels.integrations.transformers.attention.interface import prefix_attention_forward
from prefix_kernels.integrations.transformers.attention.torch_baseline import torch_attention_forward
from prefix_kernels.integrations.transformers.runtime.call_prefixes import CallPrefixes
from prefix_kernels.reference import prefix_attention_reference

both_functions = pytest.mark.parametrize("attention", [prefix_attention_forward, torch_attention_forward])


class CausalModule(nn.Module):
    """A module that is all that an attention function looks at."""

    is_causal = True
    prefix_site = 0


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Query, key, value, prefix key and prefix value of grouped heads."""
    shapes = ((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8), (2, 3, 8), (2, 3, 8))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


@both_functions
def test_softcap_is_applied(attention: Callable) -> None:
    query, key, value, prefix_key, prefix_value = operands()
    prefixes = CallPrefixes({0: (prefix_key, prefix_value)})
    out, _ = attention(CausalModule(), query, key, value, None, softcap=1.5, call_prefixes=prefixes)
    expected = prefix_attention_reference(query, key, value, prefix_key, prefix_value, is_causal=True, softcap=1.5)
    torch.testing.assert_close(out.transpose(1, 2), expected)


@both_functions
def test_a_sink_is_one_more_key_without_a_value(attention: Callable) -> None:
    tensors = *operands(), torch.randn(4, dtype=torch.float64, requires_grad=True)
    query, key, value, prefix_key, prefix_value, sinks = tensors
    prefixes = CallPrefixes({0: (prefix_key, prefix_value)})
    out, _ = attention(CausalModule(), query, key, value, None, s_aux=sinks, call_prefixes=prefixes)

    keys, values = (
        torch.cat([prefix.expand(2, -1, -1, -1), x], dim=2).repeat_interleave(2, dim=1)
        for prefix, x in ((prefix_key, key), (prefix_value, value))
    )
    scores = query @ keys.transpose(-1, -2) / 8**0.5
    scores = scores.masked_fill(torch.ones(6, 9, dtype=torch.bool).triu(4), -torch.inf)
    weights = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, -1, 6, -1)], dim=-1).softmax(-1)
    expected = weights[..., :-1] @ values
    torch.testing.assert_close(out.transpose(1, 2), expected)

    direction = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.transpose(1, 2), tensors, direction),
        torch.autograd.grad(expected, tensors, direction),
        strict=True,
    ):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs)


def test_rows_that_see_nothing_get_zeros_and_finite_gradients_with_a_sink() -> None:
    query, key, value, *_ = operands()
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[0, :, 2] = False
    module = CausalModule()
    module.prefix_site = None
    out, _ = prefix_attention_forward(module, query, key, value, mask, s_aux=sinks)
    assert (out[0, 2] == 0).all() and out[1].ne(0).all()
    grads = torch.autograd.grad(out.square().sum(), (query, key, value, sinks))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sink_keeps_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    query, key, value, prefix_key, prefix_value = operands(torch.float32)
    prefixes = CallPrefixes({0: (prefix_key, prefix_value)})
    sinks = torch.randn(4)
    expected, _ = prefix_attention_forward(CausalModule(), query, key, value, None, s_aux=sinks, call_prefixes=prefixes)
    half = [x.to(dtype) for x in (query, key, value)]
    out, _ = prefix_attention_forward(CausalModule(), *half, None, s_aux=sinks.to(dtype), call_prefixes=prefixes)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)


@both_functions
def test_an_argument_that_is_not_known_is_refused(attention: Callable) -> None:
    query, key, value, prefix_key, prefix_value = operands()
    prefixes = CallPrefixes({0: (prefix_key, prefix_value)})
    with pytest.raises(ValueError, match="CausalModule: score_mod: expected no argument of this name.*got a Tensor"):
        attention(CausalModule(), query, key, value, None, score_mod=query, call_prefixes=prefixes)


@both_functions
@pytest.mark.parametrize("name", sorted(HARMLESS_ARGUMENTS - {"output_attentions"}))
def test_harmless_arguments_and_those_that_say_nothing_change_nothing(attention: Callable, name: str) -> None:
    query, key, value, prefix_key, prefix_value = operands()
    prefixes = CallPrefixes({0: (prefix_key, prefix_value)})
    expected, _ = attention(CausalModule(), query, key, value, None, call_prefixes=prefixes)
    arguments = {name: torch.ones(1), "invented": None, "invented_too": False}
    out, _ = attention(CausalModule(), query, key, value, None, call_prefixes=prefixes, **arguments)
    assert torch.equal(out, expected)


@both_functions
def test_attention_weights_are_refused(attention: Callable) -> None:
    query, key, value, *_ = operands()
    with pytest.raises(ValueError, match="output_attentions=True: the attention weights are never formed"):
        attention(CausalModule(), query, key, value, None, output_attentions=True)
