// The gradients that are asked for, from the scores computed once more; every sum in a fixed order, without atomics.
//
//     delta = rowsum(dout * out) - dlse
//     p = exp(s - lse)    dp = dout v' (kept / (1 - r))    ds = p (dp - delta) slope
//     dquery = scale ds K'    dK' = scale ds^T query    dV' = (p kept / (1 - r))^T dout
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
  Factors<T> factors;
  T* delta;        // [batch, q_heads, q_len]; null if no score's gradient is asked for
  bool of_prefix;  // true: columns of the prefixes; false: columns of the sequences
};

PREFIX_KERNELS_HOST_DEVICE RowGrid column_grid(const AttentionParams& p, bool of_prefix) {
  if (of_prefix) return {p.num_prefixes, p.kv_heads, p.prefix_len};
  return {p.batch, p.kv_heads, p.k_len};
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarpSize, kMinBlocks) delta_kernel(const BackwardRows<T> arguments) {
  const BackwardParams& b = arguments.b;
  const AttentionParams& p = b.forward;
  const int value_dim = static_cast<int>(p.value_dim);
  for_each_row(query_grid(p), [&](int64_t batch, int64_t head, int64_t index) {
    const Query q{batch, head, index};
    const int64_t out = row_offset(p.out, q.batch, q.head, q.index);
    const int64_t dout = row_offset(b.dout, q.batch, q.head, q.index);
    T sum = 0;
    for (int d = lane(); d < value_dim; d += kWarpSize)
      sum += static_cast<const T*>(p.out.data)[out + d] * static_cast<const T*>(b.dout.data)[dout + d];
    sum = warp_sum(sum);
    const T dlse = b.dlse != nullptr ? static_cast<const T*>(b.dlse)[lse_index(p, q)] : T(0);
    if (lane() == 0) arguments.delta[lse_index(p, q)] = sum - dlse;
  });
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarpSize, kMinBlocks) dquery_kernel(const BackwardRows<T> arguments) {
  const BackwardParams& b = arguments.b;
  const AttentionParams& p = b.forward;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  T* query_row = warp_memory<T>(head_dim + value_dim + kWarpSize);
  T* dout_row = query_row + head_dim;
  T* dscores = dout_row + value_dim;
  const T rescale = arguments.factors.rescale;
  const Operand& dquery = b.gradients[kDQuery];

  for_each_row(query_grid(p), [&](int64_t batch, int64_t head, int64_t index) {
    const Query q{batch, head, index};
    // Every step ends with a barrier: none still reads the last query's rows.
    copy_row(query_row, p.query, row_offset(p.query, q.batch, q.head, q.index), head_dim);
    copy_row(dout_row, b.dout, row_offset(b.dout, q.batch, q.head, q.index), value_dim);
    __syncwarp();
    const int64_t kv_head = kv_head_of(p, head);
    const T lse = static_cast<const T*>(p.lse)[lse_index(p, q)];
    const T delta = arguments.delta[lse_index(p, q)];

    T sums[kPerLane] = {};
    for_each_segment(p, q, [&](const Segment& segment) {
      const Operand &key = segment.key(p), &value = segment.value(p);
      if (lse == -INFINITY) return;
      for (int64_t first = segment.begin; first < segment.end; first += kWarpSize) {
        const int64_t column = first + lane();
        T ds = 0;
        if (column < segment.end) {
          const int64_t key_row = row_offset(key, segment.outer, kv_head, column);
          const int64_t value_row = row_offset(value, segment.outer, kv_head, column);
          const Score<T> s =
              score(p, arguments.factors, q, segment, column, product(query_row, key, key_row, head_dim));
          if (s.value != -INFINITY) {
            const T kept = is_kept(p, q, segment, column) ? rescale : T(0);
            const T dp = kept * product(dout_row, value, value_row, value_dim);
            ds = std::exp(s.value - lse) * (dp - delta) * s.slope;
          }
        }
        dscores[lane()] = ds;
        __syncwarp();
        const int64_t left = segment.end - first;
        add_weighted_rows(sums, dscores, left < kWarpSize ? static_cast<int>(left) : kWarpSize, key,
                          row_offset(key, segment.outer, kv_head, first), head_dim);
        __syncwarp();  // the next step's scores replace these
      }
    });
    store_row(sums, static_cast<T>(p.scale), dquery, row_offset(dquery, q.batch, q.head, q.index), head_dim);
  });
}

// Calls visit(batch, segment_of) for every use of sequence or prefix `outer`: for one batch row, or for every batch row
// and slot that names the prefix. segment_of(query) is the run of its columns that a query sees.
template <class Visit>
__device__ void for_each_user(const AttentionParams& p, bool of_prefix, int64_t outer, Visit visit) {
  const int64_t slots = of_prefix ? p.prefix_slots : 1;
#pragma unroll 1
  for (int64_t batch = of_prefix ? 0 : outer; batch < (of_prefix ? p.batch : outer + 1); ++batch) {
    const int64_t total = of_prefix ? prefix_total(p, batch) : 0;
    int64_t start = 0;
#pragma unroll 1
    for (int64_t m = 0; m < slots; ++m) {
      const int64_t n = of_prefix ? prefix_of_row(p, batch, m) : outer;
      if (n == outer)
        visit(batch, [&](const Query& q) {
          return of_prefix ? prefix_segment(p, q, m, start, total) : sequence_segment(p, q);
        });
      if (of_prefix) start += valid_prefix_length(p, n);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarpSize, kMinBlocks) dkey_dvalue_kernel(const BackwardRows<T> arguments) {
  const BackwardParams& b = arguments.b;
  const AttentionParams& p = b.forward;
  const bool of_prefix = arguments.of_prefix;
  const Operand &key = of_prefix ? p.prefix_key : p.key, &value = of_prefix ? p.prefix_value : p.value;
  const Operand& dkey = b.gradients[of_prefix ? kDPrefixKey : kDKey];
  const Operand& dvalue = b.gradients[of_prefix ? kDPrefixValue : kDValue];
  const bool needs_dkey = dkey.data != nullptr, needs_dvalue = dvalue.data != nullptr;
  const T rescale = arguments.factors.rescale;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim), group = group_size(p);
  T* key_row = warp_memory<T>(head_dim + value_dim + 2 * kWarpSize);
  T* value_row = key_row + head_dim;
  T* weights = value_row + value_dim;
  T* dscores = weights + kWarpSize;

  for_each_row(column_grid(p, of_prefix), [&](int64_t outer, int64_t kv_head, int64_t column) {
    T dkey_sums[kPerLane] = {}, dvalue_sums[kPerLane] = {};
    // Every step that reads the last column's rows ends with a barrier: none still reads them.
    copy_row(key_row, key, row_offset(key, outer, kv_head, column), head_dim);
    if (needs_dkey) copy_row(value_row, value, row_offset(value, outer, kv_head, column), value_dim);
    __syncwarp();
    for_each_user(p, of_prefix, outer, [&](int64_t batch, auto segment_of) {
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const T* queries = static_cast<const T*>(p.query.data) + row_offset(p.query, batch, head, 0);
        const T* douts = static_cast<const T*>(b.dout.data) + row_offset(b.dout, batch, head, 0);
        for (int64_t first = 0; first < p.q_len; first += kWarpSize) {
          const Query q{batch, head, first + lane()};
          T weight = 0, ds = 0;
          bool seen = false;
          if (q.index < p.q_len) {
            const Segment segment = segment_of(q);
            const T lse = static_cast<const T*>(p.lse)[lse_index(p, q)];
            seen = segment.begin <= column && column < segment.end && lse != -INFINITY;
            if (seen) {
              const T qk = product(key_row, queries + q.index * p.query.row_stride, head_dim);
              const Score<T> s = score(p, arguments.factors, q, segment, column, qk);
              const T probability = s.value == -INFINITY ? T(0) : std::exp(s.value - lse);
              const T kept = is_kept(p, q, segment, column) ? rescale : T(0);
              weight = probability * kept;
              if (needs_dkey && probability != 0) {
                const T dp = kept * product(value_row, douts + q.index * b.dout.row_stride, value_dim);
                ds = probability * (dp - arguments.delta[lse_index(p, q)]) * s.slope;
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
            add_weighted_rows(dvalue_sums, weights, count, douts + first * b.dout.row_stride, b.dout.row_stride,
                              value_dim);
          if (needs_dkey)
            add_weighted_rows(dkey_sums, dscores, count, queries + first * p.query.row_stride, p.query.row_stride,
                              head_dim);
          __syncwarp();  // the next step's weights replace these
        }
      }
    });
    if (needs_dkey)
      store_row(dkey_sums, static_cast<T>(p.scale), dkey, row_offset(dkey, outer, kv_head, column), head_dim);
    if (needs_dvalue) store_row(dvalue_sums, T(1), dvalue, row_offset(dvalue, outer, kv_head, column), value_dim);
  });
}

template <class T>
void backward(const BackwardParams& b, const Context& context) {
  const AttentionParams& p = b.forward;
  BackwardRows<T> arguments{b, Factors<T>(p), nullptr, false};
  if (b.needs(kDQuery) || b.needs(kDKey) || b.needs(kDPrefixKey)) {
    arguments.delta = static_cast<T*>(context.allocate(p.batch * p.q_heads * p.q_len * sizeof(T)));
    launch_rows(delta_kernel<T>, query_grid(p), 0, context, arguments);
  }
  if (b.needs(kDQuery))
    launch_rows(dquery_kernel<T>, query_grid(p), (p.head_dim + p.value_dim + kWarpSize) * sizeof(T), context,
                arguments);
  const size_t column_bytes = (p.head_dim + p.value_dim + 2 * kWarpSize) * sizeof(T);
  if (b.needs(kDKey) || b.needs(kDValue))
    launch_rows(dkey_dvalue_kernel<T>, column_grid(p, false), column_bytes, context, arguments);
  arguments.of_prefix = true;
  if (b.needs(kDPrefixKey) || b.needs(kDPrefixValue))
    launch_rows(dkey_dvalue_kernel<T>, column_grid(p, true), column_bytes, context, arguments);
}

}  // namespace prefix_kernels::cuda::simt
