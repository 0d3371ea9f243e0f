"""Bugs of calls whose values have a head dim of their own."""

from __future__ import annotations

from mutation import COLUMNS_BLOCK, FORWARD_EPILOGUE, FORWARD_KERNEL, backward, decode, float32, forward

HEAD_DIMS = [
    forward(
        "values copied by the keys' head dim",
        FORWARD_KERNEL,
        "cells, j + 1, value_dim",
        "cells, j + 1, head_dim",
        "forward of wide values",
    ),
    forward(
        "keys copied by the values' head dim",
        FORWARD_KERNEL,
        "cells, j + 1, head_dim",
        "cells, j + 1, value_dim",
        "forward of wide values",
    ),
    forward(
        "out stored by the queries' head dim",
        FORWARD_EPILOGUE,
        "static_cast<int>(p.value_dim), params.aligned_out",
        "static_cast<int>(p.head_dim), params.aligned_out",
        "forward of wide values",
    ),
    decode(
        "values copied by the keys' head dim",
        "copy_cell(stage(warp, i) + kValues, values, static_cast<int>(p.value_dim)",
        "copy_cell(stage(warp, i) + kValues, values, static_cast<int>(p.head_dim)",
        "decode of wide values",
        file="sm80/decode/ring.cuh",
    ),
    decode(
        "out stored by the queries' head dim",
        "column + i < params_.attention.value_dim)",
        "column + i < params_.attention.head_dim)",
        "decode of wide values",
        file="sm80/decode/merge.cuh",
    ),
    backward(
        "rows: values copied by the keys' head dim",
        "sm80/backward/rows_stage.cuh",
        "aligned.prefix_value, 1, p.value_dim)",
        "aligned.prefix_value, 1, p.head_dim)",
        "backward of wide values",
    ),
    backward(
        "columns: queries copied by dout's head dim",
        "sm80/backward/columns_stage.cuh",
        "aligned.query), first, q_len, head_dim)",
        "aligned.query), first, q_len, value_dim)",
        "backward of wide values",
    ),
    backward(
        "columns: dvalue stored by the keys' head dim",
        COLUMNS_BLOCK,
        "static_cast<int>(p.value_dim), params.partial_dvalue",
        "static_cast<int>(p.head_dim), params.partial_dvalue",
        "backward of wide values",
    ),
    backward(
        "columns: dkey stored by the values' head dim",
        COLUMNS_BLOCK,
        "kDPrefixKey : kDKey, static_cast<int>(p.head_dim)",
        "kDPrefixKey : kDKey, static_cast<int>(p.value_dim)",
        "backward of wide values",
    ),
    backward(
        "delta over the queries' head dim",
        "sm80/backward/launch.cuh",
        "params.value_dim = static_cast<int>(p_.value_dim);",
        "params.value_dim = static_cast<int>(p_.head_dim);",
        "backward of wide values",
    ),
    float32(
        "out stored by the queries' head dim",
        "simt/forward.cuh",
        "q.head, q.index), value_dim);",
        "q.head, q.index), head_dim);",
        "float32 of wide values",
    ),
    float32(
        "no memory for the wider row",
        "simt/backward.cuh",
        "launch_rows(dquery_kernel<T>, query_grid(p), (p.head_dim + p.value_dim + kWarpSize)",
        "launch_rows(dquery_kernel<T>, query_grid(p), (2 * p.head_dim + kWarpSize)",
        "float32 of wide values",
    ),
]
