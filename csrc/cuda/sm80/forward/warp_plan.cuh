// The rows of a forward block and of each of its warps, and the columns that they see.
#pragma once

#include "../../common/kv_tiles.cuh"

namespace prefix_kernels::cuda::sm80 {

// Which queries and heads a block's rows stand for: of one batch row and one key head.
struct BlockRows {
  int batch;
  int kv_head;
  int first_head;
  int pack;   // heads, running fastest
  int first;  // the block's first row, among all queries of these heads
  int last;   // its last row that exists, counted from the first

  __device__ __forceinline__ int query(int row) const { return pack == 1 ? first + row : (first + row) / pack; }
  __device__ __forceinline__ int head(int row) const {
    return pack == 1 ? first_head : first_head + (first + row) % pack;
  }
};

// What a warp's rows see: all of them, and any of them.
struct WarpView {
  Span seen_by_all{0, 0};     // columns of the sequence
  Span seen_by_any{0, 0};     // columns of the sequence
  int prefix_cells_seen = 0;  // visited cells, from the first on, of which every row sees 16 columns
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

  // A warp without rows.
  __device__ __forceinline__ WarpView() {}

  __device__ __forceinline__ bool every_row_sees(const VisitedCells& cells, int begin, int end) const {
    const int from = cells.sequence_begin + (max(begin, cells.prefix_cells) - cells.prefix_cells) * kCell;
    const int to = cells.sequence_begin + (end - cells.prefix_cells) * kCell;
    return end <= cells.count && min(end, cells.prefix_cells) <= prefix_cells_seen &&
           (end <= cells.prefix_cells || (from >= seen_by_all.begin && to <= seen_by_all.end));
  }

  __device__ __forceinline__ bool some_row_sees(const Cell& cell) const {
    if (cell.segment != 0) return sees_prefix && cell.count > 0;
    return cell.first + kCell > seen_by_any.begin && cell.first < seen_by_any.end;
  }
};

// What a warp decides once, kept in shared memory: registers are for the products.
template <int kRows, int kCells, bool kMasked>
struct WarpPlan {
  BlockRows rows;
  VisitedCells cells;  // of the block
  WarpView view;
  Cell tile[kCells];                         // the tile at hand,
  float bias[kMasked ? kCells * kCell : 1];  // and what a mask adds to its columns, where that is the same for all rows
  QueryView views[kRows];
};

}  // namespace prefix_kernels::cuda::sm80
