// Copies between operands in their natural layout [rows][depth], in any dtype, and the kernels' [depth][lanes] with
// queries or keys in the lanes. The depth is head_dim for query and key, value_dim for value and out.
#pragma once

#include <type_traits>

#include "tiles.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// dst[d][lane] = factor * row_of(lane)[d], in rows of `stride`; the lanes up to the next whole vector become 0.
template <class T, class Src, class RowOf>
void pack_lanes(int count, int64_t depth, T factor, RowOf row_of, T* dst, int64_t stride) {
  constexpr int kN = kLanes<T>;
  for (int l0 = 0; l0 < count; l0 += kN) {
    const Src* row[kN];
    for (int l = 0; l < kN; ++l) row[l] = l0 + l < count ? row_of(l0 + l) : nullptr;
    const bool full = l0 + kN <= count;
    int64_t d = 0;
    for (; d + kN <= depth; d += kN) {
      Vec<T> tile[kN];
      for (int l = 0; l < kN; ++l) tile[l] = full || row[l] != nullptr ? load_as<T, Src>(row[l] + d) : Vec<T>{};
      transpose<T>(tile);
      for (int i = 0; i < kN; ++i) store(dst + (d + i) * stride + l0, tile[i] * factor);
    }
    for (; d < depth; ++d)
      for (int l = 0; l < kN; ++l)
        dst[d * stride + l0 + l] = row[l] != nullptr ? static_cast<T>(to_float(row[l][d])) * factor : T(0);
  }
}

// The factor on Q or K that makes Q K^T the argument of tanh, or a score.
template <class T>
T query_factor(const AttentionParams& p) {
  return static_cast<T>(p.softcap > 0 ? p.scale / p.softcap : p.scale);
}

// Tells if a result of `rows` rows is written past the caches: in whole lines, of a tensor that the caches of one core
// would not keep. Lines that are written in full need not be fetched first.
template <class T>
bool streams(const Operand& x, int64_t rows, int64_t depth) {
  constexpr int64_t kCachedBytes = int64_t{1} << 20;
  const auto whole = [](int64_t elements) { return elements % kLanes<T> == 0; };
  return kVectorIsLine && x.dtype == kComputeDType<T> &&
         rows * depth * static_cast<int64_t>(sizeof(T)) > kCachedBytes &&
         reinterpret_cast<uintptr_t>(x.data) % kVectorBytes == 0 && whole(x.batch_stride) && whole(x.head_stride) &&
         whole(x.row_stride);
}

template <class T, class Dst, bool kStream>
PREFIX_KERNELS_INLINE void write_vector(Dst* p, Vec<T> v) {
  if constexpr (kStream && std::is_same_v<T, Dst>)
    stream(p, v);
  else
    store_as<T, Dst>(p, v);
}

// row_of(lane)[d] = factor[lane] * src[d][lane], converted.
template <class T, class Dst, bool kStream, class RowOf>
void unpack_lanes(int count, int64_t depth, const T* factor, RowOf row_of, const T* src) {
  constexpr int kN = kLanes<T>;
  for (int l0 = 0; l0 < count; l0 += kN) {
    Dst* row[kN];
    for (int l = 0; l < kN; ++l) row[l] = l0 + l < count ? row_of(l0 + l) : nullptr;
    const bool full = l0 + kN <= count;
    const Vec<T> scale = load(factor + l0);
    int64_t d = 0;
    for (; d + kN <= depth; d += kN) {
      Vec<T> tile[kN];
      for (int i = 0; i < kN; ++i) tile[i] = load(src + (d + i) * kBlockQ + l0) * scale;
      transpose<T>(tile);
#pragma GCC unroll 16
      for (int l = 0; l < kN; ++l)
        if (full || row[l] != nullptr) write_vector<T, Dst, kStream>(row[l] + d, tile[l]);
    }
    for (; d < depth; ++d)
      for (int l = 0; l < kN && row[l] != nullptr; ++l)
        row[l][d] = from_float<Dst>(src[d * kBlockQ + l0 + l] * factor[l0 + l]);
  }
}

// Offset of a lane's row in a [batch, q_heads, q_len, depth] operand, in elements.
PREFIX_KERNELS_INLINE int64_t lane_offset(const Operand& x, const QueryBlock& block, int lane) {
  return block.batch * x.batch_stride + block.head(lane) * x.head_stride + block.row(lane) * x.row_stride;
}

template <class U>
PREFIX_KERNELS_INLINE U* lane_row(const Operand& x, const QueryBlock& block, int lane) {
  return static_cast<U*>(x.data) + lane_offset(x, block, lane);
}

// dst[d][lane] = factor * x of the block's lanes, in rows of kBlockQ.
template <class T>
void pack_queries(const Operand& x, const QueryBlock& block, int64_t depth, T factor, T* dst) {
  dispatch_dtype(x.dtype, [&](auto* tag) {
    using Src = std::remove_pointer_t<decltype(tag)>;
    const auto row_of = [&](int lane) { return static_cast<const Src*>(lane_row<Src>(x, block, lane)); };
    pack_lanes<T, Src>(block.count, depth, factor, row_of, dst, kBlockQ);
  });
}

// dst[d][lane] = factor * row first + lane of one head, in rows of `stride`.
template <class T>
void pack_rows(const Operand& x, int64_t first, int count, int64_t depth, T factor, T* dst, int64_t stride) {
  dispatch_dtype(x.dtype, [&](auto* tag) {
    using Src = std::remove_pointer_t<decltype(tag)>;
    const auto row_of = [&](int lane) { return static_cast<const Src*>(x.data) + (first + lane) * x.row_stride; };
    pack_lanes<T, Src>(count, depth, factor, row_of, dst, stride);
  });
}

// x = factor * src, one factor per lane.
template <class T>
void unpack_queries(const Operand& x, const QueryBlock& block, int64_t depth, const T* factor, const T* src) {
  const AttentionParams& p = *block.params;
  const bool past_caches = streams<T>(x, all_query_rows(p), depth);
  dispatch_dtype(x.dtype, [&](auto* tag) {
    using Dst = std::remove_pointer_t<decltype(tag)>;
    const auto row_of = [&](int lane) { return lane_row<Dst>(x, block, lane); };
    const auto unpack =
        past_caches ? unpack_lanes<T, Dst, true, decltype(row_of)> : unpack_lanes<T, Dst, false, decltype(row_of)>;
    unpack(block.count, depth, factor, row_of, src);
  });
}

template <class T, class Src>
PREFIX_KERNELS_INLINE void convert_row(const Src* src, int64_t depth, T* dst) {
  int64_t d = 0;
  for (; d + kLanes<T> <= depth; d += kLanes<T>) store(dst + d, load_as<T, Src>(src + d));
  for (; d < depth; ++d) dst[d] = static_cast<T>(to_float(src[d]));
}

// Copies rows [first, first + count) of one head, converted, into rows of copy_stride that end in zeros.
template <class T>
void copy_rows(const Operand& x, int64_t first, int count, int64_t depth, T* copy, int64_t copy_stride) {
  dispatch_dtype(x.dtype, [&](auto* tag) {
    using Src = std::remove_pointer_t<decltype(tag)>;
    const Src* src = static_cast<const Src*>(x.data) + first * x.row_stride;
    for (int r = 0; r < count; ++r, src += x.row_stride, copy += copy_stride) {
      convert_row<T, Src>(src, depth, copy);
      for (int64_t d = depth; d < copy_stride; ++d) copy[d] = 0;
    }
  });
}

// Rows of the compute type that a matrix product reads many times.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

template <class T>
Rows<T> rows_in_place(const Operand& x, int64_t first) {
  return {static_cast<const T*>(x.data) + first * x.row_stride, x.row_stride};
}

// Tells if a few consecutive rows, read side by side, fall into different sets of the cache and need no conversion.
template <class T>
bool rows_spread_in_cache(const Operand& x) {
  constexpr int64_t kSetsBytes = 4096;  // addresses that far apart share a set
  return x.dtype == kComputeDType<T> && x.row_stride * static_cast<int64_t>(sizeof(T)) % kSetsBytes != 0;
}

// Rows [first, first + count) of a segment's keys or values, `padded` apart: in place if they are dense, otherwise
// copied to scratch, ending in zeros. Rows of one head in a [batch, rows, heads, head_dim] layout are a power of two
// apart and would share a few sets of the cache.
template <class T>
Rows<T> segment_rows(const Operand& x, int64_t first, int count, int64_t depth, int64_t padded, T* scratch) {
  if (x.dtype == kComputeDType<T> && x.row_stride == padded && depth == padded) return rows_in_place<T>(x, first);
  copy_rows<T>(x, first, count, depth, scratch, padded);
  return {scratch, padded};
}

// copy[lane][d] = x, in rows of copy_stride that end in zeros.
template <class T>
void copy_queries(const Operand& x, const QueryBlock& block, int64_t depth, T* copy, int64_t copy_stride) {
  dispatch_dtype(x.dtype, [&](auto* tag) {
    using Src = std::remove_pointer_t<decltype(tag)>;
    for (int l = 0; l < block.count; ++l) {
      T* row = copy + l * copy_stride;
      convert_row<T, Src>(lane_row<Src>(x, block, l), depth, row);
      for (int64_t d = depth; d < copy_stride; ++d) row[d] = 0;
    }
  });
}

template <class T, class Dst, bool kStream>
void scale_row(const T* src, int64_t depth, T factor, Dst* dst) {
  int64_t d = 0;
  for (; d + kLanes<T> <= depth; d += kLanes<T>) write_vector<T, Dst, kStream>(dst + d, load(src + d) * factor);
  for (; d < depth; ++d) dst[d] = from_float<Dst>(src[d] * factor);
}

// The rows of a block's queries: in place if they are dense, otherwise copied to scratch as by copy_queries.
template <class T>
Rows<T> query_rows(const Operand& x, const QueryBlock& block, int64_t depth, int64_t padded, T* scratch) {
  if (x.dtype == kComputeDType<T> && x.row_stride == padded && depth == padded && block.one_head)
    return {lane_row<const T>(x, block, 0), padded};
  copy_queries<T>(x, block, depth, scratch, padded);
  return {scratch, padded};
}

// Writes factor * sum, converted, to the row of a gradient that begins at element `at`.
template <class T>
void write_gradient_row(const Operand& gradient, int64_t at, int64_t depth, T factor, const T* sum, bool past_caches) {
  dispatch_dtype(gradient.dtype, [&](auto* tag) {
    using Dst = std::remove_pointer_t<decltype(tag)>;
    Dst* dst = static_cast<Dst*>(gradient.data) + at;
    const auto scale = past_caches ? scale_row<T, Dst, true> : scale_row<T, Dst, false>;
    scale(sum, depth, factor, dst);
  });
}

// sum[lane] = sum_d x[lane][d] * y[lane][d], for whole vectors of lanes; 0 behind the last lane.
template <class T>
void row_dot(const Operand& x, const Operand& y, const QueryBlock& block, int64_t depth, T* sum) {
  constexpr int kN = kLanes<T>;
  dispatch_dtype(x.dtype, [&](auto* x_tag) {
    using X = std::remove_pointer_t<decltype(x_tag)>;  // out and dout share the query's dtype
    for (int first = 0; first < block.count; first += kN) {
      Vec<T> products[kN] = {};
      T rest[kN] = {};
      for (int i = 0; i < kN && first + i < block.count; ++i) {
        const X* a = lane_row<X>(x, block, first + i);
        const X* b = lane_row<X>(y, block, first + i);
        Vec<T> product{};
        int64_t d = 0;
        for (; d + kN <= depth; d += kN) product += load_as<T, X>(a + d) * load_as<T, X>(b + d);
        products[i] = product;
        for (; d < depth; ++d) rest[i] += static_cast<T>(to_float(a[d])) * static_cast<T>(to_float(b[d]));
      }
      store(sum + first, lane_sums<T>(products) + load(rest));
    }
  });
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
