"""Cells that are measured on a GPU, most telling first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.common.cells import Cell

HEADS = ((12, 12, 64), (32, 8, 128), (16, 16, 256))  # Hq, Hkv, D: BERT and GPT-2, Llama 3, Gemma
LENGTHS = (512, 2048, 128, 1024, 8192, 4096, 16384)
PREFIX_LENS = (64, 16, 128, 2048)
BATCHES = (8, 1, 32)
TOKENS = 16384  # of a batch: B = TOKENS / S, from 1 to 32
PASSES = ("forward", "backward", "prefix_backward", "forward_backward")


def _square(
    heads: tuple[int, int, int], length: int, prefix_len: int, dtype: str, passes: tuple[str, ...], batch: int = 0
) -> Iterator[Cell]:
    batch = batch or max(1, min(32, TOKENS // length))
    for is_causal, pass_ in itertools.product((True, False), passes):
        yield Cell(batch, *heads, length, length, prefix_len, is_causal, pass_, dtype)


def _decode(batch: int, heads: tuple[int, int, int], k_len: int, prefix_len: int, dtype: str) -> Cell:
    return Cell(batch, *heads, 1, k_len, prefix_len, True, "decode", dtype)


def plan(dtype: str = "bfloat16") -> list[Cell]:
    """All cells, in the order in which they are measured: whoever stops early has the most telling ones.

    Every head layout at two lengths and in decoding; then the other lengths; then the other prefixes and batches.
    Forward and backward together, which is measured for its memory, comes last in each of these.
    """
    single, both = PASSES[:3], PASSES[3:]
    cells: list[Cell] = []

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
