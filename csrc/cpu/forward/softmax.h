// The step from scores to probabilities in the forward pass, while they are still in the registers of the matrix
// product. Tiles are [kBlockK][kBlockQ], queries in the lanes. A register block is a Vec<T>[rows][vectors] at (row,
// column) of its tile.
#pragma once

#include "../common/dropout.h"
#include "../common/gemm.h"
#include "tiles.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// Makes the scores of one step final: capped, biased, and -infinity for keys that a lane does not see.
template <class T>
class Scores {
 public:
  T* const tile;

  Scores(const QueryBlock& block, const Segment& segment, const ForwardTilePlan<T>& plan,
         const ForwardTileBias<T>& bias, T* tile)
      : tile(tile), plan_(plan), bias_(bias), cap_(static_cast<T>(block.params->softcap)) {
    for (int v = 0; v < plan.vectors; ++v)
      ranged_ = ranged_ || plan.rows[v].core_begin > plan.rows[v].begin || plan.rows[v].core_end < plan.rows[v].end;
    if (ranged_) block.tile_ranges(segment, bias.first, begin_, end_);
  }

  int row_begin(int64_t column) const { return plan_.rows[column / kLanes<T>].begin; }

  template <int kRows, int kVectors>
  PREFIX_KERNELS_INLINE void finish(Vec<T> (&s)[kRows][kVectors], int64_t row, int64_t column) const {
    constexpr int kN = kLanes<T>;
    if (cap_ > 0 || bias_.kind == ForwardTileBias<T>::kFull) {
      store_block(s, tile + row * kBlockQ + column, kBlockQ);
      cap_and_bias(row, kRows, column, kVectors);
      load_block(s, tile + row * kBlockQ + column, kBlockQ);
    }
    if (bias_.kind == ForwardTileBias<T>::kPerKey) {
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) s[m][v] += bias_.data[row + m];
    }
    if (ranged_ && !in_core<kVectors>(row, row + kRows, column)) {
      const Vec<T> hidden = broadcast<T>(-std::numeric_limits<T>::infinity());
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const auto begin = load_bits<Int<T>>(begin_ + column + v * kN), end = load_bits<Int<T>>(end_ + column + v * kN);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          const Int<T> at = Int<T>{} + static_cast<Index>(row + m);
          s[m][v] = (at >= begin) & (at < end) ? s[m][v] : hidden;
        }
      }
    }
  }

 private:
  using Index = LaneIndex<T>;

  template <int kVectors>
  bool in_core(int64_t begin, int64_t end, int64_t column) const {
    bool core = true;
    for (int v = 0; v < kVectors; ++v) {
      const auto& rows = plan_.rows[column / kLanes<T> + v];
      core = core && begin >= rows.core_begin && end <= rows.core_end;
    }
    return core;
  }

  __attribute__((noinline)) void cap_and_bias(int64_t row, int rows, int64_t column, int vectors) const {
    for (int64_t r = row; r < row + rows; ++r) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = r * kBlockQ + column + v * kLanes<T>;
        Vec<T> s = load(tile + at);
        if (cap_ > 0) s = tanh<T>(s) * cap_;
        if (bias_.kind == ForwardTileBias<T>::kFull) s += load(bias_.data + at);
        store(tile + at, s);
      }
    }
  }

  const ForwardTilePlan<T>& plan_;
  const ForwardTileBias<T>& bias_;
  T cap_;
  bool ranged_ = false;
  alignas(64) Index begin_[kBlockQ];  // rows of the tile that each lane sees; filled if ranged_
  alignas(64) Index end_[kBlockQ];
};

// The online softmax of a block of queries over its tiles: scores -> e^(scores - reference), with
//   sum = sum e^(scores - reference)        out = sum e^(scores - reference) V
// The reference of a lane follows the maximum of its scores, but lags while that is less than kReferenceLag above it:
// the exponentials stay far from overflow, and what was summed before seldom needs a factor. Dropped elements count in
// the sum and are stored as 0.
template <class T>
struct OnlineSoftmax {
  static constexpr T kReferenceLag = 16;

  const Scores<T>& scores;
  T *reference, *sum;  // [kBlockQ]
  T* tile_sum;         // [kBlockQ], sum of this tile alone, so that long sums round seldom
  T* out;              // [value_dim][kBlockQ]
  int64_t value_dim;
  const uint16_t* bits;
  uint32_t threshold;
  int64_t first_row = 0, first_column = 0;  // place of the matrix product in the tile

  template <int kRows, int kVectors>
  PREFIX_KERNELS_INLINE void operator()(Vec<T> (&s)[kRows][kVectors], int64_t row, int64_t column) const {
    constexpr int kN = kLanes<T>;
    row += first_row;
    column += first_column;
    scores.finish(s, row, column);

    Vec<T> top[kVectors];
    Int<T> above{};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      top[v] = s[0][v];
#pragma GCC unroll 16
      for (int m = 1; m < kRows; ++m) top[v] = maximum<T>(s[m][v], top[v]);
      above |= top[v] > load(reference + column + v * kN) + kReferenceLag;
    }
    if (__builtin_expect(any_lane<T>(above), false)) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) raise(top[v], row, column + v * kN);
    }

    T* tile = scores.tile + row * kBlockQ + column;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      // A lane that has seen nothing keeps -infinity, and must not subtract it from itself.
      const Vec<T> kept_reference = load(reference + column + v * kN);
      const Vec<T> from = kept_reference == -std::numeric_limits<T>::infinity() ? Vec<T>{} : kept_reference;
      Vec<T> total{};
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const Vec<T> e = exp<T>(s[m][v] - from);
        total += e;
        store(tile + m * kBlockQ + v * kN, e);
      }
      store(tile_sum + column + v * kN, load(tile_sum + column + v * kN) + total);
    }
    if (threshold > 0) drop(row, kRows, column, kVectors);
  }

 private:
  // Moves the reference of one vector of lanes up to `top` where it lags too far.
  __attribute__((noinline)) void raise(Vec<T> top, int64_t row, int64_t column) const {
    const Vec<T> before = load(reference + column);
    const Vec<T> after = top > before + kReferenceLag ? top : before;
    store(reference + column, after);
    // A lane whose reference was -infinity has summed nothing, and must not be multiplied by NaN.
    const Vec<T> factor = before == -std::numeric_limits<T>::infinity() ? Vec<T>{} : exp<T>(before - after);
    if (!any_lane<T>(before != -std::numeric_limits<T>::infinity())) return;
    const auto rescale = [&](T* p) { store(p, load(p) * factor); };
    rescale(sum + column);
    rescale(tile_sum + column);
    for (int64_t d = 0; d < value_dim; ++d) rescale(out + d * kBlockQ + column);
    for (int64_t r = scores.row_begin(column); r < row; ++r) rescale(scores.tile + r * kBlockQ + column);
  }

  __attribute__((noinline)) void drop(int64_t row, int rows, int64_t column, int vectors) const {
    for (int64_t r = row; r < row + rows; ++r) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = r * kBlockQ + column + v * kLanes<T>;
        store(scores.tile + at, keep<T>(load(scores.tile + at), bits + at, threshold));
      }
    }
  }
};

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
