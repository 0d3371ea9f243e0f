"""Cells of a benchmark's grid: the shape, dtype and pass that are timed, and the least work that they take."""

from __future__ import annotations

from dataclasses import dataclass, replace

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Cell:
    """One row of the table. In a decode pass one query sees ``k_len`` keys of a cache."""

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    q_len: int
    k_len: int
    prefix_len: int
    is_causal: bool
    pass_: str
    dtype: str
    dropout_p: float = 0.0
    is_padded: bool = False

    def columns(self) -> dict[str, object]:
        """The cell's columns in the results table, by name."""
        return {
            "batch": self.batch,
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "q_len": self.q_len,
            "k_len": self.k_len,
            "prefix_len": self.prefix_len,
            "dtype": self.dtype,
            "dropout": self.dropout_p,
            "padded": int(self.is_padded),
            "causal": int(self.is_causal),
            "pass": self.pass_,
        }

    def one_head(self) -> Cell:
        """The same cell cut down to one batch row and one head of keys."""
        return replace(self, batch=1, q_heads=self.q_heads // self.kv_heads, kv_heads=1)

    @property
    def needs(self) -> tuple[bool, ...]:
        """Flags of query, key, value, prefix_key, prefix_value: the gradient is asked for."""
        if self.pass_ in ("forward", "decode"):
            return (False,) * 5
        return (False, False, False, True, True) if self.pass_ == "prefix_backward" else (True,) * 5

    @property
    def has_diagonal(self) -> bool:
        """True if causality hides keys: not from a single query, which sees every key of its cache."""
        return self.is_causal and self.q_len > 1

    def key_lengths(self) -> list[int]:
        """Keys of each batch row that are no padding: all in the first row, down to a little more than half."""
        padding = self.k_len if self.is_padded else 0
        return [self.k_len - row * padding // (2 * self.batch) for row in range(self.batch)]

    def flops(self) -> int:
        """Floating-point operations for the visible pairs of query and key."""
        shift = self.k_len - self.q_len
        if self.is_causal:
            lasts = range(shift + 1, self.k_len + 1)
            sequence = sum(max(0, min(length, last)) for length in self.key_lengths() for last in lasts)
        else:
            sequence = self.q_len * sum(self.key_lengths())
        prefix = self.batch * self.q_len * self.prefix_len
        per_pair = {"forward": 4, "decode": 4, "backward": 10, "forward_backward": 14}
        pairs = 8 * prefix if self.pass_ == "prefix_backward" else per_pair[self.pass_] * (prefix + sequence)
        return pairs * self.q_heads * self.head_dim

    def bytes(self) -> int:
        """Least traffic between memory and chip in bytes: every operand and result once, padding not counted."""
        size = _BYTES[self.dtype]
        queries = self.batch * self.q_heads * self.q_len * self.head_dim * size
        keys = sum(self.key_lengths()) * self.kv_heads * self.head_dim * size
        prefix = 2 * self.kv_heads * self.prefix_len * self.head_dim * size
        lse = self.batch * self.q_heads * self.q_len * 4
        forward = 2 * queries + 2 * keys + prefix + lse
        backward = 4 * queries + 4 * keys + 2 * prefix + lse  # reads query, out, dout; writes dquery
        return {
            "forward": forward,
            "decode": forward,
            "backward": backward,
            "forward_backward": forward + backward,
            "prefix_backward": 3 * queries + 2 * prefix + lse,
        }[self.pass_]


def select(cells: list[Cell], wishes: list[str]) -> list[Cell]:
    """The cells that fulfil every wish, such as ``pass=forward,decode`` or ``head_dim=64``, by columns of the table.

    Raises:
        ValueError: a wish names no column or only values that no cell has.
    """
    for wish in wishes:
        name, _, text = wish.partition("=")
        names = cells[0].columns()
        if name not in names:
            raise ValueError(f"--where: expected COLUMN=VALUE[,VALUE...], a column of {', '.join(names)}; got {wish!r}")
        values = text.split(",")
        chosen = [cell for cell in cells if str(cell.columns()[name]) in values]
        if not chosen:
            there = dict.fromkeys(str(cell.columns()[name]) for cell in cells)
            raise ValueError(f"--where {wish}: no cell left; {name} is one of {', '.join(there)}")
        cells = chosen
    return cells
