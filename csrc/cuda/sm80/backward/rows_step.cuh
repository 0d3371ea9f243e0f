// The work on a stage of the rows kernel: a warp's queries meet its keys a cell of 16 columns at a time.
//
// A step has up to kTiles blocks of 16 queries. A tile whose queries all see the whole cell is not masked; of others,
// elements are hidden one by one; general kernels also place the tile among queries and keys for the mask and for
// dropout.
#pragma once

#include "rows_block.cuh"
#include "step_tiles.cuh"

namespace prefix_kernels::cuda::sm80 {

// The tiles of a step of which some query sees a column of the cell.
template <typename Block>
__device__ __forceinline__ StepTiles<Block::kTiles> tiles_of_step(const Block& block, const Cell& cell, int slot_begin,
                                                                  int warp_row) {
  const auto& info = block.shared.info();
  StepTiles<Block::kTiles> tiles;
#pragma unroll
  for (int tile = 0; tile < Block::kTiles; ++tile) {
    const int row = warp_row + tile * kCell;
    const Span of_first = info.template visible<Block::kGeneral>(cell, slot_begin, row);
    const Span of_last = info.template visible<Block::kGeneral>(cell, slot_begin, row + kCell - 1);
    tiles.set(tile, row < block.owner.queries && of_last.end > 0 && of_first.begin < kCell,
              of_last.begin <= 0 && of_first.end >= kCell);
  }
  return tiles;
}

// The place of the cell of 16 queries from row `row` of the block on and the keys of `cell`.
template <typename Block>
__device__ __forceinline__ ScoreCell cell_of_tile(const Block& block, const Cell& cell, int row) {
  const AttentionParams& p = block.attention();
  const RowsOwner& owner = block.owner;
  ScoreCell at{};
  at.first_key = cell.first;
  if constexpr (Block::kGeneral) {
    at.first_query = owner.first + row;
    at.head = owner.batch * static_cast<int>(p.q_heads) + owner.head;
    at.segment = cell.segment;
    at.queries = owner.queries - row;
    at.seed = p.dropout_threshold > 0 ? dropout_seed(p) : 0;
    at.mask = mask_row(p, owner.batch, owner.head, at.first_query, cell.segment);
    at.move_mask(p.mask, 0, cell.first);
  }
  return at;
}

// The elements of an edge tile that are hidden.
template <typename Block>
__device__ __forceinline__ uint32_t hidden_of_tile(const Block& block, const Cell& cell, int slot_begin, int row) {
  const auto& info = block.shared.info();
  return hidden_elements<false>([&](int query, int column) {
    return !info.template visible<Block::kGeneral>(cell, slot_begin, row + query).holds(column);
  });
}

// One step: S, dP, dS of the warp's queries and the cell at `first_row` of the stage, and their part of dQ.
template <typename Block, bool kAll>
__device__ __forceinline__ void rows_step(const Block& block, const typename Block::Query& query,
                                          const typename Block::DOut& dout, const LaneRows<Block::kTiles>& of_lane,
                                          typename Block::Sums& dquery, int stage, int first_row, const Cell& cell,
                                          int slot_begin, int warp_row, const StepTiles<Block::kTiles>& tiles,
                                          const ActiveTiles<Block::kTiles, kAll>& active) {
  using T = typename Block::T;
  constexpr int kTiles = Block::kTiles;
  const T* key = block.shared.tile(stage, 0) + first_row * Block::kHeadDim;
  const T* value = block.shared.tile(stage, 1) + first_row * Block::kHeadDim;
  float s[kTiles][2][4], dp[kTiles][2][4];
  score(s, query, key, block.lane, active);
  score(dp, dout, value, block.lane, active);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (!active[tile]) continue;
    const int row = warp_row + tile * kCell;
    LaneQueries<false> queries;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      queries.reference[v] = of_lane.reference[2 * tile + v];
      queries.delta[v] = of_lane.delta[2 * tile + v];
    }
    const ScoreCell at = cell_of_tile(block, cell, row);
    const uint32_t hidden = tiles.full[tile] ? 0 : hidden_of_tile(block, cell, slot_begin, row);
    finish_cell<Block::kGeneral, false, true>(s[tile], dp[tile], queries, at, block.params.scalars,
                                              block.attention().mask, hidden);
  }
  accumulate<T, Block::kHeadDim>(dquery, dp, key, block.lane, active);
}

// Adds the warp's part of a stage, which begins with visited cell `first_cell`, to its sums.
template <typename Block>
__device__ __forceinline__ void work_on_stage(const Block& block, const WarpLayout& warps, int warp_row,
                                              const typename Block::Query& query, const typename Block::DOut& dout,
                                              const LaneRows<Block::kTiles>& of_lane, typename Block::Sums& dquery,
                                              int first_cell, int stage) {
  const AttentionParams& p = block.attention();
  const VisitedCells& cells = block.owner.cells;
#pragma unroll 1
  for (int i = warps.part; i < Block::Tile::kCells && first_cell + i < cells.count; i += warps.parts) {
    const Cell cell = cells.cell(p, first_cell + i);
    // Columns of the row's prefixes that stand before the cell's slot.
    int slot_begin = 0;
    if (Block::kGeneral && p.window_includes_prefix && cell.segment > 0)
      slot_begin = cells.prefixes.columns_before(p, block.owner.batch, cell.segment - 1);
    const auto tiles = tiles_of_step(block, cell, slot_begin, warp_row);
    take_step<false>(tiles, [&](const auto& active) {
      rows_step(block, query, dout, of_lane, dquery, stage, i * kCell, cell, slot_begin, warp_row, tiles, active);
    });
  }
}

}  // namespace prefix_kernels::cuda::sm80
