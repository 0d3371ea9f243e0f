// The forward pass for the few queries of a decoding step: a block of at most half a vector of them.
//
// With queries in the lanes most lanes would be empty, and every key is used only once: the time is that of reading
// keys and values from memory. So the head dim stands in the lanes, and neither side is transposed:
//   S  = Q K^T         [queries][keys]       lanes along head_dim, summed across them for kLanes keys at a time
//   P  = e^(S - max)                         lanes along keys, with a running max and sum per query
//   O += P V           [queries][value_dim]
#pragma once

#include "kernel.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

inline constexpr int kDecodeTile = 32;  // keys of a tile; it and the values' tile stay in the first-level cache

template <class T>
inline constexpr int kMaxDecodeQueries = kLanes<T> / 2;
static_assert(2 * kMaxDecodeQueries<float> <= kBlockQ, "a state's memory holds both the queries and their sums");
static_assert(kDecodeTile <= kBlockK && kDecodeTile % kLanes<float> == 0, "a tile's scratch memory, whole vectors");

// Tells if DecodeBlock computes the blocks of a call. Dropout excludes it: its bits are laid out for queries in the
// lanes; so does a call that extends another, whose sums are loaded there.
template <class T>
bool decodes(const AttentionParams& p, const BlockPartition& partition) {
  return partition.rows <= kMaxDecodeQueries<T> && p.dropout_threshold == 0 && !p.extends;
}

// A block of at most half a vector of queries.
template <class T>
class DecodeBlock {
 public:
  // Takes over the memory of `state`, which holds a result only after finish().
  DecodeBlock(const ForwardState<T>& state, const ForwardScratch<T>& scratch)
      : state_(state),
        block_(state.block),
        p_(*state.block.params),
        depth_(whole_vectors<T>(p_.head_dim)),
        value_depth_(whole_vectors<T>(p_.value_dim)),
        queries_(state.query),
        out_(state.query + kMaxDecodeQueries<T> * depth_),
        scratch_(scratch) {
    copy_queries<T>(p_.query, block_, p_.head_dim, queries_, depth_);
    const T factor = query_factor<T>(p_);
    for (int64_t i = 0; i < block_.count * depth_; ++i) queries_[i] *= factor;
    fill_zero(out_, block_.count * value_depth_);
    for (int q = 0; q < block_.count; ++q) {
      reference_[q] = -std::numeric_limits<T>::infinity();
      sum_[q] = Vec<T>{};
    }
  }

  // Adds the rows `range` of a segment.
  void add(const Segment& segment, KeyRange range) {
    range = intersection(range, block_.hull(segment));
    for (int64_t first = range.begin; first < range.end; first += kDecodeTile) {
      const int64_t left = range.end - first;
      add_tile(segment, first, static_cast<int>(left < kDecodeTile ? left : kDecodeTile),
               static_cast<int>(clamp_to(left - kDecodeTile, 0, kDecodeTile)));
    }
  }

  // Writes the state in the layout of forward_step, with queries in the lanes.
  void finish() const {
    for (int l = 0; l < kBlockQ; ++l) {
      state_.reference[l] = l < block_.count ? reference_[l] : -std::numeric_limits<T>::infinity();
      state_.sum[l] = l < block_.count ? horizontal_sum<T>(sum_[l]) : T(0);
    }
    for (int64_t d = 0; d < p_.value_dim; ++d)
      for (int l = 0; l < kLanes<T>; ++l)
        state_.out[d * kBlockQ + l] = l < block_.count ? out_[l * value_depth_ + d] : T(0);
  }

 private:
  static constexpr int kN = kLanes<T>;

  // Adds a tile. Its values are prefetched while its keys are multiplied, and the next tile's keys while its values
  // are.
  void add_tile(const Segment& segment, int64_t first, int count, int next_count) {
    const int64_t next = first + count;
    const Bias bias(*this, segment, first, count);
    if (bias.begin >= bias.end) return;
    first += bias.begin;
    count = bias.end - bias.begin;
    score_tile(segment, first, count);
    for (int q = 0; q < block_.count; ++q) {
      const KeyRange visible = block_.visible(segment, q);
      const auto in_tile = [&](int64_t row) { return static_cast<Index>(clamp_to(row - first, 0, count)); };
      exponentiate(q, count, in_tile(visible.begin), in_tile(visible.end), bias);
    }
    prefetch_rows(segment.key, next, next_count, p_.head_dim);
    const Rows<T> value = value_rows(segment.value, first, count);
    Prefetcher nothing;
    gemm<ALayout::kRowMajor, T>(block_.count, value_depth_, count, scratch_.scores, kDecodeTile, value.data,
                                value.stride, nothing, AddTo<T>{out_, value_depth_});
  }

  using Index = LaneIndex<T>;

  // Prefetches rows into the second-level cache: the first is full.
  static void prefetch_rows(const Operand& x, int64_t first, int count, int64_t depth) {
    const int64_t size = dtype_size(x.dtype);
    const char* row = static_cast<const char*>(x.data) + first * x.row_stride * size;
    for (int r = 0; r < count; ++r, row += x.row_stride * size)
      for (int64_t at = 0; at < depth * size; at += kCacheLine) __builtin_prefetch(row + at, 0, 2);
  }

  // attn_mask in the tile, as numbers to add: [queries][kDecodeTile], or one row that the queries share. Elements from
  // `end` on are arbitrary.
  struct Bias {
    const T* data = nullptr;  // numbers from row `begin` on; null: no mask
    int64_t stride = 0;
    int begin = 0, end;  // smallest range of rows that contains everything some query sees; empty if begin >= end

    Bias(const DecodeBlock& decode, const Segment& segment, int64_t first, int count) : end(count) {
      if (!segment.masked) return;
      const QueryBlock& block = decode.block_;
      const MaskOperand& mask = decode.p_.mask;
      T* const buffer = decode.scratch_.bias;
      const bool shared = shares_mask_row(mask, block);
      stride = shared ? 0 : kDecodeTile;
      begin = count;
      end = 0;
      dispatch_mask(mask, [&](auto* tag) {
        using Src = std::remove_pointer_t<decltype(tag)>;
        for (int q = 0; q < (shared ? 1 : block.count); ++q) {
          const Src* row = mask_row<Src>(mask, block, q) + (segment.mask_column + first) * mask.column_stride;
          for (int j = 0; j < count; ++j) {
            const T x = static_cast<T>(to_float(row[j * mask.column_stride]));
            buffer[q * kDecodeTile + j] = x;
            if (x == -std::numeric_limits<T>::infinity()) continue;
            begin = begin < j ? begin : j;
            end = end > j + 1 ? end : j + 1;
          }
        }
      });
      data = buffer + begin;
    }
  };

  Rows<T> value_rows(const Operand& x, int64_t first, int count) const {
    if (value_depth_ == p_.value_dim && x.dtype == kComputeDType<T>) return rows_in_place<T>(x, first);
    copy_rows<T>(x, first, count, p_.value_dim, scratch_.value, value_depth_);
    return {scratch_.value, value_depth_};
  }

  // scores[q][j] = queries[q] . key[j]. Elements of a row of scores from `count` on are arbitrary.
  void score_tile(const Segment& segment, int64_t first, int count) const {
    if (depth_ != p_.head_dim) {
      prefetch_rows(segment.value, first, count, p_.value_dim);
      copy_rows<T>(segment.key, first, count, p_.head_dim, scratch_.key, depth_);
      score_rows(scratch_.key, depth_, count, [](int) {});
      return;
    }
    dispatch_dtype(segment.key.dtype, [&](auto* tag) {
      using Src = std::remove_pointer_t<decltype(tag)>;
      const int64_t stride = segment.key.row_stride;
      score_rows(static_cast<const Src*>(segment.key.data) + first * stride, stride, count, [&](int j) {
        prefetch_rows(segment.value, first + j, count - j < kN ? count - j : kN, p_.value_dim);
      });
    });
  }

  // Calls before(j) before the keys from j on are multiplied, for every kN of them.
  template <class Src, class Before>
  void score_rows(const Src* key, int64_t stride, int count, Before before) const {
    for (int j = 0; j < count; j += kN) {
      before(j);
      const int end = count - j < kN ? count : j + kN;
      int q = 0;
      if constexpr (kMaxDecodeQueries<T> >= 4)
        for (; q + 4 <= block_.count; q += 4) score<4>(key, stride, j, end, q);
      if constexpr (kMaxDecodeQueries<T> >= 2)
        for (; q + 2 <= block_.count; q += 2) score<2>(key, stride, j, end, q);
      for (; q < block_.count; ++q) score<1>(key, stride, j, end, q);
    }
  }

  // Multiplies kQueries queries from `first_query` on with the keys [begin, end), kN products at a time.
  template <int kQueries, class Src>
  void score(const Src* key, int64_t stride, int begin, int end, int first_query) const {
    constexpr int kKeys = kN / kQueries;
    for (int j = begin; j < end; j += kKeys) {
      const Src* row[kKeys];
      for (int i = 0; i < kKeys; ++i) row[i] = key + (j + i < end ? j + i : end - 1) * stride;
      const T* const query = queries_ + first_query * depth_;
      Vec<T> sum[kN];
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) sum[i] = Vec<T>{};
      for (int64_t d = 0; d < depth_; d += kN) {
        Vec<T> q[kQueries];
#pragma GCC unroll 4
        for (int n = 0; n < kQueries; ++n) q[n] = load(query + n * depth_ + d);
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; ++i) {
          const Vec<T> k = load_as<T, Src>(row[i] + d);
#pragma GCC unroll 4
          for (int n = 0; n < kQueries; ++n) sum[n * kKeys + i] += k * q[n];
        }
      }
      alignas(kVectorBytes) T product[kN];
      store(product, lane_sums<T>(sum));
      for (int n = 0; n < kQueries; ++n)
        std::memcpy(scratch_.scores + (first_query + n) * kDecodeTile + j, product + n * kKeys, kKeys * sizeof(T));
    }
  }

  // Turns the scores of one query in the tile into probabilities; rows before `begin` and from `end` on are hidden.
  void exponentiate(int q, int count, Index begin, Index end, const Bias& bias) {
    T* const scores = scratch_.scores + q * kDecodeTile;
    const T cap = static_cast<T>(p_.softcap);
    const Vec<T> hidden = broadcast<T>(-std::numeric_limits<T>::infinity());
    Int<T> row;
    for (int i = 0; i < kN; ++i) row[i] = i;
    Vec<T> top = hidden;
    for (int j = 0; j < count; j += kN, row += kN) {
      Vec<T> s = load(scores + j);
      if (cap > 0) s = tanh<T>(s) * cap;
      if (bias.data != nullptr) s += load(bias.data + q * bias.stride + j);
      s = (row >= begin) & (row < end) ? s : hidden;
      top = maximum<T>(s, top);
      store(scores + j, s);
    }
    raise(q, horizontal_max<T>(top));
    const T from = reference_[q] == -std::numeric_limits<T>::infinity() ? T(0) : reference_[q];
    for (int j = 0; j < count; j += kN) {
      const Vec<T> e = exp<T>(load(scores + j) - from);
      sum_[q] += e;
      store(scores + j, e);
    }
  }

  // Moves the reference of a query up to `top` where it lags too far.
  void raise(int q, T top) {
    if (!(top > reference_[q] + OnlineSoftmax<T>::kReferenceLag)) return;
    if (reference_[q] != -std::numeric_limits<T>::infinity()) {
      const T factor = exp<T>(broadcast<T>(reference_[q] - top))[0];
      sum_[q] *= factor;
      for (int64_t d = 0; d < value_depth_; ++d) out_[q * value_depth_ + d] *= factor;
    }
    reference_[q] = top;
  }

  const ForwardState<T>& state_;
  const QueryBlock& block_;
  const AttentionParams& p_;
  const int64_t depth_, value_depth_;  // head_dim and value_dim, rounded up to whole vectors
  T* const queries_;                   // [queries][depth], scaled
  T* const out_;                       // [queries][value_depth]
  const ForwardScratch<T>& scratch_;
  T reference_[kMaxDecodeQueries<T>];
  Vec<T> sum_[kMaxDecodeQueries<T>];
};

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
