// Elements of any dtype, read and written in the kernel's own arithmetic.
#pragma once

#include "../../attention_params.h"
#include "../numeric.cuh"
#include "../platform.cuh"

namespace prefix_kernels::cuda::simt {

template <class T>
__device__ T load(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<T>(static_cast<const double*>(data)[index]);
    case DType::kFloat32:
      return static_cast<T>(static_cast<const float*>(data)[index]);
    case DType::kBFloat16:
      return static_cast<T>(to_float(static_cast<const bfloat16*>(data)[index]));
    case DType::kFloat16:
      return static_cast<T>(to_float(static_cast<const half*>(data)[index]));
  }
  return T(0);
}

template <class T>
__device__ void store(void* data, DType dtype, int64_t index, T x) {
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(data)[index] = static_cast<double>(x);
      return;
    case DType::kFloat32:
      static_cast<float*>(data)[index] = static_cast<float>(x);
      return;
    case DType::kBFloat16:
      static_cast<bfloat16*>(data)[index] = from_float<bfloat16>(static_cast<float>(x));
      return;
    case DType::kFloat16:
      static_cast<half*>(data)[index] = from_float<half>(static_cast<float>(x));
      return;
  }
}

// Where row `row` of head `head` of an operand begins, in elements; `outer` is its batch row or prefix.
__device__ inline int64_t row_offset(const Operand& x, int64_t outer, int64_t head, int64_t row) {
  return outer * x.batch_stride + head * x.head_stride + row * x.row_stride;
}

}  // namespace prefix_kernels::cuda::simt
