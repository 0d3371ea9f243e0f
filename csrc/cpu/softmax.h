// What happens to a tile of scores between the matrix products. Tiles are [kBlockK][kBlockQ], queries in the lanes.
#pragma once

#include "dropout.h"
#include "mask.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// The scores as the products left them -> capped, biased, and -infinity where a lane does not see the key.
// `capped` keeps tanh for the backward pass; null in the forward pass.
template <class T>
void finish_scores(const QueryBlock& block, const Segment& segment, int64_t first, const TilePlan<T>& plan,
                   const TileBias<T>& bias, T* scores, T* capped) {
  constexpr int kN = kLanes<T>;
  const AttentionParams& p = *block.params;
  const Vec<T> hidden = broadcast<T>(-std::numeric_limits<T>::infinity());
  for (int v = 0; v < plan.vectors; ++v) {
    const auto& rows = plan.rows[v];
    T* tile = scores + v * kN;
    if (p.softcap > 0) {
      const T cap = static_cast<T>(p.softcap);
      for (int r = rows.begin; r < rows.end; ++r) {
        const Vec<T> t = tanh<T>(load(tile + r * kBlockQ));
        if (capped != nullptr) store(capped + v * kN + r * kBlockQ, t);
        store(tile + r * kBlockQ, t * cap);
      }
    }
    if (bias.kind == TileBias<T>::kPerKey) {
      for (int r = rows.begin; r < rows.end; ++r) store(tile + r * kBlockQ, load(tile + r * kBlockQ) + bias.data[r]);
    } else if (bias.kind == TileBias<T>::kFull) {
      for (int r = rows.begin; r < rows.end; ++r)
        store(tile + r * kBlockQ, load(tile + r * kBlockQ) + load(bias.data + r * kBlockQ + v * kN));
    }
    if (rows.core_begin == rows.begin && rows.core_end == rows.end) continue;
    Int<T> begin, end;
    for (int l = 0; l < kN; ++l) {
      const KeyRange range = block.visible(segment, v * kN + l);
      begin[l] = clamp_to(range.begin - first, 0, kBlockK);
      end[l] = clamp_to(range.end - first, 0, kBlockK);
    }
    for (int r = rows.begin; r < rows.end; ++r) {
      if (r == rows.core_begin) r = rows.core_end;
      if (r >= rows.end) break;
      const Int<T> row = Int<T>{} + r;
      const Vec<T> s = load(tile + r * kBlockQ);
      store(tile + r * kBlockQ, (row >= begin) & (row < end) ? s : hidden);
    }
  }
}

// One vector of the random bits as a lane mask: all ones where kept.
template <class T>
PREFIX_KERNELS_INLINE Int<T> kept(const uint16_t* bits, uint32_t threshold) {
  using Wide = Int<T>;
  const Wide x = __builtin_convertvector(load_bits<typename SimdTypes<T>::Packed>(bits), Wide);
  return x >= static_cast<int>(threshold);
}

// The online softmax of one vector of lanes over a tile's rows, in place: scores -> e^(scores - reference).
//   sum' = sum e^(reference - reference') + sum_rows e^(scores - reference')
// The reference follows the maximum of the scores, but lags while the maximum is less than kReferenceLag above it: the
// exponentials stay far from overflow, and what was summed before seldom needs its factor. Dropped elements count in
// the sum and are stored as 0. Returns whether something was summed before that is to be multiplied by `factor`.
template <class T, bool kDropout>
PREFIX_KERNELS_INLINE bool online_softmax(T* tile, int row_begin, int row_end, const uint16_t* bits, uint32_t threshold,
                                          T* running_reference, T* running_sum, Vec<T>* factor) {
  constexpr T kReferenceLag = 8;
  const Vec<T> before = load(running_reference);
  Vec<T> top = before, top1 = before;
  int r = row_begin;
  for (; r + 2 <= row_end; r += 2) {
    top = maximum<T>(load(tile + r * kBlockQ), top);
    top1 = maximum<T>(load(tile + (r + 1) * kBlockQ), top1);
  }
  for (; r < row_end; ++r) top = maximum<T>(load(tile + r * kBlockQ), top);
  top = maximum<T>(top1, top);
  Vec<T> reference = before, sum{};
  const bool moved = any_lane<T>(top > before + kReferenceLag);
  if (moved) {
    reference = top > before + kReferenceLag ? top : before;
    *factor = exp<T>(before - reference);
    store(running_reference, reference);
    // A lane whose reference was -infinity has summed nothing, and must not be multiplied by NaN.
    *factor = before == -std::numeric_limits<T>::infinity() ? Vec<T>{} : *factor;
    sum = load(running_sum) * *factor;
  } else {
    sum = load(running_sum);
  }
  // A lane that has seen nothing keeps -infinity, and must not subtract it from itself.
  reference = reference == -std::numeric_limits<T>::infinity() ? Vec<T>{} : reference;
  Vec<T> tile_sum{};
#pragma GCC unroll 2
  for (r = row_begin; r < row_end; ++r) {
    Vec<T> e = exp<T>(load(tile + r * kBlockQ) - reference);
    tile_sum += e;
    if constexpr (kDropout) e = kept<T>(bits + r * kBlockQ, threshold) ? e : Vec<T>{};
    store(tile + r * kBlockQ, e);
  }
  store(running_sum, sum + tile_sum);
  return moved && any_lane<T>(before != -std::numeric_limits<T>::infinity());
}

// The backward step of one vector of lanes, in place:
//   scores -> p = e^(scores - lse), as dV' = p^T dout needs it;  dp -> ds = p (dp - delta)
// With dropout the dropped p become 0 after ds; dp arrives scaled by 1/(1 - r).
template <class T, bool kDropout>
PREFIX_KERNELS_INLINE void softmax_backward(T* scores, T* dp, int row_begin, int row_end, const uint16_t* bits,
                                            uint32_t threshold, Vec<T> lse, Vec<T> delta) {
#pragma GCC unroll 2
  for (int r = row_begin; r < row_end; ++r) {
    Vec<T> p = exp<T>(load(scores + r * kBlockQ) - lse);
    Int<T> keep{};
    if constexpr (kDropout) keep = kept<T>(bits + r * kBlockQ, threshold);
    if (dp != nullptr) {
      Vec<T> d = load(dp + r * kBlockQ);
      if constexpr (kDropout) d = keep ? d : Vec<T>{};
      store(dp + r * kBlockQ, p * (d - delta));
    }
    if constexpr (kDropout) p = keep ? p : Vec<T>{};
    store(scores + r * kBlockQ, p);
  }
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
