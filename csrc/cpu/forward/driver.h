// Divides the forward pass into tasks and runs them on the threads.
//
// A task is a few consecutive blocks of the queries of one head. Where there are fewer tasks than keep the threads
// busy, the columns [prefixes ; sequence] of each are split too; the partial sums of the parts are then merged in their
// order, so that the result does not depend on which thread ran what.
#pragma once

#include <atomic>

#include "../common/column_parts.h"
#include "../kernels.h"
#include "decode.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

template <class T>
struct ForwardJob {
  const AttentionParams& params;
  BlockPartition partition;
  bool decode;
  int64_t task_blocks;  // consecutive blocks of one head
  int64_t tasks_per_head;
  int64_t splits;  // parts of the columns of one task
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> next_merge{0};

  // The state of each part of each block, where there are several: [blocks][splits][...].
  Buffer<T> partial_out;                     // [head_dim][kBlockQ]
  Buffer<T> partial_reference, partial_sum;  // [kBlockQ]

  ForwardJob(const AttentionParams& p, int threads) : params(p), partition(p), decode(decodes<T>(p, partition)) {
    constexpr int64_t kTasksPerThread = 8;
    const int64_t heads = p.batch * p.kv_heads;
    task_blocks = clamp_to(heads * partition.count / (kTasksPerThread * threads), 1, kMaxTaskBlocks);
    tasks_per_head = ceil_div(partition.count, task_blocks);
    splits = column_parts(heads * tasks_per_head, threads, p.prefix_slots * p.prefix_len + p.k_len);
    tasks = heads * tasks_per_head * splits;
    if (splits > 1) {
      partial_out.allocate(blocks() * splits * p.head_dim * kBlockQ);
      partial_reference.allocate(blocks() * splits * kBlockQ);
      partial_sum.allocate(blocks() * splits * kBlockQ);
    }
  }

  int64_t blocks() const { return params.batch * params.kv_heads * partition.count; }
  int64_t partial(int64_t batch, int64_t kv_head, int64_t block, int64_t split) const {
    return ((batch * params.kv_heads + kv_head) * partition.count + block) * splits + split;
  }

  // The rows of a segment, which begins at column `start` of [prefixes ; sequence], that belong to a part.
  KeyRange part(const Segment& segment, int64_t start, int64_t columns, int64_t split) const {
    const auto bound = [&](int64_t s) {
      if (s == splits) return segment.length;
      const int64_t row = clamp_to(columns * s / splits - start, 0, segment.length);
      return row == segment.length ? row : row - row % kBlockK;  // tiles stay whole
    };
    return {bound(split), bound(split + 1)};
  }
};

struct ForwardTask {
  int64_t batch, kv_head, first_block, split;
  int blocks;

  template <class T>
  ForwardTask(const ForwardJob<T>& job, int64_t index) : split(index % job.splits) {
    index /= job.splits;
    batch = index / job.tasks_per_head / job.params.kv_heads;
    kv_head = index / job.tasks_per_head % job.params.kv_heads;
    // Under a causal mask the last blocks of a head cost most: they go first.
    first_block = (job.tasks_per_head - 1 - index % job.tasks_per_head) * job.task_blocks;
    blocks = static_cast<int>(clamp_to(job.partition.count - first_block, 0, job.task_blocks));
  }

  template <class T>
  QueryBlock block(const ForwardJob<T>& job, int i) const {
    return QueryBlock(job.params, job.partition, batch, kv_head, first_block + i);
  }
};

// The queries of a task and the first tile of its sequence, where it is not divided into parts.
template <class T>
void prefetch_task(const ForwardJob<T>& job, const ForwardTask& task, Prefetcher& prefetcher) {
  const AttentionParams& p = job.params;
  for (int i = 0; i < task.blocks; ++i) prefetcher.add_queries(p.query, task.block(job, i));
  if (job.splits > 1) return;
  const int64_t rows = p.k_len < kBlockK ? p.k_len : kBlockK;
  prefetcher.add_rows(head_of(p.key, task.batch, task.kv_head), 0, rows, p.head_dim);
  prefetcher.add_rows(head_of(p.value, task.batch, task.kv_head), 0, rows, p.head_dim);
}

// Calls visit(segment, rows) for the rows of every segment that belong to the task's part.
template <class T, class Visit>
void for_each_segment(const ForwardJob<T>& job, const ForwardTask& task, Visit visit) {
  const AttentionParams& p = job.params;
  const int64_t columns = row_prefix_total(p, task.batch) + p.k_len;
  int64_t start = 0;
  for (int64_t s = 0; s < num_segments(p); ++s) {
    const Segment segment = make_segment(p, task.batch, task.kv_head, s, start);
    visit(segment, job.part(segment, start, columns, task.split));
    start += segment.length;
  }
}

// What a part of a task's columns leaves of one block.
template <class T>
void keep_partial(const ForwardJob<T>& job, int64_t at, const ForwardState<T>& state) {
  const int64_t vectors = state.block.template vectors<T>() * kLanes<T>;
  for (int64_t l = 0; l < vectors; ++l) {
    job.partial_reference[at * kBlockQ + l] = state.reference[l];
    job.partial_sum[at * kBlockQ + l] = state.sum[l];
  }
  T* const out = job.partial_out.data() + at * job.params.head_dim * kBlockQ;
  for (int64_t d = 0; d < job.params.head_dim; ++d)
    for (int64_t l = 0; l < vectors; ++l) out[d * kBlockQ + l] = state.out[d * kBlockQ + l];
}

// `next`: the task that this thread runs after this one, or null.
template <class T>
void run_task(const ForwardJob<T>& job, const ForwardTask& task, const ForwardTask* next,
              const ForwardScratch<T>& scratch) {
  const AttentionParams& p = job.params;
  ForwardState<T>* const states = scratch.states;
  for (int i = 0; i < task.blocks; ++i) new (&states[i].block) QueryBlock(task.block(job, i));
  if (job.decode) {
    for (int i = 0; i < task.blocks; ++i) {
      DecodeBlock<T> block(states[i], scratch);
      for_each_segment(job, task, [&](const Segment& segment, KeyRange rows) { block.add(segment, rows); });
      block.finish();
    }
  } else {
    for (int i = 0; i < task.blocks; ++i) begin_block<T>(states[i]);
    for_each_segment(job, task, [&](const Segment& segment, KeyRange rows) {
      forward_segment<T>(segment, rows, task.blocks, p.head_dim, scratch, [&](Prefetcher& prefetcher) {
        if (!segment.is_prefix() && next != nullptr) prefetch_task(job, *next, prefetcher);
      });
    });
  }
  for (int i = 0; i < task.blocks; ++i) {
    if (job.splits > 1)
      keep_partial(job, job.partial(task.batch, task.kv_head, task.first_block + i, task.split), states[i]);
    else
      finish_block<T>(states[i]);
  }
}

// sum = sum of sum_i e^(reference_i - reference) over the parts i, out likewise; reference is their largest.
template <class T>
void merge_partials(const ForwardJob<T>& job, int64_t first, const ForwardState<T>& state) {
  constexpr int kN = kLanes<T>;
  const int64_t depth = job.params.head_dim;
  const Vec<T> nothing = broadcast<T>(-std::numeric_limits<T>::infinity());
  for (int l = 0; l < kBlockQ; l += kN) {
    store(state.reference + l, nothing);
    store(state.sum + l, Vec<T>{});
  }
  for (int l = 0; l < state.block.template vectors<T>() * kN; l += kN) {
    const auto reference_of = [&](int64_t i) { return load(job.partial_reference.data() + (first + i) * kBlockQ + l); };
    Vec<T> reference = nothing, sum{};
    for (int64_t i = 0; i < job.splits; ++i) reference = maximum<T>(reference_of(i), reference);
    for (int64_t d = 0; d < depth; ++d) store(state.out + d * kBlockQ + l, Vec<T>{});
    for (int64_t i = 0; i < job.splits; ++i) {
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

// Of this thread.
inline Workspace& forward_workspace() {
  static thread_local Workspace workspace;
  return workspace;
}

template <class T>
void run_tasks(void* argument, int) {
  auto& job = *static_cast<ForwardJob<T>*>(argument);
  Workspace& workspace = forward_workspace();
  const ForwardScratch<T> scratch(workspace, job.params.head_dim);
  const auto take = [&] { return job.next.fetch_add(1, std::memory_order_relaxed); };
  for (int64_t index = take(); index < job.tasks;) {
    const int64_t next_index = take();  // one ahead, so that it can be prefetched
    const ForwardTask task(job, index);
    if (next_index < job.tasks) {
      const ForwardTask next(job, next_index);
      run_task<T>(job, task, &next, scratch);
    } else {
      run_task<T>(job, task, nullptr, scratch);
    }
    index = next_index;
  }
  end_streams();
  workspace.trim();
}

template <class T>
void run_merges(void* argument, int) {
  auto& job = *static_cast<ForwardJob<T>*>(argument);
  Workspace& workspace = forward_workspace();
  const ForwardScratch<T> scratch(workspace, job.params.head_dim);
  const ForwardState<T>& state = scratch.states[0];
  const int64_t per_row = job.params.kv_heads * job.partition.count;
  for (int64_t i; (i = job.next_merge.fetch_add(1, std::memory_order_relaxed)) < job.blocks();) {
    const int64_t batch = i / per_row, kv_head = i % per_row / job.partition.count, block = i % job.partition.count;
    new (&scratch.states[0].block) QueryBlock(job.params, job.partition, batch, kv_head, block);
    merge_partials(job, job.partial(batch, kv_head, block, 0), state);
    finish_block<T>(state);
  }
  end_streams();
  workspace.trim();
}

template <class T>
void attention_forward(const AttentionParams& params, int threads, RunWorkers run) {
  ForwardJob<T> job(params, threads);
  if (job.tasks > 0) run(workers(threads, job.tasks), run_tasks<T>, &job);
  if (job.tasks > 0 && job.splits > 1) run(workers(threads, job.blocks()), run_merges<T>, &job);
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
