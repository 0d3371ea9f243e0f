// The shared memory of the rows kernel: two stages of key and value tiles, and the block's own queries.
#pragma once

#include "../../common/kv_tiles.cuh"
#include "../../common/shared_layout.cuh"
#include "rows_params.cuh"

namespace prefix_kernels::cuda::sm80 {

// The softmax reference, delta and visible columns of each query of the block.
template <int kBlockM>
struct RowInfo {
  float reference[kBlockM];  // softmax_reference(lse)
  float delta[kBlockM];
  int begin[kBlockM];  // visible columns of the sequence: [begin, end)
  int end[kBlockM];
  int prefix_begin[kBlockM];  // first visible column of the row's prefixes

  // The columns of a cell, counted from its first, that a query of the block sees. `slot_begin`: columns of the row's
  // prefixes that stand before the cell's slot, where a window counts them. kWindows: it may.
  template <bool kWindows>
  __device__ __forceinline__ Span visible(const Cell& cell, int slot_begin, int row) const {
    if (cell.segment == 0) return {begin[row] - cell.first, min(cell.count, end[row] - cell.first)};
    return {kWindows ? prefix_begin[row] - slot_begin - cell.first : 0, cell.count};
  }
};

// The queries that the block owns, and the cells that they see.
struct RowsOwner {
  int batch;
  int head;
  int first;
  int queries;  // number of queries, at most kBlockM
  VisitedCells cells;
};

template <typename T, int kHeadDim, bool kGeneral>
struct RowsShared {
  using Tile = RowsTile<kHeadDim, kGeneral>;
  using Info = RowInfo<Tile::kBlockM>;

  struct TilePiece : SharedPiece<T, SharedTile<kHeadDim>::bytes(Tile::kBlockN), 4> {};
  struct InfoPiece : SharedPiece<Info> {};
  struct OwnerPiece : SharedPiece<RowsOwner> {};
  struct DOutPiece : SharedPiece<T, SharedTile<kHeadDim>::bytes(Tile::kBlockM), !Tile::kDOutInRegisters> {};
  using Layout = SharedLayout<TilePiece, InfoPiece, OwnerPiece, DOutPiece>;
  static constexpr int kBytes = Layout::kBytes;
  static_assert(kSharedGap > 0 || kBytes <= 99 * 1024, "what a block may have on every GPU from sm_80 on");

  Layout layout;

  __device__ __forceinline__ void declare() const { layout.declare(); }
  // A tile of a stage; `which`: 0 the keys, 1 the values.
  __device__ __forceinline__ T* tile(int stage, int which) const {
    return layout.template at<TilePiece>(2 * stage + which);
  }
  __device__ __forceinline__ Info& info() const { return *layout.template at<InfoPiece>(); }
  __device__ __forceinline__ RowsOwner& owner() const { return *layout.template at<OwnerPiece>(); }
  // Memory of rows [part * kBlockN, ...) of the block's queries (0) or dout (1). Rows on their way to the registers use
  // the first stage before it is filled.
  __device__ __forceinline__ T* rows(int which, int part) const {
    if (which == 0 || Tile::kDOutInRegisters) return tile(which, part);
    return layout.template at<DOutPiece>() + part * Tile::kBlockN * kHeadDim;
  }
  // Row `row` of the block's queries (0) or dout (1).
  __device__ __forceinline__ T* row(int which, int row) const {
    return rows(which, row / Tile::kBlockN) + row % Tile::kBlockN * kHeadDim;
  }
  // Memory for the sums of warps that share queries, in place of the tiles.
  __device__ __forceinline__ float* parts() const {
    return layout.template reuse<TilePiece, float, kPartsBytes<kHeadDim, Tile::kTiles>>();
  }
};

}  // namespace prefix_kernels::cuda::sm80
