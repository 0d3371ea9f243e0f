// Dropout of a tile of probabilities.
#pragma once

#include "../../common/softmax.cuh"
#include "shared.cuh"

namespace prefix_kernels::cuda::sm80 {

// The same word of several Philox calls, whose rounds go side by side: their keys are computed once for all.
template <int kCalls>
struct PhiloxWordOf {
  uint32_t call[kCalls];

  __device__ __forceinline__ friend PhiloxWordOf operator^(const PhiloxWordOf& a, const PhiloxWordOf& b) {
    PhiloxWordOf result;
#pragma unroll
    for (int i = 0; i < kCalls; ++i) result.call[i] = a.call[i] ^ b.call[i];
    return result;
  }
  __device__ __forceinline__ friend PhiloxWordOf operator^(const PhiloxWordOf& a, uint32_t key) {
    PhiloxWordOf result;
#pragma unroll
    for (int i = 0; i < kCalls; ++i) result.call[i] = a.call[i] ^ key;
    return result;
  }
};

template <int kCalls>
struct MultiplyWordsOf {
  __device__ __forceinline__ PhiloxProduct<PhiloxWordOf<kCalls>> operator()(const PhiloxWordOf<kCalls>& a,
                                                                            uint32_t b) const {
    PhiloxProduct<PhiloxWordOf<kCalls>> result;
#pragma unroll
    for (int i = 0; i < kCalls; ++i) {
      const PhiloxProduct<uint32_t> product = MultiplyWords{}(a.call[i], b);
      result.high.call[i] = product.high;
      result.low.call[i] = product.low;
    }
    return result;
  }
};

// The dropout of a warp's rows.
struct WarpDropout {
  uint64_t seed;
  uint32_t limit;      // an element is kept if its 16 bits, as the upper half of a word, are above
  uint32_t row_group;  // as philox counts it, in the warp's first row block
  uint32_t head;       // batch row * q_heads + head

  __device__ __forceinline__ WarpDropout(const AttentionParams& p, const BlockRows& rows, int warp_row, int lane)
      : seed(p.dropout_threshold > 0 ? dropout_seed(p) : 0),
        limit((p.dropout_threshold << 16) - 1),
        row_group((rows.first + warp_row) / kCell * 8 + lane / 4),
        head(static_cast<uint32_t>(rows.batch * p.q_heads + rows.first_head)) {}

  // Sets two dropped neighbours to zero.
  __device__ __forceinline__ void drop_pair(float& even, float& odd, uint32_t bits) const {
    if (bits << 16 <= limit) even = 0.0f;
    if (bits <= limit) odd = 0.0f;
  }

  // Sets to zero the dropped elements of kCount cells from cell `first` on, which are neighbours in one segment.
  // `column_group`: that of the first, as philox counts it.
  template <int kCount, int kRowBlocks, int kColumns>
  __device__ __forceinline__ void drop(float (&probabilities)[kRowBlocks][kColumns][4], int first,
                                       uint32_t column_group, uint32_t segment) const {
    constexpr int kCalls = kCount * kRowBlocks;
    using Word = PhiloxWordOf<kCalls>;
    Word words[4];
#pragma unroll
    for (int i = 0; i < kCalls; ++i) {
      words[0].call[i] = row_group + 8 * (i % kRowBlocks);
      words[1].call[i] = column_group + 4 * (i / kRowBlocks);
      words[2].call[i] = head;
      words[3].call[i] = segment;
    }
    philox_rounds(seed, words, MultiplyWordsOf<kCalls>{});
#pragma unroll
    for (int i = 0; i < kCalls; ++i) {
      const int m = i % kRowBlocks, n = 2 * (first + i / kRowBlocks);
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float (&pair)[4] = probabilities[m][n + word % 2];
        drop_pair(pair[word / 2 * 2], pair[word / 2 * 2 + 1], words[word].call[i]);
      }
    }
  }
};

// Sets to zero the dropped elements of a tile. `run`: where its cells are if they follow one another; else the plan has
// those that some row sees.
template <typename Traits>
__device__ __forceinline__ void drop_out_tile(typename Traits::Scores& probabilities, const WarpDropout& dropout,
                                              const CellRun& run, const Cell* tile, unsigned seen, int lane) {
  constexpr int kTogether = 2 / Traits::kRowBlocks;  // cells of two calls side by side; four save no instructions
  if (run.exists) {
    const uint32_t column_group = run.column / kCell * 4 + lane % 4;
#pragma unroll
    for (int c = 0; c < Traits::kCells; c += kTogether) {
      dropout.drop<kTogether>(probabilities, c, column_group + 4 * c, run.segment);
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < Traits::kCells; ++c) {
    if ((seen >> c & 1) == 0) continue;
    dropout.drop<1>(probabilities, c, tile[c].first / kCell * 4 + lane % 4, tile[c].segment);
  }
}

}  // namespace prefix_kernels::cuda::sm80
