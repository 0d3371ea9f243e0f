// The columns that one query sees, and the score, weight and slope of each: the options of the operator, element by
// element.
#pragma once

#include <cmath>

#include "../../philox.h"
#include "elements.cuh"
#include "warp.cuh"

namespace prefix_kernels::cuda::simt {

// Quotients that are the same for every score, computed on the host: on the device a division is a call that moves
// registers to memory.
template <class T>
struct Factors {
  T rescale;          // factor on elements that dropout keeps
  T inverse_softcap;  // 0: off

  explicit Factors(const AttentionParams& p)
      : rescale(static_cast<T>(dropout_rescale(p.dropout_threshold))),
        inverse_softcap(p.softcap > 0 ? static_cast<T>(1 / p.softcap) : T(0)) {}
};

// A query of one head.
struct Query {
  int64_t batch;
  int64_t head;
  int64_t index;
};

// The number of query heads that share one key head. It fits in 32 bits, whose division is no call.
__device__ inline int group_size(const AttentionParams& p) {
  return static_cast<int>(p.q_heads) / static_cast<int>(p.kv_heads);
}

__device__ inline int64_t kv_head_of(const AttentionParams& p, int64_t head) {
  return static_cast<int>(head) / group_size(p);
}

// Index of the query among the rows of lse.
__device__ inline int64_t lse_index(const AttentionParams& p, const Query& q) {
  return (q.batch * p.q_heads + q.head) * p.q_len + q.index;
}

PREFIX_KERNELS_HOST_DEVICE RowGrid query_grid(const AttentionParams& p) { return {p.batch, p.q_heads, p.q_len}; }

// A run of columns that a query sees: those of one of its prefixes, or of its sequence.
struct Segment {
  bool is_prefix;
  int64_t outer;  // number of the prefix, or of the batch row
  int64_t begin;  // the visible columns [begin, end), counted from the segment's start
  int64_t end;
  int64_t mask_column;  // the mask's column at the segment's start; -1: the mask does not cover it
  uint32_t id;          // the segment's number in philox.h

  __device__ const Operand& key(const AttentionParams& p) const { return is_prefix ? p.prefix_key : p.key; }
  __device__ const Operand& value(const AttentionParams& p) const { return is_prefix ? p.prefix_value : p.value; }
};

__device__ inline int64_t prefix_total(const AttentionParams& p, int64_t b) {
  int64_t total = 0;
  for (int64_t m = 0; m < p.prefix_slots; ++m) total += valid_prefix_length(p, prefix_of_row(p, b, m));
  return total;
}

// Slot m of the query's prefixes, which begins after `start` columns of the `total`.
__device__ inline Segment prefix_segment(const AttentionParams& p, const Query& q, int64_t m, int64_t start,
                                         int64_t total) {
  const int64_t n = prefix_of_row(p, q.batch, m);
  const int64_t length = valid_prefix_length(p, n);
  const int64_t first = visible_prefix_begin(p, q.index + row_query_offset(p, q.batch), total);
  const bool masked = p.mask.data != nullptr && p.mask.prefix_columns > 0;
  return {true,
          n,
          clamp_to(first - start, 0, length),
          length,
          masked ? m * p.prefix_len : -1,
          static_cast<uint32_t>(1 + m)};
}

__device__ inline Segment sequence_segment(const AttentionParams& p, const Query& q) {
  const KeyRange seen = visible_sequence(p, q.index + row_query_offset(p, q.batch));
  return {false, q.batch, seen.begin, seen.end, p.mask.data != nullptr ? p.mask.prefix_columns : -1, 0};
}

// Calls visit(segment) for each of the query's prefixes and then for its sequence.
template <class Visit>
__device__ void for_each_segment(const AttentionParams& p, const Query& q, Visit visit) {
  const int64_t total = prefix_total(p, q.batch);
  int64_t start = 0;
#pragma unroll 1
  for (int64_t m = 0; m <= p.prefix_slots; ++m) {
    const bool is_prefix = m < p.prefix_slots;
    const Segment segment = is_prefix ? prefix_segment(p, q, m, start, total) : sequence_segment(p, q);
    start += segment.end;
    visit(segment);
  }
}

// The number that the mask adds to a score; -inf hides it.
template <class T>
__device__ T mask_bias(const AttentionParams& p, const Query& q, const Segment& segment, int64_t column) {
  if (segment.mask_column < 0) return T(0);
  const MaskOperand& m = p.mask;
  const int64_t index = q.batch * m.batch_stride + q.head * m.head_stride + q.index * m.row_stride +
                        (segment.mask_column + column) * m.column_stride;
  if (m.is_bool) return static_cast<const uint8_t*>(m.data)[index] != 0 ? T(0) : T(-INFINITY);
  T bias = 0;
  with_type(m.data, m.dtype, [&](const auto* data) { bias = static_cast<T>(widen(data[index])); });
  return bias;
}

template <class T>
struct Score {
  T value;
  T slope;  // derivative of the value by the scaled product
};

// The score of query and key from their product.
template <class T>
__device__ Score<T> score(const AttentionParams& p, const Factors<T>& factors, const Query& q, const Segment& segment,
                          int64_t column, T product) {
  const T scaled = static_cast<T>(p.scale) * product;
  const T bias = mask_bias<T>(p, q, segment, column);
  if (factors.inverse_softcap == 0) return {scaled + bias, T(1)};
  const T bent = std::tanh(scaled * factors.inverse_softcap);
  return {static_cast<T>(p.softcap) * bent + bias, T(1) - bent * bent};
}

// Tells if dropout keeps an element.
__device__ inline bool is_kept(const AttentionParams& p, const Query& q, const Segment& segment, int64_t column) {
  if (p.dropout_threshold == 0) return true;
  const uint32_t i = static_cast<uint32_t>(q.index), j = static_cast<uint32_t>(column);
  const PhiloxWords words = philox(dropout_seed(p), i / 16 * 8 + i % 8, j / 16 * 4 + j % 8 / 2,
                                   static_cast<uint32_t>(q.batch * p.q_heads + q.head), segment.id);
  const uint32_t which = i / 8 % 2 * 2 + j % 16 / 8;
  const uint32_t word =
      which < 2 ? (which == 0 ? words.word[0] : words.word[1]) : (which == 2 ? words.word[2] : words.word[3]);
  return (j % 2 != 0 ? word >> 16 : word & 0xFFFFu) >= p.dropout_threshold;
}

}  // namespace prefix_kernels::cuda::simt
