// out = softmax(scores) V', lse = logsumexp(scores), one warp per query.
//
// The columns that the query sees are taken 32 at a time, one per lane. With the maximum m and the sum l so far,
//     m' = max(m, max_j s_j)    l' = l exp(m - m') + sum_j exp(s_j - m')    o' = o exp(m - m') + sum_j exp(s_j - m')
//     v_j
// and in the end out = o / l and lse = m + log(l). The scores belong to lanes by column, o by element of the head dim;
// the weights cross over in shared memory.
#pragma once

#include "scores.cuh"
#include "simt.h"
#include "warp.cuh"

namespace prefix_kernels::cuda::simt {

template <class T>
__global__ void __launch_bounds__(kWarps* kWarpSize) forward_kernel(const AttentionParams p) {
  T* query_row = warp_memory<T>(p.head_dim + kWarpSize);
  T* weights = query_row + p.head_dim;
  const int64_t group = p.q_heads / p.kv_heads;

  for (Rows r(p.batch * p.q_heads * p.q_len); r.row < r.count; r.next()) {
    const Query q{r.row / p.q_len / p.q_heads, r.row / p.q_len % p.q_heads, r.row % p.q_len};
    copy_row(query_row, p.query, row_offset(p.query, q.batch, q.head, q.index), p.head_dim);
    __syncwarp();

    T max = -INFINITY, sum = 0, out[kPerLane] = {};
    for_each_segment(p, q, [&](const Segment& segment) {
      const Operand &key = segment.key(p), &value = segment.value(p);
      for (int64_t first = segment.begin; first < segment.end; first += kWarpSize) {
        const int64_t column = first + lane();
        T s = -INFINITY;
        if (column < segment.end) {
          const int64_t offset = row_offset(key, segment.outer, q.head / group, column);
          s = score(p, q, segment, column, product(query_row, key, offset, p.head_dim)).value;
        }
        const T step_max = warp_max(s);
        if (step_max == -INFINITY) continue;
        const T new_max = max < step_max ? step_max : max;
        const T rescale = std::exp(max - new_max);
        const T weight = std::exp(s - new_max);
        max = new_max;
        sum = sum * rescale + warp_sum(weight);
        weights[lane()] = is_kept(p, q, segment, column) ? weight : T(0);
        __syncwarp();
        for (T& x : out) x *= rescale;
        const int64_t left = segment.end - first;
        add_weighted_rows(out, weights, left < kWarpSize ? static_cast<int>(left) : kWarpSize, value,
                          row_offset(value, segment.outer, q.head / group, first), p.head_dim);
        __syncwarp();
      }
    });

    const T factor = sum > 0 ? static_cast<T>(dropout_rescale(p.dropout_threshold)) / sum : T(0);
    store_row(out, factor, p.out, row_offset(p.out, q.batch, q.head, q.index), p.head_dim);
    if (lane() == 0) static_cast<T*>(p.lse)[r.row] = sum > 0 ? max + std::log(sum) : T(-INFINITY);
    __syncwarp();  // the next query's row replaces this one's
  }
}

template <class T>
void forward(const AttentionParams& p, const Context& context) {
  launch_rows(forward_kernel<T>, p.batch * p.q_heads * p.q_len, (p.head_dim + kWarpSize) * sizeof(T), context, p);
}

}  // namespace prefix_kernels::cuda::simt
