// out = softmax(scale Q [P_k ; K]^T + mask) [P_v ; V],  lse = its normaliser.
//
// A task is a few blocks of queries of one head. The tiles of the prefixes and of the sequence pass over them, with an
// online softmax for each block:
//   S^T   = K Q^T             [rows][lanes]   scale folded into Q
//   P^T   = e^(S^T - max)     while S^T is in registers, with a running max and sum per lane
//   O^T  += V^T P^T           [value_dim][lanes]
// Queries stand in the SIMD lanes, so the maxima and sums are vertical and keys and values need no packing.
#pragma once

#include <cmath>

#include "../common/gemm.h"
#include "../common/workspace.h"
#include "softmax.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

inline constexpr int kMaxTaskBlocks = 4;

// The state of a block of queries, kept from tile to tile.
template <class T>
struct ForwardState {
  QueryBlock block;
  T* query;            // [head_dim][kBlockQ]
  T* out;              // [value_dim][kBlockQ]
  T *reference, *sum;  // [kBlockQ], see OnlineSoftmax
};

// A thread's memory for the blocks of a task, and for one step.
template <class T>
struct ForwardScratch {
  ForwardState<T>* states;  // [kMaxTaskBlocks]
  T *scores, *key, *value, *bias, *tile_sum;
  uint16_t* bits;

  ForwardScratch(Workspace& workspace, const AttentionParams& p) {
    // DecodeBlock keeps rows of whole vectors, of queries and of their sums, in the memory of `query`.
    const int64_t depth = whole_vectors<T>(p.head_dim > p.value_dim ? p.head_dim : p.value_dim);
    const size_t panel = depth * kBlockQ, tile = kBlockK * kBlockQ, rows = kBlockK * depth;
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

// Adds the rows [tile_first, tile_first + tile_count) of a segment, whose keys and values are given, to one block.
template <class T>
void forward_step(const ForwardState<T>& state, const Segment& segment, int64_t tile_first, int tile_count,
                  const Rows<T>& key, const Rows<T>& value, const ForwardScratch<T>& scratch, Prefetcher& prefetcher) {
  constexpr int kN = kLanes<T>;
  const QueryBlock& block = state.block;
  const AttentionParams& p = *block.params;
  const ForwardTileBias<T> bias(block, segment, tile_first, tile_count, scratch.bias);
  if (bias.count == 0) return;
  const ForwardTilePlan<T> plan(block, segment, bias.first, bias.count);
  const int64_t skipped = bias.first - tile_first;

  const bool dropout = p.dropout_threshold > 0;
  if (dropout) dropout_bits_of_query_lanes(block, segment, bias.first, bias.count, scratch.bits);
  const Scores<T> scores(block, segment, plan, bias, scratch.scores);
  fill_zero(scratch.tile_sum, kBlockQ);
  OnlineSoftmax<T> softmax{scores,    state.reference, state.sum,    scratch.tile_sum,
                           state.out, p.value_dim,     scratch.bits, p.dropout_threshold};
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
    gemm<ALayout::kTransposed, T>(p.value_dim, (group.vector_end - group.vector_begin) * kN,
                                  group.row_end - group.row_begin,
                                  value.data + (skipped + group.row_begin) * value.stride, value.stride,
                                  scratch.scores + group.row_begin * kBlockQ + group.vector_begin * kN, kBlockQ,
                                  prefetcher, AddTo<T>{state.out + group.vector_begin * kN, kBlockQ});
  }
}

// Loads the sums of a block from attention over other keys.
template <class T>
void resume_block(const ForwardState<T>& state) {
  const QueryBlock& block = state.block;
  const AttentionParams& p = *block.params;
  pack_queries<T>(p.out, block, p.value_dim, T(1), state.out);
  for (int l = 0; l < block.count; ++l) {
    const T lse = static_cast<const T*>(p.lse)[block.lse_index(l)];
    if (std::isinf(lse)) {
      for (int64_t d = 0; d < p.value_dim; ++d) state.out[d * kBlockQ + l] = 0;
    } else {
      state.reference[l] = lse;
      state.sum[l] = 1;
    }
  }
}

// Loads the queries of a block and clears its sums, or takes them up where the call extends an earlier one: in the
// first part of its columns.
template <class T>
void begin_block(const ForwardState<T>& state, bool first_part) {
  const AttentionParams& p = *state.block.params;
  pack_queries<T>(p.query, state.block, p.head_dim, query_factor<T>(p), state.query);
  fill_zero(state.out, p.value_dim * kBlockQ);
  for (int l = 0; l < kBlockQ; ++l) state.reference[l] = -std::numeric_limits<T>::infinity();
  fill_zero(state.sum, kBlockQ);
  if (p.extends && first_part) resume_block<T>(state);
}

// Writes out, lse and row_mass of a block.
template <class T>
void finish_block(const ForwardState<T>& state) {
  const QueryBlock& block = state.block;
  const AttentionParams& p = *block.params;
  const T rescale = static_cast<T>(dropout_rescale(p.dropout_threshold));
  alignas(64) T factor[kBlockQ], lse[kBlockQ], mass[kBlockQ];
  for (int l = 0; l < kBlockQ; l += kLanes<T>) {
    const Vec<T> sum = load(state.sum + l);
    store(factor + l, sum != 0 ? rescale / sum : Vec<T>{});
    const Vec<T> reference = load(state.reference + l), normaliser = reference + log<T>(sum);
    store(lse + l, normaliser);  // -infinity for a query that sees nothing
    if (p.row_mass != nullptr) store(mass + l, sum != 0 ? sum * exp<T>(reference - normaliser) : broadcast<T>(1));
  }
  for (int l = 0; l < block.count; ++l) {
    const int64_t row = block.lse_index(l);
    static_cast<T*>(p.lse)[row] = lse[l];
    if (p.row_mass != nullptr) static_cast<T*>(p.row_mass)[row] = mass[l];
  }
  unpack_queries<T>(p.out, block, p.value_dim, factor, state.out);
}

// Adds the tiles of the rows `range` of one segment to the blocks of a task. `prefetch_next` adds to a prefetcher the
// data needed after them.
template <class T, class F>
void forward_segment(const AttentionParams& p, const Segment& segment, KeyRange range, int blocks,
                     const ForwardScratch<T>& scratch, F prefetch_next) {
  KeyRange hulls[kMaxTaskBlocks];
  KeyRange all{range.end, range.begin};
  for (int i = 0; i < blocks; ++i) {
    hulls[i] = intersection(scratch.states[i].block.hull(segment), range);
    if (hulls[i].begin >= hulls[i].end) continue;
    if (hulls[i].begin < all.begin) all.begin = hulls[i].begin;
    if (hulls[i].end > all.end) all.end = hulls[i].end;
  }
  if (all.begin >= all.end) return;
  Prefetcher prefetcher;
  for (int64_t first = all.begin - all.begin % kCell; first < all.end; first += kBlockK) {
    const int64_t left = all.end - first;
    const int count = static_cast<int>(left < kBlockK ? left : kBlockK);
    const Rows<T> key = rows_spread_in_cache<T>(segment.key)
                            ? rows_in_place<T>(segment.key, first)
                            : segment_rows<T>(segment.key, first, count, p.head_dim, p.head_dim, scratch.key);
    const Rows<T> value = segment_rows<T>(segment.value, first, count, p.value_dim, p.value_dim, scratch.value);
    prefetcher.clear();
    if (left > kBlockK) {
      const int64_t rows = left - kBlockK < kBlockK ? left - kBlockK : kBlockK;
      prefetcher.add_rows(segment.key, first + kBlockK, rows, p.head_dim);
      prefetcher.add_rows(segment.value, first + kBlockK, rows, p.value_dim);
    } else {
      prefetch_next(prefetcher);
    }
    prefetcher.spread(blocks * (gemm_blocks<T>(count, kBlockQ) + gemm_blocks<T>(p.value_dim, kBlockQ)));
    for (int i = 0; i < blocks; ++i)
      if (intersects(hulls[i], first, first + count))
        forward_step<T>(scratch.states[i], segment, first, count, key, value, scratch, prefetcher);
  }
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
