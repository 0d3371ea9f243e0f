// The shared memory of the columns kernel: two stages of query tiles, their rows' numbers, and the block's own columns.
#pragma once

#include "../../common/shared_layout.cuh"
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
  static constexpr bool kHasKey = !Traits::kKeyInRegisters;
  static constexpr bool kHasValue = Traits::kWantsDKey && !Traits::kValueInRegisters;

  static constexpr int kTileBytes = SharedTile<kHeadDim>::bytes(kBlockM);
  static constexpr int kColumnsBytes = SharedTile<kHeadDim>::bytes(Traits::kBlockN);
  struct TilePiece : SharedPiece<T, kTileBytes, 2 * kStreams> {};
  struct InfoPiece : SharedPiece<Info, sizeof(Info), 2> {};
  struct OwnerPiece : SharedPiece<ColumnsOwner> {};
  struct KeyPiece : SharedPiece<T, kColumnsBytes, kHasKey> {};
  struct ValuePiece : SharedPiece<T, kColumnsBytes, kHasValue> {};
  using Layout = SharedLayout<TilePiece, InfoPiece, OwnerPiece, KeyPiece, ValuePiece>;
  static constexpr int kBytes = Layout::kBytes;
  static_assert(kSharedGap > 0 || kBytes <= 99 * 1024, "what a block may have on every GPU from sm_80 on");

  Layout layout;

  __device__ __forceinline__ void declare() const { layout.declare(); }
  // A tile of a stage; `which`: 0 the queries, 1 dout, 2 out.
  __device__ __forceinline__ T* tile(int stage, int which) const {
    return layout.template at<TilePiece>(kStreams * stage + which);
  }
  __device__ __forceinline__ Info& info(int stage) const { return *layout.template at<InfoPiece>(stage); }
  __device__ __forceinline__ ColumnsOwner& owner() const { return *layout.template at<OwnerPiece>(); }
  // Memory of rows [part * kBlockM, ...) of the block's keys (0) or values (1). Rows on their way to the registers use
  // the first stage before it is filled.
  __device__ __forceinline__ T* columns(int which, int part) const {
    if (which == 0 ? !kHasKey : !kHasValue) return tile(which, part);
    return (which == 0 ? layout.template at<KeyPiece>() : layout.template at<ValuePiece>()) + part * kBlockM * kHeadDim;
  }
  // Row `row` of the block's keys (0) or values (1).
  __device__ __forceinline__ T* column(int which, int row) const {
    return columns(which, row / kBlockM) + row % kBlockM * kHeadDim;
  }
  // Memory for the sums of warps that share columns, in place of the tiles.
  __device__ __forceinline__ float* parts() const {
    return layout.template reuse<TilePiece, float, kPartsBytes<kHeadDim, Traits::kTiles>>();
  }
};

}  // namespace prefix_kernels::cuda::sm80
