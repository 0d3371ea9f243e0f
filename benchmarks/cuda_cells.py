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


def _square(heads: tuple[int, int, int], length: int, prefix_len: int, dtype: str) -> Iterator[CudaCell]:
    batch = max(1, min(32, TOKENS // length))
    for is_causal, pass_ in itertools.product((True, False), PASSES):
        yield CudaCell(batch, *heads, length, length, prefix_len, is_causal, pass_, dtype)


def _decode(batch: int, heads: tuple[int, int, int], k_len: int, prefix_len: int, dtype: str) -> CudaCell:
    return CudaCell(batch, *heads, 1, k_len, prefix_len, True, "decode", dtype)


def plan(dtype: str = "bfloat16") -> list[CudaCell]:
    """All cells, in the order in which they are measured: whoever stops early has the most telling ones.

    Every head layout at two lengths and in decoding; then the other lengths; then the other prefixes and batches.
    """
    cells: list[CudaCell] = []
    for length, heads in itertools.product(LENGTHS[:2], HEADS):
        cells += _square(heads, length, PREFIX_LENS[0], dtype)
    cells += [_decode(8, heads, 8192, 128, dtype) for heads in HEADS]
    for length, heads in itertools.product(LENGTHS[2:], HEADS):
        cells += _square(heads, length, PREFIX_LENS[0], dtype)
    for prefix_len, heads in itertools.product(PREFIX_LENS[1:], HEADS):
        cells += _square(heads, 1024, prefix_len, dtype)
    cells += [
        _decode(batch, heads, k_len, prefix_len, dtype)
        for batch, heads, k_len, prefix_len in itertools.product(BATCHES, HEADS, (1024, 8192), (128, 2048))
    ]
    for batch, heads in itertools.product(BATCHES, HEADS):
        for is_causal, pass_ in itertools.product((True, False), PASSES):
            cells.append(CudaCell(batch, *heads, 512, 512, 64, is_causal, pass_, dtype))
    return list(dict.fromkeys(cells))
