// The scores of a cell between the two products: scale, softcap, mask, visibility, dropout.
//
// With g = lane / 4 and t = lane % 4, a thread holds columns 2t, 2t + 1, 2t + 8, 2t + 9 of rows g and g + 8 of a 16 x
// 16 block: `left` and `right` are two accumulators of mma_16816.
#pragma once

#include "../../philox.h"
#include "kv_tiles.cuh"
#include "mask.cuh"

namespace prefix_kernels::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr int kColumnsPerThread = 4;  // columns of a cell's row that one thread holds

__device__ __forceinline__ float minus_infinity() { return -INFINITY; }

// The k-th of a thread's columns in a cell.
__device__ __forceinline__ int column_of(int lane, int k) { return 2 * (lane % 4) + (k & 1) + 8 * (k >> 1); }

// Sets to -inf the scores of columns that a thread's rows, `top` and `bottom`, do not see.
__device__ __forceinline__ void hide_unseen(float (&left)[4], float (&right)[4], Span top, Span bottom, int lane) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const Span& seen = e < 2 ? top : bottom;
    if (!seen.holds(column_of(lane, e & 1))) left[e] = minus_infinity();
    if (!seen.holds(column_of(lane, 2 + (e & 1)))) right[e] = minus_infinity();
  }
}

// cap * tanh(x / cap)
__device__ __forceinline__ float softcapped(float x, float cap) {
  const float power = ptx::exp2_approx(__fdividef(x, cap) * (2 * kLog2E));
  return cap * (1 - __fdividef(2.0f, 1 + power));
}

// The part of attn_mask over one cell.
struct CellMask {
  const MaskOperand& mask;
  int64_t column;  // the mask's column at the cell's first
  bool applies;

  __device__ __forceinline__ CellMask(const AttentionParams& p, const Cell& cell) : mask(p.mask) {
    const bool in_sequence = cell.segment == 0;
    column = cell.first + (in_sequence ? mask.prefix_columns : (cell.segment - 1) * p.prefix_len);
    applies = mask.data != nullptr && (in_sequence || mask.prefix_columns > 0);
  }

  // The number that the mask adds to the score of an existing column of the cell; -inf hides it.
  __device__ __forceinline__ float bias(int64_t batch, int64_t head, int64_t query, int in_cell) const {
    if (!applies) return 0.0f;
    const int64_t at = batch * mask.batch_stride + head * mask.head_stride + query * mask.row_stride +
                       (column + in_cell) * mask.column_stride;
    return element_bias(mask, static_cast<const char*>(mask.data) + at * mask_bytes(mask));
  }

  // The mask's numbers for the thread's columns; 0 for columns that do not exist.
  __device__ __forceinline__ void load(float (&biases)[kColumnsPerThread], int64_t batch, int64_t head, int64_t query,
                                       int columns, int lane) const {
#pragma unroll
    for (int k = 0; k < kColumnsPerThread; ++k) {
      const int in_cell = column_of(lane, k);
      biases[k] = in_cell < columns ? bias(batch, head, query, in_cell) : 0.0f;
    }
  }
};

// Makes the scores of one row final, in natural units: two of `left` and two of `right` from index `from` on.
__device__ __forceinline__ void finish_scores(float (&left)[4], float (&right)[4], int from, float scale, float softcap,
                                              const float (&bias)[kColumnsPerThread], Span seen, int lane) {
#pragma unroll
  for (int k = 0; k < kColumnsPerThread; ++k) {
    float& score = k < 2 ? left[from + (k & 1)] : right[from + (k & 1)];
    float x = score * scale;
    if (softcap > 0) x = softcapped(x, softcap);
    score = seen.holds(column_of(lane, k)) ? x + bias[k] : minus_infinity();
  }
}

// Sets one row's dropped elements to zero, from index `from` on. `left_bits` and `right_bits` decide on its columns in
// 0..7 and 8..15 of the cell: 16 bits for the even column, 16 for the odd one.
__device__ __forceinline__ void drop_elements(float (&left)[4], float (&right)[4], int from, uint32_t left_bits,
                                              uint32_t right_bits, uint32_t threshold) {
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    if (((left_bits >> (16 * odd)) & 0xFFFFu) < threshold) left[from + odd] = 0.0f;
    if (((right_bits >> (16 * odd)) & 0xFFFFu) < threshold) right[from + odd] = 0.0f;
  }
}

// Sets one row's dropped elements to zero, for blocks whose rows are not 16 consecutive queries.
__device__ __forceinline__ void drop_out_row(float (&left)[4], float (&right)[4], int from, uint64_t seed,
                                             uint32_t threshold, int query, int64_t head, const Cell& cell, int lane) {
  const PhiloxWords words = philox(seed, query / 16 * 8 + query % 8, cell.first / kCell * 4 + lane % 4,
                                   static_cast<uint32_t>(head), static_cast<uint32_t>(cell.segment));
  const bool lower = query % 16 >= 8;
  drop_elements(left, right, from, lower ? words.word[2] : words.word[0], lower ? words.word[3] : words.word[1],
                threshold);
}

}  // namespace prefix_kernels::cuda
