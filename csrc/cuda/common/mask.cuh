// Elements of attn_mask, boolean or added.
#pragma once

#include "rows.cuh"

namespace prefix_kernels::cuda {

__device__ __forceinline__ int mask_bytes(const MaskOperand& mask) {
  return mask.is_bool ? 1 : dtype_bytes(mask.dtype);
}

// The number that the mask element at `data` adds to a score; -inf hides its column.
__device__ __forceinline__ float element_bias(const MaskOperand& mask, const char* data) {
  if (mask.is_bool) return *data != 0 ? 0.0f : -INFINITY;
  return load_element(data, mask.dtype);
}

}  // namespace prefix_kernels::cuda
