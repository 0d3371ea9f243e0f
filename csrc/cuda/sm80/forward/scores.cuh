// The scores of one tile of keys: S = Q K'^T, final where Traits::kGeneral, else products whose scale is still to come.
//
//   interior tile  every row of the warp sees every column, and no mask adds to it: products, then scale and softcap
//   edge tile      cells that no row sees are left out, and columns hidden from a row are set to -inf
//   general tile   an edge tile whose scores also get scale, softcap and mask
#pragma once

#include "../../common/softmax.cuh"
#include "shared.cuh"

namespace prefix_kernels::cuda::sm80 {

// The queries of a warp as operands: in registers if they have room, else read from shared memory for every product.
template <typename Traits>
struct QueryOperand {
  using Reader = BlockReader<typename Traits::T, Traits::kHeadDim, Quarters::kDown>;
  static constexpr int kBlocksOfHead = Traits::kHeadDim / kCell;

  uint32_t blocks[Traits::kQueryInRegisters ? kBlocksOfHead : 1][Traits::kRowBlocks][4];

  __device__ __forceinline__ void keep(const Reader& reader) {
#pragma unroll
    for (int k = 0; k < kBlocksOfHead; ++k) {
#pragma unroll
      for (int m = 0; m < Traits::kRowBlocks; ++m) reader.load(blocks[k][m], m, k);
    }
  }

  // The k-th 16 columns of all row blocks.
  __device__ __forceinline__ void load(uint32_t (&a)[Traits::kRowBlocks][4], const Reader& reader, int k) const {
#pragma unroll
    for (int m = 0; m < Traits::kRowBlocks; ++m) {
      if constexpr (Traits::kQueryInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = blocks[k][m][i];
      } else {
        reader.load(a[m], m, k);
      }
    }
  }
};

template <typename Traits>
using KeyReader = BlockReader<typename Traits::T, Traits::kHeadDim, Quarters::kAcross>;

// Scores of an interior tile.
template <typename Traits>
__device__ __forceinline__ void interior_scores(typename Traits::Scores& scores, const QueryOperand<Traits>& query,
                                                const typename QueryOperand<Traits>::Reader& query_reader,
                                                const KeyReader<Traits>& key) {
  set_all(scores, 0.0f);
#pragma unroll
  for (int k = 0; k < Traits::kHeadDim / kCell; ++k) {
    uint32_t a[Traits::kRowBlocks][4];
    query.load(a, query_reader, k);
#pragma unroll
    for (int c = 0; c < Traits::kCells; ++c) {
      uint32_t b[4];
      key.load(b, c, k);
#pragma unroll
      for (int m = 0; m < Traits::kRowBlocks; ++m) {
        mma_block<typename Traits::T>(scores[m][2 * c], scores[m][2 * c + 1], a[m], b);
      }
    }
  }
}

// Makes scores final that nothing hides and no mask adds to.
template <int kRowBlocks, int kColumns>
__device__ __forceinline__ void finish_interior(float (&scores)[kRowBlocks][kColumns][4], float scale, float softcap) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[m][n][e] *= scale;
    }
  }
  if (!(softcap > 0)) return;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[m][n][e] = softcapped(scores[m][n][e], softcap);
    }
  }
}

// Notes the cells of a tile in the plan. One bit per cell: some row of the warp sees it.
template <typename Traits>
__device__ __forceinline__ unsigned find_cells(typename ForwardShared<Traits>::Plan& plan, const AttentionParams& p,
                                               const VisitedCells& cells, int first_cell, int lane) {
  bool is_seen = false;
  if (lane < Traits::kCells && first_cell + lane < cells.count) {
    plan.tile[lane] = cells.cell(p, first_cell + lane);
    is_seen = plan.view.some_row_sees(plan.tile[lane]);
  }
  const unsigned seen = __ballot_sync(kAllLanes, is_seen);
  __syncwarp();
  return seen;
}

// Tells if attn_mask has columns in the visited cells [first, end).
__device__ __forceinline__ bool mask_covers(const AttentionParams& p, const VisitedCells& cells, int end) {
  return p.mask.data != nullptr && (p.mask.prefix_columns > 0 || end > cells.prefix_cells);
}

// Notes in the plan a mask that all rows share, over the columns of a tile. One bit per cell: it is hidden altogether.
template <typename Traits>
__device__ __forceinline__ unsigned load_shared_mask(typename ForwardShared<Traits>::Plan& plan,
                                                     const AttentionParams& p, const BlockRows& rows,
                                                     const VisitedCells& cells, int first_cell, int lane) {
  unsigned all_hidden = 0;
#pragma unroll 1
  for (int column = lane; column < Traits::kColumns; column += kWarpSize) {
    const int c = column / kCell, in_cell = column % kCell;
    const bool exists = first_cell + c < cells.count && in_cell < plan.tile[c].count;
    const float bias =
        exists ? CellMask(p, plan.tile[c]).bias(rows.batch, rows.first_head, 0, in_cell) : minus_infinity();
    plan.bias[column] = bias;
    const unsigned attended = __ballot_sync(kAllLanes, bias > minus_infinity());
    const unsigned hidden = ((attended & 0xFFFFu) == 0 ? 1u : 0u) | ((attended >> 16) == 0 ? 2u : 0u);
    all_hidden |= hidden << (column / kWarpSize * 2);
  }
  __syncwarp();
  return all_hidden;
}

// Makes the scores of cell c final for one row of a thread in row block m, from index `from` on: 0 or 2.
template <typename Traits>
__device__ __forceinline__ void finish_row(typename Traits::Scores& scores, const ForwardParams& params,
                                           const typename ForwardShared<Traits>::Plan& plan, const BlockRows& rows,
                                           int m, int c, int from, const Cell& cell, Span seen, int warp_row,
                                           int lane) {
  float bias[kColumnsPerThread];
  if (params.shared_mask) {
#pragma unroll
    for (int k = 0; k < kColumnsPerThread; ++k) bias[k] = plan.bias[c * kCell + column_of(lane, k)];
  } else {
    const int row = min(warp_row + m * kCell + 4 * from + lane / 4, rows.last);
    CellMask(params.attention, cell).load(bias, rows.batch, rows.head(row), rows.query(row), cell.count, lane);
  }
  finish_scores(scores[m][2 * c], scores[m][2 * c + 1], from, params.scale, params.softcap, bias, seen, lane);
}

// Scores of an edge or general tile. `seen` has a bit per cell: those without it are left out.
template <typename Traits>
__device__ __forceinline__ void edge_scores(typename Traits::Scores& scores, const ForwardParams& params,
                                            const typename ForwardShared<Traits>::Plan& plan, const BlockRows& rows,
                                            unsigned seen, const QueryOperand<Traits>& query,
                                            const typename QueryOperand<Traits>::Reader& query_reader,
                                            const KeyReader<Traits>& key, int warp_row, int lane) {
  set_all(scores, minus_infinity());
#pragma unroll
  for (int c = 0; c < Traits::kCells; ++c) {
    if ((seen >> c & 1) == 0) continue;
#pragma unroll
    for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[m][2 * c][e] = scores[m][2 * c + 1][e] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / kCell; ++k) {
      uint32_t a[Traits::kRowBlocks][4], b[4];
      query.load(a, query_reader, k);
      key.load(b, c, k);
#pragma unroll
      for (int m = 0; m < Traits::kRowBlocks; ++m) {
        mma_block<typename Traits::T>(scores[m][2 * c], scores[m][2 * c + 1], a[m], b);
      }
    }
    const Cell cell = plan.tile[c];
#pragma unroll
    for (int m = 0; m < Traits::kRowBlocks; ++m) {
      const int row = m * kCell + lane / 4;
      const Span top = plan.views[row].in(cell), bottom = plan.views[row + 8].in(cell);
      if constexpr (Traits::kGeneral) {
        finish_row<Traits>(scores, params, plan, rows, m, c, 0, cell, top, warp_row, lane);
        finish_row<Traits>(scores, params, plan, rows, m, c, 2, cell, bottom, warp_row, lane);
      } else {
        hide_unseen(scores[m][2 * c], scores[m][2 * c + 1], top, bottom, lane);
      }
    }
  }
}

// Scores of tile j. One bit per cell: the cells that some row sees.
template <typename Traits>
__device__ __forceinline__ unsigned tile_scores(typename Traits::Scores& scores, const ForwardParams& params,
                                                typename ForwardShared<Traits>::Plan& plan, int j, bool is_run,
                                                const QueryOperand<Traits>& query,
                                                const typename QueryOperand<Traits>::Reader& query_reader,
                                                const KeyReader<Traits>& key, int warp_row, int lane) {
  const AttentionParams& p = params.attention;
  const VisitedCells& cells = plan.cells;
  const int first_cell = j * Traits::kCells, end_cell = first_cell + Traits::kCells;
  const bool is_seen_whole = plan.view.every_row_sees(cells, first_cell, end_cell);
  if (is_seen_whole && (!Traits::kMayDrop || is_run) && !(Traits::kGeneral && mask_covers(p, cells, end_cell))) {
    interior_scores(scores, query, query_reader, key);
    if constexpr (Traits::kGeneral) finish_interior(scores, params.scale, params.softcap);
    return (1u << Traits::kCells) - 1;
  }
  unsigned seen = find_cells<Traits>(plan, p, cells, first_cell, lane);
  if (Traits::kGeneral && params.shared_mask) {
    seen &= ~load_shared_mask<Traits>(plan, p, plan.rows, cells, first_cell, lane);
  }
  edge_scores(scores, params, plan, plan.rows, seen, query, query_reader, key, warp_row, lane);
  return seen;
}

}  // namespace prefix_kernels::cuda::sm80
