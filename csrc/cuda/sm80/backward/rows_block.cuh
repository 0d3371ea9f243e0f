// The queries that a block owns: their place in the launch, their rows on the way in, their gradient on the way out.
#pragma once

#include "gemm.cuh"
#include "gradient_rows.cuh"
#include "rows_shared.cuh"

namespace prefix_kernels::cuda::sm80 {

// The queries that this block of the launch owns.
__device__ __forceinline__ RowsOwner rows_owner(const AttentionParams& p, int query_tiles, int block_m) {
  // The last tiles, which see most under a causal mask, come first.
  const int tile = query_tiles - 1 - static_cast<int>(blockIdx.x % query_tiles);
  const int64_t batch_head = blockIdx.x / query_tiles;
  const int64_t batch = batch_head / p.q_heads;
  const int first = tile * block_m;
  const int queries = min(block_m, static_cast<int>(p.q_len) - first);
  const int64_t position = first + row_query_offset(p, batch);
  return {static_cast<int>(batch), static_cast<int>(batch_head % p.q_heads), first, queries,
          VisitedCells(p, batch, position, position + queries - 1)};
}

// A block as its functions see it. The accumulators need the registers, so the owner stays in shared memory.
template <typename T_, int kHeadDim_, bool kGeneral_>
struct RowsBlock {
  using T = T_;
  using Tile = RowsTile<kHeadDim_, kGeneral_>;
  using Shared = RowsShared<T, kHeadDim_, kGeneral_>;
  static constexpr int kHeadDim = kHeadDim_, kTiles = Tile::kTiles;
  static constexpr bool kGeneral = kGeneral_;
  // The queries and dout of a warp, left operands of the scores and of dP, and the sums of dQ.
  using Query = Resident<T, kHeadDim, kTiles, true>;
  using DOut = Resident<T, kHeadDim, kTiles, Tile::kDOutInRegisters>;
  using Sums = float[kTiles][kHeadDim / 8][4];

  const RowsParams& params;
  const Shared& shared;
  const RowsOwner& owner;
  int thread;
  int lane;

  __device__ __forceinline__ const AttentionParams& attention() const { return params.b.forward; }
  __device__ __forceinline__ WarpLayout layout() const {
    return WarpLayout(thread / kWarpSize, (owner.queries + Tile::kWarpM - 1) / Tile::kWarpM);
  }
};

// The softmax reference and delta of the queries that a lane holds, two of each tile.
template <int kTiles>
struct LaneRows {
  float reference[kTiles * 2];
  float delta[kTiles * 2];
};

// Writes the block's RowInfo.
template <typename Block>
__device__ __forceinline__ void describe_rows(const Block& block) {
  const AttentionParams& p = block.attention();
  const RowsOwner& owner = block.owner;
  const int thread = block.thread;
  auto& info = block.shared.info();
  if (thread >= Block::Tile::kBlockM) return;
  const bool exists = thread < owner.queries;
  const int64_t row = (owner.batch * p.q_heads + owner.head) * p.q_len + owner.first + thread;
  const QueryView view(p, owner.cells.prefixes, owner.first + thread + row_query_offset(p, owner.batch));
  info.reference[thread] =
      exists ? softmax_reference<Block::kGeneral>(static_cast<const float*>(p.lse)[row]) : kInfinity;
  info.delta[thread] = exists ? block.params.delta[row] : 0.0f;
  info.begin[thread] = view.sequence.begin;
  info.end[thread] = view.sequence.end;
  info.prefix_begin[thread] = view.prefix_begin;
}

// Loads the warp's queries and dout, by way of the stages if they go into registers, and what the lane needs of the
// RowInfo that describe_rows wrote. `warp_row`: the warp's first row among the block's.
template <typename Block>
__device__ __forceinline__ void load_rows(const Block& block, int warp_row, typename Block::Query& query,
                                          typename Block::DOut& dout, LaneRows<Block::kTiles>& of_lane) {
  constexpr int kBlockN = Block::Tile::kBlockN;
  const AttentionParams& p = block.attention();
  const RowsOwner& owner = block.owner;
  const AlignedChunks& aligned = block.params.aligned;
  const int q_len = static_cast<int>(p.q_len);
#pragma unroll
  for (int part = 0; part < Block::Tile::kBlockM / kBlockN; ++part) {
    const auto copy = [&](int which, const Operand& x, bool aligned_chunks, int64_t dim) {
      copy_rows<typename Block::T, Block::kHeadDim, kBlockN, kBackwardThreads, true>(
          block.shared.rows(which, part), HeadRows(x, owner.batch, owner.head, aligned_chunks),
          owner.first + part * kBlockN, q_len, static_cast<int>(dim));
    };
    copy(0, p.query, aligned.query, p.head_dim);
    copy(1, block.params.b.dout, aligned.dout, p.value_dim);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  query.take(block.shared.row(0, warp_row), block.lane);
  dout.take(block.shared.row(1, warp_row), block.lane);
  const auto& info = block.shared.info();
#pragma unroll
  for (int i = 0; i < Block::kTiles * 2; ++i) {
    of_lane.reference[i] = info.reference[warp_row + i / 2 * kCell + resident_row(i % 2)];
    of_lane.delta[i] = info.delta[warp_row + i / 2 * kCell + resident_row(i % 2)];
  }
  __syncthreads();  // nobody reads the stages any more
}

// Stores the gradient of the block's queries, the sums of warps that share rows added.
template <typename Block>
__device__ __forceinline__ void store_rows(const Block& block, typename Block::Sums& dquery) {
  using T = typename Block::T;
  constexpr int kHeadDim = Block::kHeadDim, kTiles = Block::kTiles;
  const AttentionParams& p = block.attention();
  const RowsOwner& owner = block.owner;
  const RowsParams& params = block.params;
  const WarpLayout warps = block.layout();
  if (warps.parts > 1) {
    add_parts<kHeadDim, kTiles>(dquery, warps, block.shared.parts(), block.lane);
  }
  if (warps.part > 0) return;
  const Operand& x = params.b.gradients[kDQuery];
  T* rows = static_cast<T*>(x.data) + owner.batch * x.batch_stride + owner.head * x.head_stride;
  store_sums<T, kHeadDim>(rows, x.row_stride, params.aligned_pairs, owner.first + warps.resident * Block::Tile::kWarpM,
                          static_cast<int>(p.q_len), static_cast<int>(p.head_dim), params.scalars.scale, dquery,
                          block.lane);
}

}  // namespace prefix_kernels::cuda::sm80
