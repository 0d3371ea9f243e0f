// The only definition of the keys that a query sees, for host and device code.
//
// Query i of batch row b stands at position i + offset(b) of the sequence's axis. The row's prefixes end where the
// sequence begins: column c of its concatenated prefixes has position c - prefix_total.
#pragma once

#include "attention_params.h"

#if defined(__CUDACC__)
#define PREFIX_KERNELS_HOST_DEVICE __host__ __device__ inline
#else
#define PREFIX_KERNELS_HOST_DEVICE inline
#endif

namespace prefix_kernels {

struct KeyRange {
  int64_t begin;
  int64_t end;
};

PREFIX_KERNELS_HOST_DEVICE int64_t clamp_to(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

// The prefix in slot m of row b, or -1.
PREFIX_KERNELS_HOST_DEVICE int64_t prefix_of_row(const AttentionParams& p, int64_t b, int64_t m) {
  if (p.prefix_ids != nullptr) return p.prefix_ids[b * p.prefix_slots + m];
  return p.num_prefixes == 1 ? 0 : b;
}

// The rows of prefix n that hold a token; the others pad it to the length of the bank. 0 if n is -1.
PREFIX_KERNELS_HOST_DEVICE int64_t valid_prefix_length(const AttentionParams& p, int64_t n) {
  if (n < 0) return 0;
  return p.prefix_lens != nullptr ? p.prefix_lens[n] : p.prefix_len;
}

// The queries and keys of batch row b.
PREFIX_KERNELS_HOST_DEVICE int64_t row_queries(const AttentionParams& p, int64_t b) {
  return p.query_starts != nullptr ? p.query_starts[b + 1] - p.query_starts[b] : p.q_len;
}

PREFIX_KERNELS_HOST_DEVICE int64_t row_keys(const AttentionParams& p, int64_t b) {
  return p.key_starts != nullptr ? p.key_starts[b + 1] - p.key_starts[b] : p.k_len;
}

// The rows of prefix n in memory, of which valid_prefix_length hold a token.
PREFIX_KERNELS_HOST_DEVICE int64_t prefix_rows(const AttentionParams& p, int64_t n) {
  return p.prefix_starts != nullptr ? p.prefix_starts[n + 1] - p.prefix_starts[n] : p.prefix_len;
}

PREFIX_KERNELS_HOST_DEVICE int64_t row_query_offset(const AttentionParams& p, int64_t b) {
  return p.query_offsets != nullptr ? p.query_offsets[b] : p.query_offset;
}

// The sequence keys [begin, end), of k_len, that the query at position `position` sees; mask apart.
PREFIX_KERNELS_HOST_DEVICE KeyRange visible_sequence(const AttentionParams& p, int64_t position, int64_t k_len) {
  KeyRange range{0, k_len};
  if (p.is_causal) range.end = clamp_to(position + 1, 0, range.end);
  if (p.window_right >= 0) range.end = clamp_to(position + p.window_right + 1, 0, range.end);
  if (p.window_left >= 0) range.begin = clamp_to(position - p.window_left, 0, k_len);
  return range;
}

PREFIX_KERNELS_HOST_DEVICE KeyRange visible_sequence(const AttentionParams& p, int64_t position) {
  return visible_sequence(p, position, p.k_len);
}

// The first visible column among the row's concatenated prefixes, which hold prefix_total columns.
PREFIX_KERNELS_HOST_DEVICE int64_t visible_prefix_begin(const AttentionParams& p, int64_t position,
                                                        int64_t prefix_total) {
  if (!p.window_includes_prefix || p.window_left < 0) return 0;
  return clamp_to(position - p.window_left + prefix_total, 0, prefix_total);
}

// The queries [begin, end) of a row with this offset that see at least one of the sequence keys [first, last]; mask
// apart. The inverse of visible_sequence.
PREFIX_KERNELS_HOST_DEVICE KeyRange queries_of_sequence(const AttentionParams& p, int64_t first, int64_t last,
                                                        int64_t offset) {
  KeyRange range{0, p.q_len};
  if (p.is_causal) range.begin = clamp_to(first - offset, 0, p.q_len);
  if (p.window_right >= 0) range.begin = clamp_to(first - p.window_right - offset, range.begin, p.q_len);
  if (p.window_left >= 0) range.end = clamp_to(last + p.window_left - offset + 1, 0, p.q_len);
  return range;
}

// The queries [begin, end) of a row with this offset that see at least one of the columns up to `last` of the row's
// concatenated prefixes. The inverse of visible_prefix_begin.
PREFIX_KERNELS_HOST_DEVICE KeyRange queries_of_prefix(const AttentionParams& p, int64_t last, int64_t prefix_total,
                                                      int64_t offset) {
  KeyRange range{0, p.q_len};
  if (p.window_includes_prefix && p.window_left >= 0)
    range.end = clamp_to(last + p.window_left - prefix_total - offset + 1, 0, p.q_len);
  return range;
}

}  // namespace prefix_kernels
