// The columns that padding leaves visible, as the kernels ask for them.
#pragma once

#include "span.cuh"

namespace prefix_kernels::cuda {

// The sequence columns that padding leaves visible for this batch row; all of them if the mask was not scanned.
__device__ __forceinline__ Span shown_sequence(const AttentionParams& p, int64_t batch) {
  if (p.mask.shown == nullptr) return {0, static_cast<int>(p.k_len)};
  const ShownColumns& shown = p.mask.shown[p.mask.batch_stride == 0 ? 0 : batch];
  return {shown.begin, shown.end};
}

// The prefix columns that padding leaves visible for this batch row. Every slot counts prefix_len columns, whatever its
// prefix's length.
__device__ __forceinline__ Span shown_prefixes(const AttentionParams& p, int64_t batch) {
  if (p.mask.shown == nullptr || p.mask.prefix_columns == 0)
    return {0, static_cast<int>(p.prefix_slots * p.prefix_len)};
  const ShownColumns& shown = p.mask.shown[p.mask.batch_stride == 0 ? 0 : batch];
  return {shown.prefix_begin, shown.prefix_end};
}

// The columns that padding leaves visible of the prefix in one slot.
__device__ __forceinline__ Span shown_prefix(const AttentionParams& p, int64_t batch, int slot) {
  const int start = slot * static_cast<int>(p.prefix_len);
  const Span shown = shown_prefixes(p, batch);
  return {shown.begin - start, shown.end - start};
}

}  // namespace prefix_kernels::cuda
