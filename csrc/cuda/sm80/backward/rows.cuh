// The gradient of the queries.
//
//   dquery = scale ds K'      over the row's prefixes and its sequence
//
// A block owns kBlockM queries of one head and visits every cell of 16 columns that some of them see (kv_tiles.cuh):
//
//   query, dout rows           in registers, as left operands (dout of head dim 256: in shared memory)
//   key, value tiles           two stages of shared memory, filled by cp.async while the other is at work
//   S = Q K'^T, dP = dO V'^T   one warp: kTiles x 16 queries against 16 columns at a time
//   dQ += dS K'                left operand straight from the registers; sums in registers to the end
//
// If the queries are too few for all warps, several warps share queries and divide the columns of a tile (WarpLayout).
#pragma once

#include "rows_stage.cuh"
#include "rows_step.cuh"

namespace prefix_kernels::cuda::sm80 {

// Computes the gradient of one block of queries.
template <typename T, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(kBackwardThreads, 2) backward_rows(const RowsParams params) {
  using Block = RowsBlock<T, kHeadDim, kGeneral>;
  using Tile = typename Block::Tile;
  const int thread = threadIdx.x;
  const typename Block::Shared shared{{shared_memory()}};
  shared.declare();
  if (thread == 0) shared.owner() = rows_owner(params.b.forward, params.query_tiles, Tile::kBlockM);
  __syncthreads();
  const Block block{params, shared, shared.owner(), thread, thread % kWarpSize};
  const VisitedCells& cells = block.owner.cells;

  typename Block::Sums dquery;
  clear(dquery);
  if (cells.count > 0) {
    const WarpLayout warps = block.layout();
    const int warp_row = warps.resident * Tile::kWarpM;
    describe_rows(block);
    typename Block::Query query;
    typename Block::DOut dout;
    LaneRows<Tile::kTiles> of_lane;
    load_rows(block, warp_row, query, dout, of_lane);
    fetch_cells(block, 0, 0);
    for (int cell = 0, stage = 0; cell < cells.count; cell += Tile::kCells, stage = 1 - stage) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (cell + Tile::kCells < cells.count) fetch_cells(block, cell + Tile::kCells, 1 - stage);
      work_on_stage(block, warps, warp_row, query, dout, of_lane, dquery, cell, stage);
    }
  }
  store_rows(block, dquery);
}

}  // namespace prefix_kernels::cuda::sm80
