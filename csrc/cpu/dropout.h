// The random bits of a tile, 16 per element.
#pragma once

#include "../philox.h"
#include "tiles.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// Of 64-bit lanes the low halves; what comes to stand in the high halves of `low` does not matter.
struct MultiplyLanes {
  PREFIX_KERNELS_INLINE PhiloxProduct<Wide> operator()(Wide a, uint32_t b) const {
    const Wide product = multiply_low_halves(a, Wide{} + b);
    return {product >> 32, product};
  }
};

typedef uint16_t NarrowWide __attribute__((vector_size(kVectorBytes / 4)));

// The low 16 bits of each lane. Without the mask, gcc 12 takes some vectors apart.
PREFIX_KERNELS_INLINE NarrowWide low_bits(Wide x) { return __builtin_convertvector(x & 0xffffu, NarrowWide); }

// One vector of the random bits as a lane mask: all ones where kept.
template <class T>
PREFIX_KERNELS_INLINE Int<T> kept(const uint16_t* bits, uint32_t threshold) {
  using Wide = Int<T>;
  const Wide x = __builtin_convertvector(load_bits<typename SimdTypes<T>::Packed>(bits), Wide);
  return x >= static_cast<int>(threshold);
}

// [keys][kBlockQ]: rows [first, first + count) of the segment against the block's lanes; both start at multiples of 16
// of their axis, so that the tile is made of whole Philox cells. The block holds one head.
inline void dropout_bits(const QueryBlock& block, const Segment& segment, int64_t first, int count, uint16_t* bits) {
  const AttentionParams& p = *block.params;
  constexpr int kCalls = kVectorBytes / sizeof(uint64_t);  // at once, a divisor of 8
  const uint32_t head = static_cast<uint32_t>(block.batch * p.q_heads + block.head(0));
  const uint32_t row_group = static_cast<uint32_t>(block.query(0) / 2);
  const int groups = (block.count + kCell - 1) / kCell * (kCell / 2);  // one call serves lanes r and r + 8 of a cell
  Wide call{};
  for (int i = 0; i < kCalls; ++i) call[i] = i;
  for (int cell = 0; cell < count; cell += kCell) {
    for (int t = 0; t < 4; ++t) {
      for (int g = 0; g < groups; g += kCalls) {
        Wide word[4] = {call + (row_group + g), Wide{} + static_cast<uint32_t>((first + cell) / 4 + t), Wide{} + head,
                        Wide{} + static_cast<uint32_t>(segment.id)};
        philox_rounds(p.dropout_seed, word, MultiplyLanes{});
        const int lane = g / 8 * kCell + g % 8;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          uint16_t* row = bits + (cell + (i & 1) * 8 + 2 * t) * kBlockQ + (i >> 1) * 8 + lane;
          const NarrowWide low = low_bits(word[i]), high = low_bits(word[i] >> 16);
          std::memcpy(row, &low, sizeof(low));
          std::memcpy(row + kBlockQ, &high, sizeof(high));
        }
      }
    }
  }
}

// The same with queries in the rows: [kBlockQ][stride]; a row has room for a whole vector of calls behind its last
// cell.
inline void dropout_bits_of_rows(const QueryBlock& block, const Segment& segment, int64_t first, int count,
                                 uint16_t* bits, int64_t stride) {
  const AttentionParams& p = *block.params;
  constexpr int kCalls = kVectorBytes / sizeof(uint64_t), kAdjacent = kCalls < 4 ? kCalls : 4;  // calls of one cell
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes / 2)));
  const uint32_t head = static_cast<uint32_t>(block.batch * p.q_heads + block.head(0));
  const uint32_t row_group = static_cast<uint32_t>(block.query(0) / 2);
  const int row_groups = (block.count + kCell - 1) / kCell * (kCell / 2), groups = (count + kCell - 1) / kCell * 4;
  Wide call{};
  for (int i = 0; i < kCalls; ++i) call[i] = i;
  for (int g = 0; g < row_groups; ++g) {
    uint16_t* const row = bits + (g / 8 * kCell + g % 8) * stride;
    for (int t = 0; t < groups; t += kCalls) {
      Wide word[4] = {Wide{} + (row_group + g), call + static_cast<uint32_t>(first / 4 + t), Wide{} + head,
                      Wide{} + static_cast<uint32_t>(segment.id)};
      philox_rounds(p.dropout_seed, word, MultiplyLanes{});
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        // The halves of a word are two adjacent keys.
        const Words pairs = __builtin_convertvector(word[i] & 0xffffffffu, Words);
        uint32_t pair[kCalls];
        std::memcpy(pair, &pairs, sizeof(pairs));
        for (int c = 0; c < kCalls; c += kAdjacent)
          std::memcpy(row + (i >> 1) * 8 * stride + (t + c) / 4 * kCell + (i & 1) * 8 + (t + c) % 4 * 2, pair + c,
                      kAdjacent * sizeof(uint32_t));
      }
    }
  }
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
