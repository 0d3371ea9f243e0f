// The rows of a forward block and of each of its warps, and the columns that they see.
#pragma once

#include "../../common/kv_tiles.cuh"

namespace prefix_kernels::cuda::sm80 {

// The queries and heads of a block's rows, all of one batch row and one key head.
struct BlockRows {
  int batch;
  int kv_head;
  int first_head;
  int pack;   // heads whose rows alternate, the head running fastest
  int first;  // number of the block's first row among all queries of these heads
  int last;   // last row that exists, counted from `first`

  __device__ __forceinline__ int query(int row) const { return pack == 1 ? first + row : (first + row) / pack; }
  __device__ __forceinline__ int head(int row) const {
    return pack == 1 ? first_head : first_head + (first + row) % pack;
  }
};

// The rows of block `number`. Blocks that share keys follow one another; of a causal head, those with the most columns
// come first. `row_tiles`: blocks of `block_rows` rows per (batch row, packed heads).
__device__ __forceinline__ BlockRows rows_of_block(const AttentionParams& p, int pack, int row_tiles, int block_rows,
                                                   int number) {
  const int packs = static_cast<int>(p.q_heads) / pack;
  const int tile_number = number % row_tiles, rest = number / row_tiles;
  BlockRows rows;
  rows.batch = rest / packs;
  rows.pack = pack;
  rows.first_head = rest % packs * pack;
  rows.kv_head = rows.first_head / (static_cast<int>(p.q_heads) / static_cast<int>(p.kv_heads));
  rows.first = (row_tiles - 1 - tile_number) * block_rows;
  rows.last = min(block_rows, static_cast<int>(p.q_len) * pack - rows.first) - 1;
  return rows;
}

// Visited cells that follow one another in one segment.
struct CellRun {
  bool exists = false;
  int segment = 0;
  int column = 0;  // first column of the first cell

  __device__ __forceinline__ CellRun() {}

  // Looks at the visited cells [first, first + count). Those behind the last are taken for the sequence's.
  __device__ __forceinline__ CellRun(const VisitedCells& cells, int first, int count) {
    if (first >= cells.prefix_cells) {
      exists = true;
      column = cells.sequence_begin + (first - cells.prefix_cells) * kCell;
    } else if (cells.prefixes.slots == 1 && first + count <= cells.prefix_cells) {
      exists = true;
      segment = 1;
      column = (cells.prefix_begin + first) * kCell;
    }
  }
};

// The columns that all rows of a warp see, and those that any of them sees.
struct WarpView {
  Span seen_by_all{0, 0};     // columns of the sequence
  Span seen_by_any{0, 0};     // columns of the sequence
  int prefix_cells_seen = 0;  // the first visited cells, those of which every row sees all 16 columns
  bool sees_prefix = false;

  __device__ __forceinline__ WarpView(const VisitedCells& cells, const QueryView& first, const QueryView& last) {
    seen_by_all = {last.sequence.begin, first.sequence.end};
    seen_by_any = {first.sequence.begin, last.sequence.end};
    sees_prefix = true;
    if (last.prefix_begin == 0) {
      prefix_cells_seen = cells.prefixes.full         ? cells.prefix_cells
                          : cells.prefixes.slots == 1 ? cells.prefixes.only_length / kCell
                                                      : 0;
    }
  }

  // The view of a warp without rows.
  __device__ __forceinline__ WarpView() {}

  __device__ __forceinline__ bool every_row_sees(const VisitedCells& cells, int begin, int end) const {
    const int from = cells.sequence_begin + (max(begin, cells.prefix_cells) - cells.prefix_cells) * kCell;
    const int to = cells.sequence_begin + (end - cells.prefix_cells) * kCell;
    const bool in_sequence = begin >= cells.prefix_cells;
    return end <= cells.count && (in_sequence || min(end, cells.prefix_cells) <= prefix_cells_seen) &&
           (end <= cells.prefix_cells || (from >= seen_by_all.begin && to <= seen_by_all.end));
  }

  __device__ __forceinline__ bool some_row_sees(const Cell& cell) const {
    if (cell.segment != 0) return sees_prefix && cell.count > 0;
    return cell.first + kCell > seen_by_any.begin && cell.first < seen_by_any.end;
  }
};

// A warp's decisions, made once. They are kept in shared memory, because the accumulators need the registers.
template <int kRows, int kCells, bool kMasked>
struct WarpPlan {
  BlockRows rows;
  VisitedCells cells;  // cells that the block visits
  WarpView view;
  Cell tile[kCells];  // cells of the current tile
  float
      bias[kMasked ? kCells * kCell : 1];  // a mask shared by all rows: the numbers that it adds to the tile's columns
  QueryView views[kRows];

  // Decides for the warp whose rows begin at `warp_row` of the block's.
  __device__ __forceinline__ void make(const AttentionParams& p, const BlockRows& block_rows, int warp_row, int lane) {
    const int64_t offset = row_query_offset(p, block_rows.batch);
    const VisitedCells visited(p, block_rows.batch, block_rows.query(0) + offset,
                               block_rows.query(block_rows.last) + offset);
    for (int row = lane; row < kRows; row += kWarpSize) {
      views[row] = QueryView(p, visited.prefixes, block_rows.query(warp_row + row) + offset);
    }
    __syncwarp();
    if (lane == 0) {
      const int last = min(kRows - 1, block_rows.last - warp_row);
      rows = block_rows;
      cells = visited;
      view = last >= 0 ? WarpView(visited, views[0], views[last]) : WarpView();
    }
    __syncwarp();
  }
};

}  // namespace prefix_kernels::cuda::sm80
