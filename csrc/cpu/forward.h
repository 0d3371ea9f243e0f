// out = softmax(scale Q [P_k ; K]^T + mask) [P_v ; V],  lse = its normaliser.
//
// One task is one block of queries; it walks the tiles of the prefixes and of the sequence with an online softmax:
//   S^T   = K Q^T             [rows][lanes]   scale folded into Q
//   P^T   = e^(S^T - max)     in place, with running max and sum per lane
//   O^T  += V^T P^T           [head_dim][lanes]
// Queries stand in the SIMD lanes, so the maxima and sums are vertical and keys and values are read where they lie.
#pragma once

#include <atomic>
#include <cmath>

#include "gemm.h"
#include "kernels.h"
#include "softmax.h"
#include "workspace.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

template <class T>
struct ForwardScratch {
  T *query, *out, *scores, *key, *value, *bias, *running_max, *running_sum;
  uint16_t* bits;

  ForwardScratch(Workspace& workspace, int64_t head_dim) {
    const size_t panel = head_dim * kBlockQ, tile = kBlockK * kBlockQ, rows = kBlockK * head_dim;
    workspace.reserve(Workspace::bytes_for<T>(panel) * 2 + Workspace::bytes_for<T>(tile) * 2 +
                      Workspace::bytes_for<T>(rows) * 2 + Workspace::bytes_for<T>(kBlockQ) * 2 +
                      Workspace::bytes_for<uint16_t>(tile));
    query = workspace.take<T>(panel);
    out = workspace.take<T>(panel);
    scores = workspace.take<T>(tile);
    key = workspace.take<T>(rows);
    value = workspace.take<T>(rows);
    bias = workspace.take<T>(tile);
    running_max = workspace.take<T>(kBlockQ);
    running_sum = workspace.take<T>(kBlockQ);
    bits = workspace.take<uint16_t>(tile);
  }
};

// The factor on Q that makes Q K^T the argument of tanh, or a score.
template <class T>
T query_factor(const AttentionParams& p) {
  return static_cast<T>(p.softcap > 0 ? p.scale / p.softcap : p.scale);
}

template <class T>
void forward_tile(const QueryBlock& block, const Segment& segment, int64_t first, int count,
                  const ForwardScratch<T>& scratch) {
  constexpr int kN = kLanes<T>;
  const AttentionParams& p = *block.params;
  const TileBias<T> bias(block, segment, first, count, scratch.bias);
  if (bias.count == 0) return;
  first = bias.first;
  count = bias.count;
  const TilePlan<T> plan(block, segment, first, count);
  const bool dropout = p.dropout_threshold > 0;
  prefetch_rows(segment.key, first, count, p.head_dim);
  prefetch_rows(segment.value, first, count, p.head_dim);

  const Rows<T> key = segment_rows<T>(segment.key, first, count, p.head_dim, scratch.key);
  for (int g = 0; g < plan.num_groups; ++g) {
    const auto& group = plan.groups[g];
    gemm<ALayout::kRowMajor, T>(group.row_end - group.row_begin, (group.vector_end - group.vector_begin) * kN, p.head_dim,
                                key.data + group.row_begin * key.stride, key.stride,
                                scratch.query + group.vector_begin * kN, kBlockQ,
                                scratch.scores + group.row_begin * kBlockQ + group.vector_begin * kN, kBlockQ, false);
  }
  finish_scores<T>(block, segment, first, plan, bias, scratch.scores, nullptr);
  if (dropout) dropout_bits(block, segment, first, count, scratch.bits);

  for (int v = 0; v < plan.vectors; ++v) {
    const auto& rows = plan.rows[v];
    if (rows.begin >= rows.end) continue;
    T* tile = scratch.scores + v * kN;
    const auto step = dropout ? online_softmax<T, true> : online_softmax<T, false>;
    const Vec<T> factor = step(tile, rows.begin, rows.end, scratch.bits + v * kN, p.dropout_threshold,
                               scratch.running_max + v * kN, scratch.running_sum + v * kN);
    if (!any_lane<T>(factor != 1)) continue;
    for (int64_t d = 0; d < p.head_dim; ++d) {
      T* out = scratch.out + d * kBlockQ + v * kN;
      store(out, load(out) * factor);
    }
  }

  const Rows<T> value = segment_rows<T>(segment.value, first, count, p.head_dim, scratch.value);
  for (int g = 0; g < plan.num_groups; ++g) {
    const auto& group = plan.groups[g];
    gemm<ALayout::kTransposed, T>(p.head_dim, (group.vector_end - group.vector_begin) * kN,
                                  group.row_end - group.row_begin, value.data + group.row_begin * value.stride,
                                  value.stride, scratch.scores + group.row_begin * kBlockQ + group.vector_begin * kN,
                                  kBlockQ, scratch.out + group.vector_begin * kN, kBlockQ, true);
  }
}

template <class T>
void forward_block(const QueryBlock& block, const ForwardScratch<T>& scratch) {
  const AttentionParams& p = *block.params;
  const int lanes = block.vectors<T>() * kLanes<T>;
  pack_queries<T>(p.query, block, query_factor<T>(p), scratch.query);
  for (int64_t d = 0; d < p.head_dim; ++d)
    for (int l = 0; l < lanes; ++l) scratch.out[d * kBlockQ + l] = 0;
  for (int l = 0; l < lanes; ++l) {
    scratch.running_max[l] = -std::numeric_limits<T>::infinity();
    scratch.running_sum[l] = 0;
  }

  int64_t prefix_start = 0;
  for (int64_t s = 0; s < num_segments(p); ++s) {
    const Segment segment = make_segment(p, block.batch, block.kv_head, s, prefix_start);
    if (segment.is_prefix()) prefix_start += segment.length;
    const KeyRange hull = block.hull(segment);
    for (int64_t first = hull.begin - hull.begin % kCell; first < hull.end; first += kBlockK) {
      const int64_t left = hull.end - first;
      forward_tile<T>(block, segment, first, static_cast<int>(left < kBlockK ? left : kBlockK), scratch);
    }
  }

  const T rescale = static_cast<T>(dropout_rescale(p.dropout_threshold));
  T* factor = scratch.bias;
  for (int l = 0; l < lanes; ++l) {
    const T sum = scratch.running_sum[l];
    factor[l] = sum > 0 || sum != sum ? rescale / sum : T(0);
    if (l < block.count) {
      const int64_t row = (block.batch * p.q_heads + block.head(l)) * p.q_len + block.query(l);
      static_cast<T*>(p.lse)[row] = scratch.running_max[l] + std::log(sum);
    }
  }
  unpack_queries<T>(p.out, block, factor, scratch.out);
}

template <class T>
void attention_forward(const AttentionParams& params, int threads, RunWorkers run) {
  struct Job {
    const AttentionParams& params;
    BlockPartition partition;
    int64_t heads;
    std::atomic<int64_t> next{0};
  } job{params, BlockPartition(params), params.batch * params.kv_heads};
  const int64_t tasks = job.heads * job.partition.count;
  if (tasks == 0) return;

  run(
      workers(threads, tasks),
      [](void* argument, int) {
        Job& job = *static_cast<Job*>(argument);
        const AttentionParams& p = job.params;
        static thread_local Workspace workspace;
        const ForwardScratch<T> scratch(workspace, p.head_dim);
        const int64_t tasks = job.heads * job.partition.count;
        for (int64_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
          // Under a causal mask the last blocks cost most: they go first.
          const int64_t head = task / job.partition.count;
          const int64_t index = job.partition.count - 1 - task % job.partition.count;
          forward_block<T>(QueryBlock(p, job.partition, head / p.kv_heads, head % p.kv_heads, index), scratch);
        }
        workspace.trim();
      },
      &job);
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
