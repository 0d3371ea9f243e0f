// Range checks of integers in device memory, by the kernels that read them.
#pragma once

#include <cstdio>

#include "../../visibility.h"
#include "platform.cuh"

namespace prefix_kernels::cuda {

// Prints the argument, what was expected and what came, and traps, as torch does for an index out of range.
inline __device__ __noinline__ void refuse_value(const char* name, int64_t x, int64_t least, int64_t most,
                                                 int64_t index) {
  printf("prefix_attention: %s: expected values from %lld to %lld, got %lld at flat index %lld\n", name,
         static_cast<long long>(least), static_cast<long long>(most), static_cast<long long>(x),
         static_cast<long long>(index));
  __trap();
}

__device__ __forceinline__ void check_prefix_id(const AttentionParams& p, int64_t index) {
  const int64_t id = p.prefix_ids[index];
  if (id < -1 || id >= p.num_prefixes) refuse_value("prefix_ids", id, -1, p.num_prefixes - 1, index);
}

__device__ __forceinline__ void check_prefix_length(const AttentionParams& p, int64_t prefix) {
  const int64_t length = p.prefix_lens[prefix];
  if (length < 0 || length > p.prefix_len) refuse_value("prefix_lens", length, 0, p.prefix_len, prefix);
}

// Checks the numbers of a batch row's prefixes, and their lengths.
__device__ __forceinline__ void check_prefixes_of_row(const AttentionParams& p, int64_t batch) {
  if (p.prefix_ids == nullptr && p.prefix_lens == nullptr) return;
#pragma unroll 1
  for (int slot = 0; slot < p.prefix_slots; ++slot) {
    if (p.prefix_ids != nullptr) check_prefix_id(p, batch * p.prefix_slots + slot);
    const int64_t prefix = prefix_of_row(p, batch, slot);
    if (p.prefix_lens != nullptr && prefix >= 0) check_prefix_length(p, prefix);
  }
}

// Checks the lengths of prefixes first, first + step, ... of the bank.
__device__ __forceinline__ void check_prefix_lengths(const AttentionParams& p, int64_t first, int64_t step) {
  if (p.prefix_lens == nullptr) return;
#pragma unroll 1
  for (int64_t i = first; i < p.num_prefixes; i += step) check_prefix_length(p, i);
}

}  // namespace prefix_kernels::cuda
