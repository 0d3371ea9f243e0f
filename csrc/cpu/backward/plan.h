// The division of the backward pass into tasks, and the memory of its partial sums.
//
// A task is one (part of the keys, kv head, batch row, range of query blocks), mostly with one part. Tasks in this
// order are cut into chunks, which threads take as they become free. A chunk adds the prefix gradients of its tasks
// into partial tiles of its own, one per (prefix, kv head) that it visits. Heads change slowest, so that most partial
// tiles have one owner and no copy per batch row exists. If even tasks of single blocks are fewer than keep the threads
// busy, the keys of each segment fall into parts too, each with tasks and a dquery of its own. A second pass adds the
// partial sums in the order of the chunks and parts, so the result does not depend on which thread ran what.
#pragma once

#include "../common/column_parts.h"
#include "../common/workspace.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// The gradients that a call asks for, and the parts of the work that they need.
struct Needs {
  bool dquery, dkey, dvalue, dprefix_key, dprefix_value;

  explicit Needs(const BackwardParams& p)
      : dquery(p.needs(kDQuery)),
        dkey(p.needs(kDKey)),
        dvalue(p.needs(kDValue)),
        dprefix_key(p.needs(kDPrefixKey)),
        dprefix_value(p.needs(kDPrefixValue)) {}

  bool visits_sequence() const { return dquery || dkey || dvalue; }
  bool prefix() const { return dprefix_key || dprefix_value; }
  // Gradients of a segment that are asked for; its need of ds; its need of a visit.
  bool key(const Segment& s) const { return s.is_prefix() ? dprefix_key : dkey; }
  bool value(const Segment& s) const { return s.is_prefix() ? dprefix_value : dvalue; }
  bool ds(const Segment& s) const { return dquery || key(s); }
  bool visits(const Segment& s) const { return ds(s) || value(s); }
  bool any_ds() const { return dquery || dkey || dprefix_key; }
  bool any_key() const { return dkey || dprefix_key; }
  bool any_value() const { return dvalue || dprefix_value; }
};

// A range of query blocks of one head and batch row, over one part of its keys.
struct BackwardTask {
  int64_t kv_head, batch, split, part;
};

template <class T>
struct BackwardPlan {
  const BackwardParams& params;
  Needs needs;
  BlockPartition partition;
  // The row strides of partial tiles: head_dim in whole vectors, of dQ and dK', and value_dim likewise, of dV'.
  int64_t padded_depth, padded_value;
  int64_t splits = 1;  // ranges that the query blocks of one head fall into
  int64_t passes = 1;  // ranges of query blocks that a task processes one after another
  int64_t parts = 1;   // parts of the keys of every segment; more than one only if each split is one block
  int64_t tasks = 0;   // tasks of all parts, one part after another
  int64_t chunks = 0;
  int64_t prefix_tiles = 0;

  Buffer<int32_t> tile_of;               // [chunks][kv_heads * num_prefixes] -> partial tile, or -1
  Buffer<T> dprefix_key, dprefix_value;  // [prefix_tiles][rows of a part][padded_depth or padded_value]
  Buffer<T> dkey, dvalue;  // [splits][batch * kv_heads][k_len][padded_depth or padded_value] when splits > 1
  Buffer<T> dquery;        // [parts][batch * kv_heads][blocks][kBlockQ][padded_depth] when parts > 1

  BackwardPlan(const BackwardParams& backward, int threads)
      : params(backward),
        needs(backward),
        partition(backward.forward),
        padded_depth(whole_vectors<T>(backward.forward.head_dim)),
        padded_value(whole_vectors<T>(backward.forward.value_dim)) {
    constexpr int64_t kTasksPerThread = 4;
    constexpr int64_t kPartialBytes = int64_t{32} << 20;  // limit of partial sums, exceeded only to occupy every thread
    const AttentionParams& p = params.forward;
    const int64_t heads = p.batch * p.kv_heads;
    if (heads == 0 || partition.count == 0) return;
    const int64_t wanted = kTasksPerThread * threads;
    const int64_t row_bytes = (padded_depth > padded_value ? padded_depth : padded_value) * int64_t{sizeof(T)};
    const int64_t sequence_bytes = heads * p.k_len * row_bytes;
    splits = heads < wanted ? ceil_div(wanted, heads) : 1;
    if ((needs.dkey || needs.dvalue) && splits * sequence_bytes > kPartialBytes) splits = ceil_div(threads, heads);
    if (splits > partition.count) splits = partition.count;
    passes = ceil_div(ceil_div(partition.count, splits), max_pass_blocks());
    if (splits == partition.count) {
      const int64_t visited = (needs.dquery || needs.prefix() ? p.prefix_slots * p.prefix_len : 0) +
                              (needs.visits_sequence() ? p.k_len : 0);
      parts = column_parts(heads * splits, threads, visited);
    }
    tasks = heads * splits * parts;
    chunks = parts * clamp_to(wanted / parts, 1, tasks / parts);  // no chunk has tasks of two parts
    if (needs.prefix()) {
      assign_prefix_tiles();
      const int64_t least_chunks = parts * clamp_to(ceil_div(threads, parts), 1, tasks / parts);
      if (prefix_tiles * prefix_tile_rows() * row_bytes > kPartialBytes && chunks > least_chunks) {
        chunks = least_chunks;
        assign_prefix_tiles();
      }
      if (needs.dprefix_key) dprefix_key.allocate(prefix_tiles * prefix_tile_rows() * padded_depth);
      if (needs.dprefix_value) dprefix_value.allocate(prefix_tiles * prefix_tile_rows() * padded_value);
    }
    if (splits > 1) {
      if (needs.dkey) dkey.allocate(splits * heads * p.k_len * padded_depth);
      if (needs.dvalue) dvalue.allocate(splits * heads * p.k_len * padded_value);
    }
    if (parts > 1 && needs.dquery) dquery.allocate(parts * query_blocks() * kBlockQ * padded_depth);
  }

  BackwardTask task(int64_t index) const {
    const int64_t batch = params.forward.batch, of_part = index % (tasks / parts);
    return {of_part / splits / batch, of_part / splits % batch, of_part % splits, index / (tasks / parts)};
  }
  int64_t chunk_begin(int64_t chunk) const { return tasks * chunk / chunks; }
  // The rows of a segment of `length` rows that belong to a part, in whole tiles.
  KeyRange part_rows(int64_t length, int64_t part) const {
    const auto bound = [&](int64_t i) {
      const int64_t row = length * i / parts;
      return i == parts ? length : row - row % kBlockK;
    };
    return {bound(part), bound(part + 1)};
  }
  // The query blocks of one pass of a task.
  KeyRange blocks(const BackwardTask& t, int64_t pass) const {
    const int64_t all = BlockPartition(params.forward, row_queries(params.forward, t.batch)).count;
    const int64_t begin = all * t.split / splits, count = all * (t.split + 1) / splits - begin;
    return {begin + count * pass / passes, begin + count * (pass + 1) / passes};
  }
  int64_t max_blocks() const { return ceil_div(ceil_div(partition.count, splits), passes); }
  int64_t prefix_tile_rows() const {
    const int64_t rows = params.forward.prefix_len;
    return parts > 1 ? clamp_to(ceil_div(rows, parts) + kBlockK, 0, rows) : rows;
  }
  int32_t prefix_tile(int64_t chunk, int64_t kv_head, int64_t prefix) const {
    return tile_of[(chunk * params.forward.kv_heads + kv_head) * params.forward.num_prefixes + prefix];
  }
  // The first row of a task's head in dkey and dvalue.
  int64_t sequence_row(const BackwardTask& t) const {
    const AttentionParams& p = params.forward;
    return ((t.split * p.batch + t.batch) * p.kv_heads + t.kv_head) * p.k_len;
  }
  // All heads' query blocks, numbered by (batch row, key head, block).
  int64_t query_blocks() const { return params.forward.batch * params.forward.kv_heads * partition.count; }
  // The memory where a part sums the dquery of query block `index`, if parts > 1.
  T* part_dquery(int64_t part, int64_t index) const {
    return dquery.data() + (part * query_blocks() + index) * kBlockQ * padded_depth;
  }

 private:
  // The most query blocks of a pass: bounds a thread's scratch memory. If no sums wait for the next pass, a block's
  // rows stay in the cache.
  int64_t max_pass_blocks() const {
    constexpr int64_t kMaxBlocks = 128, kCachedBytes = int64_t{512} << 10;
    if (needs.visits_sequence()) return kMaxBlocks;
    const int64_t block_bytes = kBlockQ * (padded_depth + padded_value) * static_cast<int64_t>(sizeof(T));
    return clamp_to(kCachedBytes / block_bytes, 1, kMaxBlocks);
  }

  void assign_prefix_tiles() {
    const AttentionParams& p = params.forward;
    const int64_t pairs = p.kv_heads * p.num_prefixes;
    tile_of.allocate(chunks * pairs);
    prefix_tiles = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t i = 0; i < pairs; ++i) tile_of[chunk * pairs + i] = -1;
      for (int64_t i = chunk_begin(chunk); i < chunk_begin(chunk + 1); ++i) {
        const BackwardTask t = task(i);
        for (int64_t m = 0; m < p.prefix_slots; ++m) {
          const int64_t n = prefix_of_row(p, t.batch, m);
          if (n < 0) continue;
          int32_t& tile = tile_of[chunk * pairs + t.kv_head * p.num_prefixes + n];
          if (tile < 0) tile = static_cast<int32_t>(prefix_tiles++);
        }
      }
    }
  }
};

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
