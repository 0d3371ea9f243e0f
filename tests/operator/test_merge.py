"""Partial attentions, merged by their logsumexps, are attention over all keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefix_kernels import merge_attention, prefix_attention


def states(dtype: torch.dtype = torch.float64, keys: int = 11, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, 5, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(2, 2, keys, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return tuple(x.to(dtype).requires_grad_() for x in (query, key, value))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return prefix_attention(query, key, value, attn_mask=mask, return_lse=True)


@pytest.mark.parametrize("cuts", [(11,), (4, 7), (1, 3, 7), (5, 1, 4, 1)])
def test_parts_of_the_keys_merge_to_all_of_them(cuts: tuple[int, ...]) -> None:
    query, key, value = states()
    parts = [attend(query, *part) for part in zip(key.split(cuts, 2), value.split(cuts, 2), strict=True)]
    merged = merge_attention(*zip(*parts, strict=True))
    whole = attend(query, key, value)
    weights = [torch.randn_like(x) for x in whole]
    grads = []
    for results in (merged, whole):
        total = sum((x * weight).sum() for x, weight in zip(results, weights, strict=True))
        grads.append(torch.autograd.grad(total, (query, key, value), retain_graph=True))
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(*grads)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    outs = [torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    lses = [torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]

    def merged(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return merge_attention(tensors[:3], tensors[3:])

    assert torch.autograd.gradcheck(merged, (*outs, *lses))
    assert torch.autograd.gradgradcheck(merged, (*outs, *lses))


@pytest.mark.parametrize("nothing", [-torch.inf, torch.inf])
def test_queries_that_see_nothing_of_a_part(nothing: float) -> None:
    query, key, value = states()
    mask = torch.rand(2, 1, 5, 11, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[0, :, 0, :4] = False  # nothing of the first part
    mask[0, :, 1, 4:] = False  # nothing of the second
    mask[1, :, 2] = False  # nothing at all
    parts = [attend(query, key[:, :, cut], value[:, :, cut], mask[..., cut]) for cut in (slice(0, 4), slice(4, 11))]
    unseen = [lse == -torch.inf for _, lse in parts]
    outs = [out.masked_fill(hidden.unsqueeze(-1), torch.nan) for (out, _), hidden in zip(parts, unseen, strict=True)]
    lses = [lse.masked_fill(hidden, nothing) for (_, lse), hidden in zip(parts, unseen, strict=True)]
    out, lse = merge_attention(outs, lses)
    whole_out, whole_lse = attend(query, key, value, mask)
    torch.testing.assert_close((out, lse), (whole_out, whole_lse))
    assert (lse[1, :, 2] == -torch.inf).all()
    assert (out[1, :, 2] == 0).all()
    seen = lse > -torch.inf
    total = lambda out, lse: (out.sin() * seen.unsqueeze(-1)).sum() + lse[seen].cos().sum()  # noqa: E731
    actual, expected = (
        torch.autograd.grad(total(*x), (query, key, value)) for x in ((out, lse), (whole_out, whole_lse))
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    query, key, value = states(dtype)
    parts = [attend(query, key[:, :, cut], value[:, :, cut]) for cut in (slice(0, 4), slice(4, 11))]
    out, lse = merge_attention(*zip(*parts, strict=True))
    whole_out, whole_lse = attend(*(x.double() for x in (query, key, value)))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    epsilon = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), whole_out, rtol=epsilon, atol=epsilon)
    torch.testing.assert_close(lse.double(), whole_lse, rtol=1e-5, atol=1e-5)


def test_pytorchs_own_attention_is_a_part() -> None:
    query, key, value = (x.detach() for x in states(torch.float32))
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    sequence = flash(query, key[:, :, 4:], value[:, :, 4:])
    out, lse = merge_attention(*zip(attend(query, key[:, :, :4], value[:, :, :4]), sequence[:2], strict=True))
    torch.testing.assert_close((out, lse), attend(query, key, value))


def test_large_scores_do_not_overflow() -> None:
    outs = [torch.full((1, 2), 1.0), torch.full((1, 2), 3.0)]
    out, lse = merge_attention(outs, [torch.tensor([1e4]), torch.tensor([1e4])])
    torch.testing.assert_close(out, torch.full((1, 2), 2.0))
    torch.testing.assert_close(lse, torch.tensor([1e4]) + torch.tensor(2.0).log())
    out, lse = merge_attention(outs, [torch.tensor([-1e4]), torch.tensor([-1e4 - 200])])
    torch.testing.assert_close((out, lse), (outs[0], torch.tensor([-1e4])))


def test_compiled_and_transformed() -> None:
    outs, lses = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4)
    expected = merge_attention(list(outs), list(lses))
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(list(outs), list(lses)), expected)
    mapped = torch.func.vmap(lambda a, b, c, d: merge_attention([a, b], [c, d]))(*outs, *lses)
    torch.testing.assert_close(mapped, expected)


OUT, LSE = torch.zeros(2, 3, 4), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        (OUT, LSE, TypeError, "outs: expected a sequence of tensors, got a Tensor"),
        ([OUT], LSE, TypeError, "lses: expected a sequence of tensors, got a Tensor"),
        ([OUT, 3], [LSE, LSE], TypeError, r"outs\[1\]: expected a floating-point tensor, got int"),
        ([OUT], [LSE.long()], TypeError, r"lses\[0\]: expected a floating-point tensor, got torch.int64"),
        ([], [], ValueError, "lses: expected as many as outs, and at least one, got 0 for 0 outs"),
        ([OUT, OUT], [LSE], ValueError, "lses: expected as many as outs, and at least one, got 1 for 2 outs"),
        ([OUT, OUT[:1]], [LSE, LSE], ValueError, r"outs\[1\]: expected \[2, 3, 4\], torch.float32, cpu as outs\[0\]"),
        ([OUT, OUT.double()], [LSE, LSE], ValueError, r"outs\[1\]: expected .*got \[2, 3, 4\], torch.float64"),
        ([OUT], [LSE[:1]], ValueError, r"lses\[0\]: expected \[2, 3\] on cpu, .*got \[1, 3\]"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    outs: object, lses: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        merge_attention(outs, lses)
