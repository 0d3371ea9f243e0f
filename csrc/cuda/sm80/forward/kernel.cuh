// Attention of [prefixes ; sequence], forward, after FlashAttention-2 (Dao, 2023).
//
//   S = scale Q K'^T      P = softmax(S)      out = P V'      lse = log sum exp S
//
// A block of four warps owns kRows rows: queries of one head, or of several heads that share keys, the head running
// fastest. A warp owns 16 kRowBlocks rows alone and never exchanges scores with another. Keys and values stream through
// shared memory in tiles of kCells cells, two buffers each:
//
//   copy   | K0 | V0 | K1        | V1        | K2        | V2 ...
//   compute           S = Q K0^T   out += P V0  S = Q K1^T
//
// Scores stay in registers: a thread's accumulators of S, packed to 16 bits, are its operand of P V'.
#pragma once

#include "resume.cuh"

namespace prefix_kernels::cuda::sm80 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) forward_kernel(const ForwardParams params) {
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim, kCells = Traits::kCells, kRowBlocks = Traits::kRowBlocks;
  constexpr int kBlocksOfHead = kHeadDim / kCell;
  const AttentionParams& p = params.attention;
  const int thread = threadIdx.x % Traits::kThreads, lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);

  // Blocks that share keys follow one another; of a causal head, those with the most columns come first.
  const int packs = static_cast<int>(p.q_heads) / params.pack;
  const int tile_number = blockIdx.x % params.row_tiles, rest = blockIdx.x / params.row_tiles;
  BlockRows block_rows;
  block_rows.batch = rest / packs;
  block_rows.pack = params.pack;
  block_rows.first_head = rest % packs * params.pack;
  block_rows.kv_head = block_rows.first_head / (static_cast<int>(p.q_heads) / static_cast<int>(p.kv_heads));
  block_rows.first = (params.row_tiles - 1 - tile_number) * Traits::kRows;
  block_rows.last = min(Traits::kRows, static_cast<int>(p.q_len) * params.pack - block_rows.first) - 1;
  const int warp_row = warp * Traits::kWarpRows;

  using Plan = WarpPlan<Traits::kWarpRows, kCells, Traits::kGeneral>;
  Plan& plan = *reinterpret_cast<Plan*>(shared_memory() + Traits::kPlanOffset + warp * Traits::kPlanStride);
  shared_buffer(&plan, sizeof(Plan));
  {
    const BlockRows& rows = block_rows;
    const int64_t offset = row_query_offset(p, rows.batch);
    const VisitedCells cells(p, rows.batch, rows.query(0) + offset, rows.query(rows.last) + offset);
    for (int row = lane; row < Traits::kWarpRows; row += kWarpSize) {
      plan.views[row] = QueryView(p, cells.prefixes, rows.query(warp_row + row) + offset);
    }
    __syncwarp();
    if (lane == 0) {
      const int last = min(Traits::kWarpRows - 1, rows.last - warp_row);
      plan.rows = rows;
      plan.cells = cells;
      plan.view = last >= 0 ? WarpView(cells, plan.views[0], plan.views[last]) : WarpView();
    }
    __syncwarp();
  }
  const BlockRows& rows = plan.rows;
  const VisitedCells& cells = plan.cells;

  T* const query_tile = reinterpret_cast<T*>(shared_memory());
  shared_buffer(query_tile, Traits::kQueryBytes);
  const auto key_tile = [](int j) {
    return reinterpret_cast<T*>(shared_memory() + Traits::kKeyOffset + (j & 1) * Traits::kTileStride);
  };
  const auto value_tile = [](int j) {
    return reinterpret_cast<T*>(shared_memory() + Traits::kValueOffset + (j & 1) * Traits::kTileStride);
  };
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    shared_buffer(key_tile(j), Traits::kTileBytes);
    shared_buffer(value_tile(j), Traits::kTileBytes);
  }

  // Loaders, like readers, are made anew for every tile: they keep no registers from tile to tile.
  using Loader = TileLoader<T, kHeadDim, Traits::kThreads>;
  const auto load_keys = [&](int j) {
    const Loader loader(p.key, params.aligned_key, p.prefix_key, params.aligned_prefix_key, rows.batch, rows.kv_head,
                        pin_to_register(thread));
    loader.template load<kCells>(key_tile(j), p, cells, j * kCells, head_dim);
  };
  const auto load_values = [&](int j) {
    const Loader loader(p.value, params.aligned_value, p.prefix_value, params.aligned_prefix_value, rows.batch,
                        rows.kv_head, pin_to_register(thread));
    loader.template load<kCells>(value_tile(j), p, cells, j * kCells, value_dim);
  };
  const int tiles = (cells.count + kCells - 1) / kCells;

  constexpr int kLanes = kLanesPerRow<kHeadDim>;
#pragma unroll 1
  for (int row = thread / kLanes; row < Traits::kRows; row += Traits::kThreads / kLanes) {
    const bool valid = row <= rows.last;
    const int source = valid ? row : 0;
    const HeadRows head(p.query, rows.batch, rows.head(source), params.aligned_query);
    copy_row<T, kHeadDim>(query_tile, row, head.row(rows.query(source)), head.dtype, head.aligned_chunks,
                          thread % kLanes, head_dim, valid);
  }
  uint32_t query_blocks[Traits::kQueryInRegisters ? kBlocksOfHead : 1][kRowBlocks][4];
  using QueryReader = BlockReader<T, kHeadDim, Quarters::kDown>;
  const auto load_query = [&](uint32_t (&a)[kRowBlocks][4], const QueryReader& query, int k) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      if constexpr (Traits::kQueryInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = query_blocks[k][m][i];
      } else {
        query.load(a[m], m, k);
      }
    }
  };

  const uint64_t seed = Traits::kGeneral && p.dropout_threshold > 0 ? dropout_seed(p) : 0;
  OnlineSoftmax<kRowBlocks, Traits::kGeneral> softmax;
  float out[kRowBlocks][2 * kBlocksOfHead][4];
  set_all(out, 0.0f);
  if (p.extends) resume_rows<Traits>(params, rows, warp, lane, softmax, out);

  // Turn -1 only copies, so that every copy has one place in the code.
#pragma unroll 1
  for (int j = -1; j < tiles; ++j) {
    const int first_cell = j * kCells;
    ptx::cp_async_wait<1>();
    __syncthreads();  // all have key tile j, and none reads tile j - 1 any more
    if (j + 1 < tiles) load_keys(j + 1);
    ptx::cp_async_commit();
    const QueryReader query(query_tile + warp_row * kHeadDim, lane);
    if (Traits::kQueryInRegisters && j == 0) {
#pragma unroll
      for (int k = 0; k < kBlocksOfHead; ++k) {
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) query.load(query_blocks[k][m], m, k);
      }
    }

    // S = Q K'^T
    float scores[kRowBlocks][2 * kCells][4];
    unsigned seen = 0;  // one bit per cell of the tile that some row sees
    const auto finish_row = [&](int m, int c, int from, const Cell& cell, Span seen_columns) {
      float bias[kColumnsPerThread];
      if (params.shared_mask) {
#pragma unroll
        for (int k = 0; k < kColumnsPerThread; ++k) bias[k] = plan.bias[c * kCell + column_of(lane, k)];
      } else {
        const int row = min(warp_row + m * kCell + 4 * from + lane / 4, rows.last);
        CellMask(p, cell).load(bias, rows.batch, rows.head(row), rows.query(row), cell.count, lane);
      }
      finish_scores(scores[m][2 * c], scores[m][2 * c + 1], from, params.scale, params.softcap, bias, seen_columns,
                    lane);
    };
    const BlockReader<T, kHeadDim, Quarters::kAcross> key(key_tile(j), lane);
    if (!Traits::kGeneral && j >= 0 && plan.view.every_row_sees(cells, first_cell, first_cell + kCells)) {
      seen = (1u << kCells) - 1;
      set_all(scores, 0.0f);
#pragma unroll
      for (int k = 0; k < kBlocksOfHead; ++k) {
        uint32_t a[kRowBlocks][4];
        load_query(a, query, k);
#pragma unroll
        for (int c = 0; c < kCells; ++c) {
          uint32_t b[4];
          key.load(b, c, k);
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) mma_block<T>(scores[m][2 * c], scores[m][2 * c + 1], a[m], b);
        }
      }
    } else if (j >= 0) {
      bool is_seen = false;
      if (lane < kCells && first_cell + lane < cells.count) {
        plan.tile[lane] = cells.cell(p, first_cell + lane);
        is_seen = plan.view.some_row_sees(plan.tile[lane]);
      }
      seen = __ballot_sync(kAllLanes, is_seen);
      __syncwarp();
      if (Traits::kGeneral && params.shared_mask) {
#pragma unroll 1
        for (int column = lane; column < kCells * kCell; column += kWarpSize) {
          const int c = column / kCell, in_cell = column % kCell;
          const bool exists = first_cell + c < cells.count && in_cell < plan.tile[c].count;
          const float bias =
              exists ? CellMask(p, plan.tile[c]).bias(rows.batch, rows.first_head, 0, in_cell) : minus_infinity();
          plan.bias[column] = bias;
          const unsigned attended = __ballot_sync(kAllLanes, bias > minus_infinity());
          const unsigned hidden = ((attended & 0xFFFFu) == 0 ? 1u : 0u) | ((attended >> 16) == 0 ? 2u : 0u);
          seen &= ~(hidden << (column / kWarpSize * 2));
        }
        __syncwarp();
      }
      set_all(scores, minus_infinity());
#pragma unroll
      for (int c = 0; c < kCells; ++c) {
        if ((seen >> c & 1) == 0) continue;
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) scores[m][2 * c][e] = scores[m][2 * c + 1][e] = 0.0f;
        }
#pragma unroll
        for (int k = 0; k < kBlocksOfHead; ++k) {
          uint32_t a[kRowBlocks][4], b[4];
          load_query(a, query, k);
          key.load(b, c, k);
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) mma_block<T>(scores[m][2 * c], scores[m][2 * c + 1], a[m], b);
        }
        const Cell cell = plan.tile[c];
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          const int row = m * kCell + lane / 4;
          const Span top = plan.views[row].in(cell), bottom = plan.views[row + 8].in(cell);
          if constexpr (Traits::kGeneral) {
            finish_row(m, c, 0, cell, top);
            finish_row(m, c, 2, cell, bottom);
          } else {
            hide_unseen(scores[m][2 * c], scores[m][2 * c + 1], top, bottom, lane);
          }
        }
      }
    }
    if (seen != 0) softmax.update(scores, out, Traits::kGeneral ? kLog2E : params.scale_log2);

    ptx::cp_async_wait<1>();
    __syncthreads();  // all have value tile j
    if (j + 1 < tiles) load_values(j + 1);
    ptx::cp_async_commit();

    // out += P V'
    const BlockReader<T, kHeadDim, Quarters::kDown> value(value_tile(j), lane);
#pragma unroll
    for (int c = 0; c < kCells; ++c) {
      if ((seen >> c & 1) == 0) continue;
      uint32_t a[kRowBlocks][4];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        if constexpr (Traits::kGeneral) {
          if (p.dropout_threshold > 0) {
            drop_out(scores[m][2 * c], scores[m][2 * c + 1], seed, p.dropout_threshold,
                     (rows.first + warp_row) / kCell + m, rows.batch * p.q_heads + rows.first_head, plan.tile[c], lane);
          }
        }
        pack_operand<T>(a[m], scores[m][2 * c], scores[m][2 * c + 1]);
      }
#pragma unroll
      for (int n = 0; n < kBlocksOfHead; ++n) {
        uint32_t b[4];
        value.load_transposed(b, c, n);
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) mma_block<T>(out[m][2 * n], out[m][2 * n + 1], a[m], b);
      }
    }
  }

  // A warp's output takes the place of its own queries, which no other warp reads, and is written in whole chunks. lse
  // and row_mass take the place of the rows' views, which are not read any more.
  ptx::cp_async_wait<0>();
  __syncthreads();  // without any tile, other threads' copies of queries may still be under way
  static_assert(sizeof(plan.views) >= 2 * Traits::kWarpRows * sizeof(float), "lse and row_mass of the warp's rows");
  float* const lse = reinterpret_cast<float*>(plan.views);
  const float rescale = Traits::kGeneral ? static_cast<float>(dropout_rescale(p.dropout_threshold)) : 1.0f;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      const int row = m * kCell + half_row * 8 + lane / 4;
      const RowResult result = softmax.finish(m, half_row, Traits::kGeneral ? 1.0f : params.scale);
      const float factor = result.factor * rescale;
#pragma unroll
      for (int n = 0; n < 2 * kBlocksOfHead; ++n) {
        T* chunk = query_tile + SharedTile<kHeadDim>::offset(warp_row + row, n);
        *reinterpret_cast<uint32_t*>(chunk + 2 * (lane % 4)) =
            pack2<T>(out[m][n][2 * half_row] * factor, out[m][n][2 * half_row + 1] * factor);
      }
      if (lane % 4 == 0) {
        lse[row] = result.lse();
        if (Traits::kGeneral) lse[Traits::kWarpRows + row] = result.mass();
      }
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int i = lane / kLanes; i < Traits::kWarpRows; i += kWarpSize / kLanes) {
    const int row = warp_row + i;
    if (row > rows.last) break;
    const int head = rows.head(row), query_number = rows.query(row);
    if (lane % kLanes == 0) {
      const int64_t index = (rows.batch * p.q_heads + head) * p.q_len + query_number;
      static_cast<float*>(p.lse)[index] = lse[i];
      if (Traits::kGeneral && p.row_mass != nullptr) {
        static_cast<float*>(p.row_mass)[index] = lse[Traits::kWarpRows + i];
      }
    }
    const HeadRows out_rows(p.out, rows.batch, head, params.aligned_out);
    T* const out_row = reinterpret_cast<T*>(const_cast<char*>(out_rows.row(query_number)));
#pragma unroll
    for (int chunk = lane % kLanes; chunk < kHeadDim / kChunk; chunk += kLanes) {
      store_chunk(out_row, query_tile + SharedTile<kHeadDim>::offset(row, chunk), chunk * kChunk, value_dim,
                  params.aligned_out);
    }
  }
}

}  // namespace prefix_kernels::cuda::sm80
