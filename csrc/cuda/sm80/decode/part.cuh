// The work of one block of the decode kernel: a part of the columns of a prefix or sequence, for the rows that need it.
#pragma once

#include "../../common/check_range.cuh"
#include "entries.cuh"
#include "params.cuh"

namespace prefix_kernels::cuda::sm80 {

// A part of the columns of a prefix or of a batch row's sequence.
struct DecodePart {
  bool is_prefix;
  int entry;      // the batch row, or the first of the (batch row, slot) pairs that are served
  int entries;    // how many are served
  int first_row;  // the block's first row among those of its entries
  int row_count;
  int part, parts;  // its number, and the number of parts that the columns are cut into
  int kv_head;
  int64_t owner;    // the prefix or batch row whose keys are read
  int begin, end;   // the part's columns
  int columns_end;  // the end of all parts' columns
};

// The place of a block in the grid; `entries` is still to be found.
template <typename Traits>
__device__ __forceinline__ DecodePart part_of_block(const DecodeParams& params, int block_in_grid) {
  const AttentionParams& p = params.attention;
  DecodePart of;
  of.is_prefix = block_in_grid < params.prefix_blocks;
  const int block = of.is_prefix ? block_in_grid : block_in_grid - params.prefix_blocks;
  of.first_row = block % params.blocks_per_entry * Traits::kRows;
  const int number = block / params.blocks_per_entry;
  of.parts = of.is_prefix ? params.prefix_parts : params.sequence_parts;
  const int entries = static_cast<int>(p.batch) * (of.is_prefix ? static_cast<int>(p.prefix_slots) : 1);
  of.entry = number % entries;
  of.part = number / entries % of.parts;
  of.kv_head = number / entries / of.parts;
  return of;
}

// Sets the owner of the columns and the part's share of those that some row of the block may see.
__device__ __forceinline__ void find_columns(const AttentionParams& p, const int* entries, DecodePart& of) {
  const int slots = static_cast<int>(p.prefix_slots);
  const int batch = of.is_prefix ? of.entry / slots : of.entry;
  of.owner = of.is_prefix ? prefix_of_row(p, batch, of.entry % slots) : batch;
  Span columns;
  if (of.is_prefix) {
    columns = shown_to_any(p, entries, of.entries, static_cast<int>(valid_prefix_length(p, of.owner)));
  } else {
    const int64_t first = row_query_offset(p, batch);
    columns =
        Span{to_span(visible_sequence(p, first)).begin, to_span(visible_sequence(p, first + p.q_len - 1)).end}.within(
            shown_sequence(p, batch));
  }
  columns.begin = columns.begin / kCell * kCell;
  columns.end = max(columns.begin, columns.end);
  const int cells_per_part = ((columns.end - columns.begin + kCell - 1) / kCell + of.parts - 1) / of.parts;
  of.begin = columns.begin + of.part * cells_per_part * kCell;
  of.end = min(columns.end, of.begin + cells_per_part * kCell);
  of.columns_end = columns.end;
}

// Row `number` of the block: which query it is, and which columns of the prefix or sequence it sees.
__device__ __forceinline__ DecodeRow describe_row(const DecodeParams& params, const DecodePart& of, const int* entries,
                                                  int number, int group) {
  const AttentionParams& p = params.attention;
  const int slots = static_cast<int>(p.prefix_slots);
  const int number_of_row = of.first_row + number;
  const int of_entry = number_of_row % params.rows_per_entry, taken = entries[number_of_row / params.rows_per_entry];
  DecodeRow row;
  row.batch = of.is_prefix ? taken / slots : taken;
  row.query = of_entry / group;
  row.head = of.kv_head * group + of_entry % group;
  row.segment = of.is_prefix ? 1 + taken % slots : 0;
  if (of.is_prefix) check_prefixes_of_row(p, row.batch);
  const PrefixSlots prefixes(p, row.batch);
  const QueryView view(p, prefixes, row.query + row_query_offset(p, row.batch));
  row.seen = view.sequence;
  if (of.is_prefix) {
    const int before = view.prefix_begin > 0 ? prefixes.columns_before(p, row.batch, row.segment - 1) : 0;
    row.seen = {view.prefix_begin - before, of.columns_end};
  }
  return row;
}

}  // namespace prefix_kernels::cuda::sm80
