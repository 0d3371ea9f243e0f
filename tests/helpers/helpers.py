"""What the operator's tests share: strided and poisoned inputs, one call run three ways, and the rule of tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefix_kernels.functional import prefix_attention
from prefix_kernels.reference import prefix_attention_reference

INPUT_NAMES = ("query", "key", "value", "prefix_key", "prefix_value")
LAYOUTS = ("contiguous", "transposed", "poisoned")


@contextmanager
def nan_filled() -> Iterator[None]:
    """Every tensor that the operator allocates without initialising it is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another place in memory.

    ``contiguous``; ``transposed``: dimensions -3 and -2 swapped, as ``[B, S, H, D]`` seen through a transpose;
    ``poisoned``: a slice of a larger tensor that is NaN everywhere else, with odd strides; ``aligned``: one whose rows
    begin at multiples of 16 bytes, where head_dim is a multiple of 8.
    """
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    *outer, rows, columns = tensor.shape
    before, extra = (8, 16) if layout == "aligned" else (2, 5)
    around = tensor.new_full((*outer, rows + 3, columns + extra), math.nan)
    inside = around[..., 1 : rows + 1, before : columns + before]
    inside.copy_(tensor)
    return inside


@dataclass
class Call:
    """One call of the operator, with the gradients that arrive at its two results."""

    inputs: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    dout: Tensor | None = None
    dlse: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs that are given."""
        return tuple(name for name in INPUT_NAMES if self.inputs[name] is not None)


@dataclass
class Result:
    """What one run of a call gave; ``grads`` holds None for every input that asked for no gradient."""

    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor | None]

    def tensors(self) -> dict[str, Tensor]:
        gradients = {f"d{name}": grad for name, grad in self.grads.items() if grad is not None}
        return {"out": self.out, "lse": self.lse, **gradients}


def make_call(
    batch: int = 2,
    q_heads: int = 2,
    kv_heads: int | None = None,
    q_len: int = 17,
    k_len: int | None = None,
    prefix_len: int | None = 5,
    num_prefixes: int | None = None,
    head_dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    prefix_dtype: torch.dtype | None = None,
    layout: str = "poisoned",
    seed: int = 0,
    with_dlse: bool = True,
    **options: Any,
) -> Call:
    """A call with normally distributed inputs.

    ``prefix_len=None`` is plain attention; ``num_prefixes=None`` is one prefix ``[Hkv, P, D]``, else a bank of that
    many. Rows of the bank beyond ``prefix_lens`` are NaN. ``value_dim`` is the head dim of the values, default that of
    the queries. ``options`` go to the operator as they are.
    """
    kv_heads = q_heads if kv_heads is None else kv_heads
    k_len = q_len if k_len is None else k_len
    value_dim = head_dim if value_dim is None else value_dim
    prefix_dtype = dtype if prefix_dtype is None else prefix_dtype
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs: dict[str, Tensor | None] = {
        "query": normal(batch, q_heads, q_len, head_dim),
        "key": normal(batch, kv_heads, k_len, head_dim),
        "value": normal(batch, kv_heads, k_len, value_dim),
        "prefix_key": None,
        "prefix_value": None,
    }
    if prefix_len is not None:
        bank = () if num_prefixes is None else (num_prefixes,)
        for name, columns in (("prefix_key", head_dim), ("prefix_value", value_dim)):
            prefix = normal(*bank, kv_heads, prefix_len, columns, dtype=prefix_dtype)
            if options.get("prefix_lens") is not None:
                for one, length in zip(prefix if bank else [prefix], options["prefix_lens"].tolist(), strict=True):
                    one[:, length:] = math.nan
            inputs[name] = prefix
    return Call(
        inputs={name: None if tensor is None else lay_out(tensor, layout) for name, tensor in inputs.items()},
        options=options,
        dout=normal(batch, q_heads, q_len, value_dim, dtype=torch.float64),
        dlse=normal(batch, q_heads, q_len, dtype=torch.float64) if with_dlse else None,
    )


def repeat_batch(call: Call, times: int) -> Call:
    """The batch rows of a call without options of their own, over and over: results too must repeat themselves."""

    def repeated(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat(times, *[1] * (tensor.dim() - 1))

    inputs = {name: repeated(tensor) for name, tensor in call.inputs.items()}
    return Call(inputs, call.options, repeated(call.dout), repeated(call.dlse))


def assert_repeats(many: Result, few: Result, times: int) -> None:
    """That the results are bit for bit those of the few rows that `repeat_batch` repeated."""
    for name, expected in few.tensors().items():
        got = many.tensors()[name].unflatten(0, (times, -1))
        assert torch.equal(got, expected.expand(times, *expected.shape)), name


def run(
    call: Call,
    function: Callable[..., Any] = prefix_attention,
    dtype: torch.dtype | None = None,
    needs: Iterable[str] | None = None,
) -> Result:
    """Forward and backward.

    Args:
        dtype: float64 converts every input to it; float32 those of float64, so that what is rounded further stays so.
        needs: names of the inputs that ask for a gradient; default: all that are given.
    """
    needs = call.names if needs is None else tuple(needs)
    leaves: dict[str, Tensor | None] = {}
    for name, tensor in call.inputs.items():
        leaf = None if tensor is None else tensor.detach()
        if leaf is not None and (dtype == torch.float64 or leaf.dtype == torch.float64):
            leaf = leaf.to(leaf.dtype if dtype is None else dtype)
        leaves[name] = leaf if leaf is None else leaf.requires_grad_(name in needs)
    out, lse = function(**leaves, **call.options, return_lse=True)
    arriving = [(out, call.dout)] if call.dlse is None else [(out, call.dout), (lse, call.dlse)]
    arriving = [(tensor, gradient.to(tensor.dtype)) for tensor, gradient in arriving if tensor.requires_grad]
    if arriving:
        torch.autograd.backward(*zip(*arriving, strict=True))
    grads = {name: None if leaf is None else leaf.grad for name, leaf in leaves.items()}
    return Result(out.detach(), lse.detach(), grads)


def _largest(*tensors: Tensor | None) -> float:
    """Largest finite magnitude among all elements."""
    return max((t.nan_to_num(0, 0, 0).abs().max().item() for t in tensors if t is not None and t.numel()), default=0.0)


def term_sizes(call: Call) -> dict[str, float]:
    """How large the terms are that each result is the sum of; what is left of them may be much smaller."""
    query, key, value, prefix_key, prefix_value = (
        None if call.inputs[name] is None else call.inputs[name].double().nan_to_num() for name in INPUT_NAMES
    )
    scale = call.options.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    kept = 1 - call.options.get("dropout_p", 0.0)
    rescale = 1 / kept if kept else 0.0

    def products(rows: Tensor, *operands: Tensor | None) -> float:
        return _largest(*(rows.flatten(0, -2) @ each.flatten(0, -2).T for each in operands if each is not None))

    scores = scale * products(query, key, prefix_key)
    mask = call.options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        scores += _largest(mask)
    dscores = scale * (rescale * products(call.dout.double(), value, prefix_value) + _largest(call.dlse))
    from_query, to_query = dscores * _largest(query), dscores * _largest(key, prefix_key)
    dvalue = rescale * _largest(call.dout)
    return {
        "out": rescale * _largest(value, prefix_value),
        "lse": scores,
        "dquery": to_query,
        "dkey": from_query,
        "dvalue": dvalue,
        "dprefix_key": from_query,
        "dprefix_value": dvalue,
    }


def assert_matches(ours: Result, exact: Result, eager: Result, call: Call, exp_error: float = 0.0) -> None:
    """Every result within ``2 * max|eager - exact| + atol`` of the oracle in float64, gradients within 3 times.

    Args:
        ours: what is tested; gradients that it does not have are not compared.
        exact: the oracle's results in float64.
        eager: the oracle's results in the call's dtypes, float32 in place of float64 (the error is then scaled down).
        call: what was run.
        exp_error: relative error of the exponential that was used in float32, where it is not rounded correctly.
    """
    dtype, sizes = call.inputs["query"].dtype, term_sizes(call)
    references, eagers = exact.tensors(), eager.tensors()
    for name, got in ours.tensors().items():
        # An empty batch does not reach the oracle's inputs.
        zeros = torch.zeros_like(got, dtype=torch.float64)
        references.setdefault(name, zeros), eagers.setdefault(name, zeros)
    for name, got in ours.tensors().items():
        want, plain = references[name], eagers[name].double()
        assert got.shape == want.shape, f"{name}: expected shape {list(want.shape)}, got {list(got.shape)}"
        got_dtype, got = got.dtype, got.double()
        unseen = want == -math.inf
        assert torch.equal(got == -math.inf, unseen), f"{name}: -inf elsewhere than in the oracle"
        got, want, plain = got[~unseen], want[~unseen], plain[~unseen]
        assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} of {got.numel()} values are not finite"

        coarsest = max((got_dtype, dtype), key=lambda each: torch.finfo(each).eps)
        eps = torch.finfo(coarsest).eps
        rounded = want.to(coarsest)
        atol = 2 * _largest((rounded + 0.3 - 0.3) - rounded)
        size = max(sizes[name], _largest(want))
        if eps < 1e-6 or want.numel() < 100 or _largest(want) < eps * size:
            # In float32 and float64 the largest error is a matter of the order of summation, in a small tensor one of
            # chance, and where terms cancel (a query that sees one key has no gradient) one of their size: the eager
            # error says little there, so four roundings of the largest term are granted.
            atol += 4 * (max(eps, exp_error) if coarsest == torch.float32 else eps) * size
        elif call.options.get("dropout_p"):
            # delta = rowsum(dout * out) is of the rounded out, which is not exactly a value when that is scaled.
            atol += eps * size
        eager_error = _largest(plain - want)
        if coarsest == torch.float64:
            eager_error *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        bound = (3 if name.startswith("d") else 2) * eager_error + atol
        error = _largest(got - want)
        assert error <= bound, (
            f"{name}: error {error:.3g} exceeds {bound:.3g} (eager {eager_error:.3g}, atol {atol:.3g})"
        )


def check(
    call: Call,
    needs: Iterable[str] | None = None,
    function: Callable[..., Any] = prefix_attention,
    exp_error: float = 0.0,
) -> Result:
    """Run the call with ``function`` and require the oracle's results; returns them for further questions."""
    ours = run(call, function, needs=needs)
    exact = run(call, prefix_attention_reference, torch.float64)
    eager = run(call, prefix_attention_reference, torch.float32)
    assert_matches(ours, exact, eager, call, exp_error)
    asked = call.names if needs is None else tuple(needs)
    for name, grad in ours.grads.items():
        assert (grad is not None) == (name in asked), f"d{name}: expected {'a' if name in asked else 'no'} gradient"
        if grad is not None:
            assert grad.dtype == call.inputs[name].dtype, (
                f"d{name}: expected {call.inputs[name].dtype}, got {grad.dtype}"
            )
    return ours
