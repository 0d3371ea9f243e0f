// The random bits of a tile, 16 per element.
#pragma once

#include "../../philox.h"
#include "tiles.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// Products of the low halves of 64-bit lanes. The high halves of `low` are arbitrary.
struct MultiplyLanes {
  PREFIX_KERNELS_INLINE PhiloxProduct<Wide> operator()(Wide a, uint32_t b) const {
    const Wide product = multiply_low_halves(a, Wide{} + b);
    return {product >> 32, product};
  }
};

inline constexpr int kCalls = kVectorBytes / sizeof(uint64_t);  // calls of Philox at once, a divisor of 8

// Element i of the result is element source(i) of a and b, one behind the other.
template <class Element, class Source>
PREFIX_KERNELS_INLINE auto pick(Wide a, Wide b, Source source) {
  typedef Element Elements __attribute__((vector_size(kVectorBytes)));
  Elements index;
  for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(Element)); ++i) index[i] = static_cast<Element>(source(i));
  return __builtin_shuffle(reinterpret_cast<Elements>(a), reinterpret_cast<Elements>(b), index);
}

// x where the random bits of its lanes keep them, else 0; threshold is at least 1.
template <class T>
PREFIX_KERNELS_INLINE Vec<T> keep(Vec<T> x, const uint16_t* bits, uint32_t threshold) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const short below = static_cast<short>(threshold - 1);  // 65536 drops all, and has 17 bits
  if constexpr (sizeof(T) == 4) {
    const __mmask16 kept = _mm256_cmpgt_epu16_mask(_mm256_loadu_si256((const __m256i*)bits), _mm256_set1_epi16(below));
    return (Vec<T>)_mm512_maskz_mov_ps(kept, (__m512)x);
  } else {
    const __mmask8 kept = _mm_cmpgt_epu16_mask(_mm_loadu_si128((const __m128i*)bits), _mm_set1_epi16(below));
    return (Vec<T>)_mm512_maskz_mov_pd(kept, (__m512d)x);
  }
#else
  const Int<T> lane_bits = __builtin_convertvector(load_bits<typename SimdTypes<T>::Packed>(bits), Int<T>);
  return lane_bits >= static_cast<int>(threshold) ? x : Vec<T>{};
#endif
}

template <class T, int kRows, int kVectors>
PREFIX_KERNELS_INLINE void keep_block(Vec<T> (&block)[kRows][kVectors], const uint16_t* bits, int64_t stride,
                                      uint32_t threshold) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) block[m][v] = keep<T>(block[m][v], bits + m * stride + v * kLanes<T>, threshold);
}

// The bits of a tile with queries in the lanes, [keys][kBlockQ]: rows [first, first + count) of the segment against the
// block's lanes. Both start at multiples of 16 of their axis, so that the tile is made of whole Philox cells. The block
// holds one head.
inline void dropout_bits_of_query_lanes(const QueryBlock& block, const Segment& segment, int64_t first, int count,
                                        uint16_t* bits) {
  const AttentionParams& p = *block.params;
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
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          // [key 2t, 2t + 1][query r, r + 8][call]
          const auto row_of =
              pick<uint16_t>(word[i], word[i + 2], [](int n) { return n % (2 * kCalls) * 4 + n / (2 * kCalls); });
          uint16_t* const row = bits + (cell + i * 8 + 2 * t) * kBlockQ + lane;
          constexpr int kRun = kCalls == 8 ? 16 : kCalls;
          for (int n = 0; n < 4 * kCalls; n += kRun)
            std::memcpy(row + n / (2 * kCalls) * kBlockQ + n % (2 * kCalls) / kCalls * 8,
                        reinterpret_cast<const uint16_t*>(&row_of) + n, kRun * sizeof(uint16_t));
        }
      }
    }
  }
}

// The bits of a tile with keys in the lanes, [kBlockQ][stride]. A row has room for a whole vector of calls behind its
// last cell.
inline void dropout_bits_of_key_lanes(const QueryBlock& block, const Segment& segment, int64_t first, int count,
                                      uint16_t* bits, int64_t stride) {
  const AttentionParams& p = *block.params;
  constexpr int kAdjacent = kCalls < 4 ? kCalls : 4;  // calls at once that belong to one cell
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
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        // [cell][keys 2t, 2t + 8][call], two adjacent keys each
        const auto pairs = pick<uint32_t>(word[2 * i], word[2 * i + 1], [](int n) {
          return (n / (2 * kAdjacent) * kAdjacent + n % kAdjacent) * 2 + n / kAdjacent % 2 * 2 * kCalls;
        });
        uint16_t* const first_key = row + i * 8 * stride + t / 4 * kCell + t % 4 * 2;
        constexpr int kRun = kAdjacent == 4 ? 2 * kCalls : kAdjacent;
        for (int n = 0; n < 2 * kCalls; n += kRun)
          std::memcpy(first_key + n / kAdjacent * 8, reinterpret_cast<const uint32_t*>(&pairs) + n,
                      kRun * sizeof(uint32_t));
      }
    }
  }
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
