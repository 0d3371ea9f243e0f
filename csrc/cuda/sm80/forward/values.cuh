// The second product of a tile.
#pragma once

#include "../../common/softmax.cuh"
#include "shared.cuh"

namespace prefix_kernels::cuda::sm80 {

// out += P V'. `seen` has a bit per cell: those without it are left out.
template <typename Traits>
__device__ __forceinline__ void add_values(typename Traits::Out& out, const typename Traits::Scores& probabilities,
                                           unsigned seen, const typename Traits::T* values, int lane) {
  using T = typename Traits::T;
  const BlockReader<T, Traits::kHeadDim, Quarters::kDown> value(values, lane);
#pragma unroll
  for (int c = 0; c < Traits::kCells; ++c) {
    if ((seen >> c & 1) == 0) continue;
    uint32_t a[Traits::kRowBlocks][4];
#pragma unroll
    for (int m = 0; m < Traits::kRowBlocks; ++m) {
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
