"""Small calls that between them take every path of the kernels: what the mutations are tried on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import Call, make_call
from merge_samples import Parts, make_parts

ALL = ("query", "key", "value", "prefix_key", "prefix_value")
# Plain calls that want these form S and dP twice; those that want ALL in one pass.
TWO_PASSES = ("query", "key", "prefix_key", "prefix_value")

# The seam in the first tile, the diagonal through several, the last rows and columns in the middle of a cell.
CROSSING = {"batch": 1, "q_heads": 2, "kv_heads": 1, "q_len": 70, "k_len": 150, "prefix_len": 20, "is_causal": True}


# Each row hides another part of the prefix, and one of them both ends of its sequence.
PADDING = {"batch": 2, "q_heads": 2, "kv_heads": 1, "k_len": 150, "prefix_len": 20}


# Several tiles of rows, and the last of them not full.
FLOAT32_PREFIX = {"k_len": 20, "prefix_len": 150, "prefix_dtype": torch.float32}


def _shown() -> torch.Tensor:
    """The mask of PADDING."""
    shown = torch.zeros(2, 1, 1, 170, dtype=torch.bool)
    shown[0, ..., :10] = shown[1, ..., 18:] = shown[0, ..., 37:118] = True
    return shown


# Values wider than queries and keys, beside all of which lies NaN.
WIDE_VALUES = {"q_heads": 2, "kv_heads": 1, "k_len": 40, "prefix_len": 20, "head_dim": 24, "value_dim": 64}

# Two blocks of columns of each segment, one of whose prefixes a row names twice and another does not fill.
BANK = {
    "batch": 2,
    "q_heads": 2,
    "kv_heads": 1,
    "q_len": 33,
    "k_len": 140,
    "prefix_len": 140,
    "num_prefixes": 3,
    "prefix_ids": torch.tensor([[2, 0, 2], [-1, 1, 2]]),
    "prefix_lens": torch.tensor([20, 5, 140]),
}

# The first ten queries see nothing of the sequence, and the last row of the batch nothing else.
EXTENDING = {
    "q_heads": 2,
    "kv_heads": 1,
    "k_len": 20,
    "is_causal": True,
    "query_offset": -10,
    "num_prefixes": 2,
    "prefix_ids": torch.tensor([1, -1]),
}

# Probes on a GPU whose grids are so small that a warp of the float32 kernels takes rows of all heads and batch rows.
SMALL_GRIDS = {"float32 of several rows per warp"}

# Probes of extend_: the kernels add the prefixes to what the CPU found of the sequence.
IN_TWO_STEPS = {
    "forward that extends",
    "forward of a tiny scale that extends",
    "forward of wide values that extends",
    "float32 that extends",
}


def _half(needs: tuple[str, ...] = (), **options: object) -> tuple[Call, tuple[str, ...]]:
    options = {"head_dim": 64, "dtype": torch.float16, "layout": "aligned", **options}
    return make_call(**options), needs


def _least_float() -> tuple[Call, tuple[str, ...]]:
    """Rows of padding, all of whose probabilities are equal."""
    mask = torch.where(torch.arange(20)[:, None] < 5, torch.finfo(torch.float32).min, 0.0).expand(20, 170)
    return _half(ALL, **PADDING, q_len=20, attn_mask=mask)


PROBES: dict[str, Callable[[], tuple[Call, tuple[str, ...]]]] = {
    "forward": lambda: _half(**CROSSING),
    "forward of a window": lambda: _half(**CROSSING, window_size=(40, 0)),
    "forward with every option": lambda: _half(
        **CROSSING,
        attn_mask=torch.rand(70, 170, generator=torch.Generator().manual_seed(1)) < 0.8,
        dropout_p=0.2,
        dropout_seed=torch.tensor([5]),
        softcap=4.0,
    ),
    "forward of a mask over the sequence": lambda: _half(
        **CROSSING | {"is_causal": False},
        attn_mask=torch.rand(150, generator=torch.Generator().manual_seed(1)),
    ),
    "forward of dropout": lambda: _half(
        **CROSSING | {"prefix_len": 32, "is_causal": False}, dropout_p=0.2, dropout_seed=torch.tensor([5])
    ),
    "forward of odd rows": lambda: _half(q_len=33, k_len=40, head_dim=40, layout="poisoned"),
    "forward of a head dim of 40": lambda: _half(q_len=33, k_len=40, head_dim=40, layout="aligned"),
    "forward that sees nothing": lambda: _half(q_len=40, k_len=0, prefix_len=None),
    "forward of two prefixes": lambda: _half(
        q_len=20, prefix_len=35, num_prefixes=2, prefix_ids=torch.tensor([[1, 0], [0, -1]])
    ),
    "forward of a float32 prefix": lambda: _half(**FLOAT32_PREFIX, q_len=20),
    "forward of an odd float32 prefix": lambda: _half(**FLOAT32_PREFIX | {"layout": "poisoned"}, q_len=20),
    "decode of a float32 prefix": lambda: _half(**FLOAT32_PREFIX, q_len=2),
    "backward of a float32 prefix": lambda: _half(TWO_PASSES, **FLOAT32_PREFIX, q_len=20),
    "forward of padding": lambda: _half(**PADDING, q_len=70, attn_mask=_shown()),
    "decode of many heads": lambda: _half(
        batch=1, q_heads=5, kv_heads=1, q_len=14, k_len=90, prefix_len=20, is_causal=True
    ),
    "decode of a shared prefix": lambda: _half(batch=20, q_heads=2, kv_heads=1, q_len=1, k_len=20, prefix_len=300),
    "decode of padding": lambda: _half(**PADDING, q_len=2, attn_mask=_shown()),
    "decode": lambda: _half(
        batch=2,
        q_heads=4,
        kv_heads=2,
        q_len=1,
        k_len=600,
        prefix_len=20,
        num_prefixes=2,
        prefix_ids=torch.tensor([[1, -1], [0, 1]]),
    ),
    "backward": lambda: _half(TWO_PASSES, **CROSSING),
    "backward of a window": lambda: _half(TWO_PASSES, **CROSSING, window_size=(40, 0)),
    "backward with every option": lambda: _half(
        ALL,
        **CROSSING,
        attn_mask=torch.rand(70, 170, generator=torch.Generator().manual_seed(1)) < 0.8,
        dropout_p=0.2,
        dropout_seed=torch.tensor([5]),
        softcap=4.0,
    ),
    "backward of the least float": _least_float,
    "backward of padding": lambda: _half(ALL, **PADDING, q_len=70, attn_mask=_shown()),
    "backward of many rows to one prefix": lambda: _half(
        ("prefix_key", "prefix_value"), batch=5, q_heads=2, kv_heads=1, q_len=70, k_len=20, prefix_len=20
    ),
    "backward of a few columns": lambda: _half(TWO_PASSES, batch=2, q_heads=2, q_len=17, k_len=9, prefix_len=5),
    "backward of odd rows": lambda: _half(TWO_PASSES, q_len=33, k_len=40, head_dim=40, layout="poisoned"),
    "backward in one pass": lambda: _half(ALL, **CROSSING),
    "backward in one pass of wide values": lambda: _half(ALL, **WIDE_VALUES, q_len=33),
    "backward in one pass of a bank": lambda: _half(ALL, **BANK),
    "forward of wide values": lambda: _half(**WIDE_VALUES, q_len=33),
    "forward that extends": lambda: _half(**EXTENDING, q_len=70, prefix_len=20),
    "forward of a tiny scale that extends": lambda: _half(q_len=40, k_len=20, scale=1e-40),
    "forward of wide values that extends": lambda: _half(**WIDE_VALUES, q_len=33),
    "float32 that extends": lambda: (make_call(**EXTENDING, q_len=20, prefix_len=20, layout="aligned"), ()),
    "decode of wide values": lambda: _half(**WIDE_VALUES, q_len=2),
    "backward of wide values": lambda: _half(TWO_PASSES, **WIDE_VALUES, q_len=33),
    "float32 of wide values": lambda: (make_call(**WIDE_VALUES, q_len=20, layout="aligned"), ALL),
    "float32": lambda: (
        make_call(batch=2, q_heads=2, kv_heads=1, q_len=20, k_len=45, prefix_len=5, is_causal=True, layout="aligned"),
        ALL,
    ),
    # No query sees any of its sequence's last columns.
    "float32 of several rows per warp": lambda: (
        make_call(
            q_heads=4, kv_heads=2, q_len=5, k_len=40, attn_mask=(torch.arange(40) < 32).expand(5, 40), layout="aligned"
        ),
        ALL,
    ),
}

# Partial attentions to merge, beside whose rows lies NaN.
MERGES: dict[str, Callable[[], Parts]] = {
    "merge": lambda: make_parts(3, (2, 2, 3, 24), torch.bfloat16, "aligned"),
    "merge of odd rows": lambda: make_parts(2, (2, 2, 3, 19), torch.float32, "poisoned"),
}
