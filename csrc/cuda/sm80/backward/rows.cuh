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

#include "../../common/kv_tiles.cuh"
#include "gemm.cuh"
#include "gradient_rows.cuh"
#include "params.cuh"
#include "scores.cuh"

namespace prefix_kernels::cuda::sm80 {

struct RowsParams {
  BackwardParams b;
  const float* delta;  // [batch, q_heads, q_len]
  ScoreScalars scalars;
  AlignedChunks aligned;
  bool aligned_pairs;  // has_aligned_pairs of dquery
  int query_tiles;     // blocks: (batch * q_heads + head) * query_tiles + tile
};

template <int kHeadDim, bool kGeneral>
struct RowsTile {
  static constexpr int kTiles = kHeadDim <= 64 ? 2 : 1;    // blocks of 16 queries of a warp
  static constexpr int kWarpM = kTiles * kCell;            // queries of a warp
  static constexpr int kBlockM = kBackwardWarps * kWarpM;  // queries of a block
  static constexpr int kCells = kHeadDim <= 128 ? 4 : 2;   // cells of a stage
  static constexpr int kBlockN = kCells * kCell;           // columns of a stage
  static constexpr bool kDOutInRegisters = kHeadDim <= 128;
  static_assert(kBlockM <= 2 * kBlockN, "query and dout pass through the stages on their way to the registers");
};

// The softmax reference, delta and visible columns of each query of the block.
template <int kBlockM>
struct RowInfo {
  float reference[kBlockM];  // softmax_reference(lse)
  float delta[kBlockM];
  int begin[kBlockM];  // visible columns of the sequence: [begin, end)
  int end[kBlockM];
  int prefix_begin[kBlockM];  // first visible column of the row's prefixes
};

// The queries that the block owns, and the cells that they see.
struct RowsOwner {
  int batch;
  int head;
  int first;
  int queries;  // number of queries, at most kBlockM
  VisitedCells cells;
};

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

template <typename T, int kHeadDim, bool kGeneral>
struct RowsShared {
  using Tile = RowsTile<kHeadDim, kGeneral>;
  using Info = RowInfo<Tile::kBlockM>;
  static constexpr int kTileBytes = SharedTile<kHeadDim>::bytes(Tile::kBlockN);
  static constexpr int kTilesBytes = 4 * (kTileBytes + kSharedGap);
  static constexpr int kInfoBytes = (sizeof(Info) + 127) / 128 * 128;
  static constexpr int kRowsBytes = SharedTile<kHeadDim>::bytes(Tile::kBlockM);
  static constexpr int kOwnerOffset = kTilesBytes + kInfoBytes + kSharedGap;
  static constexpr int kOwnerBytes = 128;
  static_assert(sizeof(RowsOwner) <= kOwnerBytes);
  static constexpr int kDOutOffset = kOwnerOffset + kOwnerBytes + kSharedGap;
  static constexpr int kBytes = kDOutOffset + !Tile::kDOutInRegisters * (kRowsBytes + kSharedGap);
  static_assert(kTilesBytes >= kPartsBytes<kHeadDim, Tile::kTiles>, "the warps' sums meet where the tiles were");
  static_assert(kSharedGap > 0 || kBytes <= 99 * 1024, "what a block may have on every GPU from sm_80 on");

  char* memory;

  // A tile of a stage; `which`: 0 the keys, 1 the values.
  __device__ __forceinline__ T* tile(int stage, int which) const {
    return reinterpret_cast<T*>(memory + (2 * stage + which) * (kTileBytes + kSharedGap));
  }
  __device__ __forceinline__ Info& info() const { return *reinterpret_cast<Info*>(memory + kTilesBytes); }
  __device__ __forceinline__ RowsOwner& owner() const { return *reinterpret_cast<RowsOwner*>(memory + kOwnerOffset); }
  // Memory of rows [part * kBlockN, ...) of the block's queries (0) or dout (1). Rows on their way to the registers use
  // the first stage before it is filled.
  __device__ __forceinline__ T* rows(int which, int part) const {
    if (which == 0 || Tile::kDOutInRegisters) return tile(which, part);
    return reinterpret_cast<T*>(memory + kDOutOffset) + part * Tile::kBlockN * kHeadDim;
  }
  __device__ __forceinline__ void declare() const {
    for (int i = 0; i < 4; ++i) shared_buffer(tile(i / 2, i % 2), kTileBytes);
    shared_buffer(&info(), kInfoBytes);
    shared_buffer(&owner(), kOwnerBytes);
    if (!Tile::kDOutInRegisters) shared_buffer(rows(1, 0), kRowsBytes);
  }
};

template <typename T, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(kBackwardThreads, 2) backward_rows(const RowsParams params) {
  using Tile = RowsTile<kHeadDim, kGeneral>;
  using Shared = RowsShared<T, kHeadDim, kGeneral>;
  constexpr int kTiles = Tile::kTiles, kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN;
  const AttentionParams& p = params.b.forward;
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int q_len = static_cast<int>(p.q_len);

  const Shared shared{shared_memory()};
  shared.declare();

  // The accumulators need the registers, so data that is seldom used is kept in shared memory.
  if (thread == 0) shared.owner() = rows_owner(p, params.query_tiles, kBlockM);
  __syncthreads();
  const RowsOwner& owner = shared.owner();
  const VisitedCells& cells = owner.cells;
  const auto layout = [&] { return WarpLayout(thread / kWarpSize, (owner.queries + Tile::kWarpM - 1) / Tile::kWarpM); };

  float dquery[kTiles][kHeadDim / 8][4];
  clear(dquery);

  if (cells.count > 0) {
    const WarpLayout warps = layout();
    const int warp_row = warps.resident * Tile::kWarpM;  // the warp's first row among the block's queries
    // Loads the block's RowInfo, and its queries and dout by way of the stages.
    typename Shared::Info& info = shared.info();
    if (thread < kBlockM) {
      const bool exists = thread < owner.queries;
      const int64_t row = (owner.batch * p.q_heads + owner.head) * p.q_len + owner.first + thread;
      const QueryView view(p, cells.prefixes, owner.first + thread + row_query_offset(p, owner.batch));
      info.reference[thread] = exists ? softmax_reference<kGeneral>(static_cast<const float*>(p.lse)[row]) : kInfinity;
      info.delta[thread] = exists ? params.delta[row] : 0.0f;
      info.begin[thread] = view.sequence.begin;
      info.end[thread] = view.sequence.end;
      info.prefix_begin[thread] = view.prefix_begin;
    }
    Resident<T, kHeadDim, kTiles, true> query;
    Resident<T, kHeadDim, kTiles, Tile::kDOutInRegisters> dout;
#pragma unroll
    for (int part = 0; part < kBlockM / kBlockN; ++part) {
      copy_rows<T, kHeadDim, kBlockN, kBackwardThreads, true>(
          shared.rows(0, part), HeadRows(p.query, owner.batch, owner.head, params.aligned.query),
          owner.first + part * kBlockN, q_len, head_dim);
      copy_rows<T, kHeadDim, kBlockN, kBackwardThreads, true>(
          shared.rows(1, part), HeadRows(params.b.dout, owner.batch, owner.head, params.aligned.dout),
          owner.first + part * kBlockN, q_len, value_dim);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    const auto own_rows = [&](int which) {
      return shared.rows(which, warp_row / kBlockN) + warp_row % kBlockN * kHeadDim;
    };
    query.take(own_rows(0), lane);
    dout.take(own_rows(1), lane);
    float reference[kTiles * 2], delta[kTiles * 2];
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      reference[i] = info.reference[warp_row + i / 2 * kCell + resident_row(i % 2)];
      delta[i] = info.delta[warp_row + i / 2 * kCell + resident_row(i % 2)];
    }
    __syncthreads();

    const auto fetch = [&](int first_cell, int stage) {
      const auto load = [&](const Operand& sequence, bool aligned_sequence, const Operand& prefix, bool aligned_prefix,
                            int which, int columns) {
        const int kv_head = owner.head / static_cast<int>(p.q_heads / p.kv_heads);
        TileLoader<T, kHeadDim, kBackwardThreads>(sequence, aligned_sequence, prefix, aligned_prefix, owner.batch,
                                                  kv_head, thread)
            .template load<Tile::kCells>(shared.tile(stage, which), p, cells, first_cell, columns);
      };
      load(p.key, params.aligned.key, p.prefix_key, params.aligned.prefix_key, 0, head_dim);
      load(p.value, params.aligned.value, p.prefix_value, params.aligned.prefix_value, 1, value_dim);
      ptx::cp_async_commit();
    };

    // The columns of a cell, counted from its first, that a query of the block sees.
    const auto visible = [&](const Cell& cell, int slot_begin, int row) -> Span {
      if (cell.segment == 0) return {info.begin[row] - cell.first, min(cell.count, info.end[row] - cell.first)};
      return {kGeneral ? info.prefix_begin[row] - slot_begin - cell.first : 0, cell.count};
    };

    const auto work = [&](int first_cell, int stage) {
#pragma unroll 1
      for (int i = warps.part; i < Tile::kCells && first_cell + i < cells.count; i += warps.parts) {
        const Cell cell = cells.cell(p, first_cell + i);
        // Columns of the row's prefixes that stand before the cell's slot.
        int slot_begin = 0;
        if (kGeneral && p.window_includes_prefix && cell.segment > 0)
          slot_begin = cells.prefixes.columns_before(p, owner.batch, cell.segment - 1);
        ActiveTiles<kTiles, false> active;
        bool full[kTiles];
        bool any = false, all = true;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const int row = warp_row + tile * kCell;
          const Span of_first = visible(cell, slot_begin, row), of_last = visible(cell, slot_begin, row + kCell - 1);
          active.tile[tile] = row < owner.queries && of_last.end > 0 && of_first.begin < kCell;
          full[tile] = of_last.begin <= 0 && of_first.end >= kCell;
          any = any || active.tile[tile];
          all = all && active.tile[tile];
        }
        if (!any) continue;

        const auto step = [&](auto active_tiles) {
          const T* key = shared.tile(stage, 0) + i * kCell * kHeadDim;
          const T* value = shared.tile(stage, 1) + i * kCell * kHeadDim;
          float s[kTiles][2][4], dp[kTiles][2][4];
          score(s, query, key, lane, active_tiles);
          score(dp, dout, value, lane, active_tiles);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            if (!active_tiles[tile]) continue;
            const int row = warp_row + tile * kCell;
            LaneQueries<false> of_lane;
#pragma unroll
            for (int v = 0; v < 2; ++v) {
              of_lane.reference[v] = reference[2 * tile + v];
              of_lane.delta[v] = delta[2 * tile + v];
            }
            ScoreCell at{};
            at.first_key = cell.first;
            if constexpr (kGeneral) {
              at.first_query = owner.first + row;
              at.head = owner.batch * static_cast<int>(p.q_heads) + owner.head;
              at.segment = cell.segment;
              at.queries = owner.queries - row;
              at.seed = p.dropout_threshold > 0 ? dropout_seed(p) : 0;
              at.mask = mask_row(p, owner.batch, owner.head, at.first_query, cell.segment);
              at.move_mask(p.mask, 0, cell.first);
            }
            uint32_t hidden = 0;
            if (!full[tile]) {
              hidden = hidden_elements<false>(
                  [&](int query, int column) { return !visible(cell, slot_begin, row + query).holds(column); });
            }
            finish_cell<kGeneral, false, true>(s[tile], dp[tile], of_lane, at, params.scalars, p.mask, hidden);
          }
          accumulate<T, kHeadDim>(dquery, dp, key, lane, active_tiles);
        };
        if (all)
          step(ActiveTiles<kTiles, true>{});
        else if constexpr (kTiles > 1)
          step(active);
      }
    };

    fetch(0, 0);
    for (int cell = 0, stage = 0; cell < cells.count; cell += Tile::kCells, stage = 1 - stage) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (cell + Tile::kCells < cells.count) fetch(cell + Tile::kCells, 1 - stage);
      work(cell, stage);
    }
  }

  const WarpLayout warps = layout();
  if (warps.parts > 1) {
    shared_buffer(shared.memory, kPartsBytes<kHeadDim, kTiles>);
    add_parts<kHeadDim, kTiles>(dquery, warps, reinterpret_cast<float*>(shared.memory), lane);
  }
  if (warps.part > 0) return;
  const Operand& x = params.b.gradients[kDQuery];
  T* rows = static_cast<T*>(x.data) + owner.batch * x.batch_stride + owner.head * x.head_stride;
  store_sums<T, kHeadDim>(rows, x.row_stride, params.aligned_pairs, owner.first + warps.resident * Tile::kWarpM, q_len,
                          head_dim, params.scalars.scale, dquery, lane);
}

}  // namespace prefix_kernels::cuda::sm80
