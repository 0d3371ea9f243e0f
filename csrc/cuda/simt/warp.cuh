// The helpers of the simt kernels: one warp works on one row, and its lanes hold the row's head dim in turn.
#pragma once

#include "../launch.h"
#include "elements.cuh"

namespace prefix_kernels::cuda::simt {

inline constexpr int kWarps = 4;      // warps in a block, which share nothing
inline constexpr int kMinBlocks = 1;  // blocks per SM; without this bound ptxas spills registers to fit more
inline constexpr int kPerLane = kMaxHeadDim / kWarpSize;  // elements of a row that one lane holds

// A grid of [outers, heads, rows] rows: of queries, or of the columns of sequences or prefixes.
struct RowGrid {
  int64_t outers;
  int64_t heads;
  int64_t rows;
};

// Calls visit(outer, head, row) for the rows that this warp works on.
template <class Visit>
__device__ void for_each_row(const RowGrid& grid, Visit visit) {
  for (int64_t outer = blockIdx.z; outer < grid.outers; outer += gridDim.z)
    for (int64_t head = blockIdx.y; head < grid.heads; head += gridDim.y)
      for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; row < grid.rows;
           row += static_cast<int64_t>(gridDim.x) * kWarps)
        visit(outer, head, row);
}

__device__ inline int lane() { return threadIdx.x % kWarpSize; }

// This warp's part of the block's shared memory, which holds `elements` for each warp.
template <class T>
__device__ T* warp_memory(int elements) {
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
__device__ void copy_row(T* target, const Operand& x, int64_t offset, int head_dim) {
  with_type(x.data, x.dtype, [&](const auto* data) {
    for (int d = lane(); d < head_dim; d += kWarpSize) target[d] = static_cast<T>(widen(data[offset + d]));
  });
}

// The dot product of a row in shared memory with a row of any type, computed by one lane.
template <class T, class Element>
__device__ T product(const T* row, const Element* other, int head_dim) {
  T sum = 0;
#pragma unroll 4
  for (int d = 0; d < head_dim; ++d) sum += row[d] * static_cast<T>(widen(other[d]));
  return sum;
}

// The dot product of a row in shared memory with a row of an operand, computed by one lane.
template <class T>
__device__ T product(const T* row, const Operand& x, int64_t offset, int head_dim) {
  T sum = 0;
  with_type(x.data, x.dtype, [&](const auto* data) { sum = product(row, data + offset, head_dim); });
  return sum;
}

// sums[c] += sum over j < count of weights[j] * rows[j], at the elements that this lane holds. The sum over the 32 rows
// of a step is formed first: long sums then round less.
template <class T, class Element>
__device__ void add_weighted_rows(T (&sums)[kPerLane], const T* weights, int count, const Element* rows, int64_t stride,
                                  int head_dim) {
#pragma unroll
  for (int c = 0; c < kPerLane; ++c) {
    const int d = lane() + c * kWarpSize;
    if (d < head_dim) {
      T sum = 0;
#pragma unroll 1
      for (int j = 0; j < count; ++j) sum += weights[j] * static_cast<T>(widen(rows[j * stride + d]));
      sums[c] += sum;
    }
  }
}

// Adds weighted rows of an operand.
template <class T>
__device__ void add_weighted_rows(T (&sums)[kPerLane], const T* weights, int count, const Operand& x, int64_t offset,
                                  int head_dim) {
  with_type(x.data, x.dtype,
            [&](const auto* data) { add_weighted_rows(sums, weights, count, data + offset, x.row_stride, head_dim); });
}

// Reads the elements that the lanes hold from a row of an operand.
template <class T>
__device__ void load_row(T (&elements)[kPerLane], const Operand& x, int64_t offset, int head_dim) {
  with_type(x.data, x.dtype, [&](const auto* data) {
#pragma unroll
    for (int c = 0; c < kPerLane; ++c) {
      const int d = lane() + c * kWarpSize;
      if (d < head_dim) elements[c] = static_cast<T>(widen(data[offset + d]));
    }
  });
}

// Writes the elements that the lanes hold, times a factor, as a row of an operand.
template <class T>
__device__ void store_row(const T (&sums)[kPerLane], T factor, const Operand& x, int64_t offset, int head_dim) {
  with_type(x.data, x.dtype, [&](const auto* data) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    Element* target = const_cast<Element*>(data) + offset;
#pragma unroll
    for (int c = 0; c < kPerLane; ++c) {
      const int d = lane() + c * kWarpSize;
      if (d < head_dim) target[d] = narrow<Element>(factor * sums[c]);
    }
  });
}

// Launches one warp per row, or fewer that take several rows each.
template <class Params>
void launch_rows(void (*kernel)(Params), const RowGrid& grid, size_t bytes_per_warp, const Context& context,
                 const Params& params) {
  constexpr int64_t kMaxX = (int64_t{1} << 31) - 1;  // blocks of a grid along x, at most
  if (grid.outers == 0 || grid.heads == 0 || grid.rows == 0) return;
  const auto at_most = [](int64_t x, int64_t most) { return static_cast<unsigned>(x < most ? x : most); };
  const dim3 blocks(at_most((grid.rows + kWarps - 1) / kWarps, kMaxX), at_most(grid.heads, context.max_grid_yz),
                    at_most(grid.outers, context.max_grid_yz));
  launch(kernel, blocks, dim3(kWarps * kWarpSize), kWarps * bytes_per_warp, context.stream, params);
}

}  // namespace prefix_kernels::cuda::simt
