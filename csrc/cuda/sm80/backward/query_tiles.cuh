// The query tiles that a block of the columns kernel visits, one after another.
//
// A block owns columns of one segment: of the sequence of a batch row, or of a prefix, which any number of rows may
// name. It meets every (row, head of the group, query tile) that can see its columns. The visits of a prefix are shared
// out evenly among its splits, whatever rows name it.
#pragma once

#include "../../common/kv_tiles.cuh"

namespace prefix_kernels::cuda::sm80 {

// The columns of a segment that a block owns.
struct ColumnsOwner {
  bool is_prefix;
  int index;  // number of the batch row, or of the prefix
  int kv_head;
  int first;   // first column of the block, counted in the segment
  int rows;    // rows of the segment in memory
  int length;  // valid rows of the segment
  int split;   // number of this block's part of the prefix's visits
  int splits;
};

// The visits of one owner, and the current one. Plain data, so that it can be kept in shared memory. Every thread of a
// warp makes each call.
//
// A row that names a prefix in a slot is a pair, batch * slots + slot; for the sequence a pair is a batch row.
// kGeneral: there may be padding, or windows over prefixes.
template <int kBlockM, int kBlockN, bool kGeneral>
struct QueryTiles {
  ColumnsOwner owner;
  int group, tiles;  // heads of the group, query tiles of a head
  int visit, end;    // current visit among all of the owner's, and the first that is not this block's
  int pair, head_in_group, tile;
  int tile_begin, tile_end;        // tiles of the pair's row that see the block's columns
  int prefix_start, prefix_total;  // columns before the slot's, and all, among the row's prefixes
  int batch;
  int segment;  // number in philox.h: 0 the sequence, 1 + m the prefix in slot m

  __device__ __forceinline__ bool done() const { return visit >= end; }
  __device__ __forceinline__ int head() const { return owner.kv_head * group + head_in_group; }
  __device__ __forceinline__ int first_query() const { return tile * kBlockM; }

  __device__ __forceinline__ void begin(const AttentionParams& p, const ColumnsOwner& of) {
    owner = of;
    group = static_cast<int>(p.q_heads / p.kv_heads);
    tiles = static_cast<int>((p.q_len + kBlockM - 1) / kBlockM);
    const int of_pair = group * tiles;
    const int pairs = owner.first >= owner.length ? 0 : owner.is_prefix ? count_pairs(p) : 1;
    const int64_t all = static_cast<int64_t>(pairs) * of_pair;
    visit = static_cast<int>(all * owner.split / owner.splits);
    end = static_cast<int>(all * (owner.split + 1) / owner.splits);
    if (done()) return;
    head_in_group = visit % of_pair / tiles;
    tile = visit % tiles;
    enter_pair(p, owner.is_prefix ? find_pair(p, visit / of_pair) : owner.index);
    skip_unseen_tiles(p);
  }

  __device__ __forceinline__ void next(const AttentionParams& p) {
    ++visit;
    ++tile;
    skip_unseen_tiles(p);
  }

  // The columns of the segment that query i of the visited row sees, mask apart.
  __device__ __forceinline__ Span visible(const AttentionParams& p, int i) const {
    const int64_t position = i + row_query_offset(p, batch);
    Span seen{0, owner.length};
    if (!owner.is_prefix) {
      seen = to_span(visible_sequence(p, position));
    } else if (kGeneral) {
      seen.begin = max(0, static_cast<int>(visible_prefix_begin(p, position, prefix_total)) - prefix_start);
    }
    return kGeneral ? seen.within(shown(p)) : seen;
  }

 private:
  // The columns of the segment that the row's padding leaves.
  __device__ __forceinline__ Span shown(const AttentionParams& p) const {
    return owner.is_prefix ? shown_prefix(p, batch, segment - 1) : shown_sequence(p, batch);
  }

  // Moves on to the first visit from here that sees a column.
  __device__ __forceinline__ void skip_unseen_tiles(const AttentionParams& p) {
    while (visit < end) {
      if (tile < tile_begin) {
        visit += tile_begin - tile;
        tile = tile_begin;
      } else if (tile < tile_end) {
        return;
      } else {
        visit += tiles - tile;
        tile = 0;
        if (++head_in_group < group) continue;
        head_in_group = 0;
        if (visit < end) enter_pair(p, find_pair_from(p, pair + 1));
      }
    }
  }

  // Goes to a pair and finds the tiles of its row that see the block's columns.
  __device__ __forceinline__ void enter_pair(const AttentionParams& p, int next_pair) {
    pair = next_pair;
    const int slots = owner.is_prefix ? static_cast<int>(p.prefix_slots) : 1;
    batch = pair / slots;
    segment = owner.is_prefix ? 1 + pair % slots : 0;
    prefix_start = prefix_total = 0;
    Span columns{owner.first, min(owner.first + kBlockN, owner.length)};
    if (kGeneral) {
      columns = columns.within(shown(p));
    }
    const int last = columns.end - 1;
    KeyRange queries{0, p.q_len};
    if (columns.end <= columns.begin) {
      queries.end = 0;
    } else if (!owner.is_prefix) {
      queries = queries_of_sequence(p, columns.begin, last, row_query_offset(p, batch));
    } else if (kGeneral && p.window_includes_prefix) {
      const PrefixSlots row(p, batch);
      prefix_total = row.total;
      prefix_start = row.columns_before(p, batch, segment - 1);
      queries = queries_of_prefix(p, prefix_start + last, prefix_total, row_query_offset(p, batch));
    }
    tile_begin = static_cast<int>(queries.begin) / kBlockM;
    tile_end = queries.begin < queries.end ? (static_cast<int>(queries.end) + kBlockM - 1) / kBlockM : tile_begin;
  }

  // ---- pairs of the prefix; a warp looks at 32 at a time

  __device__ __forceinline__ static int all_pairs(const AttentionParams& p) {
    return static_cast<int>(p.batch * p.prefix_slots);
  }

  __device__ __forceinline__ unsigned matches(const AttentionParams& p, int first) const {
    const int candidate = first + static_cast<int>(threadIdx.x) % kWarpSize;
    return __ballot_sync(~0u, candidate < all_pairs(p) && p.prefix_ids[candidate] == owner.index);
  }

  __device__ __forceinline__ int count_pairs(const AttentionParams& p) const {
    if (p.prefix_slots == 0) return 0;  // ids of shape [batch, 0]: no row names a prefix
    if (p.prefix_ids == nullptr) return p.num_prefixes == 1 ? static_cast<int>(p.batch) : 1;
    int count = 0;
    for (int first = 0; first < all_pairs(p); first += kWarpSize) count += __popc(matches(p, first));
    return count;
  }

  // The pair with this rank among the prefix's.
  __device__ __forceinline__ int find_pair(const AttentionParams& p, int rank) const {
    if (p.prefix_ids == nullptr) return p.num_prefixes == 1 ? rank : owner.index;
    int first = 0;
    unsigned found = matches(p, first);
    while (rank >= __popc(found)) {
      rank -= __popc(found);
      first += kWarpSize;
      found = matches(p, first);
    }
    for (; rank > 0; --rank) found &= found - 1;
    return first + __ffs(static_cast<int>(found)) - 1;
  }

  // The first pair from here on; there is one.
  __device__ __forceinline__ int find_pair_from(const AttentionParams& p, int first) const {
    if (p.prefix_ids == nullptr) return first;
    unsigned found = matches(p, first);
    while (found == 0) {
      first += kWarpSize;
      found = matches(p, first);
    }
    return first + __ffs(static_cast<int>(found)) - 1;
  }
};

}  // namespace prefix_kernels::cuda::sm80
