// Segments of keys and blocks of queries, and the keys that each query sees.
//
// A step of a kernel is a tile of up to kBlockK keys from one segment times a block of up to kBlockQ queries. A segment
// is a prefix or the sequence. A tile never straddles the seam, since rows need no padding, and starts at a multiple of
// kCell rows of its segment. forward/tiles.h and backward/tiles.h tell which part of a step is computed.
#pragma once

#include "../../visibility.h"
#include "simd.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

inline constexpr int kBlockQ = 64;
inline constexpr int kBlockK = 128;
inline constexpr int kCell = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- segments ----------------------------------------------------------------------------------------------------

// The keys and values of one batch row and kv head that lie in one piece of memory.
struct Segment {
  Operand key;  // data points to row 0 of this head; only row_stride and dtype apply
  Operand value;
  int64_t length = 0;
  int64_t id = 0;       // number in philox.h: 0 is the sequence, 1 + slot a prefix
  int64_t prefix = -1;  // number of the prefix in the bank; -1: the sequence
  int64_t start = 0;    // a prefix's first column among the row's concatenated prefixes
  int64_t mask_column = 0;
  bool masked = false;  // attn_mask has columns for the segment

  bool is_prefix() const { return prefix >= 0; }
};

inline int64_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

inline Operand head_of(const Operand& x, int64_t batch, int64_t head, int64_t first_row) {
  Operand y = x;
  if (x.data != nullptr)
    y.data = static_cast<char*>(x.data) +
             (batch * x.batch_stride + head * x.head_stride + first_row * x.row_stride) * dtype_size(x.dtype);
  return y;
}

// One head of the keys or values, or of their gradients, of the sequence of batch row b.
inline Operand sequence_head(const AttentionParams& p, const Operand& x, int64_t b, int64_t head) {
  return head_of(x, b, head, p.key_starts != nullptr ? p.key_starts[b] : 0);
}

// The same of prefix n of the bank.
inline Operand prefix_head(const AttentionParams& p, const Operand& x, int64_t n, int64_t head) {
  return head_of(x, n, head, p.prefix_starts != nullptr ? p.prefix_starts[n] : 0);
}

inline int64_t num_segments(const AttentionParams& p) { return p.prefix_slots + 1; }

inline int64_t row_prefix_total(const AttentionParams& p, int64_t b) {
  int64_t total = 0;
  for (int64_t m = 0; m < p.prefix_slots; ++m) total += valid_prefix_length(p, prefix_of_row(p, b, m));
  return total;
}

// Segment s of batch row b: the prefixes in slot order, then the sequence. `start`: the prefix's first column among the
// row's concatenated prefixes.
inline Segment make_segment(const AttentionParams& p, int64_t b, int64_t kv_head, int64_t s, int64_t start) {
  Segment segment;
  if (s < p.prefix_slots) {
    const int64_t n = prefix_of_row(p, b, s);
    segment.id = 1 + s;
    segment.start = start;
    segment.mask_column = s * p.prefix_len;
    segment.masked = p.mask.data != nullptr && p.mask.prefix_columns > 0;
    segment.prefix = n < 0 ? 0 : n;
    segment.length = valid_prefix_length(p, n);
    segment.key = prefix_head(p, p.prefix_key, segment.prefix, kv_head);
    segment.value = prefix_head(p, p.prefix_value, segment.prefix, kv_head);
  } else {
    segment.masked = p.mask.data != nullptr;
    segment.mask_column = p.mask.prefix_columns;
    segment.length = row_keys(p, b);
    segment.key = sequence_head(p, p.key, b, kv_head);
    segment.value = sequence_head(p, p.value, b, kv_head);
  }
  return segment;
}

// The rows of all heads' queries, and of all heads' keys of the sequences.
inline int64_t all_query_rows(const AttentionParams& p) {
  return p.q_heads * (p.query_starts != nullptr ? p.packed_queries : p.batch * p.q_len);
}
inline int64_t all_key_rows(const AttentionParams& p) {
  return p.kv_heads * (p.key_starts != nullptr ? p.packed_keys : p.batch * p.k_len);
}

inline KeyRange intersection(const KeyRange& a, const KeyRange& b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

inline bool intersects(const KeyRange& a, int64_t begin, int64_t end) {
  return a.begin < end && a.end > begin && a.begin < a.end;
}

// ---- query blocks ------------------------------------------------------------------------------------------------

// The division of the queries of one (batch row, kv head) into blocks: of one row, or of the longest there is. Short
// queries of a group's heads share a block, so that decoding reads its keys once per group. Otherwise a block holds one
// head, as the dropout bits do.
struct BlockPartition {
  bool packed;
  int64_t group;            // query heads per kv head
  int64_t rows;             // queries of one head, or of the group when packed
  int64_t blocks_per_head;  // blocks of one head, or of the group when packed
  int64_t count;

  explicit BlockPartition(const AttentionParams& p) : BlockPartition(p, p.q_len) {}
  BlockPartition(const AttentionParams& p, int64_t q_len)
      : packed(p.q_heads > p.kv_heads && p.q_len < kBlockQ && p.dropout_threshold == 0),
        group(p.q_heads / p.kv_heads),
        rows(packed ? group * q_len : q_len),
        blocks_per_head(ceil_div(rows, kBlockQ)),
        count(packed ? blocks_per_head : blocks_per_head * group) {}
};

// A block of queries: consecutive rows of the group's flattened [group, q_len] queries, one per lane.
struct QueryBlock {
  const AttentionParams* params;
  int64_t batch, kv_head;
  int64_t q_len;                    // queries of the batch row
  int64_t start;                    // its first row in memory: more than 0 where sequences are packed
  int64_t first_head, first_query;  // head and query of lane 0
  int count;                        // valid lanes
  bool one_head;                    // all lanes have one head; their key ranges are then monotone
  int64_t prefix_total;
  int64_t offset;
  KeyRange sequence[kBlockQ];     // visible sequence keys of each lane; the lanes past count repeat the last
  int64_t prefix_begin[kBlockQ];  // first visible column of the concatenated prefixes

  // `index`: below the number of the row's own blocks.
  QueryBlock(const AttentionParams& p, int64_t b, int64_t h, int64_t index)
      : params(&p),
        batch(b),
        kv_head(h),
        q_len(row_queries(p, b)),
        start(p.query_starts != nullptr ? p.query_starts[b] : 0),
        prefix_total(row_prefix_total(p, b)),
        offset(row_query_offset(p, b)) {
    const BlockPartition partition(p, q_len);
    const int64_t rows = partition.rows, k_len = row_keys(p, b);
    const int64_t unit = index / partition.blocks_per_head;
    const int64_t row = (index % partition.blocks_per_head) * kBlockQ;
    const int64_t first_row = unit * rows + row;
    count = static_cast<int>(rows - row < kBlockQ ? rows - row : kBlockQ);
    first_head = kv_head * partition.group + first_row / q_len;
    first_query = first_row % q_len;
    one_head = first_query + count <= q_len;
    if (!p.is_causal && p.window_left < 0 && p.window_right < 0) {  // every query sees every column
      for (int l = 0; l < kBlockQ; ++l) {
        sequence[l] = {0, k_len};
        prefix_begin[l] = 0;
      }
      return;
    }
    for (int l = 0; l < kBlockQ; ++l) {
      const int64_t position = query(l < count ? l : count - 1) + offset;
      sequence[l] = visible_sequence(p, position, k_len);
      prefix_begin[l] = visible_prefix_begin(p, position, prefix_total);
    }
  }

  // Divides only for blocks of several heads.
  int64_t head(int lane) const { return one_head ? first_head : first_head + (first_query + lane) / q_len; }
  int64_t query(int lane) const { return one_head ? first_query + lane : (first_query + lane) % q_len; }

  // The row of a lane's query, of out and their gradients, among those of its head in memory.
  int64_t row(int lane) const { return start + query(lane); }

  // The index of a lane in lse.
  int64_t lse_index(int lane) const {
    const int64_t rows = params->query_starts != nullptr ? params->packed_queries : params->q_len;
    return (batch * (params->query_starts != nullptr ? 0 : params->q_heads) + head(lane)) * rows + row(lane);
  }

  template <class T>
  int vectors() const {
    return (count + kLanes<T> - 1) / kLanes<T>;
  }

  // The rows of a segment that lane l sees.
  KeyRange visible(const Segment& segment, int lane) const {
    if (!segment.is_prefix()) return sequence[lane];
    return {clamp_to(prefix_begin[lane] - segment.start, 0, segment.length), segment.length};
  }

  // The rows that each lane sees of the tile that begins at row `first` of the segment, counted from `first`.
  template <class Index>
  void tile_ranges(const Segment& segment, int64_t first, Index* begin, Index* end) const {
    for (int l = 0; l < kBlockQ; ++l) {
      const KeyRange range = visible(segment, l);
      begin[l] = static_cast<Index>(clamp_to(range.begin - first, 0, kBlockK));
      end[l] = static_cast<Index>(clamp_to(range.end - first, 0, kBlockK));
    }
  }

  // The rows that some lane may see; empty when begin >= end.
  KeyRange hull(const Segment& segment) const {
    KeyRange range = visible(segment, 0);
    if (one_head) {
      range.end = visible(segment, count - 1).end;
      return range;
    }
    for (int l = 1; l < count; ++l) {
      const KeyRange lane = visible(segment, l);
      if (lane.begin < range.begin) range.begin = lane.begin;
      if (lane.end > range.end) range.end = lane.end;
    }
    return range;
  }
};

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
