// The end of a forward warp: its sums become out, lse and row_mass.
#pragma once

#include "../../common/softmax.cuh"
#include "shared.cuh"

namespace prefix_kernels::cuda::sm80 {

// Writes finished rows into shared memory. Output takes the place of the warp's own queries, which no other warp reads;
// lse and, behind it, row_mass take the place of the rows' views, which are not read any more.
template <typename Traits>
__device__ __forceinline__ void finish_rows(const ForwardParams& params, float* lse,
                                            const OnlineSoftmax<Traits::kRowBlocks, Traits::kGeneral>& softmax,
                                            const typename Traits::Out& out, int warp_row, int lane) {
  using T = typename Traits::T;
  const AttentionParams& p = params.attention;
  const float rescale = Traits::kMayDrop ? static_cast<float>(dropout_rescale(p.dropout_threshold)) : 1.0f;
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      const int row = m * kCell + half_row * 8 + lane / 4;
      const RowResult result = softmax.finish(m, half_row, Traits::kGeneral ? 1.0f : params.scale);
      const float factor = result.factor * rescale;
#pragma unroll
      for (int n = 0; n < 2 * Traits::kHeadDim / kCell; ++n) {
        T* chunk = ForwardShared<Traits>::queries() + SharedTile<Traits::kHeadDim>::offset(warp_row + row, n);
        *reinterpret_cast<uint32_t*>(chunk + 2 * (lane % 4)) =
            pack2<T>(out[m][n][2 * half_row] * factor, out[m][n][2 * half_row + 1] * factor);
      }
      if (lane % 4 == 0) {
        lse[row] = result.lse();
        if (Traits::kGeneral) lse[Traits::kWarpRows + row] = result.mass();
      }
    }
  }
}

// Copies finished rows to global memory, in whole chunks.
template <typename Traits>
__device__ __forceinline__ void store_rows(const ForwardParams& params, const BlockRows& rows, const float* lse,
                                           int warp_row, int lane) {
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim, kLanes = kLanesPerRow<kHeadDim>;
  const AttentionParams& p = params.attention;
#pragma unroll 1
  for (int i = lane / kLanes; i < Traits::kWarpRows; i += kWarpSize / kLanes) {
    const int row = warp_row + i;
    if (row > rows.last) break;
    const int head = rows.head(row), query_number = rows.query(row);
    if (lane % kLanes == 0) {
      const int64_t index = (rows.batch * p.q_heads + head) * p.q_len + query_number;
      static_cast<float*>(p.lse)[index] = lse[i];
      if (Traits::kGeneral && p.row_mass != nullptr) {
        static_cast<float*>(p.row_mass)[index] = lse[Traits::kWarpRows + i];
      }
    }
    const HeadRows out_rows(p.out, rows.batch, head, params.aligned_out);
    T* const out_row = reinterpret_cast<T*>(const_cast<char*>(out_rows.row(query_number)));
#pragma unroll
    for (int chunk = lane % kLanes; chunk < kHeadDim / kChunk; chunk += kLanes) {
      store_chunk(out_row, ForwardShared<Traits>::queries() + SharedTile<kHeadDim>::offset(row, chunk), chunk * kChunk,
                  static_cast<int>(p.value_dim), params.aligned_out);
    }
  }
}

// Writes the results of a warp's rows. No copy may be on its way to the queries.
template <typename Traits>
__device__ __forceinline__ void write_results(const ForwardParams& params, typename ForwardShared<Traits>::Plan& plan,
                                              const OnlineSoftmax<Traits::kRowBlocks, Traits::kGeneral>& softmax,
                                              const typename Traits::Out& out, int warp_row, int lane) {
  static_assert(sizeof(plan.views) >= 2 * Traits::kWarpRows * sizeof(float), "lse and row_mass of the warp's rows");
  float* const lse = reinterpret_cast<float*>(plan.views);
  finish_rows<Traits>(params, lse, softmax, out, warp_row, lane);
  __syncwarp();
  store_rows<Traits>(params, plan.rows, lse, warp_row, lane);
}

}  // namespace prefix_kernels::cuda::sm80
