// Stores of finished sums to rows of a gradient, in the gradient's own dtype.
#pragma once

#include "../../common/rows.cuh"

namespace prefix_kernels::cuda::sm80 {

// Tells if pairs of adjacent elements, the first at an even column, may be written at once.
inline bool has_aligned_pairs(const Operand& x, int64_t head_dim) {
  const int64_t any = x.batch_stride | x.head_stride | x.row_stride | head_dim;
  const uintptr_t pair = x.dtype == DType::kFloat64 ? 16 : x.dtype == DType::kFloat32 ? 8 : 4;
  return any % 2 == 0 && reinterpret_cast<uintptr_t>(x.data) % pair == 0;
}

// Stores columns `column` and `column` + 1 of a row, if they exist.
template <typename V>
__device__ __forceinline__ void store_pair(V* row, int column, int head_dim, bool aligned_pairs, float x, float y) {
  if (aligned_pairs) {
    if (column >= head_dim) return;
    if constexpr (sizeof(V) == 2) {
      *reinterpret_cast<uint32_t*>(row + column) = pack2<V>(x, y);
    } else if constexpr (sizeof(V) == 4) {
      *reinterpret_cast<float2*>(row + column) = make_float2(x, y);
    } else {
      *reinterpret_cast<double2*>(row + column) = make_double2(x, y);
    }
  } else {
    const auto finished = [](float value) {
      if constexpr (sizeof(V) == 8) {
        return static_cast<double>(value);
      } else {
        return from_float<V>(value);
      }
    };
    if (column < head_dim) row[column] = finished(x);
    if (column + 1 < head_dim) row[column + 1] = finished(y);
  }
}

__device__ __forceinline__ void store_pair(char* row, DType dtype, int column, int head_dim, bool aligned_pairs,
                                           float x, float y) {
  switch (dtype) {
    case DType::kFloat64:
      return store_pair(reinterpret_cast<double*>(row), column, head_dim, aligned_pairs, x, y);
    case DType::kFloat32:
      return store_pair(reinterpret_cast<float*>(row), column, head_dim, aligned_pairs, x, y);
    case DType::kBFloat16:
      return store_pair(reinterpret_cast<bfloat16*>(row), column, head_dim, aligned_pairs, x, y);
    default:
      return store_pair(reinterpret_cast<half*>(row), column, head_dim, aligned_pairs, x, y);
  }
}

// Stores the sums of a warp's kTiles x 16 rows, times `factor`, to rows [first, count) of `rows`.
template <typename V, int kHeadDim, int kTiles>
__device__ __forceinline__ void store_sums(V* rows, int64_t row_stride, bool aligned_pairs, int first, int count,
                                           int head_dim, float factor, const float (&sums)[kTiles][kHeadDim / 8][4],
                                           int lane) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const int row = first + tile * kCell + upper * 8 + lane / 4;
      if (row >= count) continue;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        store_pair(rows + row * row_stride, n * 8 + lane % 4 * 2, head_dim, aligned_pairs,
                   factor * sums[tile][n][2 * upper], factor * sums[tile][n][2 * upper + 1]);
      }
    }
  }
}

}  // namespace prefix_kernels::cuda::sm80
