// The gradients of attention over [prefix ; sequence], only those asked for.
//
//   delta = rowsum(dout * out) - dlse      P = exp(S - lse)      dS = P * (dout V'^T - delta)
//   dV' = P^T dout        dK' = scale dS^T Q        dQ = scale dS K'
//
// One task walks the tiles of keys of one head, or of a part of them; a tile's dK', dV' stay in cache while the blocks
// of queries pass. Keys stand in the lanes: of a tile K and V are transposed once, while Q, dO and the gradients stay
// as they are in memory.
//   S = Q K^T,  dP = dO V^T       [queries][keys], with the factors of S and dP folded into K^T and V^T
//   dV += P^T dO,  dK += dS^T Q   [keys][head_dim]
//   dQ += dS K                    [queries][head_dim], kept for the whole range of queries
// When prefix gradients alone are asked for, only prefix tiles are visited; when ds is not wanted, V and dP are not
// read.
#pragma once

#include "plan.h"
#include "softmax.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

template <class T>
struct BlockState {
  QueryBlock block;
  bool ready;
  Rows<T> query, dout;
  T *query_scratch, *dout_scratch;  // [kBlockQ][padded_depth], where the rows cannot be read in place
  T* dquery;                        // [kBlockQ][padded_depth]; null where not needed
  T lse[kBlockQ];                   // +infinity for a row that sees nothing
  T delta[kBlockQ];
};

// A tile of keys and values as the products read them.
template <class T>
struct KeyTile {
  Segment segment;
  int64_t first;
  int count;
  const T *key_lanes, *value_lanes;  // [head_dim][kKeyStride]
  Rows<T> key;                       // only for dQ
  T *dkey, *dvalue;                  // [count][padded_depth]; null where not needed
};

template <class T>
class BackwardTask {
 public:
  BackwardTask(const BackwardPlan<T>& plan, Workspace& workspace) : plan_(plan), p_(plan.params.forward) {
    const int64_t blocks = plan.max_blocks(), padded = plan.padded_depth;
    const size_t rows = kBlockQ * padded, tile = kBlockQ * kKeyStride, lanes = p_.head_dim * kKeyStride;
    // The sums of one tile, or of the whole sequence where they wait for another pass.
    const bool waits = plan.passes > 1 && plan.splits == 1 && (plan.needs.dkey || plan.needs.dvalue);
    const size_t sums = (waits ? ceil_div(p_.k_len, kBlockK) : 1) * kBlockK * padded;
    workspace.reserve(Workspace::bytes_for<BlockState<T>>(blocks) + blocks * 3 * Workspace::bytes_for<T>(rows) +
                      4 * Workspace::bytes_for<T>(tile) + 2 * Workspace::bytes_for<T>(lanes) +
                      Workspace::bytes_for<T>(kBlockK * padded) + 2 * Workspace::bytes_for<T>(sums) +
                      Workspace::bytes_for<uint16_t>(tile));
    states_ = workspace.take<BlockState<T>>(blocks);
    for (int64_t i = 0; i < blocks; ++i) {
      states_[i].query_scratch = workspace.take<T>(rows);
      states_[i].dout_scratch = workspace.take<T>(rows);
      states_[i].dquery = plan.needs.dquery ? workspace.take<T>(rows) : nullptr;
    }
    probabilities_ = workspace.take<T>(tile);
    ds_ = workspace.take<T>(tile);
    bias_ = workspace.take<T>(tile);
    capped_ = workspace.take<T>(tile);
    key_lanes_ = workspace.take<T>(lanes);
    value_lanes_ = workspace.take<T>(lanes);
    key_ = workspace.take<T>(kBlockK * padded);
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
      if (plan_.needs.dquery && plan_.parts > 1)
        state.dquery = plan_.part_dquery(
            task.part, (task.batch * p_.kv_heads + task.kv_head) * plan_.partition.count + range.begin + i);
      if (plan_.needs.dquery) fill_zero(state.dquery, kBlockQ * plan_.padded_depth);
    }
    int64_t prefix_start = 0;
    for (int64_t s = 0; s < num_segments(p_); ++s) {
      const Segment segment = make_segment(p_, task.batch, task.kv_head, s, prefix_start);
      if (segment.is_prefix()) prefix_start += segment.length;
      if (!plan_.needs.visits(segment)) continue;
      const KeyRange rows = plan_.part_rows(segment.length, task.part);
      for (int64_t first = rows.begin; first < rows.end; first += kBlockK) {
        const int64_t left = rows.end - first;
        run_tile(chunk, task, segment, first, static_cast<int>(left < kBlockK ? left : kBlockK));
      }
    }
    if (plan_.needs.dquery && plan_.parts == 1) write_dquery();
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
      prefetch_tile(make_segment(p_, task->batch, task->kv_head, p_.prefix_slots, 0),
                    plan_.part_rows(p_.k_len, task->part).begin);
  }

  // Asks for what follows the step of block i with a tile: the next block that was not met yet, and in the last step of
  // a tile the next tile; after the last tile, what follows.
  void plan_prefetch(int64_t i, const KeyTile<T>& tile) {
    const Segment& segment = tile.segment;
    prefetcher_.clear();
    const bool last_block = i + 1 == blocks_;
    if (!last_block) {
      if (!states_[i + 1].ready) prefetch_block(states_[i + 1].block);
    } else if (tile.first + kBlockK < plan_.part_rows(segment.length, task_->part).end) {
      prefetch_tile(segment, tile.first + kBlockK);
    } else if (segment.is_prefix() != plan_.needs.visits_sequence()) {
      prefetch_following();
    }
    const Needs& needs = plan_.needs;
    prefetcher_.spread(gemm_blocks<T>(kBlockQ, tile.count) * (1 + needs.ds(segment)) +
                       gemm_blocks<T>(tile.count, plan_.padded_depth) * (needs.key(segment) + needs.value(segment)) +
                       gemm_blocks<T>(kBlockQ, plan_.padded_depth) * needs.dquery);
  }

  // When the first tile meets a block.
  void prepare(BlockState<T>& state) {
    state.ready = true;
    const QueryBlock& block = state.block;
    const Needs& needs = plan_.needs;
    state.query = query_rows<T>(p_.query, block, plan_.padded_depth, state.query_scratch);
    state.dout = query_rows<T>(plan_.params.dout, block, plan_.padded_depth, state.dout_scratch);
    if (needs.any_ds()) row_dot<T>(plan_.params.dout, p_.out, block, state.delta);
    const T* lse = static_cast<const T*>(p_.lse);
    const T* dlse = static_cast<const T*>(plan_.params.dlse);
    for (int l = 0; l < block.count; ++l) {
      const int64_t row = (block.batch * p_.q_heads + block.head(l)) * p_.q_len + block.query(l);
      state.lse[l] = lse[row] != -std::numeric_limits<T>::infinity() ? lse[row] : std::numeric_limits<T>::infinity();
      if (needs.any_ds() && dlse != nullptr) state.delta[l] -= dlse[row];
    }
  }

  // Where a tile's dK' or dV' is summed: the chunk's partial prefix tile, the split's partial sums, or scratch.
  T* sums(const Buffer<T>& prefix, const Buffer<T>& sequence, T* scratch, int64_t chunk, const Task& task,
          const Segment& segment, int64_t first, int count) {
    const int64_t depth = plan_.padded_depth;
    if (segment.is_prefix())
      return prefix.data() + plan_.prefix_tile(chunk, task.kv_head, segment.prefix) * plan_.prefix_tile_size() +
             (first - plan_.part_rows(segment.length, task.part).begin) * depth;
    T* target = scratch;
    if (plan_.splits > 1) target = sequence.data() + plan_.sequence_offset(task);
    if (plan_.splits > 1 || plan_.passes > 1) target += first * depth;
    if (pass_ == 0) fill_zero(target, count * depth);
    return target;
  }

  // Rows [first, first + count) of a segment against every block of the task that may see them.
  void run_tile(int64_t chunk, const Task& task, const Segment& segment, int64_t first, int count) {
    const Needs& needs = plan_.needs;
    KeyTile<T> tile{segment, first, count, key_lanes_, value_lanes_, {}, nullptr, nullptr};
    if (needs.key(segment)) tile.dkey = sums(plan_.dprefix_key, plan_.dkey, dkey_, chunk, task, segment, first, count);
    if (needs.value(segment))
      tile.dvalue = sums(plan_.dprefix_value, plan_.dvalue, dvalue_, chunk, task, segment, first, count);

    pack_rows<T>(segment.key, first, count, p_.head_dim, query_factor<T>(p_), key_lanes_, kKeyStride);
    if (needs.ds(segment)) {
      const T rescale = static_cast<T>(dropout_rescale(p_.dropout_threshold));
      pack_rows<T>(segment.value, first, count, p_.head_dim, rescale, value_lanes_, kKeyStride);
    }
    if (needs.dquery) tile.key = segment_rows<T>(segment.key, first, count, p_.head_dim, plan_.padded_depth, key_);
    for (int64_t i = 0; i < blocks_; ++i) {
      if (!intersects(states_[i].block.hull(segment), first, first + count)) continue;
      plan_prefetch(i, tile);
      step(states_[i], tile);
    }

    if (segment.is_prefix() || plan_.splits > 1 || pass_ + 1 < plan_.passes) return;
    if (needs.dkey) write_rows(plan_.params.gradients[kDKey], task, first, count, static_cast<T>(p_.scale), tile.dkey);
    if (needs.dvalue)
      write_rows(plan_.params.gradients[kDValue], task, first, count,
                 static_cast<T>(dropout_rescale(p_.dropout_threshold)), tile.dvalue);
  }

  // One tile against one block.
  void step(BlockState<T>& state, const KeyTile<T>& tile) {
    constexpr int kN = kLanes<T>;
    const QueryBlock& block = state.block;
    const Segment& segment = tile.segment;
    const bool ds = plan_.needs.ds(segment);
    const int64_t depth = p_.head_dim, padded = plan_.padded_depth;

    const KeyBias<T> bias(block, segment, tile.first, tile.count, bias_);
    if (bias.shown.begin >= bias.shown.end) return;
    const KeyPlan<T> plan(block, segment, tile.first, tile.count, bias.shown);
    if (!state.ready) prepare(state);

    const uint32_t threshold = p_.dropout_threshold;
    if (threshold > 0) dropout_bits_of_rows(block, segment, tile.first, tile.count, bits_, kKeyStride);
    const T cap = static_cast<T>(p_.softcap);
    Probabilities<T> probabilities{plan, bias, probabilities_, cap, capped_, state.lse, bits_, ds ? 0 : threshold};
    ScoreGradients<T> gradients{probabilities_, ds_, state.delta, cap > 0 ? capped_ : nullptr, bits_, threshold};
    for (int g = 0; g < plan.num_groups; ++g) {
      const auto& group = probabilities.group = gradients.group = plan.groups[g];
      const int rows = group.row_end - group.row_begin, key = group.vector_begin * kN;
      const int lanes = (group.vector_end - group.vector_begin) * kN;
      const int keys = lanes < tile.count - key ? lanes : tile.count - key;
      const T* const query = state.query.data + group.row_begin * state.query.stride;
      const T* const dout = state.dout.data + group.row_begin * state.dout.stride;
      const int64_t at = group.row_begin * kKeyStride + key;

      gemm<ALayout::kRowMajor, T>(rows, lanes, depth, query, state.query.stride, tile.key_lanes + key, kKeyStride,
                                  prefetcher_, probabilities);
      if (ds)
        gemm<ALayout::kRowMajor, T>(rows, lanes, depth, dout, state.dout.stride, tile.value_lanes + key, kKeyStride,
                                    prefetcher_, gradients);
      if (tile.dvalue != nullptr)
        gemm<ALayout::kTransposed, T>(keys, padded, rows, probabilities_ + at, kKeyStride, dout, state.dout.stride,
                                      prefetcher_, AddTo<T>{tile.dvalue + key * padded, padded});
      if (tile.dkey != nullptr)
        gemm<ALayout::kTransposed, T>(keys, padded, rows, ds_ + at, kKeyStride, query, state.query.stride, prefetcher_,
                                      AddTo<T>{tile.dkey + key * padded, padded});
      if (plan_.needs.dquery)
        gemm<ALayout::kRowMajor, T>(rows, padded, keys, ds_ + at, kKeyStride, tile.key.data + key * tile.key.stride,
                                    tile.key.stride, prefetcher_,
                                    AddTo<T>{state.dquery + group.row_begin * padded, padded});
    }
  }

  void write_dquery() {
    const Operand& gradient = plan_.params.gradients[kDQuery];
    const bool past_caches = streams<T>(gradient, p_.batch * p_.q_heads * p_.q_len, p_.head_dim);
    for (int64_t i = 0; i < blocks_; ++i)
      for (int l = 0; l < states_[i].block.count; ++l)
        write_gradient_row<T>(gradient, lane_offset(gradient, states_[i].block, l), p_.head_dim,
                              static_cast<T>(p_.scale), states_[i].dquery + l * plan_.padded_depth, past_caches);
  }

  void write_rows(const Operand& gradient, const Task& task, int64_t first, int count, T factor, const T* sums) {
    const Operand head = head_of(gradient, task.batch, task.kv_head);
    const bool past_caches = streams<T>(gradient, p_.batch * p_.kv_heads * p_.k_len, p_.head_dim);
    for (int r = 0; r < count; ++r)
      write_gradient_row<T>(head, (first + r) * head.row_stride, p_.head_dim, factor, sums + r * plan_.padded_depth,
                            past_caches);
  }

  const BackwardPlan<T>& plan_;
  const AttentionParams& p_;
  Prefetcher prefetcher_;
  BlockState<T>* states_;
  int64_t pass_ = 0;
  int64_t blocks_ = 0;
  const Task* task_ = nullptr;
  const Task* next_ = nullptr;
  T *probabilities_, *ds_, *bias_, *capped_;  // [kBlockQ][kKeyStride]
  T *key_lanes_, *value_lanes_;               // [head_dim][kKeyStride]
  T *key_, *dkey_, *dvalue_;
  uint16_t* bits_;  // [kBlockQ][kKeyStride]
};

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
