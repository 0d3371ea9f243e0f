// out += P V' of one tile; elements of P are dropped before, if any are.
#pragma once

#include "../../common/softmax.cuh"
#include "shared.cuh"

namespace prefix_kernels::cuda::sm80 {

// `seen` has a bit per cell: those without it are left out.
template <typename Traits>
__device__ __forceinline__ void add_values(typename Traits::Out& out, typename Traits::Scores& probabilities,
                                           const Cell* tile, unsigned seen, const typename Traits::T* values,
                                           const AttentionParams& p, const BlockRows& rows, uint64_t seed, int warp_row,
                                           int lane) {
  using T = typename Traits::T;
  const BlockReader<T, Traits::kHeadDim, Quarters::kDown> value(values, lane);
#pragma unroll
  for (int c = 0; c < Traits::kCells; ++c) {
    if ((seen >> c & 1) == 0) continue;
    uint32_t a[Traits::kRowBlocks][4];
#pragma unroll
    for (int m = 0; m < Traits::kRowBlocks; ++m) {
      if constexpr (Traits::kGeneral) {
        if (p.dropout_threshold > 0) {
          drop_out(probabilities[m][2 * c], probabilities[m][2 * c + 1], seed, p.dropout_threshold,
                   (rows.first + warp_row) / kCell + m, rows.batch * p.q_heads + rows.first_head, tile[c], lane);
        }
      }
      pack_operand<T>(a[m], probabilities[m][2 * c], probabilities[m][2 * c + 1]);
    }
#pragma unroll
    for (int n = 0; n < Traits::kHeadDim / kCell; ++n) {
      uint32_t b[4];
      value.load_transposed(b, c, n);
#pragma unroll
      for (int m = 0; m < Traits::kRowBlocks; ++m) mma_block<T>(out[m][2 * n], out[m][2 * n + 1], a[m], b);
    }
  }
}

}  // namespace prefix_kernels::cuda::sm80
