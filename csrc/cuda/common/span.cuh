// Runs of columns.
#pragma once

#include "../../visibility.h"
#include "platform.cuh"

namespace prefix_kernels::cuda {

// Columns of a cell or of a segment, [begin, end).
struct Span {
  int begin;
  int end;

  __device__ __forceinline__ bool holds(int column) const { return column >= begin && column < end; }
  __device__ __forceinline__ Span within(Span other) const { return {max(begin, other.begin), min(end, other.end)}; }
};

// Columns fit in 32 bits, unlike positions.
__device__ __forceinline__ Span to_span(const KeyRange& range) {
  return {static_cast<int>(range.begin), static_cast<int>(range.end)};
}

}  // namespace prefix_kernels::cuda
