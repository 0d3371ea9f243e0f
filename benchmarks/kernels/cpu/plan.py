"""Cells that are measured on a CPU."""

from __future__ import annotations

import itertools

from benchmarks.common.cells import Cell

# B, Hq, Hkv, S, P, D.
SHAPES = (
    # BERT at the width of MiniLM and of bert-base, a longer text, two long ones.
    (16, 12, 12, 128, 20, 32),
    (8, 12, 12, 128, 20, 64),
    (2, 12, 12, 512, 20, 64),
    (1, 8, 8, 2048, 64, 64),
    (1, 8, 8, 2048, 64, 128),
    # Llama 3; short texts; lengths, heads and a head dimension that divide nothing; prefixes longer than the text.
    (4, 32, 8, 1024, 16, 128),
    (32, 12, 12, 64, 20, 64),
    (3, 14, 2, 777, 33, 80),
    (1, 8, 8, 512, 2048, 64),
    (1, 32, 8, 512, 2048, 128),
    # Fewer heads of keys than threads.
    (1, 4, 1, 2048, 64, 64),
)
PASSES = ("forward", "backward", "prefix_backward")
# B, Hq, Hkv, Sk, P, D.
DECODE = ((1, 32, 8, 2048, 20, 128), (16, 32, 8, 2048, 20, 128), (1, 8, 1, 16384, 20, 128))
# Training steps of a BERT with dropout and padding.
DROPOUT = ((8, 12, 12, 128, 20, 64), (16, 12, 12, 128, 20, 32), (4, 12, 12, 492, 20, 32))
DROPOUT_P = 0.1


def plan(dtype: str = "float32") -> list[Cell]:
    """All cells, in the order in which they are measured."""
    cells = []
    for shape, is_causal, pass_ in itertools.product(SHAPES, (False, True), PASSES):
        batch, q_heads, kv_heads, length, prefix_len, head_dim = shape
        cells.append(Cell(batch, q_heads, kv_heads, head_dim, length, length, prefix_len, is_causal, pass_, dtype))
    for batch, q_heads, kv_heads, k_len, prefix_len, head_dim in DECODE:
        cells.append(Cell(batch, q_heads, kv_heads, head_dim, 1, k_len, prefix_len, True, "decode", dtype))
    for batch, q_heads, kv_heads, length, prefix_len, head_dim in DROPOUT:
        shape = batch, q_heads, kv_heads, head_dim, length, length, prefix_len
        cells.append(Cell(*shape, False, "forward_backward", dtype, DROPOUT_P, is_padded=True))
    return cells


def one_of_each(cells: list[Cell]) -> list[Cell]:
    """The first cell of every pass, causal and not."""
    return list({(cell.pass_, cell.is_causal): cell for cell in reversed(cells)}.values())[::-1]
