// Runs the tasks of the forward pass on the threads, then merges the parts of their columns in a fixed order.
#pragma once

#include <atomic>

#include "../kernels.h"
#include "plan.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// One call: its plan, the tasks that threads have taken, and the partial sums.
template <class T>
struct ForwardJob {
  ForwardPlan<T> plan;
  std::atomic<int64_t> next_task{0};
  std::atomic<int64_t> next_merge{0};

  // The state of each part of each block, where there are several parts: [query_blocks][splits][...].
  Buffer<T> partial_out;                     // [value_dim][kBlockQ]
  Buffer<T> partial_reference, partial_sum;  // [kBlockQ]

  ForwardJob(const AttentionParams& p, int threads) : plan(p, threads) {
    if (plan.splits > 1) {
      partial_out.allocate(plan.query_blocks() * plan.splits * p.value_dim * kBlockQ);
      partial_reference.allocate(plan.query_blocks() * plan.splits * kBlockQ);
      partial_sum.allocate(plan.query_blocks() * plan.splits * kBlockQ);
    }
  }
};

// Prefetches the queries of a task and, if its columns are not split, the first tile of its sequence.
template <class T>
void prefetch_task(const ForwardPlan<T>& plan, const ForwardTask& task, Prefetcher& prefetcher) {
  const AttentionParams& p = plan.params;
  for (int i = 0; i < task.blocks; ++i) prefetcher.add_queries(p.query, task.block(plan, i), p.head_dim);
  if (plan.splits > 1) return;
  const int64_t rows = clamp_to(row_keys(p, task.batch), 0, kBlockK);
  prefetcher.add_rows(sequence_head(p, p.key, task.batch, task.kv_head), 0, rows, p.head_dim);
  prefetcher.add_rows(sequence_head(p, p.value, task.batch, task.kv_head), 0, rows, p.value_dim);
}

// Calls visit(segment, rows) for the rows of every segment that belong to the task's part.
template <class T, class Visit>
void for_each_segment(const ForwardPlan<T>& plan, const ForwardTask& task, Visit visit) {
  const AttentionParams& p = plan.params;
  const int64_t columns = row_prefix_total(p, task.batch) + row_keys(p, task.batch);
  int64_t start = 0;
  for (int64_t s = 0; s < num_segments(p); ++s) {
    const Segment segment = make_segment(p, task.batch, task.kv_head, s, start);
    visit(segment, plan.part_rows(segment, start, columns, task.split));
    start += segment.length;
  }
}

// Stores the sums of one block over a part of a task's columns.
template <class T>
void keep_partial(const ForwardJob<T>& job, int64_t at, const ForwardState<T>& state) {
  const int64_t vectors = state.block.template vectors<T>() * kLanes<T>;
  for (int64_t l = 0; l < vectors; ++l) {
    job.partial_reference[at * kBlockQ + l] = state.reference[l];
    job.partial_sum[at * kBlockQ + l] = state.sum[l];
  }
  const int64_t depth = job.plan.params.value_dim;
  T* const out = job.partial_out.data() + at * depth * kBlockQ;
  for (int64_t d = 0; d < depth; ++d)
    for (int64_t l = 0; l < vectors; ++l) out[d * kBlockQ + l] = state.out[d * kBlockQ + l];
}

// Runs a task. `next`: the task that this thread runs after it, or null.
template <class T>
void run_task(const ForwardJob<T>& job, const ForwardTask& task, const ForwardTask* next,
              const ForwardScratch<T>& scratch) {
  const ForwardPlan<T>& plan = job.plan;
  const AttentionParams& p = plan.params;
  ForwardState<T>* const states = scratch.states;
  for (int i = 0; i < task.blocks; ++i) new (&states[i].block) QueryBlock(task.block(plan, i));
  if (plan.decode) {
    for (int i = 0; i < task.blocks; ++i) {
      DecodeBlock<T> block(states[i], scratch);
      for_each_segment(plan, task, [&](const Segment& segment, KeyRange rows) { block.add(segment, rows); });
      block.finish();
    }
  } else {
    for (int i = 0; i < task.blocks; ++i) begin_block<T>(states[i], task.split == 0);
    for_each_segment(plan, task, [&](const Segment& segment, KeyRange rows) {
      forward_segment<T>(p, segment, rows, task.blocks, scratch, [&](Prefetcher& prefetcher) {
        if (!segment.is_prefix() && next != nullptr) prefetch_task(plan, *next, prefetcher);
      });
    });
  }
  for (int i = 0; i < task.blocks; ++i) {
    if (plan.splits > 1)
      keep_partial(job, plan.partial(task.batch, task.kv_head, task.first_block + i, task.split), states[i]);
    else
      finish_block<T>(states[i]);
  }
}

// sum = sum of sum_i e^(reference_i - reference) over the parts i, out likewise; reference is their largest.
template <class T>
void merge_partials(const ForwardJob<T>& job, int64_t first, const ForwardState<T>& state) {
  constexpr int kN = kLanes<T>;
  const int64_t depth = job.plan.params.value_dim;
  const Vec<T> nothing = broadcast<T>(-std::numeric_limits<T>::infinity());
  for (int l = 0; l < kBlockQ; l += kN) {
    store(state.reference + l, nothing);
    store(state.sum + l, Vec<T>{});
  }
  for (int l = 0; l < state.block.template vectors<T>() * kN; l += kN) {
    const auto reference_of = [&](int64_t i) { return load(job.partial_reference.data() + (first + i) * kBlockQ + l); };
    Vec<T> reference = nothing, sum{};
    for (int64_t i = 0; i < job.plan.splits; ++i) reference = maximum<T>(reference_of(i), reference);
    for (int64_t d = 0; d < depth; ++d) store(state.out + d * kBlockQ + l, Vec<T>{});
    for (int64_t i = 0; i < job.plan.splits; ++i) {
      const Vec<T> part = reference_of(i);
      const Vec<T> factor = part == nothing ? Vec<T>{} : exp<T>(part - reference);
      sum += load(job.partial_sum.data() + (first + i) * kBlockQ + l) * factor;
      const T* out = job.partial_out.data() + (first + i) * depth * kBlockQ + l;
      for (int64_t d = 0; d < depth; ++d) {
        T* const target = state.out + d * kBlockQ + l;
        store(target, load(target) + load(out + d * kBlockQ) * factor);
      }
    }
    store(state.reference + l, reference);
    store(state.sum + l, sum);
  }
}

// Scratch memory of the calling thread, kept between calls.
inline Workspace& forward_workspace() {
  static thread_local Workspace workspace;
  return workspace;
}

// The body of one thread: takes tasks until there are none left.
template <class T>
void run_forward_tasks(void* argument, int) {
  auto& job = *static_cast<ForwardJob<T>*>(argument);
  const ForwardPlan<T>& plan = job.plan;
  Workspace& workspace = forward_workspace();
  const ForwardScratch<T> scratch(workspace, plan.params);
  const auto take = [&] { return job.next_task.fetch_add(1, std::memory_order_relaxed); };
  for (int64_t index = take(); index < plan.tasks;) {
    const int64_t next_index = take();  // one ahead, so that it can be prefetched
    const ForwardTask task(plan, index);
    if (next_index < plan.tasks) {
      const ForwardTask next(plan, next_index);
      run_task<T>(job, task, &next, scratch);
    } else {
      run_task<T>(job, task, nullptr, scratch);
    }
    index = next_index;
  }
  end_streams();
  workspace.trim();
}

// The body of one thread: merges the parts of one block after another.
template <class T>
void run_forward_merges(void* argument, int) {
  auto& job = *static_cast<ForwardJob<T>*>(argument);
  const ForwardPlan<T>& plan = job.plan;
  Workspace& workspace = forward_workspace();
  const ForwardScratch<T> scratch(workspace, plan.params);
  const ForwardState<T>& state = scratch.states[0];
  const int64_t per_row = plan.params.kv_heads * plan.partition.count;
  for (int64_t i; (i = job.next_merge.fetch_add(1, std::memory_order_relaxed)) < plan.query_blocks();) {
    const int64_t batch = i / per_row, kv_head = i % per_row / plan.partition.count, block = i % plan.partition.count;
    if (block >= BlockPartition(plan.params, row_queries(plan.params, batch)).count) continue;
    new (&scratch.states[0].block) QueryBlock(plan.params, batch, kv_head, block);
    merge_partials(job, plan.partial(batch, kv_head, block, 0), state);
    finish_block<T>(state);
  }
  end_streams();
  workspace.trim();
}

template <class T>
void attention_forward(const AttentionParams& params, int threads, RunWorkers run) {
  ForwardJob<T> job(params, threads);
  const ForwardPlan<T>& plan = job.plan;
  if (plan.tasks > 0) run(workers(threads, plan.tasks), run_forward_tasks<T>, &job);
  if (plan.tasks > 0 && plan.splits > 1) run(workers(threads, plan.query_blocks()), run_forward_merges<T>, &job);
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
