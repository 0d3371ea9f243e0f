// The shared memory of the rows kernel: two stages of key and value tiles, and the block's own queries.
#pragma once

#include "../../common/kv_tiles.cuh"
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
  static constexpr int kTileBytes = SharedTile<kHeadDim>::bytes(Tile::kBlockN);
  static constexpr int kTilesBytes = 4 * (kTileBytes + kSharedGap);
  static constexpr int kInfoBytes = (sizeof(Info) + 127) / 128 * 128;
  static constexpr int kRowsBytes = SharedTile<kHeadDim>::bytes(Tile::kBlockM);
  static constexpr int kOwnerOffset = kTilesBytes + kInfoBytes + kSharedGap;
  static constexpr int kOwnerBytes = 128;
  static_assert(sizeof(RowsOwner) <= kOwnerBytes);
  static constexpr int kDOutOffset = kOwnerOffset + kOwnerBytes + kSharedGap;
  static constexpr int kBytes = kDOutOffset + !Tile::kDOutInRegisters * (kRowsBytes + kSharedGap);
  static_assert(kTilesBytes >= kPartsBytes<kHeadDim, Tile::kTiles>, "the warps' sums meet where the tiles were");
  static_assert(kSharedGap > 0 || kBytes <= 99 * 1024, "what a block may have on every GPU from sm_80 on");

  char* memory;

  // A tile of a stage; `which`: 0 the keys, 1 the values.
  __device__ __forceinline__ T* tile(int stage, int which) const {
    return reinterpret_cast<T*>(memory + (2 * stage + which) * (kTileBytes + kSharedGap));
  }
  __device__ __forceinline__ Info& info() const { return *reinterpret_cast<Info*>(memory + kTilesBytes); }
  __device__ __forceinline__ RowsOwner& owner() const { return *reinterpret_cast<RowsOwner*>(memory + kOwnerOffset); }
  // Memory of rows [part * kBlockN, ...) of the block's queries (0) or dout (1). Rows on their way to the registers use
  // the first stage before it is filled.
  __device__ __forceinline__ T* rows(int which, int part) const {
    if (which == 0 || Tile::kDOutInRegisters) return tile(which, part);
    return reinterpret_cast<T*>(memory + kDOutOffset) + part * Tile::kBlockN * kHeadDim;
  }
  // Row `row` of the block's queries (0) or dout (1).
  __device__ __forceinline__ T* row(int which, int row) const {
    return rows(which, row / Tile::kBlockN) + row % Tile::kBlockN * kHeadDim;
  }
  __device__ __forceinline__ void declare() const {
    for (int i = 0; i < 4; ++i) shared_buffer(tile(i / 2, i % 2), kTileBytes);
    shared_buffer(&info(), kInfoBytes);
    shared_buffer(&owner(), kOwnerBytes);
    if (!Tile::kDOutInRegisters) shared_buffer(rows(1, 0), kRowsBytes);
  }
};

}  // namespace prefix_kernels::cuda::sm80
