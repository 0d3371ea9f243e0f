"""Partial attentions, merged by their logsumexps, are attention over all keys."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from merge_samples import Parts, check_merge, expected, make_parts
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from prefix_kernels import merge_attention, prefix_attention
from prefix_kernels.merge_operator import MAX_PARTS, merge, merge_backward

SAMPLES = {
    "two parts": {},
    "one part": {"parts": 1},
    "as many parts as one call takes": {"parts": MAX_PARTS, "shape": (1, 2, 3, 8)},
    "odd rows": {"shape": (2, 2, 3, 67), "layout": "poisoned"},
    "rows in the order of a transpose": {"parts": 3, "layout": "transposed"},
    "rows for several threads": {"shape": (2, 4, 100, 64), "layout": "aligned"},
    "one row": {"shape": (9,)},
    "rows without batch": {"shape": (7, 16)},
    "five dimensions": {"shape": (2, 1, 2, 3, 16), "layout": "transposed"},
    "no rows": {"shape": (2, 0, 5, 4)},
    "empty rows": {"shape": (2, 3, 5, 0)},
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_results_and_gradients_are_those_of_float64(sample: str, dtype: torch.dtype) -> None:
    check_merge(make_parts(**SAMPLES[sample], dtype=dtype), merge, merge_backward)


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
    # A part whose share is zero after rounding does not matter either.
    outs[1].fill_(torch.nan)
    lses = [torch.tensor([-1e4]), torch.tensor([-1e4 - 200])]
    assert torch.equal(merge_attention(outs, lses)[0], outs[0])
    gradients = merge_backward(torch.ones(1, 2), torch.ones(1), outs, lses, [True] * 4)
    assert [x.tolist() for x in gradients] == [[[1.0, 1.0]], [[0.0, 0.0]], [1.0], [0.0]]


def leaves(parts: int = 2, **options: object) -> tuple[Tensor, ...]:
    sample = make_parts(parts, **options)
    finite = [x.nan_to_num(0.5, posinf=-torch.inf) for x in (*sample.outs, *sample.lses)]
    return tuple(x.requires_grad_() for x in finite)


def merged(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    half = len(tensors) // 2
    return merge_attention(tensors[:half], tensors[half:])


def gradients(function: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    out, lse = function(*inputs)
    arriving = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in (out, lse)]
    return [out, lse, *torch.autograd.grad([out, lse], inputs, arriving)]


def test_the_operators_register_as_pytorch_asks() -> None:
    outs_and_lses = leaves(3, layout="transposed")
    outs, lses = list(outs_and_lses[:3]), list(outs_and_lses[3:])
    torch.library.opcheck(torch.ops.prefix_kernels.merge.default, (outs, lses))
    outs, lses = ([x.detach() for x in tensors] for tensors in (outs, lses))
    dout, dlse = torch.randn_like(outs[0]), torch.randn_like(lses[0])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for arguments in (
        (dout, dlse, outs, lses, [True] * 6),
        (dout, None, [], lses, [True] * 3 + [False] * 3),
    ):
        torch.library.opcheck(torch.ops.prefix_kernels.merge_backward.default, arguments, test_utils=tests)


@pytest.mark.parametrize("sample", SAMPLES)
def test_fake_results_have_the_true_shapes_strides_and_dtypes_on_a_gpu_too(sample: str) -> None:
    parts = make_parts(**SAMPLES[sample], dtype=torch.bfloat16)
    count = len(parts.outs)
    # Its last dimension has stride 0.
    expanded = parts.dout[..., :1].expand(parts.dout.shape) if parts.dout.numel() else parts.dout

    def properties(*tensors: Tensor) -> list[tuple[object, ...]]:
        dout, expanded, dlse, *outs_and_lses = tensors
        outs, lses = outs_and_lses[:count], outs_and_lses[count:]
        results = [*merge(outs, lses), *merge([expanded] * count, lses)]
        for each in (dout, expanded):
            results += merge_backward(each, dlse, outs, lses, [True] * 2 * count)
        return [(x.shape, x.stride(), x.dtype) for x in results]

    tensors = (parts.dout, expanded, parts.dlse, *parts.outs, *parts.lses)
    with FakeTensorMode():
        fake = properties(*(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in tensors))
    assert fake == properties(*tensors)


def test_fake_parts_on_two_devices_are_refused() -> None:
    with FakeTensorMode():
        out = torch.empty(2, 4, device="cuda")
        with pytest.raises(ValueError, match=r"lses\[0\]: expected a tensor on cuda:0 like outs\[0\], got one on cpu"):
            merge([out], [torch.empty(2)])


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "poisoned"])
def test_compiled_without_graph_breaks(layout: str) -> None:
    torch._dynamo.reset()
    inputs = leaves(3, layout=layout)
    compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled, inputs), gradients(merged, inputs), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0.0, atol=0.0)


def test_compiled_inside_a_transform_and_around_one() -> None:
    torch._dynamo.reset()
    inputs = tuple(x.detach() for x in leaves(2))
    eager = merged(*inputs)
    compiled = torch.compile(torch.func.vmap(merged), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), eager)
    torch.testing.assert_close(torch.func.vmap(merged)(*inputs), eager)


def test_transforms_give_the_gradients_of_the_operator() -> None:
    inputs = leaves(2, dtype=torch.float64)
    sees_any = (inputs[2] > -torch.inf) | (inputs[3] > -torch.inf)

    def total(*tensors: Tensor) -> Tensor:
        out, lse = merged(*tensors)
        return (out.sin() * sees_any.unsqueeze(-1)).sum() + torch.where(sees_any, lse, 0.0).cos().sum()

    by_operator = torch.autograd.grad(total(*inputs), inputs)
    numbers = tuple(range(4))
    torch.testing.assert_close(torch.func.grad(total, numbers)(*(x.detach() for x in inputs)), by_operator)
    tangents = tuple(torch.ones_like(x) for x in inputs)
    directional = sum(gradient.sum() for gradient in by_operator)
    torch.testing.assert_close(torch.func.jvp(total, inputs, tangents)[1], directional)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x.detach(), t) for x, t in zip(inputs, tangents, strict=True)]
        tangent = torch.autograd.forward_ad.unpack_dual(total(*duals)).tangent
    torch.testing.assert_close(tangent, directional)
    out, _ = merged(*inputs)
    batch = torch.stack([torch.ones_like(out), torch.randn_like(out)])
    batched = torch.autograd.grad(out, inputs, batch, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, inputs, each, retain_graph=True) for each in batch]
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*one_by_one, strict=True))))


def test_only_the_gradients_that_are_asked_for() -> None:
    inputs = leaves(2)
    for wanted in itertools.product([True, False], repeat=4):
        if not any(wanted):
            continue
        chosen = tuple(x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True))
        for index in (0, 1):
            # The gradient of one result alone.
            asked = [x for x in chosen if x.requires_grad]
            got = torch.autograd.grad(merged(*chosen)[index].sin().nansum(), asked, allow_unused=True)
            full = torch.autograd.grad(merged(*inputs)[index].sin().nansum(), inputs, allow_unused=True)
            for ours, whole in zip(got, [x for x, want in zip(full, wanted, strict=True) if want], strict=True):
                assert (ours is None or not ours.any()) if whole is None else torch.equal(ours, whole)


def test_outs_are_kept_for_the_gradients_of_lses_alone() -> None:
    kept = []
    outs, lses = [torch.randn(2, 3, 4).requires_grad_() for _ in range(2)], [torch.randn(2, 3) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda _: None):
        merge_attention(outs, lses)
        assert kept == [(2, 3)] * 2
        kept.clear()
        merge_attention([x.detach() for x in outs], [lses[0], lses[1].requires_grad_()])
        assert kept == [(2, 3)] * 2 + [(2, 3, 4)] * 2


def test_more_parts_than_one_call_takes() -> None:
    count = 2 * MAX_PARTS + 3
    parts = make_parts(count, shape=(2, 3, 4), dtype=torch.float64)
    inputs = tuple(x.detach().requires_grad_() for x in (*parts.outs, *parts.lses))
    out, lse = merged(*inputs)
    torch.testing.assert_close([out, lse], expected(parts)[:2])
    actual = torch.autograd.grad([out, lse], inputs, [parts.dout, parts.dlse])
    torch.testing.assert_close(list(actual), expected(parts)[2:])


def test_lses_of_several_dtypes() -> None:
    parts = make_parts(3, dtype=torch.bfloat16)
    dtypes = (torch.float64, torch.float32, torch.float16)
    lses = [lse.to(dtype) for lse, dtype in zip(parts.lses, dtypes, strict=True)]
    out, lse = merge_attention(parts.outs, lses)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float64)
    same = Parts(parts.outs, [x.double() for x in lses], parts.dout, parts.dlse)
    torch.testing.assert_close(lse, expected(same)[1])
    computed = merge_backward(parts.dout, parts.dlse, parts.outs, lses, [True] * 6)
    assert [x.dtype for x in computed] == [torch.bfloat16] * 3 + list(dtypes)


def test_a_nan_of_an_lse_is_not_hidden() -> None:
    outs, lses = torch.ones(2, 3, 4), torch.zeros(2, 3)
    lses[1, 1] = torch.nan
    by_transform = torch.func.vmap(merged)(*outs, *lses)
    for out, lse in (merged(*outs, *lses), by_transform):
        assert out.isnan().all(-1).tolist() == lse.isnan().tolist() == [False, True, False]


def test_gradients_that_are_nan_stop_at_rows_that_see_nothing() -> None:
    outs = [torch.ones(2, 4).requires_grad_() for _ in range(2)]
    lses = [torch.tensor([0.0, -torch.inf]).requires_grad_() for _ in range(2)]
    arriving = [torch.tensor([[1.0], [torch.nan]]).expand(2, 4), torch.tensor([1.0, torch.nan])]
    for create_graph in (False, True):
        for gradient in torch.autograd.grad(
            merge_attention(outs, lses), [*outs, *lses], arriving, create_graph=create_graph
        ):
            assert (gradient[1] == 0).all() and (gradient[0] != 0).all()


def test_one_operator_does_it_and_its_work_is_counted() -> None:
    inputs = leaves(2)
    with torch.profiler.profile() as profile, FlopCounterMode(display=False) as counter:
        out, lse = merged(*inputs)
    names = {event.name for event in profile.events() if event.name.startswith(("aten::", "prefix_kernels::"))}
    assert "prefix_kernels::merge" in names and "aten::exp" not in names
    assert counter.get_total_flops() == 2 * 2 * out.numel()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad([out, lse], inputs, [out, torch.ones_like(lse)])
    assert counter.get_total_flops() == (2 + 2 * 2) * out.numel()


def test_sharded_parts() -> None:
    distributed = pytest.importorskip("torch.distributed.tensor")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        inputs = leaves(2)
        sharded = [distributed.distribute_tensor(x.detach(), mesh, [distributed.Shard(0)]) for x in inputs]
        for ours, expected in zip(merged(*sharded), merged(*inputs), strict=True):
            assert isinstance(ours, distributed.DTensor)
            torch.testing.assert_close(ours.full_tensor(), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_autocast_changes_nothing() -> None:
    inputs = leaves(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [x.dtype for x in merged(*inputs)] == [torch.float32, torch.float32]


def test_the_backward_operator_is_not_differentiable_by_itself() -> None:
    outs, lses = [torch.randn(2, 4)], [torch.randn(2)]
    gradient = merge_backward(torch.randn(2, 4).requires_grad_(), None, outs, lses, [True, True])[0]
    with pytest.raises(NotImplementedError, match="differentiate merge_attention twice, with create_graph=True"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dout": torch.zeros(2, 5)}, ValueError, r"outs\[0\]: expected \[2, 5\] on cpu like dout, got \[2, 4\]"),
        ({"dout": torch.zeros(2, 4).double()}, TypeError, r"outs\[0\]: expected Double like dout, got Float"),
        ({"dlse": torch.zeros(3)}, ValueError, r"dlse: expected \[2\] on cpu, .* of dout .*, got \[3\]"),
        ({"outs": []}, ValueError, "outs: expected 1 tensors for the gradients asked for, got 0"),
        ({"lses": []}, ValueError, "lses: expected 1 to 32 tensors, got 0"),
        ({"lses": [torch.zeros(2).long()]}, TypeError, "expected float64, float32, bfloat16 or float16, got Long"),
        ({"needs": [True]}, ValueError, "needs: expected 2 values for 1 lses, got 1"),
    ],
)
def test_tensors_that_the_backward_operator_cannot_take(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {
        "dout": torch.zeros(2, 4),
        "dlse": None,
        "outs": [torch.zeros(2, 4)],
        "lses": [torch.zeros(2)],
        "needs": [True, True],
    }
    with pytest.raises(error, match=message):
        merge_backward(**arguments | changes)


def test_tensors_that_the_operator_cannot_take() -> None:
    out, lse = torch.zeros(2, 4), torch.zeros(2)
    for outs, lses, message in (
        ([], [lse], "lses: expected as many as outs, got 1 for 0 outs"),
        ([out], [], "lses: expected as many as outs, got 0 for 1 outs"),
        ([out] * 33, [lse] * 33, "lses: expected 1 to 32 tensors, got 33"),
        ([lse.sum()], [lse.sum()], r"outs\[0\]: expected \[..., Dv\], got \[\]"),
        ([out, out[:1]], [lse, lse], r"outs\[1\]: expected \[2, 4\] on cpu like outs\[0\], got \[1, 4\]"),
        ([out, out], [lse, lse[:1]], r"lses\[1\]: expected \[2\] on cpu, the shape of outs\[0\] without"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(outs, lses)


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
        ([LSE.sum()], [LSE.sum()], ValueError, r"outs\[0\]: expected \[..., Dv\], got a tensor without dimensions"),
        ([OUT], [LSE[:1]], ValueError, r"lses\[0\]: expected \[2, 3\] on cpu, .*got \[1, 3\]"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    outs: object, lses: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        merge_attention(outs, lses)
