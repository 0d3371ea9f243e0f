// The only definition of the dropout bits, for host and device code: keyed by element and not by tile.
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

// The high and low 32 bits of a product of two words.
template <class Word>
struct PhiloxProduct {
  Word high, low;
};

struct MultiplyWords {
  PREFIX_KERNELS_HOST_DEVICE PhiloxProduct<uint32_t> operator()(uint32_t a, uint32_t b) const {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
  }
};

// The rounds of one call, or of one call a lane where Word is a vector.
template <class Word, class Multiply>
PREFIX_KERNELS_HOST_DEVICE void philox_rounds(uint64_t seed, Word (&counter)[4], Multiply multiply) {
  constexpr int kRounds = 7;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const PhiloxProduct<Word> product0 = multiply(counter[0], 0xD2511F53u);
    const PhiloxProduct<Word> product1 = multiply(counter[2], 0xCD9E8D57u);
    counter[0] = product1.high ^ counter[1] ^ key0;
    counter[2] = product0.high ^ counter[3] ^ key1;
    counter[1] = product1.low;
    counter[3] = product0.low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// row_group = (i / 16) * 8 + i % 8, column_group = (j / 16) * 4 + (j % 8) / 2, head = b * q_heads + h.
PREFIX_KERNELS_HOST_DEVICE PhiloxWords philox(uint64_t seed, uint32_t row_group, uint32_t column_group, uint32_t head,
                                              uint32_t segment) {
  PhiloxWords words{{row_group, column_group, head, segment}};
  philox_rounds(seed, words.word, MultiplyWords{});
  return words;
}

PREFIX_KERNELS_HOST_DEVICE uint64_t dropout_seed(const AttentionParams& p) {
  return p.dropout_seed_ptr != nullptr ? static_cast<uint64_t>(*p.dropout_seed_ptr) : p.dropout_seed;
}

// The factor on kept elements: the exact inverse of the probability of keeping one.
PREFIX_KERNELS_HOST_DEVICE double dropout_rescale(uint32_t threshold) {
  return threshold < 65536u ? 65536.0 / (65536.0 - threshold) : 0.0;
}

}  // namespace prefix_kernels
