// Elements of any dtype, read and written in the kernel's own arithmetic.
#pragma once

#include <type_traits>

#include "../../attention_params.h"
#include "../common/numeric.cuh"
#include "../common/platform.cuh"

namespace prefix_kernels::cuda::simt {

// Calls visit(pointer) with `data` as a pointer to its elements.
template <class Visit>
__device__ __forceinline__ void with_type(const void* data, DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat64:
      return visit(static_cast<const double*>(data));
    case DType::kFloat32:
      return visit(static_cast<const float*>(data));
    case DType::kBFloat16:
      return visit(static_cast<const bfloat16*>(data));
    case DType::kFloat16:
      return visit(static_cast<const half*>(data));
  }
}

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return to_float(x); }
__device__ __forceinline__ float widen(half x) { return to_float(x); }

template <class Element, class T>
__device__ __forceinline__ Element narrow(T x) {
  if constexpr (std::is_arithmetic_v<Element>)
    return static_cast<Element>(x);
  else
    return from_float<Element>(static_cast<float>(x));
}

// Offset of row `row` of head `head` of an operand, in elements; `outer` is its batch row or prefix.
__device__ inline int64_t row_offset(const Operand& x, int64_t outer, int64_t head, int64_t row) {
  return outer * x.batch_stride + head * x.head_stride + row * x.row_stride;
}

}  // namespace prefix_kernels::cuda::simt
