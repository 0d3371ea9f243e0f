// The gradients of attention over [prefix ; sequence], only those asked for.
//
//   delta = rowsum(dout * out) - dlse      P = exp(S - lse)      dS = P * (dout V'^T - delta)
//   dV' = P^T dout        dK' = scale dS^T Q        dQ = scale dS K'
//
// A task walks the tiles of keys of one head, or a part of them. A tile's dK', dV' stay in cache while the blocks of
// queries pass. Keys stand in the lanes: a tile's K and V are transposed once, while Q, dO and the gradients keep their
// layout in memory.
//   S = Q K^T,  dP = dO V^T       [queries][keys], with the factors of S and dP folded into K^T and V^T
//   dV += P^T dO,  dK += dS^T Q   [keys][value_dim], [keys][head_dim]
//   dQ += dS K                    [queries][head_dim], kept for the whole range of queries
// If only prefix gradients are asked for, only prefix tiles are visited. If ds is not needed, V and dP are not read.
#pragma once

#include "plan.h"
#include "softmax.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// The state of a block of queries, kept from tile to tile.
template <class T>
struct BackwardState {
  QueryBlock block;
  bool ready;  // begin_block was called
  Rows<T> query, dout;
  T* query_scratch;  // [kBlockQ][padded_depth], if the rows cannot be read in place
  T* dout_scratch;   // [kBlockQ][padded_value], likewise
  T* dquery;         // [kBlockQ][padded_depth]; null if not needed
  T lse[kBlockQ];    // +infinity for a row that sees nothing
  T delta[kBlockQ];
};

// A tile of keys and values as the products read them.
template <class T>
struct BackwardTile {
  Segment segment;
  int64_t first;
  int count;
  const T *key_lanes, *value_lanes;  // [head_dim][kKeyStride], [value_dim][kKeyStride]
  Rows<T> key;                       // filled for dQ only
  T *dkey, *dvalue;                  // [count][padded_depth], [count][padded_value]; null if not needed
};

// Scratch memory for one step, and for the sums of dK' and dV' that do not go into a partial tile.
template <class T>
struct BackwardScratch {
  T *probabilities, *ds, *bias, *capped;  // [kBlockQ][kKeyStride]
  T *key_lanes, *value_lanes;             // [head_dim][kKeyStride], [value_dim][kKeyStride]
  T* key;                                 // [kBlockK][padded_depth]
  T *dkey, *dvalue;                       // [kBlockK or the sequence's rows][padded_depth or padded_value]
  uint16_t* bits;                         // [kBlockQ][kKeyStride]
};

// The state of one thread: the plan, its current task and pass, and the memory of both.
template <class T>
struct BackwardWorker {
  const BackwardPlan<T>& plan;
  const AttentionParams& p;
  Prefetcher prefetcher;
  BackwardState<T>* states;  // [blocks]
  int64_t pass = 0;
  int64_t blocks = 0;
  const BackwardTask* task = nullptr;
  const BackwardTask* next = nullptr;  // the task that this thread runs after `task`, or null
  BackwardScratch<T> scratch;

  BackwardWorker(const BackwardPlan<T>& plan, Workspace& workspace) : plan(plan), p(plan.params.forward) {
    const int64_t blocks = plan.max_blocks(), padded = plan.padded_depth, padded_value = plan.padded_value;
    const size_t rows = kBlockQ * padded, value_rows = kBlockQ * padded_value, tile = kBlockQ * kKeyStride;
    const size_t key_lanes = p.head_dim * kKeyStride, value_lanes = p.value_dim * kKeyStride;
    // The sums of one tile, or of the whole sequence if they wait for another pass.
    const bool waits = plan.passes > 1 && plan.splits == 1 && (plan.needs.dkey || plan.needs.dvalue);
    const size_t sums = (waits ? ceil_div(p.k_len, kBlockK) : 1) * kBlockK;
    workspace.reserve(Workspace::bytes_for<BackwardState<T>>(blocks) + blocks * 2 * Workspace::bytes_for<T>(rows) +
                      blocks * Workspace::bytes_for<T>(value_rows) + 4 * Workspace::bytes_for<T>(tile) +
                      Workspace::bytes_for<T>(key_lanes) + Workspace::bytes_for<T>(value_lanes) +
                      Workspace::bytes_for<T>(kBlockK * padded) + Workspace::bytes_for<T>(sums * padded) +
                      Workspace::bytes_for<T>(sums * padded_value) + Workspace::bytes_for<uint16_t>(tile));
    states = workspace.take<BackwardState<T>>(blocks);
    for (int64_t i = 0; i < blocks; ++i) {
      states[i].query_scratch = workspace.take<T>(rows);
      states[i].dout_scratch = workspace.take<T>(value_rows);
      states[i].dquery = plan.needs.dquery ? workspace.take<T>(rows) : nullptr;
    }
    scratch.probabilities = workspace.take<T>(tile);
    scratch.ds = workspace.take<T>(tile);
    scratch.bias = workspace.take<T>(tile);
    scratch.capped = workspace.take<T>(tile);
    scratch.key_lanes = workspace.take<T>(key_lanes);
    scratch.value_lanes = workspace.take<T>(value_lanes);
    scratch.key = workspace.take<T>(kBlockK * padded);
    scratch.dkey = workspace.take<T>(sums * padded);
    scratch.dvalue = workspace.take<T>(sums * padded_value);
    scratch.bits = workspace.take<uint16_t>(tile);
  }
};

// Prefetches the rows of a block of queries.
template <class T>
inline void prefetch_block(BackwardWorker<T>& w, const QueryBlock& block) {
  w.prefetcher.add_queries(w.p.query, block, w.p.head_dim);
  w.prefetcher.add_queries(w.plan.params.dout, block, w.p.value_dim);
  if (w.plan.needs.any_ds()) w.prefetcher.add_queries(w.p.out, block, w.p.value_dim);
}

// Prefetches the rows of a tile of keys and values.
template <class T>
inline void prefetch_tile(BackwardWorker<T>& w, const Segment& segment, int64_t first) {
  const int64_t left = segment.length - first, rows = left < kBlockK ? left : kBlockK;
  w.prefetcher.add_rows(segment.key, first, rows, w.p.head_dim);
  if (w.plan.needs.ds(segment)) w.prefetcher.add_rows(segment.value, first, rows, w.p.value_dim);
}

// Prefetches the first block and tile of the next pass or task.
template <class T>
inline void prefetch_following(BackwardWorker<T>& w) {
  const bool same_task = w.pass + 1 < w.plan.passes;
  const BackwardTask* task = same_task ? w.task : w.next;
  if (task == nullptr) return;
  const KeyRange blocks = w.plan.blocks(*task, same_task ? w.pass + 1 : 0);
  if (blocks.begin < blocks.end) prefetch_block(w, QueryBlock(w.p, task->batch, task->kv_head, blocks.begin));
  if (w.plan.needs.visits_sequence())
    prefetch_tile(w, make_segment(w.p, task->batch, task->kv_head, w.p.prefix_slots, 0),
                  w.plan.part_rows(row_keys(w.p, task->batch), task->part).begin);
}

// Prefetches the data needed after the step of block i with a tile: the next block, if it is not ready; after the last
// block the next tile; after the last tile the next pass or task.
template <class T>
inline void prefetch_after_step(BackwardWorker<T>& w, int64_t i, const BackwardTile<T>& tile) {
  const Segment& segment = tile.segment;
  w.prefetcher.clear();
  const bool last_block = i + 1 == w.blocks;
  if (!last_block) {
    if (!w.states[i + 1].ready) prefetch_block(w, w.states[i + 1].block);
  } else if (tile.first + kBlockK < w.plan.part_rows(segment.length, w.task->part).end) {
    prefetch_tile(w, segment, tile.first + kBlockK);
  } else if (segment.is_prefix() != w.plan.needs.visits_sequence()) {
    prefetch_following(w);
  }
  const Needs& needs = w.plan.needs;
  w.prefetcher.spread(gemm_blocks<T>(kBlockQ, tile.count) * (1 + needs.ds(segment)) +
                      gemm_blocks<T>(tile.count, w.plan.padded_depth) * needs.key(segment) +
                      gemm_blocks<T>(tile.count, w.plan.padded_value) * needs.value(segment) +
                      gemm_blocks<T>(kBlockQ, w.plan.padded_depth) * needs.dquery);
}

// Loads a block's rows and computes delta, at its first step.
template <class T>
inline void begin_block(BackwardWorker<T>& w, BackwardState<T>& state) {
  state.ready = true;
  const QueryBlock& block = state.block;
  const Needs& needs = w.plan.needs;
  state.query = query_rows<T>(w.p.query, block, w.p.head_dim, w.plan.padded_depth, state.query_scratch);
  state.dout = query_rows<T>(w.plan.params.dout, block, w.p.value_dim, w.plan.padded_value, state.dout_scratch);
  if (needs.any_ds()) row_dot<T>(w.plan.params.dout, w.p.out, block, w.p.value_dim, state.delta);
  const T* lse = static_cast<const T*>(w.p.lse);
  const T* dlse = static_cast<const T*>(w.plan.params.dlse);
  for (int l = 0; l < block.count; ++l) {
    const int64_t row = block.lse_index(l);
    state.lse[l] = lse[row] != -std::numeric_limits<T>::infinity() ? lse[row] : std::numeric_limits<T>::infinity();
    if (needs.any_ds() && dlse != nullptr) state.delta[l] -= dlse[row];
  }
}

// Adds one tile's contributions to the gradients of one block, and the block's to those of the tile.
template <class T>
inline void backward_step(BackwardWorker<T>& w, BackwardState<T>& state, const BackwardTile<T>& tile) {
  constexpr int kN = kLanes<T>;
  const QueryBlock& block = state.block;
  const Segment& segment = tile.segment;
  const bool ds = w.plan.needs.ds(segment);
  const int64_t padded = w.plan.padded_depth, padded_value = w.plan.padded_value;

  const BackwardTileBias<T> bias(block, segment, tile.first, tile.count, w.scratch.bias);
  if (bias.shown.begin >= bias.shown.end) return;
  const BackwardTilePlan<T> plan(block, segment, tile.first, tile.count, bias.shown);
  if (!state.ready) begin_block(w, state);

  const uint32_t threshold = w.p.dropout_threshold;
  if (threshold > 0) dropout_bits_of_key_lanes(block, segment, tile.first, tile.count, w.scratch.bits, kKeyStride);
  const T cap = static_cast<T>(w.p.softcap);
  Probabilities<T> probabilities{plan,      bias,           w.scratch.probabilities, cap, w.scratch.capped,
                                 state.lse, w.scratch.bits, ds ? 0 : threshold};
  ScoreGradients<T> gradients{w.scratch.probabilities, w.scratch.ds, state.delta, cap > 0 ? w.scratch.capped : nullptr,
                              w.scratch.bits,          threshold};
  for (int g = 0; g < plan.num_groups; ++g) {
    const auto& group = probabilities.group = gradients.group = plan.groups[g];
    const int rows = group.row_end - group.row_begin, key = group.vector_begin * kN;
    const int lanes = (group.vector_end - group.vector_begin) * kN;
    const int keys = lanes < tile.count - key ? lanes : tile.count - key;
    const T* const query = state.query.data + group.row_begin * state.query.stride;
    const T* const dout = state.dout.data + group.row_begin * state.dout.stride;
    const int64_t at = group.row_begin * kKeyStride + key;

    gemm<ALayout::kRowMajor, T>(rows, lanes, w.p.head_dim, query, state.query.stride, tile.key_lanes + key, kKeyStride,
                                w.prefetcher, probabilities);
    if (ds)
      gemm<ALayout::kRowMajor, T>(rows, lanes, w.p.value_dim, dout, state.dout.stride, tile.value_lanes + key,
                                  kKeyStride, w.prefetcher, gradients);
    if (tile.dvalue != nullptr)
      gemm<ALayout::kTransposed, T>(keys, padded_value, rows, w.scratch.probabilities + at, kKeyStride, dout,
                                    state.dout.stride, w.prefetcher,
                                    AddTo<T>{tile.dvalue + key * padded_value, padded_value});
    if (tile.dkey != nullptr)
      gemm<ALayout::kTransposed, T>(keys, padded, rows, w.scratch.ds + at, kKeyStride, query, state.query.stride,
                                    w.prefetcher, AddTo<T>{tile.dkey + key * padded, padded});
    if (w.plan.needs.dquery)
      gemm<ALayout::kRowMajor, T>(rows, padded, keys, w.scratch.ds + at, kKeyStride,
                                  tile.key.data + key * tile.key.stride, tile.key.stride, w.prefetcher,
                                  AddTo<T>{state.dquery + group.row_begin * padded, padded});
  }
}

// The memory where a tile's dK' or dV' is summed, in rows of `depth`: the chunk's partial prefix tile, the split's
// partial sums, or scratch.
template <class T>
inline T* tile_sums(BackwardWorker<T>& w, const Buffer<T>& prefix, const Buffer<T>& sequence, T* scratch, int64_t depth,
                    int64_t chunk, const BackwardTask& task, const Segment& segment, int64_t first, int count) {
  if (segment.is_prefix()) {
    const int64_t tile = w.plan.prefix_tile(chunk, task.kv_head, segment.prefix);
    const int64_t row = first - w.plan.part_rows(segment.length, task.part).begin;
    return prefix.data() + (tile * w.plan.prefix_tile_rows() + row) * depth;
  }
  T* target = scratch;
  if (w.plan.splits > 1) target = sequence.data() + w.plan.sequence_row(task) * depth;
  if (w.plan.splits > 1 || w.plan.passes > 1) target += first * depth;
  if (w.pass == 0) fill_zero(target, count * depth);
  return target;
}

// Writes a tile's finished sums, rows of `padded`, to a gradient of the sequence, rows of `depth`.
template <class T>
inline void write_rows(BackwardWorker<T>& w, const Operand& gradient, int64_t depth, const BackwardTask& task,
                       int64_t first, int count, T factor, const T* sums, int64_t padded) {
  const Operand head = sequence_head(w.p, gradient, task.batch, task.kv_head);
  const bool past_caches = streams<T>(gradient, all_key_rows(w.p), depth);
  for (int r = 0; r < count; ++r)
    write_gradient_row<T>(head, (first + r) * head.row_stride, depth, factor, sums + r * padded, past_caches);
}

// Runs the steps of rows [first, first + count) of a segment with every block of the task that may see them.
template <class T>
inline void backward_tile(BackwardWorker<T>& w, int64_t chunk, const BackwardTask& task, const Segment& segment,
                          int64_t first, int count) {
  const Needs& needs = w.plan.needs;
  BackwardTile<T> tile{segment, first, count, w.scratch.key_lanes, w.scratch.value_lanes, {}, nullptr, nullptr};
  if (needs.key(segment))
    tile.dkey = tile_sums(w, w.plan.dprefix_key, w.plan.dkey, w.scratch.dkey, w.plan.padded_depth, chunk, task, segment,
                          first, count);
  if (needs.value(segment))
    tile.dvalue = tile_sums(w, w.plan.dprefix_value, w.plan.dvalue, w.scratch.dvalue, w.plan.padded_value, chunk, task,
                            segment, first, count);

  pack_rows<T>(segment.key, first, count, w.p.head_dim, query_factor<T>(w.p), w.scratch.key_lanes, kKeyStride);
  if (needs.ds(segment)) {
    const T rescale = static_cast<T>(dropout_rescale(w.p.dropout_threshold));
    pack_rows<T>(segment.value, first, count, w.p.value_dim, rescale, w.scratch.value_lanes, kKeyStride);
  }
  if (needs.dquery)
    tile.key = segment_rows<T>(segment.key, first, count, w.p.head_dim, w.plan.padded_depth, w.scratch.key);
  for (int64_t i = 0; i < w.blocks; ++i) {
    if (!intersects(w.states[i].block.hull(segment), first, first + count)) continue;
    prefetch_after_step(w, i, tile);
    backward_step(w, w.states[i], tile);
  }

  if (segment.is_prefix() || w.plan.splits > 1 || w.pass + 1 < w.plan.passes) return;
  if (needs.dkey)
    write_rows(w, w.plan.params.gradients[kDKey], w.p.head_dim, task, first, count, static_cast<T>(w.p.scale),
               tile.dkey, w.plan.padded_depth);
  if (needs.dvalue)
    write_rows(w, w.plan.params.gradients[kDValue], w.p.value_dim, task, first, count,
               static_cast<T>(dropout_rescale(w.p.dropout_threshold)), tile.dvalue, w.plan.padded_value);
}

// Writes dquery of the blocks of a pass.
template <class T>
inline void finish_blocks(BackwardWorker<T>& w) {
  const Operand& gradient = w.plan.params.gradients[kDQuery];
  const bool past_caches = streams<T>(gradient, all_query_rows(w.p), w.p.head_dim);
  for (int64_t i = 0; i < w.blocks; ++i)
    for (int l = 0; l < w.states[i].block.count; ++l)
      write_gradient_row<T>(gradient, lane_offset(gradient, w.states[i].block, l), w.p.head_dim,
                            static_cast<T>(w.p.scale), w.states[i].dquery + l * w.plan.padded_depth, past_caches);
}

// Runs the tiles of the rows `range` of one segment with the blocks of a task.
template <class T>
inline void backward_segment(BackwardWorker<T>& w, int64_t chunk, const BackwardTask& task, const Segment& segment,
                             KeyRange range) {
  for (int64_t first = range.begin; first < range.end; first += kBlockK) {
    const int64_t left = range.end - first;
    backward_tile(w, chunk, task, segment, first, static_cast<int>(left < kBlockK ? left : kBlockK));
  }
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
