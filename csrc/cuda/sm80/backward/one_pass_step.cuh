// The work on one visit of the one-pass kernel: the block's columns meet a tile of queries.
#pragma once

#include "columns_stage.cuh"
#include "one_pass_gemm.cuh"
#include "one_pass_shared.cuh"

namespace prefix_kernels::cuda::sm80 {

// A block as its functions see it. The accumulators need the registers, so the owner stays in shared memory.
template <typename Traits_>
struct OnePassBlock {
  using Traits = Traits_;
  using Shared = OnePassShared<Traits>;
  using Tiles = typename Shared::Tiles;

  const ColumnsParams& params;
  const Turns& turns;
  const Shared& shared;
  const ColumnsOwner& owner;
  int thread;
  int lane;

  __device__ __forceinline__ const AttentionParams& attention() const { return params.b.forward; }
  __device__ __forceinline__ int warp() const { return thread / kWarpSize; }
  // Tells if dkey, or dvalue, of the block's segment was asked for.
  __device__ __forceinline__ bool adds_dkey() const {
    return params.b.gradients[owner.is_prefix ? kDPrefixKey : kDKey].data != nullptr;
  }
  __device__ __forceinline__ bool adds_dvalue() const {
    return params.b.gradients[owner.is_prefix ? kDPrefixValue : kDValue].data != nullptr;
  }

  // The warp's first row and column of S and dP, of dK and dV, and its first row and column of dQ.
  __device__ __forceinline__ int score_row() const {
    return warp() % Traits::kScoreRowWarps * Traits::kScoreRows * kCell;
  }
  __device__ __forceinline__ int score_column() const {
    return warp() / Traits::kScoreRowWarps * Traits::kScoreColumns * kCell;
  }
  __device__ __forceinline__ int sum_row() const { return warp() % Traits::kSumRowWarps * Traits::kSumRows * kCell; }
  __device__ __forceinline__ int sum_column() const { return warp() / Traits::kSumRowWarps * Traits::kSumColumns; }
  static __device__ __forceinline__ int query_row(int warp) {
    return warp % Traits::kQueryRowWarps * Traits::kQueryRows * kCell;
  }
  static __device__ __forceinline__ int query_column(int warp) {
    return warp / Traits::kQueryRowWarps * Traits::kQueryColumns;
  }
};

template <typename Traits>
using OnePassColumns =
    KeptColumns<typename Traits::T, Traits::kHeadDim, Traits::kScoreColumns, Traits::kColumnsInRegisters>;

// A warp's sums of dK and dV.
template <typename Traits>
using OnePassSums = float[Traits::kSumRows][Traits::kSumColumns / 8][4];

// A warp's part of dQ of a visit.
template <typename Traits>
using OnePassQuery = float[Traits::kQueryRows][Traits::kQueryColumns / 8][4];

// Writes the turn of the current visit of `tiles` into its stage.
template <typename Block>
__device__ __forceinline__ void describe_turn(const Block& block, const typename Block::Tiles& tiles, int stage) {
  using Traits = typename Block::Traits;
  if (block.thread != Traits::kBlockM) return;
  const AttentionParams& p = block.attention();
  const int64_t tile = (tiles.batch * p.q_heads + tiles.head()) * block.turns.tiles + tiles.tile;
  Turn& turn = block.shared.turn(stage);
  turn.sums = block.turns.sums + tile * (Traits::kBlockM * Traits::kHeadDim);
  turn.count = block.turns.counts + tile;
  turn.rank = rank_of_visit(p, tiles);
}

// Writes 16 x 16 elements into the tile of P or dS, whose first row and column are given.
template <typename T, int kWidth>
__device__ __forceinline__ void store_weights(T* tile, int row, int column, const float (&cell)[2][4], int lane) {
  using Tile = SharedTile<kWidth>;
  T* const first = tile + (row + lane / 4) * kWidth + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    T* const to = first + ((column / kChunk + n) ^ Tile::permutation(lane / 4)) * kChunk;
    *reinterpret_cast<uint32_t*>(to) = pack2<T>(cell[n][0], cell[n][1]);
    *reinterpret_cast<uint32_t*>(to + 8 * kWidth) = pack2<T>(cell[n][2], cell[n][3]);
  }
}

// S, dP, P and dS of the visit; P and dS go to shared memory.
template <typename Traits>
__device__ __forceinline__ void form_weights(const OnePassBlock<Traits>& block, const OnePassColumns<Traits>& key,
                                             const OnePassColumns<Traits>& value, int stage) {
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim, kRows = Traits::kScoreRows, kColumns = Traits::kScoreColumns;
  const int row = block.score_row(), column = block.score_column();
  const auto& info = block.shared.info(stage);
  float s[kRows][kColumns][2][4], dp[kRows][kColumns][2][4];
  key.score(s, block.shared.tile(stage, 0) + row * kHeadDim, block.shared.columns(0, 0) + column * kHeadDim,
            block.lane);
  value.score(dp, block.shared.tile(stage, 1) + row * kHeadDim, block.shared.columns(1, 0) + column * kHeadDim,
              block.lane);
  const int first_column = block.owner.first + column;
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    const int first_row = row + m * kCell;
    LaneQueries<false> queries;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      queries.reference[v] = info.reference[first_row + resident_row(v)];
      queries.delta[v] = info.delta[first_row + resident_row(v)];
    }
    const bool full =
        first_column >= info.begin[first_row + kCell - 1] && first_column + kColumns * kCell <= info.end[first_row];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const auto hides = [&](int query, int key) {
        const int at = first_column + n * kCell + key;
        return at < info.begin[first_row + query] || at >= info.end[first_row + query];
      };
      const uint32_t hidden = full ? 0 : hidden_elements<false>(hides);
      finish_cell<false, false, true>(s[m][n], dp[m][n], queries, ScoreCell{}, block.params.scalars,
                                      block.attention().mask, hidden);
      store_weights<T, Traits::kBlockN>(block.shared.weights(0), first_row, column + n * kCell, s[m][n], block.lane);
      store_weights<T, Traits::kBlockN>(block.shared.weights(1), first_row, column + n * kCell, dp[m][n], block.lane);
    }
  }
}

// Adds the visit's part of dK and dV.
template <typename Traits>
__device__ __forceinline__ void add_columns(const OnePassBlock<Traits>& block, OnePassSums<Traits>& dkey,
                                            OnePassSums<Traits>& dvalue, int stage) {
  using T = typename Traits::T;
  const auto add = [&](OnePassSums<Traits>& sums, int weights, int which) {
    add_transposed<T, Traits::kBlockN, Traits::kHeadDim, Traits::kBlockM, Traits::kSumRows, Traits::kSumColumns>(
        sums, block.shared.weights(weights), block.sum_row() / kCell, block.shared.tile(stage, which),
        block.sum_column() / kCell, block.lane);
  };
  if (block.adds_dvalue()) add(dvalue, 0, 1);
  if (block.adds_dkey()) add(dkey, 1, 0);
}

// Adds the visit's part of dQ to the tile's sums when the block's turn has come.
template <typename Traits>
__device__ __forceinline__ void add_queries(const OnePassBlock<Traits>& block, int stage) {
  using T = typename Traits::T;
  const Turn& turn = block.shared.turn(stage);
  // The count is read ahead of the product. Nothing is added before the branch on it is taken.
  const int count = block.lane == 0 ? ptx::load_relaxed(turn.count) : 0;
  OnePassQuery<Traits> dquery;
  multiply<T, Traits::kBlockN, Traits::kHeadDim, Traits::kQueryRows, Traits::kQueryColumns>(
      dquery, block.shared.weights(1) + block.query_row(block.warp()) * Traits::kBlockN, block.shared.columns(0, 0),
      block.query_column(block.warp()) / kCell, block.lane);
  if (block.lane == 0) {
    if (count != turn.rank) ptx::wait_for_value(turn.count, turn.rank);
  }
  __syncwarp();
  float* const sums = turn.sums + block.thread;
#pragma unroll
  for (int i = 0; i < Traits::kQueryRows * Traits::kQueryColumns / 2; ++i) {
    atomicAdd(sums + i * Traits::kThreads,
              dquery[i / (Traits::kQueryColumns / 2)][i / 4 % (Traits::kQueryColumns / 8)][i % 4]);
  }
}

}  // namespace prefix_kernels::cuda::sm80
