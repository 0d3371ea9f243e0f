// out = softmax(scale Q [P_k ; K]^T + mask) [P_v ; V],  lse = its normaliser.
//
// One task is a few blocks of queries of one head; the tiles of the prefixes and of the sequence pass over them, with
// an online softmax for each block:
//   S^T   = K Q^T             [rows][lanes]   scale folded into Q
//   P^T   = e^(S^T - max)     while S^T is in registers, with a running max and sum per lane
//   O^T  += V^T P^T           [head_dim][lanes]
// Queries stand in the SIMD lanes, so the maxima and sums are vertical and keys and values need no packing.
#pragma once

#include <atomic>

#include "gemm.h"
#include "kernels.h"
#include "softmax.h"
#include "workspace.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

inline constexpr int kMaxTaskBlocks = 4;

// What a block of queries carries from tile to tile.
template <class T>
struct ForwardState {
  QueryBlock block;
  T *query, *out;      // [head_dim][kBlockQ]
  T *reference, *sum;  // [kBlockQ], of the online softmax
};

template <class T>
struct ForwardScratch {
  ForwardState<T>* states;  // [kMaxTaskBlocks]
  T *scores, *key, *value, *bias, *tile_sum;
  uint16_t* bits;

  ForwardScratch(Workspace& workspace, int64_t head_dim) {
    const size_t panel = head_dim * kBlockQ, tile = kBlockK * kBlockQ, rows = kBlockK * head_dim;
    const size_t state = 2 * Workspace::bytes_for<T>(panel) + 2 * Workspace::bytes_for<T>(kBlockQ);
    workspace.reserve(Workspace::bytes_for<ForwardState<T>>(kMaxTaskBlocks) + kMaxTaskBlocks * state +
                      2 * Workspace::bytes_for<T>(tile) + 2 * Workspace::bytes_for<T>(rows) +
                      Workspace::bytes_for<T>(kBlockQ) + Workspace::bytes_for<uint16_t>(tile));
    states = workspace.take<ForwardState<T>>(kMaxTaskBlocks);
    for (int i = 0; i < kMaxTaskBlocks; ++i) {
      states[i].query = workspace.take<T>(panel);
      states[i].out = workspace.take<T>(panel);
      states[i].reference = workspace.take<T>(kBlockQ);
      states[i].sum = workspace.take<T>(kBlockQ);
    }
    scores = workspace.take<T>(tile);
    key = workspace.take<T>(rows);
    value = workspace.take<T>(rows);
    bias = workspace.take<T>(tile);
    tile_sum = workspace.take<T>(kBlockQ);
    bits = workspace.take<uint16_t>(tile);
  }
};

// The factor on Q that makes Q K^T the argument of tanh, or a score.
template <class T>
T query_factor(const AttentionParams& p) {
  return static_cast<T>(p.softcap > 0 ? p.scale / p.softcap : p.scale);
}

// One block against the rows [tile_first, tile_first + tile_count) of a segment, whose keys and values are given.
template <class T>
void forward_step(const ForwardState<T>& state, const Segment& segment, int64_t tile_first, int tile_count,
                  const Rows<T>& key, const Rows<T>& value, const ForwardScratch<T>& scratch, Prefetcher& prefetcher) {
  constexpr int kN = kLanes<T>;
  const QueryBlock& block = state.block;
  const AttentionParams& p = *block.params;
  const TileBias<T> bias(block, segment, tile_first, tile_count, scratch.bias);
  if (bias.count == 0) return;
  const TilePlan<T> plan(block, segment, bias.first, bias.count);
  const int64_t skipped = bias.first - tile_first;

  const bool dropout = p.dropout_threshold > 0;
  if (dropout) dropout_bits(block, segment, bias.first, bias.count, scratch.bits);
  const Scores<T> scores(block, segment, plan, bias, scratch.scores, nullptr);
  fill_zero(scratch.tile_sum, kBlockQ);
  OnlineSoftmax<T> softmax{scores,    state.reference, state.sum,    scratch.tile_sum,
                           state.out, p.head_dim,      scratch.bits, p.dropout_threshold};
  for (int g = 0; g < plan.num_groups; ++g) {
    const auto& group = plan.groups[g];
    softmax.first_row = group.row_begin;
    softmax.first_column = group.vector_begin * kN;
    gemm<ALayout::kRowMajor, T>(group.row_end - group.row_begin, (group.vector_end - group.vector_begin) * kN,
                                p.head_dim, key.data + (skipped + group.row_begin) * key.stride, key.stride,
                                state.query + group.vector_begin * kN, kBlockQ, prefetcher, softmax);
  }
  for (int l = 0; l < kBlockQ; ++l) state.sum[l] += scratch.tile_sum[l];

  for (int g = 0; g < plan.num_groups; ++g) {
    const auto& group = plan.groups[g];
    gemm<ALayout::kTransposed, T>(p.head_dim, (group.vector_end - group.vector_begin) * kN,
                                  group.row_end - group.row_begin,
                                  value.data + (skipped + group.row_begin) * value.stride, value.stride,
                                  scratch.scores + group.row_begin * kBlockQ + group.vector_begin * kN, kBlockQ,
                                  prefetcher, AddTo<T>{state.out + group.vector_begin * kN, kBlockQ});
  }
}

template <class T>
void begin_block(const ForwardState<T>& state) {
  const AttentionParams& p = *state.block.params;
  pack_queries<T>(p.query, state.block, query_factor<T>(p), state.query);
  fill_zero(state.out, p.head_dim * kBlockQ);
  for (int l = 0; l < kBlockQ; ++l) state.reference[l] = -std::numeric_limits<T>::infinity();
  fill_zero(state.sum, kBlockQ);
}

template <class T>
void finish_block(const ForwardState<T>& state) {
  const QueryBlock& block = state.block;
  const AttentionParams& p = *block.params;
  const T rescale = static_cast<T>(dropout_rescale(p.dropout_threshold));
  alignas(64) T factor[kBlockQ], lse[kBlockQ];
  for (int l = 0; l < kBlockQ; l += kLanes<T>) {
    const Vec<T> sum = load(state.sum + l);
    store(factor + l, sum != 0 ? rescale / sum : Vec<T>{});
    store(lse + l, load(state.reference + l) + log<T>(sum));  // -infinity where nothing was summed
  }
  for (int l = 0; l < block.count; ++l)
    static_cast<T*>(p.lse)[(block.batch * p.q_heads + block.head(l)) * p.q_len + block.query(l)] = lse[l];
  unpack_queries<T>(p.out, block, factor, state.out);
}

inline bool intersects(const KeyRange& a, int64_t begin, int64_t end) {
  return a.begin < end && a.end > begin && a.begin < a.end;
}

// The tiles of one segment over the blocks of a task. `prefetch_next` names what is wanted after the segment.
template <class T, class F>
void forward_segment(const Segment& segment, int blocks, int64_t head_dim, const ForwardScratch<T>& scratch,
                     F prefetch_next) {
  KeyRange hulls[kMaxTaskBlocks];
  KeyRange all{segment.length, 0};
  for (int i = 0; i < blocks; ++i) {
    hulls[i] = scratch.states[i].block.hull(segment);
    if (hulls[i].begin >= hulls[i].end) continue;
    if (hulls[i].begin < all.begin) all.begin = hulls[i].begin;
    if (hulls[i].end > all.end) all.end = hulls[i].end;
  }
  Prefetcher prefetcher;
  for (int64_t first = all.begin - all.begin % kCell; first < all.end; first += kBlockK) {
    const int64_t left = all.end - first;
    const int count = static_cast<int>(left < kBlockK ? left : kBlockK);
    const Rows<T> key = rows_spread_in_cache<T>(segment.key)
                            ? rows_in_place<T>(segment.key, first)
                            : segment_rows<T>(segment.key, first, count, head_dim, scratch.key);
    const Rows<T> value = segment_rows<T>(segment.value, first, count, head_dim, scratch.value);
    prefetcher.clear();
    if (left > kBlockK) {
      const int64_t rows = left - kBlockK < kBlockK ? left - kBlockK : kBlockK;
      prefetcher.add_rows(segment.key, first + kBlockK, rows, head_dim);
      prefetcher.add_rows(segment.value, first + kBlockK, rows, head_dim);
    } else {
      prefetch_next(prefetcher);
    }
    prefetcher.spread(blocks * (gemm_blocks<T>(count, kBlockQ) + gemm_blocks<T>(head_dim, kBlockQ)));
    for (int i = 0; i < blocks; ++i)
      if (intersects(hulls[i], first, first + count))
        forward_step<T>(scratch.states[i], segment, first, count, key, value, scratch, prefetcher);
  }
}

struct ForwardJob {
  const AttentionParams& params;
  BlockPartition partition;
  int64_t task_blocks;  // consecutive blocks of one head
  int64_t tasks_per_head;
  int64_t tasks;
  std::atomic<int64_t> next{0};

  ForwardJob(const AttentionParams& p, int threads) : params(p), partition(p) {
    constexpr int64_t kTasksPerThread = 8;
    const int64_t heads = p.batch * p.kv_heads;
    task_blocks = clamp_to(heads * partition.count / (kTasksPerThread * threads), 1, kMaxTaskBlocks);
    tasks_per_head = ceil_div(partition.count, task_blocks);
    tasks = heads * tasks_per_head;
  }
};

struct ForwardTask {
  int64_t batch, kv_head, first_block;
  int blocks;

  ForwardTask(const ForwardJob& job, int64_t index)
      : batch(index / job.tasks_per_head / job.params.kv_heads),
        kv_head(index / job.tasks_per_head % job.params.kv_heads),
        // Under a causal mask the last blocks of a head cost most: they go first.
        first_block((job.tasks_per_head - 1 - index % job.tasks_per_head) * job.task_blocks),
        blocks(static_cast<int>(clamp_to(job.partition.count - first_block, 0, job.task_blocks))) {}

  QueryBlock block(const ForwardJob& job, int i) const {
    return QueryBlock(job.params, job.partition, batch, kv_head, first_block + i);
  }
};

// The queries of a task and the first tile of its sequence.
inline void prefetch_task(const ForwardJob& job, const ForwardTask& task, Prefetcher& prefetcher) {
  const AttentionParams& p = job.params;
  for (int i = 0; i < task.blocks; ++i) prefetcher.add_queries(p.query, task.block(job, i));
  const int64_t rows = p.k_len < kBlockK ? p.k_len : kBlockK;
  prefetcher.add_rows(head_of(p.key, task.batch, task.kv_head), 0, rows, p.head_dim);
  prefetcher.add_rows(head_of(p.value, task.batch, task.kv_head), 0, rows, p.head_dim);
}

// `next`: the task that this thread runs after this one, or null.
template <class T>
void run_task(const ForwardJob& job, const ForwardTask& task, const ForwardTask* next,
              const ForwardScratch<T>& scratch) {
  const AttentionParams& p = job.params;
  for (int i = 0; i < task.blocks; ++i) {
    new (&scratch.states[i].block) QueryBlock(task.block(job, i));
    begin_block<T>(scratch.states[i]);
  }
  int64_t prefix_start = 0;
  for (int64_t s = 0; s < num_segments(p); ++s) {
    const Segment segment = make_segment(p, task.batch, task.kv_head, s, prefix_start);
    if (segment.is_prefix()) prefix_start += segment.length;
    forward_segment<T>(segment, task.blocks, p.head_dim, scratch, [&](Prefetcher& prefetcher) {
      if (!segment.is_prefix() && next != nullptr) prefetch_task(job, *next, prefetcher);
    });
  }
  for (int i = 0; i < task.blocks; ++i) finish_block<T>(scratch.states[i]);
}

template <class T>
void run_tasks(void* argument, int) {
  ForwardJob& job = *static_cast<ForwardJob*>(argument);
  static thread_local Workspace workspace;
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
void attention_forward(const AttentionParams& params, int threads, RunWorkers run) {
  ForwardJob job(params, threads);
  if (job.tasks > 0) run(workers(threads, job.tasks), run_tasks<T>, &job);
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
