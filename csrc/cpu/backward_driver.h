// Runs the tasks of the backward pass on the threads, then sums their partial tiles in a fixed order.
#pragma once

#include <atomic>

#include "backward.h"
#include "kernels.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

template <class T>
struct BackwardJob {
  BackwardPlan<T> plan;
  std::atomic<int64_t> next_chunk{0};
  std::atomic<int64_t> next_sum{0};

  BackwardJob(const BackwardParams& params, int threads) : plan(params, threads) {}

  int64_t prefix_pairs() const {
    return plan.needs.prefix() ? plan.params.forward.num_prefixes * plan.params.forward.kv_heads : 0;
  }
  int64_t sequence_heads() const {
    return plan.splits > 1 && (plan.needs.dkey || plan.needs.dvalue)
               ? plan.params.forward.batch * plan.params.forward.kv_heads
               : 0;
  }
};

template <class T>
void run_chunks(void* argument, int) {
  auto& job = *static_cast<BackwardJob<T>*>(argument);
  const BackwardPlan<T>& plan = job.plan;
  static thread_local Workspace workspace;
  BackwardTask<T> runner(plan, workspace);
  for (int64_t chunk; (chunk = job.next_chunk.fetch_add(1, std::memory_order_relaxed)) < plan.chunks;) {
    if (plan.needs.prefix()) {
      const int64_t begin = plan.first_tile[chunk] * plan.prefix_tile_size();
      const int64_t end = plan.first_tile[chunk + 1] * plan.prefix_tile_size();
      if (plan.needs.dprefix_key) fill_zero(plan.dprefix_key.data() + begin, end - begin);
      if (plan.needs.dprefix_value) fill_zero(plan.dprefix_value.data() + begin, end - begin);
    }
    const int64_t end = plan.chunk_begin(chunk + 1);
    for (int64_t i = plan.chunk_begin(chunk); i < end; ++i) {
      const Task next = plan.task(i + 1);
      runner.run(chunk, plan.task(i), i + 1 < end ? &next : nullptr);
    }
  }
  end_streams();
  workspace.trim();
}

// gradient[pair] = factor * sum over chunks, in order; zero where no row used the prefix.
template <class T>
void sum_prefix(const BackwardPlan<T>& plan, int64_t pair, const Operand& gradient, const Buffer<T>& partial,
                T factor) {
  const AttentionParams& p = plan.params.forward;
  const int64_t kv_head = pair / p.num_prefixes, prefix = pair % p.num_prefixes, depth = plan.padded_depth;
  const Operand head = head_of(gradient, prefix, kv_head);
  T sum[kMaxHeadDim];
  for (int64_t r = 0; r < p.prefix_len; ++r) {
    for (int64_t d = 0; d < depth; ++d) sum[d] = 0;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t tile = plan.prefix_tile(chunk, kv_head, prefix);
      if (tile < 0) continue;
      const T* row = partial.data() + tile * plan.prefix_tile_size() + r * depth;
      for (int64_t d = 0; d < depth; ++d) sum[d] += row[d];
    }
    write_gradient_row<T>(head, r * head.row_stride, p.head_dim, factor, sum, false);
  }
}

template <class T>
void sum_sequence(const BackwardPlan<T>& plan, int64_t index, const Operand& gradient, const Buffer<T>& partial,
                  T factor) {
  const AttentionParams& p = plan.params.forward;
  const int64_t depth = plan.padded_depth;
  const Operand head = head_of(gradient, index / p.kv_heads, index % p.kv_heads);
  T sum[kMaxHeadDim];
  for (int64_t r = 0; r < p.k_len; ++r) {
    for (int64_t d = 0; d < depth; ++d) sum[d] = 0;
    for (int64_t split = 0; split < plan.splits; ++split) {
      const T* row = partial.data() + plan.sequence_offset({index % p.kv_heads, index / p.kv_heads, split}) + r * depth;
      for (int64_t d = 0; d < depth; ++d) sum[d] += row[d];
    }
    write_gradient_row<T>(head, r * head.row_stride, p.head_dim, factor, sum, false);
  }
}

template <class T>
void run_sums(void* argument, int) {
  auto& job = *static_cast<BackwardJob<T>*>(argument);
  const BackwardPlan<T>& plan = job.plan;
  const AttentionParams& p = plan.params.forward;
  const Operand* gradients = plan.params.gradients;
  const T scale = static_cast<T>(p.scale), rescale = static_cast<T>(dropout_rescale(p.dropout_threshold));
  const int64_t pairs = job.prefix_pairs(), total = pairs + job.sequence_heads();
  for (int64_t i; (i = job.next_sum.fetch_add(1, std::memory_order_relaxed)) < total;) {
    if (i < pairs) {
      if (plan.needs.dprefix_key) sum_prefix(plan, i, gradients[kDPrefixKey], plan.dprefix_key, scale);
      if (plan.needs.dprefix_value) sum_prefix(plan, i, gradients[kDPrefixValue], plan.dprefix_value, rescale);
    } else {
      if (plan.needs.dkey) sum_sequence(plan, i - pairs, gradients[kDKey], plan.dkey, scale);
      if (plan.needs.dvalue) sum_sequence(plan, i - pairs, gradients[kDValue], plan.dvalue, rescale);
    }
  }
}

template <class T>
void attention_backward(const BackwardParams& params, int threads, RunWorkers run) {
  BackwardJob<T> job(params, threads);
  if (job.plan.chunks > 0) run(workers(threads, job.plan.chunks), run_chunks<T>, &job);
  const int64_t sums = job.prefix_pairs() + job.sequence_heads();
  if (sums > 0) run(workers(threads, sums), run_sums<T>, &job);
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
