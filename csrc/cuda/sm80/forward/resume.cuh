// The start of a warp's online softmax from attention over other keys (AttentionParams::extends).
#pragma once

#include "../../common/softmax.cuh"
#include "shared.cuh"

namespace prefix_kernels::cuda::sm80 {

// Loads out and lse of the warp's rows as sums that its softmax goes on from; rows that do not exist or that saw
// nothing keep empty sums. The rows of out pass through the tiles of keys and values, one tile per warp, which no copy
// may be on its way to. The copies of the queries are there afterwards.
template <typename Traits>
__device__ __forceinline__ void resume_rows(const ForwardParams& params, const BlockRows& rows, int warp, int lane,
                                            OnlineSoftmax<Traits::kRowBlocks, Traits::kGeneral>& softmax,
                                            typename Traits::Out& out) {
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim, kLanes = kLanesPerRow<kHeadDim>;
  static_assert(Traits::kWarps == 4 && Traits::kWarpRows <= Traits::kColumns, "two tiles of keys and two of values");
  const AttentionParams& p = params.attention;
  const int warp_row = warp * Traits::kWarpRows;
  T* const tile = ForwardShared<Traits>::tile(warp);
#pragma unroll 1
  for (int i = lane / kLanes; i < Traits::kWarpRows; i += kWarpSize / kLanes) {
    const bool valid = warp_row + i <= rows.last;
    const int row = valid ? warp_row + i : 0;
    const HeadRows head(p.out, rows.batch, rows.head(row), params.aligned_out);
    copy_row<T, kHeadDim>(tile, i, head.row(rows.query(row)), kDTypeOf<T>, head.aligned_chunks, lane % kLanes,
                          static_cast<int>(p.value_dim), valid);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      const int i = m * kCell + half_row * 8 + lane / 4, row = warp_row + i;
      if (row > rows.last) continue;
      const int64_t index = (rows.batch * p.q_heads + rows.head(row)) * p.q_len + rows.query(row);
      const float lse = static_cast<const float*>(p.lse)[index];
      if (is_infinite(lse)) continue;
      softmax.resume(m, half_row, Traits::kGeneral ? lse : __fdividef(lse, params.scale), lane);
#pragma unroll
      for (int n = 0; n < 2 * Traits::kHeadDim / kCell; ++n) {
        const T* chunk = tile + SharedTile<kHeadDim>::offset(i, n);
        const float2 pair = unpack2<T>(*reinterpret_cast<const uint32_t*>(chunk + 2 * (lane % 4)));
        out[m][n][2 * half_row] = pair.x;
        out[m][n][2 * half_row + 1] = pair.y;
      }
    }
  }
}

}  // namespace prefix_kernels::cuda::sm80
