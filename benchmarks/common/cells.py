"""A cell of a benchmark's grid: the shape, dtype and pass that are timed, and the work that they are at least."""

from __future__ import annotations

from dataclasses import dataclass

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
        """What the table calls them."""
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

    @property
    def needs(self) -> tuple[bool, ...]:
        """Which of query, key, value, prefix_key, prefix_value ask for a gradient."""
        if self.pass_ in ("forward", "decode"):
            return (False,) * 5
        return (False, False, False, True, True) if self.pass_ == "prefix_backward" else (True,) * 5

    @property
    def has_diagonal(self) -> bool:
        """Some query does not see some key of its sequence; one query alone sees every key of its cache."""
        return self.is_causal and self.q_len > 1

    def key_lengths(self) -> list[int]:
        """How many keys of each row are no padding: all in the first row, down to a little more than half."""
        padding = self.k_len if self.is_padded else 0
        return [self.k_len - row * padding // (2 * self.batch) for row in range(self.batch)]

    def flops(self) -> int:
        """Of the visible pairs of query and key."""
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
        """That must move between memory and chip at least: every operand and every result once, but no padding."""
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
    """The cells that fulfil every wish: ``pass=forward,decode`` or ``head_dim=64``, by columns of the table.

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
