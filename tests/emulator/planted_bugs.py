"""The bugs that `mutations.py` plants, one at a time, by kind."""

from __future__ import annotations

from mutation import (
    BACKWARD,
    COLUMNS,
    COLUMNS_BLOCK,
    DECODE,
    DECODE_MERGE,
    FORWARD,
    FORWARD_EPILOGUE,
    FORWARD_KERNEL,
    FORWARD_LOAD,
    ROWS,
    Mutation,
    backward,
    decode,
    float32,
    forward,
    merge,
    padding,
)
from planted_decode import DECODING
from planted_extend import EXTEND
from planted_one_pass import ONE_PASS
from planted_value_dims import HEAD_DIMS

KEY_BARRIER = (
    "    ptx::cp_async_wait<1>();\n    __syncthreads();  // all have key tile j, and none reads tile j - 1 any more\n"
)
VALUE_BARRIER = "    ptx::cp_async_wait<1>();\n    __syncthreads();  // all have value tile j\n"

BARRIERS = [
    forward("no barrier before keys are read", FORWARD_KERNEL, KEY_BARRIER, "    ptx::cp_async_wait<1>();\n"),
    forward("no barrier before values are read", FORWARD_KERNEL, VALUE_BARRIER, "    ptx::cp_async_wait<1>();\n"),
    forward(
        "no __syncwarp before the tile's cells are read",
        "sm80/forward/scores.cuh",
        "  __syncwarp();\n  return seen;\n",
        "  return seen;\n",
    ),
    forward(
        "without tiles, no barrier before the queries' copies are written over",
        FORWARD_KERNEL,
        "  __syncthreads();  // without any tile, other threads' copies of queries may still be under way\n",
        "",
        "forward that sees nothing",
    ),
    forward(
        "a barrier that warps without rows do not reach",
        FORWARD_KERNEL,
        KEY_BARRIER,
        "    ptx::cp_async_wait<1>();\n    if (plan.view.sees_prefix) __syncthreads();\n",
    ),
    backward(
        "columns: no barrier before a stage is read",
        COLUMNS,
        "      ptx::cp_async_wait<0>();\n      __syncthreads();\n      const Tiles& next",
        "      ptx::cp_async_wait<0>();\n      const Tiles& next",
    ),
    backward(
        "rows: no barrier before a stage is read",
        ROWS,
        "      __syncthreads();\n      if (cell + Tile::kCells < cells.count)",
        "      if (cell + Tile::kCells < cells.count)",
    ),
    backward(
        "warps' sums are added before they are written",
        "sm80/backward/warp_layout.cuh",
        "    }\n    __syncthreads();\n#pragma unroll\n    for (int i = 0; i < kPerLane; ++i) {\n      if (takes)",
        "    }\n#pragma unroll\n    for (int i = 0; i < kPerLane; ++i) {\n      if (takes)",
        "backward of a few columns",
    ),
    decode(
        "no __syncwarp before a cell is read",
        "      __syncwarp();\n",
        "      ;\n",
    ),
    decode(
        "no barrier before other warps' cells are read",
        "    else\n      __syncthreads();\n",
        "    else\n      __syncwarp();\n",
        "decode of a shared prefix",
    ),
    decode(
        "cells loaded over queries that are still read",
        "    __syncthreads();  // nobody reads the last stages any more\n",
        "",
    ),
    decode(
        "results written over cells that are still read", "  __syncthreads();  // nobody reads the ring any more\n", ""
    ),
    padding(
        "warps' spans are read before they are written",
        "  }\n  __syncthreads();\n  for (int warp",
        "  }\n  for (int warp",
    ),
    padding(
        "the sequence's spans over the prefixes' ones",
        "  __syncthreads();  // the memory's last readers are done\n",
        "",
    ),
    float32(
        "no __syncwarp before the weights are read",
        "simt/forward.cuh",
        "        __syncwarp();\n        for (T& x : out)",
        "        for (T& x : out)",
    ),
    float32(
        "the next query over one whose last columns are all hidden",
        "simt/forward.cuh",
        "a barrier behind.\n    __syncwarp();\n",
        "a barrier behind.\n",
        "float32 of several rows per warp",
    ),
    float32(
        "dquery: the next scores over those that are still read",
        "simt/backward.cuh",
        "        __syncwarp();  // the next step's scores replace these\n",
        "",
        "float32 of several rows per warp",
    ),
    float32(
        "dkey and dvalue: the next weights over those that are still read",
        "simt/backward.cuh",
        "          __syncwarp();  // the next step's weights replace these\n",
        "",
        "float32 of several rows per warp",
    ),
]

COPIES = [
    forward("a wait that leaves the keys on their way", FORWARD_KERNEL, KEY_BARRIER, KEY_BARRIER.replace("<1>", "<2>")),
    forward("no wait for the values", FORWARD_KERNEL, VALUE_BARRIER, VALUE_BARRIER.partition("\n")[2]),
    forward("the next keys into the buffer in use", FORWARD_KERNEL, "cells, j + 1, head_dim", "cells, j + 2, head_dim"),
    decode("the next cell into the stage in use", "load(i + kStages - 1);", "load(i + kStages);"),
    backward(
        "columns: the next stage into the one in use",
        COLUMNS,
        "if (more) fetch_queries(block, next, 1 - stage, arriving);",
        "if (more) fetch_queries(block, next, stage, arriving);",
    ),
    backward(
        "rows: no wait for a stage",
        ROWS,
        "      ptx::cp_async_wait<0>();\n      __syncthreads();\n      if (cell",
        "      __syncthreads();\n      if (cell",
    ),
    backward(
        "columns: the first stage over keys that are still read",
        COLUMNS_BLOCK,
        "  __syncthreads();  // nobody reads the stages any more\n",
        "",
        "backward",
        "backward of many rows to one prefix",
    ),
]

EDGES = [
    forward(
        "one column too many of a prefix",
        "common/kv_tiles.cuh",
        "max(0, min(kCell, prefixes.length(p, batch, slot) - column))",
        "max(0, min(kCell, prefixes.length(p, batch, slot) + 1 - column))",
    ),
    forward(
        "the sequence begins one cell late",
        "common/kv_tiles.cuh",
        "sequence_begin + (i - prefix_cells) * kCell;\n      return",
        "sequence_begin + (i + 1 - prefix_cells) * kCell;\n      return",
    ),
    forward("the diagonal one column to the right", "../visibility.h", "position + 1, 0,", "position + 2, 0,"),
    backward(
        "columns: the diagonal one column to the right",
        "sm80/backward/columns_step.cuh",
        "column >= info.end[row + query]",
        "column > info.end[row + query]",
    ),
    backward(
        "rows: the diagonal one column to the left",
        "sm80/backward/rows_shared.cuh",
        "min(cell.count, end[row]",
        "min(cell.count, end[row] - 1",
    ),
    forward("rows beyond the last are written", FORWARD_EPILOGUE, "    if (row > rows.last) break;\n", ""),
    forward("rows beyond the last are read", FORWARD_LOAD, "row <= rows.last;", "true;"),
    forward(
        "chunks beyond the head dim are read",
        "common/rows.cuh",
        "valid && (lane_of_row + chunk) * kChunk < head_dim",
        "valid",
        "forward of a head dim of 40",
    ),
    backward(
        "rows beyond the last are written",
        "sm80/backward/gradient_rows.cuh",
        "      if (row >= count) continue;\n",
        "",
    ),
    backward(
        "delta of rows beyond the last",
        "sm80/backward/delta.cuh",
        "  if (row < params.rows && lane == 0) params.delta",
        "  if (lane == 0) params.delta",
    ),
    padding(
        "the last column shown is taken for padding",
        "min(shown.begin, column), column + 1}",
        "min(shown.begin, column), column}",
    ),
    padding("columns of the prefix taken for the sequence's", "  row += mask.prefix_columns", "  row += 0"),
    forward(
        "a cell that padding leaves in part is not visited",
        "common/kv_tiles.cuh",
        "min((in_slot + more) / kCell",
        "min(in_slot / kCell",
        "forward of padding",
    ),
    decode(
        "padding: a prefix as the first of its rows sees it",
        "max(any.end, shown.end)}",
        "min(any.end, shown.end)}",
        "decode of padding",
        file="sm80/decode/entries.cuh",
    ),
    backward(
        "columns: a tile that padding leaves in part is not visited",
        "sm80/backward/query_tiles.cuh",
        "if (columns.end <= columns.begin)",
        "if (columns.end < owner.first + kBlockN)",
        "backward of padding",
    ),
    float32("one column too many", "simt/forward.cuh", "if (column < segment.end)", "if (column <= segment.end)"),
]

MEMORY = [
    forward(
        "shared memory for one value buffer too few",
        "sm80/forward/params.cuh",
        "kPlanOffset = kValueOffset + 2 * kTileStride",
        "kPlanOffset = kValueOffset + 1 * kTileStride",
    ),
    forward(
        "a launch with too little shared memory",
        "sm80/forward/params.cuh",
        "kSharedBytes = kPlanOffset + kWarps * kPlanStride",
        "kSharedBytes = kPlanOffset + (kWarps - 1) * kPlanStride",
    ),
    forward(
        "16-byte copies of rows that are not aligned",
        "common/rows.cuh",
        "return strides % (16 / dtype_bytes(x.dtype)) == 0 && head_dim % kChunk == 0 &&",
        "return strides != -1 ||",
        "forward of odd rows",
    ),
    forward(
        "16-byte loads of float32 rows that are aligned to 4 bytes",
        "common/rows.cuh",
        "return strides % (16 / dtype_bytes(x.dtype)) == 0 && head_dim % kChunk == 0 &&",
        "return x.dtype == DType::kFloat32 ||",
        "forward of an odd float32 prefix",
    ),
    Mutation(
        "decode: rows beyond the last of a prefix that is converted",
        "common/rows.cuh",
        "first + row(i) < count &&",
        "first + row(i) < count + kRows &&",
        DECODE,
        ("decode of a float32 prefix",),
    ),
    decode(
        "every block of an entry takes its first rows",
        "block % params.blocks_per_entry * Traits::kRows",
        "block % params.blocks_per_entry * 0",
        "decode of many heads",
        file="sm80/decode/part.cuh",
    ),
    decode(
        "rows of every tile merged from the first tile's warps",
        "first_warp = number_of_row / kCell;",
        "first_warp = 0;",
        "decode of a shared prefix",
        file="sm80/decode/warp_results.cuh",
    ),
    decode(
        "tiles of rows that do not divide the warps",
        "tiles * kCell < part.row_count) tiles *= 2;",
        "tiles * kCell < part.row_count) tiles += 1;",
        "decode of a shared prefix",
    ),
    decode(
        "a warp takes the cells of one ring alone",
        "ring = cell_lane; ring < kWarps; ring += cell_lanes",
        "ring = cell_lane; ring < kWarps; ring += kWarps",
        "decode of a shared prefix",
    ),
    decode("results of slots without a prefix", "(exists ? parts : 0)", "parts", file=DECODE_MERGE),
    decode("a row beyond those that there is memory for", "if (thread < kRows) {", "if (thread <= kRows) {"),
    backward(
        "columns: a tile copied over the end of its memory",
        "sm80/backward/columns_stage.cuh",
        """  copy_rows<T, kHeadDim, kBlockM, Traits::kThreads, true>(
      block.shared.tile(stage, 0)""",
        """  copy_rows<T, kHeadDim, kBlockM + 2 * kCell, Traits::kThreads, true>(
      block.shared.tile(stage, 0)""",
    ),
    backward(
        "rows: memory for one tile too few",
        "sm80/backward/rows_shared.cuh",
        "bytes(Tile::kBlockN), 4>",
        "bytes(Tile::kBlockN), 3>",
    ),
    decode("all parts write one partial result", "before + part.part;", "before;", file="sm80/decode/warp_results.cuh"),
    backward(
        "two splits write one partial sum",
        COLUMNS_BLOCK,
        "* owner.splits + owner.split;",
        "* owner.splits;",
        "backward of many rows to one prefix",
    ),
    backward(
        "a row of the partial sums that nobody writes",
        "sm80/backward/gradient_rows.cuh",
        "if (row >= count) continue;",
        "if (row + 1 >= count) continue;",
        "backward of many rows to one prefix",
    ),
]

ARITHMETIC = [
    forward(
        "quarters of an operand swapped",
        "common/shared_tile.cuh",
        "a[1] = pack2<T>(left[2], left[3])",
        "a[1] = pack2<T>(right[0], right[1])",
    ),
    forward(
        "halves of two operands swapped",
        "common/shared_tile.cuh",
        "b_left[2] = {b[0], b[1]}",
        "b_left[2] = {b[0], b[2]}",
    ),
    forward(
        "the second chunk under way stored over the first",
        "common/rows.cuh",
        "Tile::offset(row(i), chunk(i))) = chunks[i]",
        "Tile::offset(row(0), chunk(i))) = chunks[i]",
        "forward of a float32 prefix",
    ),
    # Both files hold the function that becomes wrong, and the linker takes one of the two.
    Mutation(
        "halves of a converted chunk swapped",
        "common/conversion.cuh",
        "pack2<T>(a.z, a.w), pack2<T>(b.x, b.y)",
        "pack2<T>(b.x, b.y), pack2<T>(a.z, a.w)",
        FORWARD + BACKWARD,
        ("forward of a float32 prefix", "backward of a float32 prefix"),
    ),
    decode(
        "a prefix's rows converted from the first of its part on",
        "source, first, part.end, lane",
        "source, part.begin, part.end, lane",
        "decode of a float32 prefix",
        file="sm80/decode/ring.cuh",
    ),
    backward(
        "the least float times log2(e)",
        "sm80/backward/scores.cuh",
        "exponent = (score - queries.reference[q]) * kLog2E;",
        "exponent = score * kLog2E - queries.reference[q] * kLog2E;",
        "backward of the least float",
    ),
    forward("an accumulator that starts as it is", FORWARD_KERNEL, "  set_all(out, 0.0f);\n", ""),
    forward(
        "dropout: a tile across the seam taken for one of the sequence",
        "sm80/forward/scores.cuh",
        "(!Traits::kMayDrop || is_run) && ",
        "",
        "forward of dropout",
    ),
    forward(
        "dropout: all cells of a tile as the first one",
        "sm80/forward/dropout.cuh",
        "column_group + 4 * c, run.segment",
        "column_group, run.segment",
        "forward of dropout",
    ),
    forward(
        "dropout: two neighbours by the same bits",
        "sm80/forward/dropout.cuh",
        "bits << 16 <= limit",
        "bits <= limit",
        "forward of dropout",
    ),
    forward(
        "a mask of the sequence that is not read",
        "sm80/forward/scores.cuh",
        "(p.mask.prefix_columns > 0 || end > cells.prefix_cells)",
        "p.mask.prefix_columns > 0",
        "forward of a mask over the sequence",
    ),
    backward("an accumulator that starts as it is", ROWS, "  clear(dquery);\n", ""),
    forward(
        "a shuffle that not all lanes reach",
        "common/softmax.cuh",
        "  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));",
        "  return x > 0 ? x : fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));",
    ),
    forward(
        "a row's sum over the wrong lanes",
        "common/softmax.cuh",
        "return x + __shfl_xor_sync(kAllLanes, x, 2);",
        "return x + __shfl_xor_sync(kAllLanes, x, 4);",
    ),
    forward(
        "the sum keeps its scale when the maximum grows",
        "common/softmax.cuh",
        "          sum_[m][half_row] *= shrink;\n",
        "",
    ),
    backward(
        "dropout of the neighbour's keys",
        "sm80/backward/scores.cuh",
        "e % 2 == odd",
        "e % 2 != odd",
        "backward with every option",
    ),
    backward("delta without dlse", "sm80/backward/delta.cuh", "params.dlse[row] : 0.0f", "0.0f : 0.0f"),
    backward(
        "a split left out of the sum",
        "sm80/backward/reduce.cuh",
        "int split = 0;",
        "int split = 1;",
        "backward of many rows to one prefix",
    ),
]

MERGING = [
    merge(
        "a sum over lanes that one lane alone comes to",
        "    dot = simt::warp_sum(dot);\n    if (lane() == i) own_dot = dot;\n",
        "    if (lane() == i) own_dot = simt::warp_sum(dot);\n",
    ),
    merge(
        "rows of a part that sees nothing are read",
        "if (weight == 0 || d >= p.value_dim) continue;",
        "if (d >= p.value_dim) continue;",
    ),
    merge(
        "elements behind the row's end are written",
        "    if (d >= p.value_dim) continue;\n    Elements result;",
        "    Elements result;",
    ),
    merge("an lse of +inf is a number", "      if (score == INFINITY) score = -INFINITY;\n", ""),
    merge("the gradient of lse without its mean", "(dot - mean + arriving)", "(dot + arriving)"),
]

MUTATIONS = [
    *(*BARRIERS, *COPIES, *EDGES, *MEMORY, *ARITHMETIC, *HEAD_DIMS, *EXTEND, *DECODING, *MERGING, *ONE_PASS),
]
