"""Goals of the CPU kernels, and the cells of a table that miss them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.common.table import Row, geometric_mean

# Rows from which on a sequence or a prefix counts as long.
_LONG = 512
_HALF = ("bfloat16", "float16")
_ALL = ("float32", *_HALF)

_MEANING = {
    "cat_ratio": "times faster than torch.cat + SDPA",
    "alternative_ratio": "times faster than the alternative in plain PyTorch",
    "of_floor": "of the floor of its time",
    "dropout_cost": "times the time without dropout",
}


@dataclass(frozen=True)
class Goal:
    """A bound on a column: its mean or lowest value is at least ``target``, its highest value at most."""

    pass_: str
    dtypes: tuple[str, ...]
    column: str
    how: str  # mean, lowest or highest
    target: float
    is_causal: bool | None = None  # None: both
    is_long: bool | None = None  # the sequence; None: both
    is_prefix_long: bool | None = None

    def concerns(self, row: Row) -> bool:
        return (
            row["pass"] == self.pass_
            and row["dtype"] in self.dtypes
            and row[self.column] != ""
            and self.is_causal in (None, bool(int(row["causal"])))
            and self.is_long in (None, int(row["q_len"]) >= _LONG)
            and self.is_prefix_long in (None, int(row["prefix_len"]) >= _LONG)
        )

    def holds(self, value: float) -> bool:
        return value <= self.target if self.how == "highest" else value >= self.target

    def __str__(self) -> str:
        kind = {None: "", True: " causal", False: " full"}[self.is_causal]
        length = {None: "", True: f" S>={_LONG}", False: f" S<{_LONG}"}[self.is_long]
        prefix = {None: "", True: f" P>={_LONG}", False: f" P<{_LONG}"}[self.is_prefix_long]
        return f"{self.pass_}{kind}{length}{prefix}, {self.how} {_MEANING[self.column]}"


def _ratios(
    pass_: str, dtypes: tuple[str, ...], full: float | None, causal: float | None, alternative: float
) -> Iterator[Goal]:
    if full is not None:
        yield Goal(pass_, dtypes, "cat_ratio", "mean", full, is_causal=False)
    if causal is not None:
        yield Goal(pass_, dtypes, "cat_ratio", "mean", causal, is_causal=True)
    yield Goal(pass_, dtypes, "alternative_ratio", "lowest", alternative)


def _of_floor(
    pass_: str, dtypes: tuple[str, ...], long: float, short: float, is_causal: bool | None = None
) -> Iterator[Goal]:
    for is_long, target in ((True, long), (False, short)):
        yield Goal(pass_, dtypes, "of_floor", "lowest", target, is_causal, is_long)


GOALS = (
    *_ratios("forward", ("float32",), 2.0, 3.7, 1.2),
    Goal("forward", ("float32",), "cat_ratio", "lowest", 1.2),
    *_of_floor("forward", ("float32",), 0.82, 0.68, is_causal=False),
    *_of_floor("forward", ("float32",), 0.75, 0.60, is_causal=True),
    *_ratios("forward", ("bfloat16",), 3.2, 5.0, 2.0),
    *_ratios("forward", ("float16",), 2.0, 3.5, 2.0),
    *_of_floor("forward", _HALF, 0.75, 0.55),
    *_ratios("backward", ("float32",), 1.9, 3.2, 1.3),
    *_ratios("backward", ("bfloat16",), 3.0, 4.5, 1.3),
    *_of_floor("backward", ("float32",), 0.85, 0.70),
    *_of_floor("backward", ("bfloat16",), 0.60, 0.60),
    # The FLOPs of a long prefix bound what leaving out the others can win.
    Goal("prefix_backward", _ALL, "cat_ratio", "mean", 30.0, is_long=True, is_prefix_long=False),
    Goal("prefix_backward", _ALL, "cat_ratio", "mean", 18.0, is_long=False, is_prefix_long=False),
    Goal("prefix_backward", _ALL, "alternative_ratio", "lowest", 1.8),
    Goal("prefix_backward", _ALL, "of_floor", "lowest", 0.65),
    Goal("forward_backward", _ALL, "cat_ratio", "mean", 8.0),
    Goal("forward_backward", _ALL, "cat_ratio", "lowest", 5.0),
    Goal("forward_backward", _ALL, "dropout_cost", "highest", 1.12),
    Goal("decode", _ALL, "cat_ratio", "mean", 10.0),
    Goal("decode", _ALL, "alternative_ratio", "lowest", 3.0),
    Goal("decode", _ALL, "of_floor", "lowest", 0.80),
)


def _name(row: Row) -> str:
    heads = f"{row['q_heads']}/{row['kv_heads']}"
    kind = "causal" if int(row["causal"]) else "full"
    return f"({row['batch']},{heads},{row['k_len']},{row['prefix_len']},{row['head_dim']}) {kind}"


def judge(rows: Iterable[Row]) -> Iterator[str]:
    """A line for every goal and dtype that the rows are about, and one for every cell that misses it.

    Beside a ratio that misses its goal stands the ratio that ours would have at the floor of its time.
    """
    rows = list(rows)
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for goal in GOALS:
            chosen = [row for row in rows if row["dtype"] == dtype and goal.concerns(row)]
            if not chosen:
                continue
            combine = {"mean": geometric_mean, "lowest": min, "highest": max}[goal.how]
            values = [float(row[goal.column]) for row in chosen]
            verdict = f"{dtype} {goal}: {combine(values):.2f}, goal {goal.target:g} ({len(chosen)} cells)"
            if goal.holds(combine(values)):
                yield f"met    {verdict}"
                continue
            at_floor = [""] * len(chosen)
            if goal.column.endswith("_ratio"):
                best = [value / float(row["of_floor"]) for value, row in zip(values, chosen, strict=True)]
                verdict += f"; at the floor {combine(best):.2f}"
                at_floor = [f"; at the floor {value:.2f}" for value in best]
            yield f"MISSED {verdict}"
            below = zip(values, map(_name, chosen), at_floor, strict=True)
            for value, name, best_text in sorted(below):
                if not goal.holds(value):
                    yield f"         {value:6.2f}  {name}{best_text}"
