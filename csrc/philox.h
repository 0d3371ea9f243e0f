// Dropout bits, keyed by element and not by tile: the only definition, for host and device code.
//
// One Philox4x32-7 call (Salmon et al., 2011) decides eight elements with 16 bits each: rows {r, r + 8} times columns
// {2t, 2t+1, 2t+8, 2t+9} of a 16 x 16 cell, which are the elements that one thread holds of two adjacent accumulators
// of the tensor cores. Columns count from the start of their segment: 0 is the sequence, 1 + m the prefix in slot m.
#pragma once

#include <cstdint>

#include "visibility.h"

namespace prefix_kernels {

struct PhiloxWords {
  uint32_t word[4];
};

// row_group = (i / 16) * 8 + i % 8, column_group = (j / 16) * 4 + (j % 8) / 2, head = b * q_heads + h.
PREFIX_KERNELS_HOST_DEVICE PhiloxWords philox(uint64_t seed, uint32_t row_group, uint32_t column_group, uint32_t head,
                                              uint32_t segment) {
  constexpr int kRounds = 7;
  uint32_t c0 = row_group, c1 = column_group, c2 = head, c3 = segment;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

PREFIX_KERNELS_HOST_DEVICE uint64_t dropout_seed(const AttentionParams& p) {
  return p.dropout_seed_ptr != nullptr ? static_cast<uint64_t>(*p.dropout_seed_ptr) : p.dropout_seed;
}

// A kept element is scaled by this, the exact inverse of the probability of keeping it.
PREFIX_KERNELS_HOST_DEVICE double dropout_rescale(uint32_t threshold) {
  return threshold < 65536u ? 65536.0 / (65536.0 - threshold) : 0.0;
}

}  // namespace prefix_kernels
