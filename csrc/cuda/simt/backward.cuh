// The gradients that are asked for, from the scores computed once more; every sum in a fixed order, without atomics.
//
//     p = exp(s - lse)    dp = dout v' (kept / (1 - r))    ds = p (dp - delta) slope    delta = rowsum(dout * out) -
//     dlse dquery = scale ds K'        dK' = scale ds^T query        dV' = (p kept / (1 - r))^T dout
//
// Three kernels, each one warp per row: delta and dquery by query, dK' and dV' by key. A key's warp visits the queries
// of its group's heads 32 at a time, one per lane; a prefix's key those of all batch rows that name its prefix.
#pragma once

#include "scores.cuh"
#include "simt.h"
#include "warp.cuh"

namespace prefix_kernels::cuda::simt {

template <class T>
struct BackwardRows {
  BackwardParams b;
  T* delta;        // [batch, q_heads, q_len]; null where no score's gradient is asked for
  bool of_prefix;  // the columns of the prefixes, or those of the sequences
};

template <class T>
__global__ void __launch_bounds__(kWarps* kWarpSize) delta_kernel(const BackwardRows<T> arguments) {
  const BackwardParams& b = arguments.b;
  const AttentionParams& p = b.forward;
  for (Rows r(p.batch * p.q_heads * p.q_len); r.row < r.count; r.next()) {
    const Query q{r.row / p.q_len / p.q_heads, r.row / p.q_len % p.q_heads, r.row % p.q_len};
    const int64_t out = row_offset(p.out, q.batch, q.head, q.index);
    const int64_t dout = row_offset(b.dout, q.batch, q.head, q.index);
    T sum = 0;
    for (int64_t d = lane(); d < p.head_dim; d += kWarpSize)
      sum += load<T>(p.out.data, p.out.dtype, out + d) * load<T>(b.dout.data, b.dout.dtype, dout + d);
    sum = warp_sum(sum);
    const T dlse = b.dlse != nullptr ? static_cast<const T*>(b.dlse)[r.row] : T(0);
    if (lane() == 0) arguments.delta[r.row] = sum - dlse;
  }
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarpSize) dquery_kernel(const BackwardRows<T> arguments) {
  const BackwardParams& b = arguments.b;
  const AttentionParams& p = b.forward;
  T* query_row = warp_memory<T>(2 * p.head_dim + kWarpSize);
  T* dout_row = query_row + p.head_dim;
  T* dscores = dout_row + p.head_dim;
  const int64_t group = p.q_heads / p.kv_heads;
  const T rescale = static_cast<T>(dropout_rescale(p.dropout_threshold));
  const Operand& dquery = b.gradients[kDQuery];

  for (Rows r(p.batch * p.q_heads * p.q_len); r.row < r.count; r.next()) {
    const Query q{r.row / p.q_len / p.q_heads, r.row / p.q_len % p.q_heads, r.row % p.q_len};
    copy_row(query_row, p.query, row_offset(p.query, q.batch, q.head, q.index), p.head_dim);
    copy_row(dout_row, b.dout, row_offset(b.dout, q.batch, q.head, q.index), p.head_dim);
    __syncwarp();
    const T lse = static_cast<const T*>(p.lse)[r.row];
    const T delta = arguments.delta[r.row];

    T sums[kPerLane] = {};
    for_each_segment(p, q, [&](const Segment& segment) {
      const Operand &key = segment.key(p), &value = segment.value(p);
      if (lse == -INFINITY) return;
      for (int64_t first = segment.begin; first < segment.end; first += kWarpSize) {
        const int64_t column = first + lane();
        T ds = 0;
        if (column < segment.end) {
          const int64_t key_row = row_offset(key, segment.outer, q.head / group, column);
          const int64_t value_row = row_offset(value, segment.outer, q.head / group, column);
          const Score<T> s = score(p, q, segment, column, product(query_row, key, key_row, p.head_dim));
          if (s.value != -INFINITY) {
            const T kept = is_kept(p, q, segment, column) ? rescale : T(0);
            const T dp = kept == 0 ? T(0) : kept * product(dout_row, value, value_row, p.head_dim);
            ds = std::exp(s.value - lse) * (dp - delta) * s.slope;
          }
        }
        dscores[lane()] = ds;
        __syncwarp();
        const int64_t left = segment.end - first;
        add_weighted_rows(sums, dscores, left < kWarpSize ? static_cast<int>(left) : kWarpSize, key,
                          row_offset(key, segment.outer, q.head / group, first), p.head_dim);
        __syncwarp();
      }
    });
    store_row(sums, static_cast<T>(p.scale), dquery, row_offset(dquery, q.batch, q.head, q.index), p.head_dim);
    __syncwarp();  // the next query's row replaces this one's
  }
}

// Adds to dkey and dvalue what the queries of one batch row give column `column` of what `segment_of(query)` names.
template <class T, class SegmentOf>
__device__ void add_queries(const BackwardRows<T>& arguments, const T* key_row, const T* value_row, T* weights,
                            T* dscores, int64_t batch, int64_t kv_head, int64_t column, SegmentOf segment_of,
                            T (&dkey)[kPerLane], T (&dvalue)[kPerLane]) {
  const BackwardParams& b = arguments.b;
  const AttentionParams& p = b.forward;
  const T rescale = static_cast<T>(dropout_rescale(p.dropout_threshold));
  const int64_t group = p.q_heads / p.kv_heads;
  const bool needs_dkey = b.gradients[arguments.of_prefix ? kDPrefixKey : kDKey].data != nullptr;
  const bool needs_dvalue = b.gradients[arguments.of_prefix ? kDPrefixValue : kDValue].data != nullptr;

  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t first = 0; first < p.q_len; first += kWarpSize) {
      const Query q{batch, head, first + lane()};
      T weight = 0, ds = 0;
      bool seen = false;
      if (q.index < p.q_len) {
        const int64_t index = (batch * p.q_heads + head) * p.q_len + q.index;
        const Segment segment = segment_of(q);
        const T lse = static_cast<const T*>(p.lse)[index];
        seen = segment.begin <= column && column < segment.end && lse != -INFINITY;
        if (seen) {
          const int64_t query_row = row_offset(p.query, batch, head, q.index);
          const Score<T> s = score(p, q, segment, column, product(key_row, p.query, query_row, p.head_dim));
          const T probability = s.value == -INFINITY ? T(0) : std::exp(s.value - lse);
          const T kept = is_kept(p, q, segment, column) ? rescale : T(0);
          weight = probability * kept;
          if (needs_dkey && probability != 0) {
            const int64_t dout_row = row_offset(b.dout, batch, head, q.index);
            const T dp = kept == 0 ? T(0) : kept * product(value_row, b.dout, dout_row, p.head_dim);
            ds = probability * (dp - arguments.delta[index]) * s.slope;
          }
        }
      }
      if (!__any_sync(~0u, seen)) continue;
      weights[lane()] = weight;
      dscores[lane()] = ds;
      __syncwarp();
      const int64_t left = p.q_len - first;
      const int count = left < kWarpSize ? static_cast<int>(left) : kWarpSize;
      if (needs_dvalue)
        add_weighted_rows(dvalue, weights, count, b.dout, row_offset(b.dout, batch, head, first), p.head_dim);
      if (needs_dkey)
        add_weighted_rows(dkey, dscores, count, p.query, row_offset(p.query, batch, head, first), p.head_dim);
      __syncwarp();
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarpSize) dkey_dvalue_kernel(const BackwardRows<T> arguments) {
  const BackwardParams& b = arguments.b;
  const AttentionParams& p = b.forward;
  const bool of_prefix = arguments.of_prefix;
  const Operand &key = of_prefix ? p.prefix_key : p.key, &value = of_prefix ? p.prefix_value : p.value;
  const Operand& dkey = b.gradients[of_prefix ? kDPrefixKey : kDKey];
  const Operand& dvalue = b.gradients[of_prefix ? kDPrefixValue : kDValue];
  const int64_t columns = of_prefix ? p.prefix_len : p.k_len;
  T* key_row = warp_memory<T>(2 * p.head_dim + 2 * kWarpSize);
  T* value_row = key_row + p.head_dim;
  T* weights = value_row + p.head_dim;
  T* dscores = weights + kWarpSize;

  for (Rows r((of_prefix ? p.num_prefixes : p.batch) * p.kv_heads * columns); r.row < r.count; r.next()) {
    const int64_t outer = r.row / columns / p.kv_heads, kv_head = r.row / columns % p.kv_heads;
    const int64_t column = r.row % columns;
    T dkey_sums[kPerLane] = {}, dvalue_sums[kPerLane] = {};
    copy_row(key_row, key, row_offset(key, outer, kv_head, column), p.head_dim);
    if (dkey.data != nullptr) copy_row(value_row, value, row_offset(value, outer, kv_head, column), p.head_dim);
    __syncwarp();
    if (of_prefix) {
      for (int64_t batch = 0; batch < p.batch; ++batch) {
        const int64_t total = prefix_total(p, batch);
        int64_t start = 0;
        for (int64_t m = 0; m < p.prefix_slots; ++m) {
          const int64_t n = prefix_of_row(p, batch, m);
          if (n == outer)
            add_queries(
                arguments, key_row, value_row, weights, dscores, batch, kv_head, column,
                [&](const Query& q) { return prefix_segment(p, q, m, start, total); }, dkey_sums, dvalue_sums);
          start += prefix_length(p, n);
        }
      }
    } else {
      add_queries(
          arguments, key_row, value_row, weights, dscores, outer, kv_head, column,
          [&](const Query& q) { return sequence_segment(p, q); }, dkey_sums, dvalue_sums);
    }
    if (dkey.data != nullptr)
      store_row(dkey_sums, static_cast<T>(p.scale), dkey, row_offset(dkey, outer, kv_head, column), p.head_dim);
    if (dvalue.data != nullptr)
      store_row(dvalue_sums, T(1), dvalue, row_offset(dvalue, outer, kv_head, column), p.head_dim);
    __syncwarp();  // the next column's rows replace this one's
  }
}

template <class T>
void backward(const BackwardParams& b, const Context& context) {
  const AttentionParams& p = b.forward;
  const int64_t queries = p.batch * p.q_heads * p.q_len;
  BackwardRows<T> arguments{b, nullptr, false};
  if (b.needs(kDQuery) || b.needs(kDKey) || b.needs(kDPrefixKey)) {
    arguments.delta = static_cast<T*>(context.allocate(queries * sizeof(T)));
    launch_rows(delta_kernel<T>, queries, 0, context, arguments);
  }
  if (b.needs(kDQuery))
    launch_rows(dquery_kernel<T>, queries, (2 * p.head_dim + kWarpSize) * sizeof(T), context, arguments);
  const size_t columns_bytes = 2 * (p.head_dim + kWarpSize) * sizeof(T);
  if (b.needs(kDKey) || b.needs(kDValue))
    launch_rows(dkey_dvalue_kernel<T>, p.batch * p.kv_heads * p.k_len, columns_bytes, context, arguments);
  arguments.of_prefix = true;
  if (b.needs(kDPrefixKey) || b.needs(kDPrefixValue))
    launch_rows(dkey_dvalue_kernel<T>, p.num_prefixes * p.kv_heads * p.prefix_len, columns_bytes, context, arguments);
}

}  // namespace prefix_kernels::cuda::simt
