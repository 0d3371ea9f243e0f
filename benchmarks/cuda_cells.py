"""What is measured on a GPU: the cells of the grid, most telling first, and the work that each must do at least."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

HEADS = ((12, 12, 64), (32, 8, 128), (16, 16, 256))  # Hq, Hkv, D: BERT and GPT-2, Llama 3, Gemma
LENGTHS = (512, 2048, 128, 1024, 8192, 4096, 16384)
PREFIX_LENS = (64, 16, 128, 2048)
BATCHES = (8, 1, 32)
TOKENS = 16384  # of a batch: B = TOKENS / S, from 1 to 32
PASSES = ("forward", "backward", "prefix_backward", "forward_backward")
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class CudaCell:
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
    dtype: str = "bfloat16"

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
            "causal": int(self.is_causal),
            "pass": self.pass_,
        }

    @property
    def needs(self) -> tuple[bool, ...]:
        """Which of query, key, value, prefix_key, prefix_value ask for a gradient."""
        if self.pass_ in ("forward", "decode"):
            return (False,) * 5
        return (False, False, False, True, True) if self.pass_ == "prefix_backward" else (True,) * 5

    def flops(self) -> int:
        """Of the visible pairs of query and key."""
        sequence = self.q_len * self.k_len
        if self.is_causal:
            sequence -= self.q_len * (self.q_len - 1) // 2
        prefix = self.q_len * self.prefix_len
        per_pair = {"forward": 4, "decode": 4, "backward": 10, "forward_backward": 14}
        pairs = 8 * prefix if self.pass_ == "prefix_backward" else per_pair[self.pass_] * (prefix + sequence)
        return pairs * self.batch * self.q_heads * self.head_dim

    def bytes(self) -> int:
        """That must move between memory and chip at least: every operand and every result once."""
        size = _BYTES[self.dtype]
        queries = self.batch * self.q_heads * self.q_len * self.head_dim * size
        keys = self.batch * self.kv_heads * self.k_len * self.head_dim * size
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


def _square(
    heads: tuple[int, int, int], length: int, prefix_len: int, dtype: str, passes: tuple[str, ...], batch: int = 0
) -> Iterator[CudaCell]:
    batch = batch or max(1, min(32, TOKENS // length))
    for is_causal, pass_ in itertools.product((True, False), passes):
        yield CudaCell(batch, *heads, length, length, prefix_len, is_causal, pass_, dtype)


def _decode(batch: int, heads: tuple[int, int, int], k_len: int, prefix_len: int, dtype: str) -> CudaCell:
    return CudaCell(batch, *heads, 1, k_len, prefix_len, True, "decode", dtype)


def plan(dtype: str = "bfloat16") -> list[CudaCell]:
    """All cells, in the order in which they are measured: whoever stops early has the most telling ones.

    Every head layout at two lengths and in decoding; then the other lengths; then the other prefixes and batches.
    Forward and backward together, which is measured for its memory, comes last in each of these.
    """
    single, both = PASSES[:3], PASSES[3:]
    cells: list[CudaCell] = []

    def squares(lengths: tuple[int, ...], passes: tuple[str, ...]) -> None:
        for length, heads in itertools.product(lengths, HEADS):
            cells.extend(_square(heads, length, PREFIX_LENS[0], dtype, passes))

    squares(LENGTHS[:2], single)
    cells += [_decode(8, heads, 8192, 128, dtype) for heads in HEADS]
    squares(LENGTHS[:2], both)
    squares(LENGTHS[2:], single)
    squares(LENGTHS[2:], both)
    for passes in (single, both):
        for prefix_len, heads in itertools.product(PREFIX_LENS[1:], HEADS):
            cells += _square(heads, 1024, prefix_len, dtype, passes)
    cells += [
        _decode(batch, heads, k_len, prefix_len, dtype)
        for batch, heads, k_len, prefix_len in itertools.product(BATCHES, HEADS, (1024, 8192), (128, 2048))
    ]
    for batch, heads in itertools.product(BATCHES, HEADS):
        cells += _square(heads, 512, 64, dtype, PASSES, batch)
    return list(dict.fromkeys(cells))


def select(cells: list[CudaCell], wishes: list[str]) -> list[CudaCell]:
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
