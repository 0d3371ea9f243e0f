// delta = rowsum(dout * out) - dlse, with which ds = p (dp - delta): one value for each query of each head.
//
// A group of lanes reads a row 16 bytes a lane at a time and sums it by shuffles.
#pragma once

#include "../../common/rows.cuh"
#include "turns.cuh"

namespace prefix_kernels::cuda::sm80 {

struct DeltaParams {
  Operand out;        // [batch, q_heads, q_len, value_dim]
  Operand dout;       // like out
  const float* dlse;  // [batch, q_heads, q_len] contiguous; null: zero
  float* delta;       // like dlse
  int64_t rows;       // batch * q_heads * q_len
  int64_t q_heads;
  int64_t q_len;
  int value_dim;
  bool aligned_chunks;  // has_aligned_chunks of both out and dout
  Turns turns;          // cleared, unless sums is null
};

inline constexpr int kDeltaThreads = 128;

template <int kHeadDim>
inline constexpr int kDeltaLanes = kHeadDim <= 32    ? 4
                                   : kHeadDim <= 64  ? 8
                                   : kHeadDim <= 128 ? 16
                                                     : 32;

template <int kHeadDim>
inline constexpr int kDeltaRows = kDeltaThreads / kDeltaLanes<kHeadDim>;  // rows of a block

// The sum of the eight products of two chunks.
template <typename T>
__device__ __forceinline__ float chunk_product(const T* x, const T* y) {
  const uint4 a = *reinterpret_cast<const uint4*>(x), b = *reinterpret_cast<const uint4*>(y);
  const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = unpack2<T>(left[i]), v = unpack2<T>(right[i]);
    sum += u.x * v.x + u.y * v.y;
  }
  return sum;
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kDeltaThreads) row_delta(const DeltaParams params) {
  constexpr int kLanes = kDeltaLanes<kHeadDim>;
  const int lane = threadIdx.x % kLanes, column = lane * kChunk;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDeltaRows<kHeadDim> + threadIdx.x / kLanes;
  float sum = 0.0f;
  if (row < params.rows && column < params.value_dim) {
    const int64_t i = row % params.q_len, bh = row / params.q_len;
    const int64_t b = bh / params.q_heads, h = bh % params.q_heads;
    const auto at = [&](const Operand& x) {
      return static_cast<const T*>(x.data) + b * x.batch_stride + h * x.head_stride + i * x.row_stride;
    };
    const T *out = at(params.out), *dout = at(params.dout);
    if (params.aligned_chunks) {
      sum = chunk_product(out + column, dout + column);
    } else {
      const int end = min(column + kChunk, params.value_dim);
      for (int c = column; c < end; ++c) sum += to_float(out[c]) * to_float(dout[c]);
    }
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (params.turns.sums != nullptr && row < params.rows) {
    clear_turns<kHeadDim, kLanes>(params.turns, row / params.q_len, static_cast<int>(row % params.q_len),
                                  static_cast<int>(params.q_len), lane);
  }
  if (row < params.rows && lane == 0) params.delta[row] = sum - (params.dlse != nullptr ? params.dlse[row] : 0.0f);
}

}  // namespace prefix_kernels::cuda::sm80
