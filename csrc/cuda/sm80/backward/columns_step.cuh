// The work on a stage of the columns kernel: a warp's columns meet its queries 16 at a time.
//
// A step has up to kTiles blocks of 16 columns. A tile that every one of the 16 queries sees whole is not masked; of
// others, elements are hidden one by one; general kernels also place the tile among queries and keys for the mask and
// for dropout.
#pragma once

#include "columns_block.cuh"
#include "step_tiles.cuh"

namespace prefix_kernels::cuda::sm80 {

// The tiles of a step that some query sees. `row`: the step's first query in the stage.
template <int kTiles, typename Info>
__device__ __forceinline__ StepTiles<kTiles> tiles_of_step(const Info& info, int row, int warp_column) {
  const int first_begin = info.begin[row], last_begin = info.begin[row + kCell - 1];
  const int first_end = info.end[row], last_end = info.end[row + kCell - 1];
  StepTiles<kTiles> tiles;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int column = warp_column + tile * kCell;
    tiles.set(tile, column < last_end && column + kCell > first_begin,
              column >= last_begin && column + kCell <= first_end);
  }
  return tiles;
}

// The lse and delta of the queries that a lane holds.
template <bool kWantsDelta, typename Info>
__device__ __forceinline__ LaneQueries<true> lane_queries(const Info& info, int row) {
  LaneQueries<true> queries;
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    queries.reference[u] = info.reference[row + streamed_row(u)];
    queries.delta[u] = kWantsDelta ? info.delta[row + streamed_row(u)] : 0.0f;
  }
  return queries;
}

// The place of the cell of 16 queries from `row` of the stage on and 16 keys from `first_key` on.
template <bool kGeneral, typename Info>
__device__ __forceinline__ ScoreCell cell_of_tile(const AttentionParams& p, const Info& info, int row, int first_key) {
  ScoreCell cell{};
  cell.first_key = first_key;
  if constexpr (kGeneral) {
    cell.first_query = info.first_query + row;
    cell.head = info.head;
    cell.segment = info.segment;
    cell.queries = info.queries - row;
    cell.seed = info.seed;
    cell.mask = info.mask;
    cell.move_mask(p.mask, row, cell.first_key);
  }
  return cell;
}

// The elements of an edge tile that are hidden.
template <typename Info>
__device__ __forceinline__ uint32_t hidden_of_tile(const Info& info, int row, int first_key) {
  return hidden_elements<true>([&](int query, int key) {
    const int column = first_key + key;
    return column < info.begin[row + query] || column >= info.end[row + query];
  });
}

// One step: S, dP, P, dS of 16 queries from `row` of the stage on, and their part of the sums.
template <typename Traits, bool kAll>
__device__ __forceinline__ void columns_step(const ColumnsBlock<Traits>& block, const ColumnsKey<Traits>& key,
                                             const ColumnsValue<Traits>& value, ColumnsSums<Traits>& sums,
                                             const typename ColumnsBlock<Traits>::Shared::Info& info, int stage,
                                             int row, int warp_column, const StepTiles<Traits::kTiles>& tiles,
                                             const ActiveTiles<Traits::kTiles, kAll>& active) {
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim, kTiles = Traits::kTiles;
  constexpr bool kWantsDKey = Traits::kWantsDKey, kGeneral = Traits::kGeneral;
  const AttentionParams& p = block.attention();
  const T* query = block.shared.tile(stage, 0) + row * kHeadDim;
  const T* dout = block.shared.tile(stage, 1) + row * kHeadDim;
  float s[kTiles][2][4], dp[kTiles][2][4];
  score(s, key, query, block.lane, active);
  if constexpr (kWantsDKey) score(dp, value, dout, block.lane, active);

  const LaneQueries<true> queries = lane_queries<kWantsDKey>(info, row);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (!active[tile]) continue;
    const ScoreCell cell = cell_of_tile<kGeneral>(p, info, row, warp_column + tile * kCell);
    const uint32_t hidden = tiles.full[tile] ? 0 : hidden_of_tile(info, row, cell.first_key);
    finish_cell<kGeneral, true, kWantsDKey>(s[tile], dp[tile], queries, cell, block.params.scalars, p.mask, hidden);
  }
  if constexpr (Traits::kWantsDValue) {
    if (block.adds_dvalue()) accumulate<T, kHeadDim>(sums.dvalue, s, dout, block.lane, active);
  }
  if constexpr (kWantsDKey) accumulate<T, kHeadDim>(sums.dkey, dp, query, block.lane, active);
}

// Adds the warp's part of a stage to its sums.
template <typename Traits>
__device__ __forceinline__ void work_on_stage(const ColumnsBlock<Traits>& block, const ColumnsKey<Traits>& key,
                                              const ColumnsValue<Traits>& value, ColumnsSums<Traits>& sums, int stage) {
  const auto& info = block.shared.info(stage);
  const WarpLayout warps = block.layout();
  const int warp_column = block.owner.first + warps.resident * Traits::kWarpN;
#pragma unroll 1
  for (int cell = warps.part; cell < Traits::kBlockM / kCell; cell += warps.parts) {
    const int row = cell * kCell;
    const auto tiles = tiles_of_step<Traits::kTiles>(info, row, warp_column);
    // General kernels have one version of the step, for some of the tiles or all.
    take_step<Traits::kGeneral>(tiles, [&](const auto& active) {
      columns_step(block, key, value, sums, info, stage, row, warp_column, tiles, active);
    });
  }
}

}  // namespace prefix_kernels::cuda::sm80
