// Access to attn_mask as numbers to add to scores.
#pragma once

#include <limits>

#include "pack.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

struct BoolMask {
  uint8_t attend;
};
PREFIX_KERNELS_INLINE float to_float(BoolMask m) {
  return m.attend != 0 ? 0.0f : -std::numeric_limits<float>::infinity();
}

template <class F>
PREFIX_KERNELS_INLINE void dispatch_mask(const MaskOperand& mask, F&& f) {
  if (mask.is_bool)
    f(static_cast<BoolMask*>(nullptr));
  else
    dispatch_dtype(mask.dtype, f);
}

// The mask's first column for the query in a lane.
template <class Src>
PREFIX_KERNELS_INLINE const Src* mask_row(const MaskOperand& mask, const QueryBlock& block, int lane) {
  return static_cast<const Src*>(mask.data) + block.batch * mask.batch_stride + block.head(lane) * mask.head_stride +
         block.query(lane) * mask.row_stride;
}

// Tells if all queries of a block share one row of the mask.
inline bool shares_mask_row(const MaskOperand& mask, const QueryBlock& block) {
  return mask.row_stride == 0 && (block.one_head || mask.head_stride == 0);
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
