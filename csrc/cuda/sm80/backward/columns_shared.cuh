// The shared memory of the columns kernel: two stages of query tiles, their rows' numbers, and the block's own columns.
#pragma once

#include "columns_params.cuh"
#include "query_tiles.cuh"

namespace prefix_kernels::cuda::sm80 {

inline constexpr int kNoColumn = 0x7FFFFFFF;

// The part of a stage beside its tiles: one entry for each query of the tile.
template <int kBlockM, typename Tiles>
struct QueryInfo {
  float reference[kBlockM];  // softmax_reference(lse)
  float delta[kBlockM];
  int begin[kBlockM];  // visible columns of the segment: [begin, end)
  int end[kBlockM];
  Tiles next;  // the visit after the tile's
  // The tile's ScoreCell, in general kernels.
  int first_query, head, segment, queries;
  const char* mask;  // result of mask_row
  uint64_t seed;
};

template <typename Traits>
struct ColumnsShared {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kBlockM = Traits::kBlockM, kStreams = Traits::kStreams;
  using Tiles = QueryTiles<kBlockM, Traits::kBlockN, Traits::kGeneral>;
  using Info = QueryInfo<kBlockM, Tiles>;
  static constexpr int kTileBytes = SharedTile<kHeadDim>::bytes(kBlockM);
  static constexpr int kTilesBytes = 2 * kStreams * (kTileBytes + kSharedGap);
  static constexpr int kInfoBytes = (sizeof(Info) + 127) / 128 * 128;
  static constexpr int kColumnsBytes = SharedTile<kHeadDim>::bytes(Traits::kBlockN);
  static constexpr bool kHasKey = !Traits::kKeyInRegisters;
  static constexpr bool kHasValue = Traits::kWantsDKey && !Traits::kValueInRegisters;
  static constexpr int kOwnerOffset = kTilesBytes + 2 * (kInfoBytes + kSharedGap);
  static constexpr int kOwnerBytes = 128;
  static_assert(sizeof(ColumnsOwner) <= kOwnerBytes);
  static constexpr int kKeyOffset = kOwnerOffset + kOwnerBytes + kSharedGap;
  static constexpr int kValueOffset = kKeyOffset + kHasKey * (kColumnsBytes + kSharedGap);
  static constexpr int kBytes = kValueOffset + kHasValue * (kColumnsBytes + kSharedGap);
  static_assert(kTilesBytes >= kPartsBytes<kHeadDim, Traits::kTiles>, "the warps' sums meet where the tiles were");
  static_assert(kSharedGap > 0 || kBytes <= 99 * 1024, "what a block may have on every GPU from sm_80 on");

  char* memory;

  // A tile of a stage; `which`: 0 the queries, 1 dout, 2 out.
  __device__ __forceinline__ T* tile(int stage, int which) const {
    return reinterpret_cast<T*>(memory + (kStreams * stage + which) * (kTileBytes + kSharedGap));
  }
  __device__ __forceinline__ Info& info(int stage) const {
    return *reinterpret_cast<Info*>(memory + kTilesBytes + stage * (kInfoBytes + kSharedGap));
  }
  __device__ __forceinline__ ColumnsOwner& owner() const {
    return *reinterpret_cast<ColumnsOwner*>(memory + kOwnerOffset);
  }
  // Memory of rows [part * kBlockM, ...) of the block's keys (0) or values (1). Rows on their way to the registers use
  // the first stage before it is filled.
  __device__ __forceinline__ T* columns(int which, int part) const {
    if (which == 0 ? !kHasKey : !kHasValue) return tile(which, part);
    return reinterpret_cast<T*>(memory + (which == 0 ? kKeyOffset : kValueOffset)) + part * kBlockM * kHeadDim;
  }
  // Row `row` of the block's keys (0) or values (1).
  __device__ __forceinline__ T* column(int which, int row) const {
    return columns(which, row / kBlockM) + row % kBlockM * kHeadDim;
  }
  __device__ __forceinline__ void declare() const {
    for (int i = 0; i < 2 * kStreams; ++i) shared_buffer(tile(i / kStreams, i % kStreams), kTileBytes);
    for (int i = 0; i < 2; ++i) shared_buffer(&info(i), kInfoBytes);
    shared_buffer(&owner(), kOwnerBytes);
    if (kHasKey) shared_buffer(columns(0, 0), kColumnsBytes);
    if (kHasValue) shared_buffer(columns(1, 0), kColumnsBytes);
  }
};

}  // namespace prefix_kernels::cuda::sm80
