// The steps from scores to probabilities, and from dP to dS, in the backward pass, while they are still in the
// registers of the matrix product. Tiles are [kBlockQ][kKeyStride], keys in the lanes. A register block is a
// Vec<T>[rows][vectors] at (row, column) of its group.
#pragma once

#include "../common/dropout.h"
#include "../common/gemm.h"
#include "tiles.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// Turns scores, once capped, biased, and -infinity for keys that a query does not see, into p = e^(scores - lse). With
// dropout and no dS to come, the dropped p become 0.
template <class T>
struct Probabilities {
  const BackwardTilePlan<T>& plan;
  const BackwardTileBias<T>& bias;
  T* tile;
  T cap;      // softcap; 0: none
  T* capped;  // tanh of the scores, for ScoreGradients; written if there is a cap
  const T* lse;
  const uint16_t* bits;
  uint32_t threshold;  // dropout threshold; 0: keep all
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
  // Applies, in the tile, the options that only some steps need: cap, bias and visibility.
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

// Turns dp into ds = p (dp - delta). With dropout, dp is scaled by 1/(1 - r), the dropped dp count as 0, and the
// dropped p become 0 for dV' = p^T dout, which reads them afterwards.
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
  // Turns ds of the capped scores into ds of the scores, in the tile.
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
