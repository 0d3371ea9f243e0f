// The gradients of attention over [prefix ; sequence], only those asked for.
//
//   delta = rowsum(dout * out) - dlse      P = exp(S - lse)      dS = P * (dout V'^T - delta)
//   dV' = P^T dout        dK' = scale dS^T Q        dQ = scale dS K'
//
// One task walks the tiles of keys of one head; a tile's dK', dV' stay in cache while the blocks of queries pass:
//   S^T = K Q^T,  dP^T = V dO^T      [rows][lanes], as in the forward pass
//   dV += P^T dO,  dK += dS^T Q      [rows][head_dim], P^T and dS^T broadcast from their tiles, dO and Q in the lanes
//   dQ^T += K^T dS^T                 [head_dim][lanes], kept for the whole range of queries
// When prefix gradients alone are asked for, only prefix tiles are visited; when ds is not wanted, V and dP are not
// read.
#pragma once

#include "backward_plan.h"
#include "forward.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

template <class T>
struct BlockState {
  QueryBlock block;
  bool ready;
  T *query, *dout;             // [head_dim][kBlockQ], scaled as S and dP need them
  T *query_rows, *dout_rows;   // [kBlockQ][padded_depth], as dK' and dV' need them; null where not needed
  T* dquery;                   // [head_dim][kBlockQ]
  alignas(64) T lse[kBlockQ];  // +infinity for a row that sees nothing
  alignas(64) T delta[kBlockQ];
};

template <class T>
class BackwardTask {
 public:
  BackwardTask(const BackwardPlan<T>& plan, Workspace& workspace) : plan_(plan), p_(plan.params.forward) {
    const int64_t blocks = plan.max_blocks();
    const size_t panel = p_.head_dim * kBlockQ, rows = kBlockQ * plan.padded_depth;
    const size_t tile = kBlockK * kBlockQ, keys = kBlockK * p_.head_dim;
    // The sums of one tile, or of the whole sequence where they wait for another pass.
    const bool waits = plan.passes > 1 && plan.splits == 1 && (plan.needs.dkey || plan.needs.dvalue);
    const size_t sums = (waits ? ceil_div(p_.k_len, kBlockK) : 1) * kBlockK * plan.padded_depth;
    workspace.reserve(Workspace::bytes_for<BlockState<T>>(blocks) +
                      blocks * (3 * Workspace::bytes_for<T>(panel) + 2 * Workspace::bytes_for<T>(rows)) +
                      4 * Workspace::bytes_for<T>(tile) + 2 * Workspace::bytes_for<T>(keys) +
                      2 * Workspace::bytes_for<T>(sums) + Workspace::bytes_for<uint16_t>(tile));
    const Needs& needs = plan.needs;
    states_ = workspace.take<BlockState<T>>(blocks);
    for (int64_t i = 0; i < blocks; ++i) {
      BlockState<T>& state = states_[i];
      state.query = workspace.take<T>(panel);
      state.dout = needs.any_ds() ? workspace.take<T>(panel) : nullptr;
      state.dquery = needs.dquery ? workspace.take<T>(panel) : nullptr;
      state.query_rows = needs.any_key() ? workspace.take<T>(rows) : nullptr;
      state.dout_rows = needs.any_value() ? workspace.take<T>(rows) : nullptr;
    }
    scores_ = workspace.take<T>(tile);
    dp_ = workspace.take<T>(tile);
    bias_ = workspace.take<T>(tile);
    capped_ = workspace.take<T>(tile);
    key_ = workspace.take<T>(keys);
    value_ = workspace.take<T>(keys);
    dkey_ = workspace.take<T>(sums);
    dvalue_ = workspace.take<T>(sums);
    bits_ = workspace.take<uint16_t>(tile);
  }

  // `next`: the task that this thread runs after this one, or null.
  void run(int64_t chunk, const Task& task, const Task* next) {
    task_ = &task;
    next_ = next;
    for (pass_ = 0; pass_ < plan_.passes; ++pass_) run_pass(chunk, task);
  }

 private:
  void run_pass(int64_t chunk, const Task& task) {
    const KeyRange range = plan_.blocks(task.split, pass_);
    blocks_ = range.end - range.begin;
    for (int64_t i = 0; i < blocks_; ++i) {
      BlockState<T>& state = states_[i];
      new (&state.block) QueryBlock(p_, plan_.partition, task.batch, task.kv_head, range.begin + i);
      state.ready = false;
      if (plan_.needs.dquery) fill_zero(state.dquery, p_.head_dim * kBlockQ);
    }
    int64_t prefix_start = 0;
    for (int64_t s = 0; s < num_segments(p_); ++s) {
      const Segment segment = make_segment(p_, task.batch, task.kv_head, s, prefix_start);
      if (segment.is_prefix()) prefix_start += segment.length;
      if (!plan_.needs.visits(segment)) continue;
      for (int64_t first = 0; first < segment.length; first += kBlockK) {
        const int64_t left = segment.length - first;
        key_tile(chunk, task, segment, first, static_cast<int>(left < kBlockK ? left : kBlockK));
      }
    }
    if (plan_.needs.dquery) write_dquery();
  }

  void prefetch_block(const QueryBlock& block) {
    prefetcher_.add_queries(p_.query, block);
    prefetcher_.add_queries(plan_.params.dout, block);
    if (plan_.needs.any_ds()) prefetcher_.add_queries(p_.out, block);
  }

  void prefetch_tile(const Segment& segment, int64_t first) {
    const int64_t left = segment.length - first, rows = left < kBlockK ? left : kBlockK;
    prefetcher_.add_rows(segment.key, first, rows, p_.head_dim);
    if (plan_.needs.ds(segment)) prefetcher_.add_rows(segment.value, first, rows, p_.head_dim);
  }

  // What the next pass, or the next task, begins with.
  void prefetch_following() {
    const bool same_task = pass_ + 1 < plan_.passes;
    const Task* task = same_task ? task_ : next_;
    if (task == nullptr) return;
    const int64_t block = plan_.blocks(task->split, same_task ? pass_ + 1 : 0).begin;
    prefetch_block(QueryBlock(p_, plan_.partition, task->batch, task->kv_head, block));
    if (plan_.needs.visits_sequence())
      prefetch_tile(make_segment(p_, task->batch, task->kv_head, p_.prefix_slots, 0), 0);
  }

  // Asks for what follows the step of block i with the tile at `first`: the next block that was not packed yet, and in
  // the last step of a tile the next tile; after the last tile, what follows.
  void plan_prefetch(int64_t i, const Segment& segment, int64_t first, int count) {
    prefetcher_.clear();
    const bool last_block = i + 1 == blocks_;
    if (!last_block) {
      if (!states_[i + 1].ready) prefetch_block(states_[i + 1].block);
    } else if (first + kBlockK < segment.length) {
      prefetch_tile(segment, first + kBlockK);
    } else if (segment.is_prefix() != plan_.needs.visits_sequence()) {
      prefetch_following();
    }
    const Needs& needs = plan_.needs;
    prefetcher_.spread(gemm_blocks<T>(count, kBlockQ) * (1 + needs.ds(segment)) +
                       gemm_blocks<T>(count, plan_.padded_depth) * (needs.key(segment) + needs.value(segment)) +
                       gemm_blocks<T>(p_.head_dim, kBlockQ) * needs.dquery);
  }

  // Packs a block when the first tile meets it.
  void prepare(BlockState<T>& state) {
    state.ready = true;
    const QueryBlock& block = state.block;
    const Needs& needs = plan_.needs;
    const int64_t padded = plan_.padded_depth;
    pack_queries<T>(p_.query, block, query_factor<T>(p_), state.query, state.query_rows, padded);
    if (needs.any_ds()) {
      const T rescale = static_cast<T>(dropout_rescale(p_.dropout_threshold));
      pack_queries<T>(plan_.params.dout, block, rescale, state.dout, state.dout_rows, padded);
      row_dot<T>(plan_.params.dout, p_.out, block, state.delta);
    } else {
      copy_queries<T>(plan_.params.dout, block, state.dout_rows, padded);
    }
    const T* lse = static_cast<const T*>(p_.lse);
    const T* dlse = static_cast<const T*>(plan_.params.dlse);
    for (int l = 0; l < kBlockQ; ++l) {
      state.lse[l] = std::numeric_limits<T>::infinity();
      if (l >= block.count) {
        state.delta[l] = 0;
        continue;
      }
      const int64_t row = (block.batch * p_.q_heads + block.head(l)) * p_.q_len + block.query(l);
      if (lse[row] != -std::numeric_limits<T>::infinity()) state.lse[l] = lse[row];
      if (needs.any_ds() && dlse != nullptr) state.delta[l] -= dlse[row];
    }
  }

  // Where a tile's dK' or dV' is summed: the chunk's partial prefix tile, the split's partial sums, or scratch.
  T* sums(const Buffer<T>& prefix, const Buffer<T>& sequence, T* scratch, int64_t chunk, const Task& task,
          const Segment& segment, int64_t first, int count) {
    const int64_t depth = plan_.padded_depth;
    if (segment.is_prefix())
      return prefix.data() + plan_.prefix_tile(chunk, task.kv_head, segment.prefix) * plan_.prefix_tile_size() +
             first * depth;
    T* target = scratch;
    if (plan_.splits > 1) target = sequence.data() + plan_.sequence_offset(task);
    if (plan_.splits > 1 || plan_.passes > 1) target += first * depth;
    if (pass_ == 0) fill_zero(target, count * depth);
    return target;
  }

  // Rows [first, first + count) of a segment against every block of the task that may see them.
  void key_tile(int64_t chunk, const Task& task, const Segment& segment, int64_t first, int count) {
    const Needs& needs = plan_.needs;
    T* dkey = nullptr;
    T* dvalue = nullptr;
    if (needs.key(segment)) dkey = sums(plan_.dprefix_key, plan_.dkey, dkey_, chunk, task, segment, first, count);
    if (needs.value(segment))
      dvalue = sums(plan_.dprefix_value, plan_.dvalue, dvalue_, chunk, task, segment, first, count);

    const Rows<T> key = segment_rows<T>(segment.key, first, count, p_.head_dim, key_);
    Rows<T> value{};
    if (needs.ds(segment)) value = segment_rows<T>(segment.value, first, count, p_.head_dim, value_);
    for (int64_t i = 0; i < blocks_; ++i) {
      if (!intersects(states_[i].block.hull(segment), first, first + count)) continue;
      plan_prefetch(i, segment, first, count);
      step(states_[i], segment, first, count, key, value, dkey, dvalue);
    }

    if (segment.is_prefix() || plan_.splits > 1 || pass_ + 1 < plan_.passes) return;
    if (dkey != nullptr) write_rows(plan_.params.gradients[kDKey], task, first, count, static_cast<T>(p_.scale), dkey);
    if (dvalue != nullptr)
      write_rows(plan_.params.gradients[kDValue], task, first, count,
                 static_cast<T>(dropout_rescale(p_.dropout_threshold)), dvalue);
  }

  // One tile against one block.
  void step(BlockState<T>& state, const Segment& segment, int64_t tile_first, int tile_count, const Rows<T>& key,
            const Rows<T>& value, T* dkey, T* dvalue) {
    constexpr int kN = kLanes<T>;
    const QueryBlock& block = state.block;
    const bool ds = plan_.needs.ds(segment);
    const int64_t depth = p_.head_dim, padded = plan_.padded_depth;

    const TileBias<T> bias(block, segment, tile_first, tile_count, bias_);
    if (bias.count == 0) return;
    const TilePlan<T> plan(block, segment, bias.first, bias.count);
    if (!state.ready) prepare(state);
    const int64_t skipped = bias.first - tile_first;

    // P^T from S^T = K Q^T,  dS^T from dP^T = V dO^T
    const uint32_t threshold = p_.dropout_threshold;
    if (threshold > 0) dropout_bits(block, segment, bias.first, bias.count, bits_);
    const Scores<T> scores(block, segment, plan, bias, scores_, capped_);
    Probabilities<T> probabilities{scores, state.lse, bits_, ds ? 0 : threshold};
    ScoreGradients<T> gradients{scores_, dp_, state.delta, p_.softcap > 0 ? capped_ : nullptr, bits_, threshold};
    for (int g = 0; g < plan.num_groups; ++g) {
      const auto& group = plan.groups[g];
      const int rows = group.row_end - group.row_begin, columns = (group.vector_end - group.vector_begin) * kN;
      const int64_t row = skipped + group.row_begin;
      probabilities.first_row = gradients.first_row = group.row_begin;
      probabilities.first_column = gradients.first_column = group.vector_begin * kN;
      gemm<ALayout::kRowMajor, T>(rows, columns, depth, key.data + row * key.stride, key.stride,
                                  state.query + group.vector_begin * kN, kBlockQ, prefetcher_, probabilities);
      if (ds)
        gemm<ALayout::kRowMajor, T>(rows, columns, depth, value.data + row * value.stride, value.stride,
                                    state.dout + group.vector_begin * kN, kBlockQ, prefetcher_, gradients);
    }

    // dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T
    for (int g = 0; g < plan.num_groups; ++g) {
      const auto& group = plan.groups[g];
      const int rows = group.row_end - group.row_begin, columns = (group.vector_end - group.vector_begin) * kN;
      const int64_t row = skipped + group.row_begin, at = group.row_begin * kBlockQ + group.vector_begin * kN;
      const int lane = group.vector_begin * kN;
      const int lane_end = group.vector_end * kN < block.count ? group.vector_end * kN : block.count;
      if (dvalue != nullptr)
        gemm<ALayout::kRowMajor, T>(rows, padded, lane_end - lane, scores_ + at, kBlockQ,
                                    state.dout_rows + lane * padded, padded, prefetcher_,
                                    AddTo<T>{dvalue + row * padded, padded});
      if (dkey != nullptr)
        gemm<ALayout::kRowMajor, T>(rows, padded, lane_end - lane, dp_ + at, kBlockQ, state.query_rows + lane * padded,
                                    padded, prefetcher_, AddTo<T>{dkey + row * padded, padded});
      if (plan_.needs.dquery)
        gemm<ALayout::kTransposed, T>(depth, columns, rows, key.data + row * key.stride, key.stride, dp_ + at, kBlockQ,
                                      prefetcher_, AddTo<T>{state.dquery + lane, kBlockQ});
    }
  }

  void write_dquery() {
    T factor[kBlockQ];
    for (int l = 0; l < kBlockQ; ++l) factor[l] = static_cast<T>(p_.scale);
    for (int64_t i = 0; i < blocks_; ++i)
      unpack_queries<T>(plan_.params.gradients[kDQuery], states_[i].block, factor, states_[i].dquery);
  }

  void write_rows(const Operand& gradient, const Task& task, int64_t first, int count, T factor, const T* sums) {
    const Operand head = head_of(gradient, task.batch, task.kv_head);
    const bool past_caches = streams<T>(gradient, p_.batch * p_.kv_heads * p_.k_len, p_.head_dim);
    for (int r = 0; r < count; ++r)
      write_gradient_row<T>(head, first + r, p_.head_dim, factor, sums + r * plan_.padded_depth, past_caches);
  }

  const BackwardPlan<T>& plan_;
  const AttentionParams& p_;
  Prefetcher prefetcher_;
  BlockState<T>* states_;
  int64_t pass_ = 0;
  int64_t blocks_ = 0;
  const Task* task_ = nullptr;
  const Task* next_ = nullptr;
  T *scores_, *dp_, *bias_, *capped_, *key_, *value_, *dkey_, *dvalue_;
  uint16_t* bits_;
};

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
