// All gradients in one pass over the scores.
//
//   dV' = P^T dO      dK' = scale dS^T Q      dQ = scale dS K'
//
// A block owns kBlockN columns of one segment of one kv head, as in the columns kernel, and visits every query tile
// that sees them. S and dP are formed once:
//
//   keys, values of the block     in shared memory; operands of S and dP in registers where there is room
//   query, dout tiles             two stages of shared memory, filled by cp.async while the other is at work
//   S = Q K^T, dP = dO V^T        then P and dS, written to shared memory as 16-bit numbers
//   dV += P^T dO, dK += dS^T Q    sums in registers to the end
//   dQ = dS K                     added to sums in global memory, in the order of turns.cuh
//
// finish_dquery then scales the sums of dQ and converts them.
#pragma once

#include "one_pass_step.cuh"

namespace prefix_kernels::cuda::sm80 {

// Loads the block's keys and values.
template <typename Traits>
__device__ __forceinline__ void load_columns(const OnePassBlock<Traits>& block, OnePassColumns<Traits>& key,
                                             OnePassColumns<Traits>& value) {
  const AttentionParams& p = block.attention();
  const AlignedChunks& aligned = block.params.aligned;
  const bool is_prefix = block.owner.is_prefix;
  copy_columns(block, is_prefix ? p.prefix_key : p.key, is_prefix ? aligned.prefix_key : aligned.key, 0,
               static_cast<int>(p.head_dim));
  copy_columns(block, is_prefix ? p.prefix_value : p.value, is_prefix ? aligned.prefix_value : aligned.value, 1,
               static_cast<int>(p.value_dim));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  key.take(block.shared.columns(0, 0) + block.score_column() * Traits::kHeadDim, block.lane);
  value.take(block.shared.columns(1, 0) + block.score_column() * Traits::kHeadDim, block.lane);
}

// Stores a warp's sums of one gradient, times `factor`: to the gradient, or to the split's own place if the splits'
// sums are still to be added. `dim`: the gradient's head dim.
template <typename Traits>
__device__ __forceinline__ void store_gradient(const OnePassBlock<Traits>& block, const OnePassSums<Traits>& sums,
                                               Gradient gradient, int dim, float* partial, float factor) {
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim, kColumns = Traits::kSumColumns;
  const AttentionParams& p = block.attention();
  const ColumnsOwner& owner = block.owner;
  const int first = owner.first + block.sum_row(), column = block.sum_column();
  if (owner.is_prefix && partial != nullptr) {
    const int64_t slot = (static_cast<int64_t>(owner.index) * p.kv_heads + owner.kv_head) * owner.splits + owner.split;
    store_sums<float, kColumns>(partial + slot * p.prefix_len * kHeadDim + column, kHeadDim, true, first, owner.rows,
                                kColumns, factor, sums, block.lane);
  } else {
    const Operand& x = block.params.b.gradients[gradient];
    T* head = static_cast<T*>(x.data) + owner.index * x.batch_stride + owner.kv_head * x.head_stride;
    store_sums<T, kColumns>(head + column, x.row_stride, block.params.aligned_pairs[gradient], first, owner.rows,
                            dim - column, factor, sums, block.lane);
  }
}

// Computes the gradients of one block of columns, or its split's part of them, and its part of dQ.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) backward_one_pass(const OnePassParams params) {
  using Shared = OnePassShared<Traits>;
  using Tiles = typename Shared::Tiles;
  const AttentionParams& p = params.columns.b.forward;
  const int thread = threadIdx.x;
  const Shared shared{{shared_memory()}};
  shared.declare();
  if (thread == 0) {
    shared.turn(1).count = nullptr;  // no visit before the first
    const int ticket = atomicAdd(params.turns.tickets, 1);
    shared.owner() = columns_owner(
        params.columns, Traits::kBlockN,
        block_of_ticket(ticket, params.columns.prefix_blocks, params.sequence_blocks, params.columns.sequence_tiles));
  }
  __syncthreads();
  const OnePassBlock<Traits> block{params.columns, params.turns, shared, shared.owner(), thread, thread % kWarpSize};

  OnePassSums<Traits> dkey, dvalue;
  clear(dkey);
  clear(dvalue);
  Tiles first_tiles;
  first_tiles.begin(p, block.owner);
  if (!first_tiles.done()) {
    OnePassColumns<Traits> key, value;
    load_columns(block, key, value);
    ArrivingQuery arriving;
    fetch_queries(block, first_tiles, 0, arriving);
    describe_queries(block, first_tiles, 0, arriving);
    describe_turn(block, first_tiles, 0);
    int stage = 0;
    for (bool more = true; more; stage = 1 - stage) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      const Tiles& next = shared.info(stage).next;
      more = !next.done();
      if (more) fetch_queries(block, next, 1 - stage, arriving);
      form_weights(block, key, value, stage);
      // The other stage still describes the visit before this one.
      int* const passing = thread == 0 ? shared.turn(1 - stage).count : nullptr;
      __syncthreads();
      if (passing != nullptr) pass_turn(passing);
      add_columns(block, dkey, dvalue, stage);
      add_queries(block, stage);
      if (more) {
        describe_queries(block, next, 1 - stage, arriving);
        describe_turn(block, next, 1 - stage);
      }
    }
    __syncthreads();
    if (thread == 0) pass_turn(shared.turn(1 - stage).count);
  }
  if (block.adds_dvalue())
    store_gradient(block, dvalue, block.owner.is_prefix ? kDPrefixValue : kDValue, static_cast<int>(p.value_dim),
                   params.columns.partial_dvalue, 1.0f);
  if (block.adds_dkey())
    store_gradient(block, dkey, block.owner.is_prefix ? kDPrefixKey : kDKey, static_cast<int>(p.head_dim),
                   params.columns.partial_dkey, params.columns.scalars.scale);
}

// Writes the gradient of one query tile from its finished sums.
struct FinishParams {
  const float* sums;  // Turns::sums
  Operand dquery;
  int64_t q_heads;
  int q_len;
  int tiles;
  int head_dim;
  float scale;
  bool aligned_pairs;  // has_aligned_pairs of dquery
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads) finish_dquery(const FinishParams params) {
  using T = typename Traits::T;
  using Block = OnePassBlock<Traits>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int tile = static_cast<int>(blockIdx.x) % params.tiles;
  const int64_t batch_head = blockIdx.x / params.tiles;
  const float* from =
      params.sums + static_cast<int64_t>(blockIdx.x) * (Traits::kBlockM * Traits::kHeadDim) + threadIdx.x;
  OnePassQuery<Traits> sums;
#pragma unroll
  for (int i = 0; i < Traits::kQueryRows * Traits::kQueryColumns / 2; ++i)
    sums[i / (Traits::kQueryColumns / 2)][i / 4 % (Traits::kQueryColumns / 8)][i % 4] = from[i * Traits::kThreads];
  const int row = Block::query_row(warp), column = Block::query_column(warp);
  const Operand& x = params.dquery;
  T* head = static_cast<T*>(x.data) + batch_head / params.q_heads * x.batch_stride +
            batch_head % params.q_heads * x.head_stride;
  store_sums<T, Traits::kQueryColumns>(head + column, x.row_stride, params.aligned_pairs, tile * Traits::kBlockM + row,
                                       params.q_len, params.head_dim - column, params.scale, sums, lane);
}

}  // namespace prefix_kernels::cuda::sm80
