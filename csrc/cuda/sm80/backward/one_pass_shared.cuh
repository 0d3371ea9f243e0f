// The shared memory of the one-pass kernel: two stages of query tiles, the block's keys and values, P and dS.
#pragma once

#include "columns_shared.cuh"
#include "one_pass_params.cuh"

namespace prefix_kernels::cuda::sm80 {

template <typename Traits>
struct OnePassShared {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  using Tiles = QueryTiles<kBlockM, kBlockN, false>;
  using Info = QueryInfo<kBlockM, Tiles>;

  struct TilePiece : SharedPiece<T, SharedTile<kHeadDim>::bytes(kBlockM), 4> {};
  struct ColumnsPiece : SharedPiece<T, SharedTile<kHeadDim>::bytes(kBlockN), 2> {};
  struct WeightsPiece : SharedPiece<T, SharedTile<kBlockN>::bytes(kBlockM), 2> {};
  struct InfoPiece : SharedPiece<Info, sizeof(Info), 2> {};
  struct TurnPiece : SharedPiece<Turn, sizeof(Turn), 2, 16> {};
  struct OwnerPiece : SharedPiece<ColumnsOwner, sizeof(ColumnsOwner), 1, 16> {};
  using Layout = SharedLayout<TilePiece, ColumnsPiece, WeightsPiece, InfoPiece, TurnPiece, OwnerPiece>;
  static constexpr int kBytes = Layout::kBytes;
  static_assert(kSharedGap > 0 || kBytes <= 163 * 1024, "what a block may have on compute capability 8.0");

  Layout layout;

  __device__ __forceinline__ void declare() const { layout.declare(); }
  // A tile of a stage; `which`: 0 the queries, 1 dout.
  __device__ __forceinline__ T* tile(int stage, int which) const {
    return layout.template at<TilePiece>(2 * stage + which);
  }
  // Rows [part * kBlockM, ...) of the block's keys (0) or values (1).
  __device__ __forceinline__ T* columns(int which, int part) const {
    return layout.template at<ColumnsPiece>(which) + part * kBlockM * kHeadDim;
  }
  // P (0) or dS (1) of the visit, kBlockM x kBlockN.
  __device__ __forceinline__ T* weights(int which) const { return layout.template at<WeightsPiece>(which); }
  __device__ __forceinline__ Info& info(int stage) const { return *layout.template at<InfoPiece>(stage); }
  __device__ __forceinline__ Turn& turn(int stage) const { return *layout.template at<TurnPiece>(stage); }
  __device__ __forceinline__ ColumnsOwner& owner() const { return *layout.template at<OwnerPiece>(); }
};

}  // namespace prefix_kernels::cuda::sm80
