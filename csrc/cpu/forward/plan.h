// The division of the forward pass into tasks.
//
// A task is a few consecutive blocks of the queries of one head. Where there are fewer tasks than keep the threads
// busy, the columns [prefixes ; sequence] of each are split too; the partial sums of the parts are then merged in their
// order, so that the result does not depend on which thread ran what.
#pragma once

#include "../common/column_parts.h"
#include "decode.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

template <class T>
struct ForwardPlan {
  const AttentionParams& params;
  BlockPartition partition;
  bool decode;             // the blocks are those of decode.h
  int64_t task_blocks;     // consecutive blocks of one head in a task
  int64_t tasks_per_head;  // ranges of `task_blocks` blocks
  int64_t splits;          // parts of the columns of one task
  int64_t tasks;

  ForwardPlan(const AttentionParams& p, int threads) : params(p), partition(p), decode(decodes<T>(p, partition)) {
    constexpr int64_t kTasksPerThread = 8;
    const int64_t heads = p.batch * p.kv_heads;
    task_blocks = clamp_to(heads * partition.count / (kTasksPerThread * threads), 1, kMaxTaskBlocks);
    tasks_per_head = ceil_div(partition.count, task_blocks);
    splits = column_parts(heads * tasks_per_head, threads, p.prefix_slots * p.prefix_len + p.k_len);
    tasks = heads * tasks_per_head * splits;
  }

  // All heads' query blocks, numbered by (batch row, key head, block).
  int64_t query_blocks() const { return params.batch * params.kv_heads * partition.count; }
  // Index of one part's sums of one block among the partial sums, [query_blocks][splits].
  int64_t partial(int64_t batch, int64_t kv_head, int64_t block, int64_t split) const {
    return ((batch * params.kv_heads + kv_head) * partition.count + block) * splits + split;
  }

  // The rows that a part has of a segment which begins at column `start` of [prefixes ; sequence].
  KeyRange part_rows(const Segment& segment, int64_t start, int64_t columns, int64_t split) const {
    const auto bound = [&](int64_t s) {
      if (s == splits) return segment.length;
      const int64_t row = clamp_to(columns * s / splits - start, 0, segment.length);
      return row == segment.length ? row : row - row % kBlockK;  // tiles stay whole
    };
    return {bound(split), bound(split + 1)};
  }
};

// Some consecutive blocks of one head, over one part of its columns.
struct ForwardTask {
  int64_t batch, kv_head, first_block, split;
  int blocks;

  template <class T>
  ForwardTask(const ForwardPlan<T>& plan, int64_t index) : split(index % plan.splits) {
    index /= plan.splits;
    batch = index / plan.tasks_per_head / plan.params.kv_heads;
    kv_head = index / plan.tasks_per_head % plan.params.kv_heads;
    // Under a causal mask the last blocks of a head cost most: they go first.
    first_block = (plan.tasks_per_head - 1 - index % plan.tasks_per_head) * plan.task_blocks;
    const BlockPartition of_row(plan.params, row_queries(plan.params, batch));
    blocks = static_cast<int>(clamp_to(of_row.count - first_block, 0, plan.task_blocks));
  }

  template <class T>
  QueryBlock block(const ForwardPlan<T>& plan, int i) const {
    return QueryBlock(plan.params, batch, kv_head, first_block + i);
  }
};

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
