// The gradients of keys and values, of the sequence and of the prefixes.
//
//   dK' = scale ds^T Q      dV' = p^T dO
//
// Both are summed over the heads of the group and, for a prefix, over the rows that name it. A block owns kBlockN
// columns of one segment of one kv head and visits every query tile that sees them:
//
//   keys, values of the block     in registers, as left operands, or in shared memory if the sums leave no room
//   query, dout tiles             two stages of shared memory, filled by cp.async while the other is at work
//   S^T = K Q^T, dP^T = V dO^T    one warp: kTiles x 16 columns against 16 queries at a time
//   dV += P^T dO, dK += dS^T Q    left operands straight from the registers; sums in registers to the end
//
// For prefix gradients alone, delta is computed here, so that query, out and dout are read once and nothing else is. If
// the columns are too few for all warps, several warps share columns and divide the queries of a tile (WarpLayout). A
// prefix's visits are split over blocks, whose sums reduce.cuh adds.
#pragma once

#include "delta.cuh"
#include "gemm.cuh"
#include "gradient_rows.cuh"
#include "params.cuh"
#include "query_tiles.cuh"
#include "scores.cuh"

namespace prefix_kernels::cuda::sm80 {

struct ColumnsParams {
  BackwardParams b;
  const float* delta;  // [batch, q_heads, q_len]
  ScoreScalars scalars;
  AlignedChunks aligned;
  bool aligned_pairs[kNumGradients];

  // Blocks of prefixes come first: ((prefix * kv_heads + kv_head) * prefix_tiles + tile) * splits + split.
  int64_t prefix_blocks;
  int prefix_tiles;
  int splits;
  float* partial_dkey;  // [num_prefixes, kv_heads, splits, prefix_len, kHeadDim]; null: one split writes the gradient
  float* partial_dvalue;
  // Then those of sequences: (batch * kv_heads + kv_head) * sequence_tiles + tile.
  int sequence_tiles;
};

// The traits of one columns kernel. kWantsDKey, kWantsDValue: the sums that it computes; kGeneral: mask, softcap,
// dropout, windows over the prefix; kFusesDelta: delta is computed from out, which is streamed with dout, and not read.
template <typename T_, int kHeadDim_, bool kWantsDKey_, bool kWantsDValue_, bool kGeneral_, bool kFusesDelta_ = false>
struct ColumnsTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWantsDKey = kWantsDKey_, kWantsDValue = kWantsDValue_, kGeneral = kGeneral_;
  static constexpr bool kFusesDelta = kFusesDelta_;

  static constexpr int kTiles = kHeadDim <= 64 ? 2 : 1;    // blocks of 16 columns of a warp
  static constexpr int kWarpN = kTiles * kCell;            // columns of a warp
  static constexpr int kBlockN = kBackwardWarps * kWarpN;  // columns of a block
  // The queries of a stage.
  static constexpr int kBlockM = kHeadDim == 256 && kGeneral                          ? 16
                                 : kHeadDim > 128 || (kHeadDim == 128 && kFusesDelta) ? 32
                                                                                      : 64;
  // The tiles that a stage streams: query, dout and, for delta, out.
  static constexpr int kStreams = 2 + kFusesDelta;
  // The sums leave registers for the block's keys, or values; kGeneral kernels need some for their options.
  static constexpr bool kKeyInRegisters =
      kHeadDim == 256 ? kWantsDKey && !kGeneral : !kGeneral || (kHeadDim != 64 && kHeadDim != 128);
  static constexpr bool kValueInRegisters = kHeadDim == 32 || kHeadDim == 96;
  static_assert(kBlockN <= 2 * kBlockM || !(kKeyInRegisters || kValueInRegisters),
                "keys and values pass through the stages on their way to the registers");
};

// Tells if the registers hold dK and dV together.
template <int kHeadDim>
inline constexpr bool kBothSums = kHeadDim <= 128;

inline constexpr int kNoColumn = 0x7FFFFFFF;

// The part of a stage beside its tiles: one entry for each query of the tile.
template <int kBlockM, typename Tiles>
struct QueryInfo {
  float reference[kBlockM];  // softmax_reference(lse)
  float delta[kBlockM];
  int begin[kBlockM];  // visible columns of the segment: [begin, end)
  int end[kBlockM];
  Tiles next;  // the visit after the tile's
  // The tile's ScoreCell, in general kernels.
  int first_query, head, segment, queries;
  const char* mask;  // result of mask_row
  uint64_t seed;
};

template <typename Traits>
struct ColumnsShared {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kBlockM = Traits::kBlockM, kStreams = Traits::kStreams;
  using Tiles = QueryTiles<kBlockM, Traits::kBlockN, Traits::kGeneral>;
  using Info = QueryInfo<kBlockM, Tiles>;
  static constexpr int kTileBytes = SharedTile<kHeadDim>::bytes(kBlockM);
  static constexpr int kTilesBytes = 2 * kStreams * (kTileBytes + kSharedGap);
  static constexpr int kInfoBytes = (sizeof(Info) + 127) / 128 * 128;
  static constexpr int kColumnsBytes = SharedTile<kHeadDim>::bytes(Traits::kBlockN);
  static constexpr bool kHasKey = !Traits::kKeyInRegisters;
  static constexpr bool kHasValue = Traits::kWantsDKey && !Traits::kValueInRegisters;
  static constexpr int kOwnerOffset = kTilesBytes + 2 * (kInfoBytes + kSharedGap);
  static constexpr int kOwnerBytes = 128;
  static_assert(sizeof(ColumnsOwner) <= kOwnerBytes);
  static constexpr int kKeyOffset = kOwnerOffset + kOwnerBytes + kSharedGap;
  static constexpr int kValueOffset = kKeyOffset + kHasKey * (kColumnsBytes + kSharedGap);
  static constexpr int kBytes = kValueOffset + kHasValue * (kColumnsBytes + kSharedGap);
  static_assert(kTilesBytes >= kPartsBytes<kHeadDim, Traits::kTiles>, "the warps' sums meet where the tiles were");
  static_assert(kSharedGap > 0 || kBytes <= 99 * 1024, "what a block may have on every GPU from sm_80 on");

  char* memory;

  // A tile of a stage; `which`: 0 the queries, 1 dout, 2 out.
  __device__ __forceinline__ T* tile(int stage, int which) const {
    return reinterpret_cast<T*>(memory + (kStreams * stage + which) * (kTileBytes + kSharedGap));
  }
  __device__ __forceinline__ Info& info(int stage) const {
    return *reinterpret_cast<Info*>(memory + kTilesBytes + stage * (kInfoBytes + kSharedGap));
  }
  __device__ __forceinline__ ColumnsOwner& owner() const {
    return *reinterpret_cast<ColumnsOwner*>(memory + kOwnerOffset);
  }
  // Memory of rows [part * kBlockM, ...) of the block's keys (0) or values (1). Rows on their way to the registers use
  // the first stage before it is filled.
  __device__ __forceinline__ T* columns(int which, int part) const {
    if (which == 0 ? !kHasKey : !kHasValue) return tile(which, part);
    return reinterpret_cast<T*>(memory + (which == 0 ? kKeyOffset : kValueOffset)) + part * kBlockM * kHeadDim;
  }
  __device__ __forceinline__ void declare() const {
    for (int i = 0; i < 2 * kStreams; ++i) shared_buffer(tile(i / kStreams, i % kStreams), kTileBytes);
    for (int i = 0; i < 2; ++i) shared_buffer(&info(i), kInfoBytes);
    shared_buffer(&owner(), kOwnerBytes);
    if (kHasKey) shared_buffer(columns(0, 0), kColumnsBytes);
    if (kHasValue) shared_buffer(columns(1, 0), kColumnsBytes);
  }
};

__device__ __forceinline__ ColumnsOwner columns_owner(const ColumnsParams& params, int block_n) {
  const AttentionParams& p = params.b.forward;
  const int heads = static_cast<int>(p.kv_heads);
  ColumnsOwner owner;
  int64_t block = blockIdx.x;
  owner.is_prefix = block < params.prefix_blocks;
  if (owner.is_prefix) {
    owner.splits = params.splits;
    owner.split = static_cast<int>(block % params.splits);
    block /= params.splits;
  } else {
    owner.splits = 1;
    owner.split = 0;
    block -= params.prefix_blocks;
  }
  const int tiles = owner.is_prefix ? params.prefix_tiles : params.sequence_tiles;
  owner.first = static_cast<int>(block % tiles) * block_n;
  owner.kv_head = static_cast<int>(block / tiles % heads);
  owner.index = static_cast<int>(block / tiles / heads);
  owner.rows = static_cast<int>(owner.is_prefix ? p.prefix_len : p.k_len);
  owner.length = owner.is_prefix ? static_cast<int>(valid_prefix_length(p, owner.index)) : owner.rows;
  return owner;
}

// One lane's part of the dot product of row `row` of two tiles, which kLanes lanes share.
template <typename T, int kHeadDim, int kLanes>
__device__ __forceinline__ float row_product(const T* x, const T* y, int row, int lane_of_row) {
  using Tile = SharedTile<kHeadDim>;
  float sum = 0.0f;
#pragma unroll 2
  for (int chunk = lane_of_row; chunk < Tile::kChunks; chunk += kLanes) {
    const int at = Tile::offset(row, chunk);
    sum += chunk_product(x + at, y + at);
  }
  return sum;
}

// Computes the sums of one block of columns. dvalue is skipped for segments whose gradient was not asked for.
template <typename Traits>
__global__ void __launch_bounds__(kBackwardThreads, 2) backward_columns(const ColumnsParams params) {
  using T = typename Traits::T;
  using Shared = ColumnsShared<Traits>;
  using Tiles = typename Shared::Tiles;
  constexpr int kHeadDim = Traits::kHeadDim, kTiles = Traits::kTiles;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr bool kWantsDKey = Traits::kWantsDKey, kWantsDValue = Traits::kWantsDValue, kGeneral = Traits::kGeneral;
  const AttentionParams& p = params.b.forward;
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int q_len = static_cast<int>(p.q_len);

  const Shared shared{shared_memory()};
  shared.declare();

  // The accumulators need the registers, so data that is seldom used is kept in shared memory.
  if (thread == 0) shared.owner() = columns_owner(params, kBlockN);
  __syncthreads();
  const ColumnsOwner& owner = shared.owner();
  const auto layout = [&] {
    return WarpLayout(thread / kWarpSize, (owner.rows - owner.first + Traits::kWarpN - 1) / Traits::kWarpN);
  };

  float dkey[kWantsDKey ? kTiles : 1][kHeadDim / 8][4];
  float dvalue[kWantsDValue ? kTiles : 1][kHeadDim / 8][4];
  if constexpr (kWantsDKey) clear(dkey);
  if constexpr (kWantsDValue) clear(dvalue);
  const auto adds_dvalue = [&] {
    return kWantsDValue && params.b.gradients[owner.is_prefix ? kDPrefixValue : kDValue].data != nullptr;
  };

  Tiles first_tiles;
  first_tiles.begin(p, owner);
  if (!first_tiles.done()) {
    const int warp_row = layout().resident * Traits::kWarpN;  // the warp's first row among the block's columns
    // The block's keys and values arrive by way of the stages.
    Resident<T, kHeadDim, kTiles, Traits::kKeyInRegisters> key;
    Resident<T, kHeadDim, kTiles, Traits::kValueInRegisters> value;
    const auto copy_columns = [&](const Operand& x, bool aligned, int stage, int dim) {
      const HeadRows source(x, owner.index, owner.kv_head, aligned);
#pragma unroll
      for (int part = 0; part < kBlockN / kBlockM; ++part) {
        copy_rows<T, kHeadDim, kBlockM, kBackwardThreads, false>(shared.columns(stage, part), source,
                                                                 owner.first + part * kBlockM, owner.length, dim);
      }
    };
    copy_columns(owner.is_prefix ? p.prefix_key : p.key,
                 owner.is_prefix ? params.aligned.prefix_key : params.aligned.key, 0, head_dim);
    if constexpr (kWantsDKey) {
      copy_columns(owner.is_prefix ? p.prefix_value : p.value,
                   owner.is_prefix ? params.aligned.prefix_value : params.aligned.value, 1, value_dim);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    const auto own_rows = [&](int stage) {
      return shared.columns(stage, warp_row / kBlockM) + warp_row % kBlockM * kHeadDim;
    };
    key.take(own_rows(0), lane);
    if constexpr (kWantsDKey) value.take(own_rows(1), lane);
    __syncthreads();

    float lse = 0.0f, delta = 0.0f;

    // Starts copying the current visit of `tiles`. lse and delta are loaded into registers, from which describe()
    // stores them when they have arrived.
    const auto fetch = [&](const Tiles& tiles, int stage) {
      const int first = tiles.first_query(), b = tiles.batch, h = tiles.head();
      copy_rows<T, kHeadDim, kBlockM, kBackwardThreads, true>(
          shared.tile(stage, 0), HeadRows(p.query, b, h, params.aligned.query), first, q_len, head_dim);
      copy_rows<T, kHeadDim, kBlockM, kBackwardThreads, true>(
          shared.tile(stage, 1), HeadRows(params.b.dout, b, h, params.aligned.dout), first, q_len, value_dim);
      if constexpr (Traits::kFusesDelta) {
        copy_rows<T, kHeadDim, kBlockM, kBackwardThreads, true>(
            shared.tile(stage, 2), HeadRows(p.out, b, h, params.aligned.out), first, q_len, value_dim);
      }
      ptx::cp_async_commit();
      if (thread < kBlockM && first + thread < q_len) {
        const int64_t row = (b * p.q_heads + h) * p.q_len + first + thread;
        lse = static_cast<const float*>(p.lse)[row];
        if constexpr (Traits::kFusesDelta) {
          delta = params.b.dlse != nullptr ? -static_cast<const float*>(params.b.dlse)[row] : 0.0f;
        } else if constexpr (kWantsDKey) {
          delta = params.delta[row];
        }
      }
    };
    const auto describe = [&](const Tiles& tiles, int stage) {
      typename Shared::Info& info = shared.info(stage);
      const int first = tiles.first_query();
      if (thread < kBlockM) {
        const int i = first + thread;
        const bool exists = i < q_len;
        info.reference[thread] = exists ? softmax_reference<kGeneral>(lse) : kInfinity;
        info.delta[thread] = exists ? delta : 0.0f;
        // Rows beyond the last query are skipped in blocks of 16. In a block with queries they continue the visible
        // columns, so that the block's first and last row give the columns that it sees.
        const Span visible = tiles.visible(p, i);
        const bool in_block = i / kCell * kCell < q_len;
        info.begin[thread] = in_block ? visible.begin : kNoColumn;
        info.end[thread] = in_block ? visible.end : 0;
      }
      if (kGeneral && thread == kBlockM) {
        info.first_query = first;
        info.queries = q_len - first;
        info.head = tiles.batch * static_cast<int>(p.q_heads) + tiles.head();
        info.segment = tiles.segment;
        info.mask = mask_row(p, tiles.batch, tiles.head(), first, tiles.segment);
        info.seed = p.dropout_threshold > 0 ? dropout_seed(p) : 0;
      }
      if (thread >= kBackwardThreads - kWarpSize) {
        Tiles next = tiles;
        next.next(p);
        if (lane == 0) info.next = next;
      }
    };

    // Adds rowsum(dout * out) to the stage's -dlse.
    const auto fuse_delta = [&](int stage) {
      constexpr int kLanes = kBackwardThreads / kBlockM;
      const int row = thread / kLanes;
      float sum = row_product<T, kHeadDim, kLanes>(shared.tile(stage, 1), shared.tile(stage, 2), row, thread % kLanes);
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (thread % kLanes == 0) shared.info(stage).delta[row] += sum;
    };

    const auto work = [&](int stage) {
      const typename Shared::Info& info = shared.info(stage);
      // Computed anew for every stage: the sums leave no registers to keep it in.
      const WarpLayout warps = layout();
      const int warp_column = owner.first + warps.resident * Traits::kWarpN;
#pragma unroll 1
      for (int block = warps.part; block < kBlockM / kCell; block += warps.parts) {
        const int row = block * kCell;
        const int first_begin = info.begin[row], last_begin = info.begin[row + kCell - 1];
        const int first_end = info.end[row], last_end = info.end[row + kCell - 1];
        ActiveTiles<kTiles, false> active;
        bool full[kTiles];
        bool any = false, all = true;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const int column = warp_column + tile * kCell;
          active.tile[tile] = column < last_end && column + kCell > first_begin;
          full[tile] = column >= last_begin && column + kCell <= first_end;
          any = any || active.tile[tile];
          all = all && active.tile[tile];
        }
        if (!any) continue;

        const auto step = [&](auto active_tiles) {
          const T* query = shared.tile(stage, 0) + row * kHeadDim;
          const T* dout = shared.tile(stage, 1) + row * kHeadDim;
          float s[kTiles][2][4], dp[kTiles][2][4];
          score(s, key, query, lane, active_tiles);
          if constexpr (kWantsDKey) score(dp, value, dout, lane, active_tiles);

          LaneQueries<true> queries;
#pragma unroll
          for (int u = 0; u < 4; ++u) {
            queries.reference[u] = info.reference[row + streamed_row(u)];
            queries.delta[u] = kWantsDKey ? info.delta[row + streamed_row(u)] : 0.0f;
          }
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            if (!active_tiles[tile]) continue;
            ScoreCell cell{};
            cell.first_key = warp_column + tile * kCell;
            if constexpr (kGeneral) {
              cell.first_query = info.first_query + row;
              cell.head = info.head;
              cell.segment = info.segment;
              cell.queries = info.queries - row;
              cell.seed = info.seed;
              cell.mask = info.mask;
              cell.move_mask(p.mask, row, cell.first_key);
            }
            uint32_t hidden = 0;
            if (!full[tile]) {
              hidden = hidden_elements<true>([&](int query, int key) {
                const int column = cell.first_key + key;
                return column < info.begin[row + query] || column >= info.end[row + query];
              });
            }
            finish_cell<kGeneral, true, kWantsDKey>(s[tile], dp[tile], queries, cell, params.scalars, p.mask, hidden);
          }
          if constexpr (kWantsDValue) {
            if (adds_dvalue()) accumulate<T, kHeadDim>(dvalue, s, dout, lane, active_tiles);
          }
          if constexpr (kWantsDKey) accumulate<T, kHeadDim>(dkey, dp, query, lane, active_tiles);
        };
        if constexpr (kTiles > 1 && kGeneral) {
          step(active);
        } else if (all) {
          step(ActiveTiles<kTiles, true>{});
        } else if constexpr (kTiles > 1) {
          step(active);
        }
      }
    };

    fetch(first_tiles, 0);
    describe(first_tiles, 0);
    bool more = true;
    for (int stage = 0; more; stage = 1 - stage) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      const Tiles& next = shared.info(stage).next;
      more = !next.done();
      if (more) fetch(next, 1 - stage);
      if constexpr (Traits::kFusesDelta) {
        fuse_delta(stage);
        __syncthreads();
      }
      work(stage);
      if (more) describe(next, 1 - stage);
    }
  }

  const WarpLayout warps = layout();
  const int warp_column = owner.first + warps.resident * Traits::kWarpN;
  const auto finish = [&](auto& sums, Gradient gradient, int dim, float* partial, float factor) {
    if (warps.parts > 1) {
      shared_buffer(shared.memory, kPartsBytes<kHeadDim, kTiles>);
      add_parts<kHeadDim, kTiles>(sums, warps, reinterpret_cast<float*>(shared.memory), lane);
    }
    if (warps.part > 0) return;
    if (owner.is_prefix && partial != nullptr) {
      const int64_t slot =
          (static_cast<int64_t>(owner.index) * p.kv_heads + owner.kv_head) * owner.splits + owner.split;
      store_sums<float, kHeadDim>(partial + slot * p.prefix_len * kHeadDim, kHeadDim, true, warp_column, owner.rows,
                                  kHeadDim, factor, sums, lane);
    } else {
      const Operand& x = params.b.gradients[gradient];
      T* head = static_cast<T*>(x.data) + owner.index * x.batch_stride + owner.kv_head * x.head_stride;
      store_sums<T, kHeadDim>(head, x.row_stride, params.aligned_pairs[gradient], warp_column, owner.rows, dim, factor,
                              sums, lane);
    }
  };
  if constexpr (kWantsDValue) {
    // The sum holds the kept P without dropout's factor, which is applied here.
    if (adds_dvalue())
      finish(dvalue, owner.is_prefix ? kDPrefixValue : kDValue, value_dim, params.partial_dvalue,
             params.scalars.rescale);
  }
  if constexpr (kWantsDKey)
    finish(dkey, owner.is_prefix ? kDPrefixKey : kDKey, head_dim, params.partial_dkey, params.scalars.scale);
}

}  // namespace prefix_kernels::cuda::sm80
