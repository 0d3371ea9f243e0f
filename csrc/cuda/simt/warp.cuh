// What the simt kernels share: one warp works on one row, and its lanes hold the row's head dim in turn.
#pragma once

#include "../launch.h"
#include "elements.cuh"

namespace prefix_kernels::cuda::simt {

inline constexpr int kWarps = 4;                          // in a block; they share nothing
inline constexpr int kPerLane = kMaxHeadDim / kWarpSize;  // elements of a row that one lane holds

// The rows that this warp works on: for (Rows r(count); r.row < r.count; r.next()).
struct Rows {
  int64_t count;
  int64_t row;

  __device__ explicit Rows(int64_t count)
      : count(count), row(static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize) {}
  __device__ void next() { row += static_cast<int64_t>(gridDim.x) * kWarps; }
};

__device__ inline int lane() { return threadIdx.x % kWarpSize; }

// This warp's part of the block's shared memory, which holds `elements` for each warp.
template <class T>
__device__ T* warp_memory(int64_t elements) {
  return reinterpret_cast<T*>(shared_memory()) + threadIdx.x / kWarpSize * elements;
}

template <class T>
__device__ T warp_sum(T x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

template <class T>
__device__ T warp_max(T x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(~0u, x, distance);
    x = x < other ? other : x;
  }
  return x;
}

// Copies a row of an operand into shared memory, all lanes together.
template <class T>
__device__ void copy_row(T* target, const Operand& x, int64_t offset, int64_t head_dim) {
  for (int64_t d = lane(); d < head_dim; d += kWarpSize) target[d] = load<T>(x.data, x.dtype, offset + d);
}

// One lane's product of a row in shared memory with a row of an operand.
template <class T>
__device__ T product(const T* row, const Operand& x, int64_t offset, int64_t head_dim) {
  T sum = 0;
  for (int64_t d = 0; d < head_dim; ++d) sum += row[d] * load<T>(x.data, x.dtype, offset + d);
  return sum;
}

// sums[c] += sum over j < count of weights[j] * row j of the operand, at the elements that this lane holds. The sum
// over the 32 rows of a step is formed first: long sums then round less.
template <class T>
__device__ void add_weighted_rows(T (&sums)[kPerLane], const T* weights, int count, const Operand& x, int64_t offset,
                                  int64_t head_dim) {
#pragma unroll
  for (int c = 0; c < kPerLane; ++c) {
    const int64_t d = lane() + c * kWarpSize;
    if (d >= head_dim) break;
    T sum = 0;
    for (int j = 0; j < count; ++j) sum += weights[j] * load<T>(x.data, x.dtype, offset + j * x.row_stride + d);
    sums[c] += sum;
  }
}

// Writes the elements that the lanes hold, times a factor, as a row of an operand.
template <class T>
__device__ void store_row(const T (&sums)[kPerLane], T factor, const Operand& x, int64_t offset, int64_t head_dim) {
#pragma unroll
  for (int c = 0; c < kPerLane; ++c) {
    const int64_t d = lane() + c * kWarpSize;
    if (d < head_dim) store<T>(x.data, x.dtype, offset + d, factor * sums[c]);
  }
}

// Launches one warp per row, or fewer that take several rows each.
template <class Params>
void launch_rows(void (*kernel)(Params), int64_t rows, size_t bytes_per_warp, const Context& context,
                 const Params& params) {
  constexpr int64_t kMaxBlocks = int64_t{1} << 30;
  if (rows == 0) return;
  const int64_t blocks = (rows + kWarps - 1) / kWarps;
  launch(kernel, dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)), dim3(kWarps * kWarpSize),
         kWarps * bytes_per_warp, context.stream, params);
}

}  // namespace prefix_kernels::cuda::simt
