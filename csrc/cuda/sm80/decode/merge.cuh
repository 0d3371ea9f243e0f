// The results of the parts of a row's columns, merged in fixed order.
#pragma once

#include "params.cuh"

namespace prefix_kernels::cuda::sm80 {

// Merges the parts' results in their order, one warp per row.
template <typename Traits>
__global__ void __launch_bounds__(128) merge_kernel(const DecodeParams params) {
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim;
  const AttentionParams& p = params.attention;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (row >= p.batch * p.q_heads * p.q_len) return;
  const int64_t query = row % p.q_len, head = row / p.q_len % p.q_heads, batch = row / p.q_len / p.q_heads;
  const Share* const shares = params.partial_share + row * params.parts;
  // Nothing was written for a slot without a prefix.
  const auto exists = [&](int part) {
    const int slot = part / max(1, params.prefix_parts);
    return slot >= p.prefix_slots || params.prefix_parts == 0 || prefix_of_row(p, batch, slot) >= 0;
  };

  float most = minus_infinity(), sum = 0.0f;
  for (int part = 0; part < params.parts; ++part) {
    if (exists(part)) most = fmaxf(most, shares[part].maximum);
  }
  const float reference = most == minus_infinity() ? 0.0f : most;
  for (int part = 0; part < params.parts; ++part) {
    if (exists(part)) sum += shares[part].relative_to(reference);
  }
  const float factor = sum > 0.0f ? params.dropout_rescale / sum : 0.0f;
  if (lane == 0) {
    const RowResult result{factor, most, sum};
    static_cast<float*>(p.lse)[row] = result.lse();
    if (p.row_mass != nullptr) static_cast<float*>(p.row_mass)[row] = result.mass();
  }

  T* const out =
      static_cast<T*>(p.out.data) + batch * p.out.batch_stride + head * p.out.head_stride + query * p.out.row_stride;
  for (int column = lane; column < p.value_dim; column += kWarpSize) {
    float total = 0.0f;
    for (int part = 0; part < params.parts; ++part) {
      if (!exists(part)) continue;
      const float weight = shares[part].relative_to(reference);
      total += weight * params.partial_out[(row * params.parts + part) * kHeadDim + column];
    }
    out[column] = from_float<T>(total * factor);
  }
}

}  // namespace prefix_kernels::cuda::sm80
