// The results of a block's warps, merged in fixed order into the block's partial result.
#pragma once

#include "../../common/softmax.cuh"
#include "part.cuh"

namespace prefix_kernels::cuda::sm80 {

template <typename Traits>
struct WarpResults {
  static constexpr int kHeadDim = Traits::kHeadDim, kOut = 2 * kHeadDim / kCell;

  static __device__ __forceinline__ float* out_of(int row) { return Traits::results() + row * kHeadDim; }

  // Writes a warp's rows and their shares.
  static __device__ __forceinline__ void keep(const OnlineSoftmax<1, true>& softmax, const float (&out)[1][kOut][4],
                                              Share* shares, int warp, int lane) {
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      const int row = warp * kCell + half_row * 8 + lane / 4;
      const RowResult result = softmax.finish(0, half_row, 1.0f);
      if (lane % 4 == 0) shares[row] = {result.maximum, result.sum};
#pragma unroll
      for (int n = 0; n < kOut; ++n) {
        *reinterpret_cast<float2*>(out_of(row) + n * 8 + 2 * (lane % 4)) =
            make_float2(out[0][n][2 * half_row] * result.factor, out[0][n][2 * half_row + 1] * result.factor);
      }
    }
  }

  // Merges the results of the warps that share a tile of rows, and writes those of the block. `tiles`: of rows.
  static __device__ __forceinline__ void merge(const DecodeParams& params, const DecodePart& part,
                                               const DecodeRow* rows, const Share* shares, int tiles, int thread) {
    const AttentionParams& p = params.attention;
#pragma unroll 1
    for (int i = thread; i < part.row_count * (kHeadDim / 4); i += Traits::kThreads) {
      const int number_of_row = i / (kHeadDim / 4), column = i % (kHeadDim / 4) * 4;
      const DecodeRow& row = rows[number_of_row];
      float most = minus_infinity(), sum = 0.0f;
      // Index of this row in the results of warp w.
      const auto row_of = [&](int w) { return w * kCell + number_of_row % kCell; };
      const int first_warp = number_of_row / kCell;
      for (int w = first_warp; w < Traits::kWarps; w += tiles) most = fmaxf(most, shares[row_of(w)].maximum);
      float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int w = first_warp; w < Traits::kWarps && most > minus_infinity(); w += tiles) {
        const float weight = shares[row_of(w)].relative_to(most);
        const float4 from = *reinterpret_cast<const float4*>(out_of(row_of(w)) + column);
        sum += weight;
        total.x += weight * from.x;
        total.y += weight * from.y;
        total.z += weight * from.z;
        total.w += weight * from.w;
      }
      const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
      total = make_float4(total.x * factor, total.y * factor, total.z * factor, total.w * factor);
      const int before =
          part.is_prefix ? (row.segment - 1) * part.parts : static_cast<int>(p.prefix_slots) * params.prefix_parts;
      const int64_t result =
          ((row.batch * p.q_heads + row.head) * p.q_len + row.query) * params.parts + before + part.part;
      *reinterpret_cast<float4*>(params.partial_out + result * kHeadDim + column) = total;
      if (column == 0) params.partial_share[result] = {most, sum};
    }
  }
};

}  // namespace prefix_kernels::cuda::sm80
