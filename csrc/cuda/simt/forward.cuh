// out = softmax(scores) V', lse = logsumexp(scores), one warp per query.
//
// The columns that the query sees are taken 32 at a time, one per lane. With the maximum m and the sum l so far:
//     m' = max(m, max_j s_j)
//     l' = l exp(m - m') + sum_j exp(s_j - m')
//     o' = o exp(m - m') + sum_j exp(s_j - m') v_j
// At the end out = o / l and lse = m + log(l). Lanes hold scores by column and o by element of the head dim; the
// weights cross over in shared memory.
#pragma once

#include "scores.cuh"
#include "simt.h"
#include "warp.cuh"

namespace prefix_kernels::cuda::simt {

template <class T>
struct ForwardRows {
  AttentionParams p;
  Factors<T> factors;
};

// Takes up a row of attention over other keys; one that saw nothing keeps its empty sums.
template <class T>
__device__ void resume(const AttentionParams& p, const Query& q, T& max, T& sum, T (&out)[kPerLane]) {
  const T lse = static_cast<const T*>(p.lse)[lse_index(p, q)];
  if (is_infinite(lse)) return;
  max = lse;
  sum = 1;
  load_row(out, p.out, row_offset(p.out, q.batch, q.head, q.index), static_cast<int>(p.value_dim));
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarpSize, kMinBlocks) forward_kernel(const ForwardRows<T> arguments) {
  const AttentionParams& p = arguments.p;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  T* query_row = warp_memory<T>(head_dim + kWarpSize);
  T* weights = query_row + head_dim;

  for_each_row(query_grid(p), [&](int64_t batch, int64_t head, int64_t index) {
    const Query q{batch, head, index};
    const int64_t kv_head = kv_head_of(p, head);
    copy_row(query_row, p.query, row_offset(p.query, q.batch, q.head, q.index), head_dim);
    T max = -INFINITY, sum = 0, out[kPerLane] = {};
    if (p.extends) resume(p, q, max, sum, out);
    __syncwarp();

    for_each_segment(p, q, [&](const Segment& segment) {
      const Operand &key = segment.key(p), &value = segment.value(p);
      for (int64_t first = segment.begin; first < segment.end; first += kWarpSize) {
        const int64_t column = first + lane();
        T s = -INFINITY;
        if (column < segment.end) {
          const int64_t offset = row_offset(key, segment.outer, kv_head, column);
          s = score(p, arguments.factors, q, segment, column, product(query_row, key, offset, head_dim)).value;
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
                          row_offset(value, segment.outer, kv_head, first), value_dim);
        __syncwarp();
      }
    });

    const T factor = sum > 0 ? arguments.factors.rescale / sum : T(0);
    store_row(out, factor, p.out, row_offset(p.out, q.batch, q.head, q.index), value_dim);
    if (lane() == 0) {
      const T lse = sum > 0 ? max + std::log(sum) : T(-INFINITY);
      static_cast<T*>(p.lse)[lse_index(p, q)] = lse;
      if (p.row_mass != nullptr) {
        static_cast<T*>(p.row_mass)[lse_index(p, q)] = sum > 0 ? sum * std::exp(max - lse) : T(1);
      }
    }
    // The next query's row replaces this one's, which steps that show nothing have read without a barrier behind.
    __syncwarp();
  });
}

template <class T>
void forward(const AttentionParams& p, const Context& context) {
  launch_rows(forward_kernel<T>, query_grid(p), (p.head_dim + kWarpSize) * sizeof(T), context,
              ForwardRows<T>{p, Factors<T>(p)});
}

}  // namespace prefix_kernels::cuda::simt
