// The prefix gradients from the float32 sums of several blocks. They are added in the blocks' order, so that the result
// repeats bit for bit.
#pragma once

#include "gradient_rows.cuh"

namespace prefix_kernels::cuda::sm80 {

struct ReduceParams {
  const float* partial;  // [num_prefixes, kv_heads, splits, prefix_len, kHeadDim]
  Operand gradient;      // [num_prefixes, kv_heads, prefix_len, head_dim]; of dprefix_value value_dim
  int64_t pairs;         // num_prefixes * kv_heads * prefix_len * kHeadDim / 2
  int kv_heads;
  int splits;
  int prefix_len;
  int head_dim;  // that of the gradient
  bool aligned_pairs;
};

inline constexpr int kReduceThreads = 128;

// Sums one pair of adjacent elements per thread.
template <int kHeadDim>
__global__ void __launch_bounds__(kReduceThreads) reduce_partial(const ReduceParams params) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (pair >= params.pairs) return;
  constexpr int kPairs = kHeadDim / 2;
  const int column = static_cast<int>(pair % kPairs) * 2;
  const int64_t row_index = pair / kPairs;
  const int row = static_cast<int>(row_index % params.prefix_len);
  const int64_t owner = row_index / params.prefix_len;

  const int64_t split_stride = static_cast<int64_t>(params.prefix_len) * kHeadDim;
  const float* partial =
      params.partial + owner * params.splits * split_stride + static_cast<int64_t>(row) * kHeadDim + column;
  float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 8
  for (int split = 0; split < params.splits; ++split) {
    const float2 x = *reinterpret_cast<const float2*>(partial + split * split_stride);
    sum.x += x.x;
    sum.y += x.y;
  }
  const HeadRows gradient(params.gradient, owner / params.kv_heads, owner % params.kv_heads, false);
  store_pair(const_cast<char*>(gradient.row(row)), params.gradient.dtype, column, params.head_dim, params.aligned_pairs,
             sum.x, sum.y);
}

}  // namespace prefix_kernels::cuda::sm80
