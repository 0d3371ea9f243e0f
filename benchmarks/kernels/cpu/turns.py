"""Two builds of the CPU kernels, called in short turns on the same buffers, and the ratio of their times."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.common.cells import Cell
from benchmarks.common.contenders import difference, make_dout, make_inputs
from benchmarks.common.table import Row
from benchmarks.kernels.cpu.builds import Call, Kernels, Tensor

_DTYPES = ("float32", "bfloat16", "float16")
# Largest distance of the results of two builds, over the Euclidean norm; builds may sum in another order.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.02}
LEAST_PAIRS = 5


class Problem:
    """The buffers of one cell, and the call that both builds make on them.

    Raises:
        ValueError: the cell's dtype is not one that ``attention_forward<float>`` reads.
    """

    def __init__(self, cell: Cell, threads: int) -> None:
        if cell.dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {cell.dtype!r}")
        self.cell, self.threads = cell, threads
        self.forward = cell.pass_ in ("forward", "decode", "forward_backward")
        self.backward = cell.pass_ not in ("forward", "decode")
        torch.manual_seed(0)
        self._inputs = make_inputs(cell, "cpu")
        self._dout = make_dout(self._inputs[0])
        self._out = torch.empty_like(self._inputs[0])
        self._lse = torch.empty(cell.batch, cell.q_heads, cell.q_len)
        asked = cell.needs if self.backward else (False,) * 5
        self._gradients = [torch.empty_like(x) if need else None for x, need in zip(self._inputs, asked, strict=True)]
        lengths = torch.tensor(cell.key_lengths())
        self._key_mask = torch.arange(cell.k_len) < lengths[:, None] if cell.is_padded else None
        self.call = self._make_call()

    def _make_call(self) -> Call:
        cell, call = self.cell, Call()
        for name in ("batch", "q_heads", "kv_heads", "q_len", "k_len", "head_dim", "prefix_len", "is_causal"):
            setattr(call, name, int(getattr(cell, name)))
        call.dtype = _DTYPES.index(cell.dtype)
        call.dropout_threshold, call.dropout_seed = math.floor(cell.dropout_p * 65536 + 0.5), 1
        call.scale = cell.head_dim**-0.5
        call.key_mask = None if self._key_mask is None else self._key_mask.data_ptr()
        names = ("query", "key", "value", "prefix_key", "prefix_value")
        for name, tensor in zip((*names, "out", "dout"), (*self._inputs, self._out, self._dout), strict=True):
            setattr(call, name, _operand(tensor))
        for place, gradient in enumerate(self._gradients):
            call.gradients[place] = _operand(gradient)
        call.lse = self._lse.data_ptr()
        return call

    def results(self, kernels: Kernels) -> list[torch.Tensor]:
        """Copies of out, lse and the gradients of a build; an element that it does not write is NaN."""
        written = [self._out, self._lse, *(gradient for gradient in self._gradients if gradient is not None)]
        for tensor in written:
            tensor.fill_(math.nan)
        kernels.run(self.call, True, False, self.threads)
        if self.backward:
            kernels.run(self.call, False, True, self.threads)
        return [tensor.clone() for tensor in written]

    def time(self, kernels: Kernels, repeats: int) -> int:
        """Nanoseconds of ``repeats`` times the cell's pass: CPU time on one thread, wall time on several."""
        return kernels.run(self.call, self.forward, self.backward, self.threads, repeats)


def _operand(tensor: torch.Tensor | None) -> Tensor:
    """The tensor for the kernels; a prefix ``[heads, rows, head_dim]`` is the only one of its bank."""
    if tensor is None:
        return Tensor()
    strides = tensor.stride()
    return Tensor(tensor.data_ptr(), *((0, *strides) if tensor.dim() == 3 else strides)[:3])


@dataclass(frozen=True)
class Comparison:
    """Times of two builds in one cell.

    Attributes:
        base_ms, changed_ms: medians of a call's milliseconds.
        ratios: the base's time over the changed build's, of every pair of turns; above 1, the changed one is faster.
        difference: the largest distance of their results, over its norm; 0.0 if they are equal bit by bit.
    """

    base_ms: float
    changed_ms: float
    ratios: list[float]
    difference: float

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def middle_half(self) -> tuple[float, float]:
        """The quartiles of the ratios: how much one pair of turns differs from another."""
        first, _, third = statistics.quantiles(self.ratios, n=4)
        return first, third

    @property
    def interval(self) -> tuple[float, float]:
        """An interval of 95% confidence for the median, from the ranks of the ratios (a binomial of one half)."""
        ordered, count = sorted(self.ratios), len(self.ratios)
        reach = 0.98 * math.sqrt(count)
        low, high = math.floor(count / 2 - reach), math.ceil(count / 2 + reach)
        return ordered[max(0, low)], ordered[min(count - 1, high)]

    def columns(self) -> Row:
        """The comparison's columns in a table, by name."""
        return {
            "base_ms": f"{self.base_ms:.4f}",
            "changed_ms": f"{self.changed_ms:.4f}",
            "ratio": f"{self.ratio:.4f}",
            **{f"quartile_{n}": f"{bound:.4f}" for n, bound in zip((1, 3), self.middle_half, strict=True)},
            **{f"median_{end}": f"{bound:.4f}" for end, bound in zip(("low", "high"), self.interval, strict=True)},
            "pairs": len(self.ratios),
            "difference": f"{self.difference:.2g}",
        }


def compare(
    cell: Cell,
    base: Kernels,
    changed: Kernels,
    *,
    threads: int = 1,
    seconds: float = 3.0,
    turn_ms: float = 4.0,
    evict: Callable[[], object] | None = None,
) -> Comparison:
    """Time two builds in one cell.

    A turn is as many calls of one build as take about ``turn_ms``. Two turns make a pair, of which base begins every
    other one, so that whatever drifts more slowly than a pair, the clock rate or another process, slows both alike.

    Args:
        seconds: time for all pairs together, evictions included; at least `LEAST_PAIRS` pairs are made.
        evict: called before every turn, which then is a single call with empty caches.

    Raises:
        ValueError: the results of the builds differ by more than rounding.
    """
    problem = Problem(cell, threads)
    expected, got = problem.results(base), problem.results(changed)
    distance = 0.0
    if not all(map(torch.equal, got, expected)):
        distance = difference(got, expected)
        # Written so that NaN is refused.
        if not distance < _TOLERANCE[cell.dtype]:
            raise ValueError(f"the results of the two builds differ by {distance:.2g} of their size in {cell}")
    calls = 1
    if evict is None:
        once = min(problem.time(base, 1) for _ in range(3))
        calls = max(1, round(turn_ms * 1e6 / once))
    times: dict[Kernels, list[float]] = {base: [], changed: []}
    end = time.monotonic() + seconds
    while len(times[base]) < LEAST_PAIRS or time.monotonic() < end:
        first_is_base = len(times[base]) % 2 == 0
        for kernels in (base, changed) if first_is_base else (changed, base):
            if evict is not None:
                evict()
            times[kernels].append(problem.time(kernels, calls) / calls / 1e6)
    ratios = [one / other for one, other in zip(times[base], times[changed], strict=True)]
    return Comparison(statistics.median(times[base]), statistics.median(times[changed]), ratios, distance)
