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
    return end <= cells.count && min(end, cells.prefix_cells) <= prefix_cells_seen &&
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
};

}  // namespace prefix_kernels::cuda::sm80
