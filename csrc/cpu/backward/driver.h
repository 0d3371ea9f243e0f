// Runs the tasks of the backward pass on the threads, then adds their partial sums in a fixed order.
#pragma once

#include <atomic>

#include "../kernels.h"
#include "kernel.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// One call: its plan, with the partial sums, and the chunks and sums that threads have taken.
template <class T>
struct BackwardJob {
  BackwardPlan<T> plan;
  std::atomic<int64_t> next_chunk{0};
  std::atomic<int64_t> next_sum{0};

  BackwardJob(const BackwardParams& params, int threads) : plan(params, threads) {}

  // The numbers of tiles and blocks that have partial sums to add.
  int64_t prefix_tiles() const {
    const AttentionParams& p = plan.params.forward;
    return plan.needs.prefix() ? p.num_prefixes * p.kv_heads * ceil_div(p.prefix_len, kBlockK) : 0;
  }
  int64_t sequence_tiles() const {
    const AttentionParams& p = plan.params.forward;
    return plan.splits > 1 && (plan.needs.dkey || plan.needs.dvalue) ? p.batch * p.kv_heads * ceil_div(p.k_len, kBlockK)
                                                                     : 0;
  }
  int64_t query_blocks() const { return plan.parts > 1 && plan.needs.dquery ? plan.query_blocks() : 0; }
};

// Runs a task for one of the ranges that its query blocks fall into.
template <class T>
inline void run_pass(BackwardWorker<T>& w, int64_t chunk, const BackwardTask& task) {
  const KeyRange range = w.plan.blocks(task, w.pass);
  w.blocks = range.end - range.begin;
  for (int64_t i = 0; i < w.blocks; ++i) {
    BackwardState<T>& state = w.states[i];
    new (&state.block) QueryBlock(w.p, task.batch, task.kv_head, range.begin + i);
    state.ready = false;
    if (w.plan.needs.dquery && w.plan.parts > 1)
      state.dquery = w.plan.part_dquery(
          task.part, (task.batch * w.p.kv_heads + task.kv_head) * w.plan.partition.count + range.begin + i);
    if (w.plan.needs.dquery) fill_zero(state.dquery, kBlockQ * w.plan.padded_depth);
  }
  int64_t prefix_start = 0;
  for (int64_t s = 0; s < num_segments(w.p); ++s) {
    const Segment segment = make_segment(w.p, task.batch, task.kv_head, s, prefix_start);
    if (segment.is_prefix()) prefix_start += segment.length;
    if (!w.plan.needs.visits(segment)) continue;
    backward_segment(w, chunk, task, segment, w.plan.part_rows(segment.length, task.part));
  }
  if (w.plan.needs.dquery && w.plan.parts == 1) finish_blocks(w);
}

// Runs a task. `next`: the task that this thread runs after it, or null.
template <class T>
inline void run_task(BackwardWorker<T>& w, int64_t chunk, const BackwardTask& task, const BackwardTask* next) {
  w.task = &task;
  w.next = next;
  for (w.pass = 0; w.pass < w.plan.passes; ++w.pass) run_pass(w, chunk, task);
}

// Clears the partial tiles that a chunk sums into.
template <class T>
void clear_prefix_tiles(const BackwardPlan<T>& plan, int64_t chunk) {
  const int64_t size = plan.prefix_tile_rows() * plan.padded_depth;
  const int64_t value_size = plan.prefix_tile_rows() * plan.padded_value;
  const int64_t pairs = plan.params.forward.kv_heads * plan.params.forward.num_prefixes;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t tile = plan.tile_of[chunk * pairs + pair];
    if (tile < 0) continue;
    if (plan.needs.dprefix_key) fill_zero(plan.dprefix_key.data() + tile * size, size);
    if (plan.needs.dprefix_value) fill_zero(plan.dprefix_value.data() + tile * value_size, value_size);
  }
}

// Scratch memory of the calling thread, kept between calls.
inline Workspace& backward_workspace() {
  static thread_local Workspace workspace;
  return workspace;
}

// The body of one thread: takes chunks of tasks until there are none left.
template <class T>
void run_backward_tasks(void* argument, int) {
  auto& job = *static_cast<BackwardJob<T>*>(argument);
  const BackwardPlan<T>& plan = job.plan;
  Workspace& workspace = backward_workspace();
  BackwardWorker<T> worker(plan, workspace);
  for (int64_t chunk; (chunk = job.next_chunk.fetch_add(1, std::memory_order_relaxed)) < plan.chunks;) {
    if (plan.needs.prefix()) clear_prefix_tiles(plan, chunk);
    const int64_t end = plan.chunk_begin(chunk + 1);
    for (int64_t i = plan.chunk_begin(chunk); i < end; ++i) {
      const BackwardTask next = plan.task(i + 1);
      run_task(worker, chunk, plan.task(i), i + 1 < end ? &next : nullptr);
    }
  }
  end_streams();
  workspace.trim();
}

// gradient = factor * sum over chunks, in order, of one tile of one (prefix, key head); zero where no row used it.
// `depth`: the gradient's head dim; `padded`: its rows in the partial tiles.
template <class T>
void sum_prefix(const BackwardPlan<T>& plan, int64_t index, const Operand& gradient, const Buffer<T>& partial,
                int64_t depth, int64_t padded, T factor) {
  const AttentionParams& p = plan.params.forward;
  const int64_t tiles = ceil_div(p.prefix_len, kBlockK), pair = index / tiles, first = index % tiles * kBlockK;
  const int64_t kv_head = pair / p.num_prefixes, prefix = pair % p.num_prefixes;
  const Operand head = prefix_head(p, gradient, prefix, kv_head);
  const int64_t rows = prefix_rows(p, prefix), length = valid_prefix_length(p, prefix);
  int64_t part = 0;  // part that the tile belongs to
  while (part + 1 < plan.parts && plan.part_rows(length, part).end <= first) ++part;
  const int64_t part_begin = plan.part_rows(length, part).begin, chunks = plan.chunks / plan.parts;
  T sum[kMaxHeadDim];
  for (int64_t r = first; r < first + kBlockK && r < rows; ++r) {
    for (int64_t d = 0; d < padded; ++d) sum[d] = 0;
    for (int64_t chunk = part * chunks; chunk < (part + 1) * chunks && r < length; ++chunk) {
      const int64_t tile = plan.prefix_tile(chunk, kv_head, prefix);
      if (tile < 0) continue;
      const T* row = partial.data() + (tile * plan.prefix_tile_rows() + r - part_begin) * padded;
      for (int64_t d = 0; d < padded; ++d) sum[d] += row[d];
    }
    write_gradient_row<T>(head, r * head.row_stride, depth, factor, sum, false);
  }
}

// gradient = factor * sum over splits of one tile of one head. `depth` and `padded` as for sum_prefix.
template <class T>
void sum_sequence(const BackwardPlan<T>& plan, int64_t index, const Operand& gradient, const Buffer<T>& partial,
                  int64_t depth, int64_t padded, T factor) {
  const AttentionParams& p = plan.params.forward;
  const int64_t tiles = ceil_div(p.k_len, kBlockK), first = index % tiles * kBlockK;
  const int64_t batch = index / tiles / p.kv_heads, kv_head = index / tiles % p.kv_heads;
  const Operand head = sequence_head(p, gradient, batch, kv_head);
  T sum[kMaxHeadDim];
  for (int64_t r = first; r < first + kBlockK && r < row_keys(p, batch); ++r) {
    for (int64_t d = 0; d < padded; ++d) sum[d] = 0;
    for (int64_t split = 0; split < plan.splits; ++split) {
      const T* row = partial.data() + (plan.sequence_row({kv_head, batch, split, 0}) + r) * padded;
      for (int64_t d = 0; d < padded; ++d) sum[d] += row[d];
    }
    write_gradient_row<T>(head, r * head.row_stride, depth, factor, sum, false);
  }
}

// dquery = factor * sum over parts of one block.
template <class T>
void sum_queries(const BackwardPlan<T>& plan, int64_t index, T factor) {
  const AttentionParams& p = plan.params.forward;
  const Operand& gradient = plan.params.gradients[kDQuery];
  const int64_t head = index / plan.partition.count, depth = plan.padded_depth;
  const int64_t batch = head / p.kv_heads, number = index % plan.partition.count;
  if (number >= BlockPartition(p, row_queries(p, batch)).count) return;
  const QueryBlock block(p, batch, head % p.kv_heads, number);
  T sum[kMaxHeadDim];
  for (int l = 0; l < block.count; ++l) {
    for (int64_t d = 0; d < depth; ++d) sum[d] = 0;
    for (int64_t part = 0; part < plan.parts; ++part) {
      const T* row = plan.part_dquery(part, index) + l * depth;
      for (int64_t d = 0; d < depth; ++d) sum[d] += row[d];
    }
    write_gradient_row<T>(gradient, lane_offset(gradient, block, l), p.head_dim, factor, sum, false);
  }
}

// The body of one thread: adds the partial sums of one tile or block after another.
template <class T>
void run_backward_sums(void* argument, int) {
  auto& job = *static_cast<BackwardJob<T>*>(argument);
  const BackwardPlan<T>& plan = job.plan;
  const AttentionParams& p = plan.params.forward;
  const Operand* gradients = plan.params.gradients;
  const T scale = static_cast<T>(p.scale), rescale = static_cast<T>(dropout_rescale(p.dropout_threshold));
  const int64_t prefixes = job.prefix_tiles(), tiles = prefixes + job.sequence_tiles();
  for (int64_t i; (i = job.next_sum.fetch_add(1, std::memory_order_relaxed)) < tiles + job.query_blocks();) {
    if (i < prefixes) {
      if (plan.needs.dprefix_key)
        sum_prefix(plan, i, gradients[kDPrefixKey], plan.dprefix_key, p.head_dim, plan.padded_depth, scale);
      if (plan.needs.dprefix_value)
        sum_prefix(plan, i, gradients[kDPrefixValue], plan.dprefix_value, p.value_dim, plan.padded_value, rescale);
    } else if (i < tiles) {
      if (plan.needs.dkey)
        sum_sequence(plan, i - prefixes, gradients[kDKey], plan.dkey, p.head_dim, plan.padded_depth, scale);
      if (plan.needs.dvalue)
        sum_sequence(plan, i - prefixes, gradients[kDValue], plan.dvalue, p.value_dim, plan.padded_value, rescale);
    } else {
      sum_queries(plan, i - tiles, scale);
    }
  }
}

template <class T>
void attention_backward(const BackwardParams& params, int threads, RunWorkers run) {
  BackwardJob<T> job(params, threads);
  if (job.plan.chunks > 0) run(workers(threads, job.plan.chunks), run_backward_tasks<T>, &job);
  const int64_t sums = job.prefix_tiles() + job.sequence_tiles() + job.query_blocks();
  if (sums > 0) run(workers(threads, sums), run_backward_sums<T>, &job);
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
