// The batch rows that a block of the decode kernel serves.
#pragma once

#include "../../common/kv_tiles.cuh"
#include "../../common/softmax.cuh"

namespace prefix_kernels::cuda::sm80 {

// Counts the (batch row, slot) pairs that take part in the block of `entry`, 0 if another block serves it. All lanes of
// a warp call it; the pairs are written to `entries` unless it is null.
__device__ __forceinline__ int gather_entries(const AttentionParams& p, int entry, int per_block, int lane,
                                              int* entries) {
  const int slots = static_cast<int>(p.prefix_slots), count = static_cast<int>(p.batch) * slots;
  if (p.prefix_ids == nullptr) {
    // Either all rows name the same prefix, or each row another.
    const int bunch = p.num_prefixes == 1 ? per_block : 1;
    const int found = entry % bunch == 0 ? min(bunch, count - entry) : 0;
    for (int i = lane; entries != nullptr && i < found; i += kWarpSize) entries[i] = entry + i;
    return found;
  }
  const int64_t prefix = prefix_of_row(p, entry / slots, entry % slots);
  if (prefix < 0) return 0;
  const auto naming = [&](int first) {
    const int other = first + lane;
    return __ballot_sync(kAllLanes, other < count && prefix_of_row(p, other / slots, other % slots) == prefix);
  };
  int before = 0;
  for (int first = 0; first < entry; first += kWarpSize) {
    const unsigned earlier = entry - first < kWarpSize ? (1u << (entry - first)) - 1 : kAllLanes;
    before += __popc(naming(first) & earlier);
  }
  if (before % per_block != 0) return 0;
  int found = 0;
  for (int first = entry; first < count && found < per_block; first += kWarpSize) {
    const unsigned named = naming(first);
    const int place = found + __popc(named & ((1u << lane) - 1));
    if (entries != nullptr && (named >> lane & 1) != 0 && place < per_block) entries[place] = first + lane;
    found += __popc(named);
  }
  return min(found, per_block);
}

// The smallest range of the columns of a prefix of `length` that contains everything padding leaves visible to the rows
// that share it.
__device__ __forceinline__ Span shown_to_any(const AttentionParams& p, const int* entries, int count, int length) {
  if (p.mask.prefix_columns == 0) return {0, length};
  const int slots = static_cast<int>(p.prefix_slots);
  Span any{length, 0};
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const Span shown = shown_prefix(p, entries[i] / slots, entries[i] % slots).within({0, length});
    if (shown.begin < shown.end) any = {min(any.begin, shown.begin), max(any.end, shown.end)};
  }
  return any;
}

}  // namespace prefix_kernels::cuda::sm80
