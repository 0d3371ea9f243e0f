// What becomes of a backward step's products while they are still in registers: scores -> probabilities, and their
// gradients -> dS. Tiles are [kBlockQ][kKeyStride], keys in the lanes; a block is a Vec<T>[rows][vectors] at (row,
// column) of its group.
#pragma once

#include "../common/dropout.h"
#include "../common/gemm.h"
#include "tiles.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// Scores -> p = e^(scores - lse), once they are capped, biased, and -infinity where a query does not see the key. With
// dropout and no dS to come, the dropped p become 0.
template <class T>
struct Probabilities {
  const BackwardTilePlan<T>& plan;
  const BackwardTileBias<T>& bias;
  T* tile;
  T cap;      // 0: none
  T* capped;  // tanh of the scores, for ScoreGradients; where there is a cap
  const T* lse;
  const uint16_t* bits;
  uint32_t threshold;  // 0: keep all
  typename BackwardTilePlan<T>::Group group{};

  template <int kRows, int kVectors>
  PREFIX_KERNELS_INLINE void operator()(Vec<T> (&s)[kRows][kVectors], int64_t row, int64_t column) const {
    constexpr int kN = kLanes<T>;
    row += group.row_begin;
    column += group.vector_begin * kN;
    const int64_t at = row * kKeyStride + column;
    if (__builtin_expect(cap > 0 || bias.kind != BackwardTileBias<T>::kNone || !group.whole, false)) {
      store_block(s, tile + at, kKeyStride);
      adjust(row, kRows, column, kVectors);
      load_block(s, tile + at, kKeyStride);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> normaliser = broadcast<T>(lse[row + m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) s[m][v] = exp<T>(s[m][v] - normaliser);
    }
    if (threshold > 0) keep_block<T>(s, bits + at, kKeyStride, threshold);
    store_block(s, tile + at, kKeyStride);
  }

 private:
  // In the tile: what only some steps need.
  __attribute__((noinline)) void adjust(int64_t first_row, int rows, int64_t first_column, int vectors) const {
    constexpr int kN = kLanes<T>;
    const Vec<T> hidden = broadcast<T>(-std::numeric_limits<T>::infinity());
    const int64_t bias_stride = bias.kind == BackwardTileBias<T>::kFull ? kKeyStride : 0;
    Int<T> first_lane;
    for (int l = 0; l < kN; ++l) first_lane[l] = static_cast<LaneIndex<T>>(first_column + l);
    for (int64_t row = first_row; row < first_row + rows; ++row) {
      Int<T> lane = first_lane;
      for (int v = 0; v < vectors; ++v, lane += kN) {
        const int64_t column = first_column + v * kN, at = row * kKeyStride + column;
        Vec<T> s = load(tile + at);
        if (cap > 0) {
          const Vec<T> t = tanh<T>(s);
          store(capped + at, t);
          s = t * cap;
        }
        if (bias.kind != BackwardTileBias<T>::kNone) s += load(bias.data + row * bias_stride + column);
        if (!group.whole) s = (lane >= plan.begin[row]) & (lane < plan.end[row]) ? s : hidden;
        store(tile + at, s);
      }
    }
  }
};

// dp -> ds = p (dp - delta), with dp scaled by 1/(1 - r) where there is dropout. Then the dropped dp count as 0, and p,
// which dV' = p^T dout is still to read, becomes 0 there.
template <class T>
struct ScoreGradients {
  T* probabilities;
  T* ds;
  const T* delta;   // [kBlockQ]
  const T* capped;  // tanh of the scores; null without softcap
  const uint16_t* bits;
  uint32_t threshold;
  typename BackwardTilePlan<T>::Group group{};

  template <int kRows, int kVectors>
  PREFIX_KERNELS_INLINE void operator()(Vec<T> (&dp)[kRows][kVectors], int64_t row, int64_t column) const {
    constexpr int kN = kLanes<T>;
    row += group.row_begin;
    column += group.vector_begin * kN;
    const int64_t at = row * kKeyStride + column;
    T* const p = probabilities + at;
    if (threshold > 0) keep_block<T>(dp, bits + at, kKeyStride, threshold);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> center = broadcast<T>(delta[row + m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) dp[m][v] = load(p + m * kKeyStride + v * kN) * (dp[m][v] - center);
    }
    store_block(dp, ds + at, kKeyStride);
    if (threshold > 0) {
      load_block(dp, p, kKeyStride);
      keep_block<T>(dp, bits + at, kKeyStride, threshold);
      store_block(dp, p, kKeyStride);
    }
    if (__builtin_expect(capped != nullptr, false)) differentiate_cap(at, kRows, kVectors);
  }

 private:
  // ds of the capped scores -> ds of the scores, in the tile.
  __attribute__((noinline)) void differentiate_cap(int64_t at, int rows, int vectors) const {
    for (int m = 0; m < rows; ++m) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t element = at + m * kKeyStride + v * kLanes<T>;
        const Vec<T> t = load(capped + element);
        store(ds + element, load(ds + element) * (1 - t * t));
      }
    }
  }
};

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
