// The columns that the rows of a tile attend to: a batch row's prefixes, then its sequence, cut into cells of 16.
//
//   slot 0          slot 1          sequence
//   |----|----|-    |----|--        |----|----|----|----|-        cells; each segment begins with a new one
//
// A cell lies in one segment, so where its rows are, which of them exist and who sees them is decided once per cell and
// never per element, and the seam may fall anywhere in a tile. Every slot has the cells of the row's longest prefix;
// those of a shorter one are empty. Only cells between the first and the last that some row of the tile sees are
// visited, one after another: neither padding nor a window's gap between prefix and sequence costs anything. Tiles are
// runs of visited cells, and a prefix of 16 tokens takes 16 columns of one.
#pragma once

#include "padding.cuh"
#include "rows.cuh"

namespace prefix_kernels::cuda {

struct Cell {
  int segment;  // 0: the sequence; 1 + m: the prefix in slot m
  int first;    // the cell's first column, counted from the start of the segment
  int count;    // columns that exist, of 16
  int before;   // columns of the row's prefixes before the cell's, if a window counts them; 0 in the sequence
};

// The prefixes of one batch row.
struct PrefixSlots {
  int slots;           // prefix slots; 0 without any prefix
  int cells_per_slot;  // cells of the longest prefix
  int total;           // columns that exist in all slots together
  bool full;           // every cell has 16 columns
  int only_prefix;     // number of the prefix, if there is a single slot
  int only_length;     // length of that prefix

  __device__ __forceinline__ PrefixSlots(const AttentionParams& p, int64_t batch)
      : slots(static_cast<int>(p.prefix_slots)),
        cells_per_slot(0),
        total(0),
        full(true),
        only_prefix(-1),
        only_length(0) {
    int longest = 0;
#pragma unroll 1
    for (int m = 0; m < slots; ++m) {
      only_prefix = static_cast<int>(prefix_of_row(p, batch, m));
      only_length = static_cast<int>(valid_prefix_length(p, only_prefix));
      full = full && only_length % kCell == 0 && (m == 0 || only_length == longest);
      longest = max(longest, only_length);
      total += only_length;
    }
    cells_per_slot = (longest + kCell - 1) / kCell;
  }

  __device__ __forceinline__ int prefix(const AttentionParams& p, int64_t batch, int slot) const {
    return slots == 1 ? only_prefix : static_cast<int>(prefix_of_row(p, batch, slot));
  }

  __device__ __forceinline__ int length(const AttentionParams& p, int64_t batch, int slot) const {
    return slots == 1 ? only_length : static_cast<int>(valid_prefix_length(p, prefix_of_row(p, batch, slot)));
  }

  // The number of cells before a column of the mask, in which every slot has prefix_len columns. `more` is added to the
  // column first: kCell - 1 counts a cell that has begun, 0 does not.
  __device__ __forceinline__ int cells_before(const AttentionParams& p, int mask_column, int more) const {
    if (cells_per_slot == 0) return 0;
    const int slot = mask_column / static_cast<int>(p.prefix_len);
    const int in_slot = mask_column - slot * static_cast<int>(p.prefix_len);
    return slot * cells_per_slot + min((in_slot + more) / kCell, cells_per_slot);
  }

  // The number of columns that exist in the slots before this one.
  __device__ __forceinline__ int columns_before(const AttentionParams& p, int64_t batch, int slot) const {
    int columns = 0;
#pragma unroll 1
    for (int m = 0; m < slot; ++m) columns += length(p, batch, m);
    return columns;
  }
};

// The cells that queries at positions from `first` to `last` visit.
struct VisitedCells {
  int64_t batch;
  PrefixSlots prefixes;
  int prefix_begin;    // number of the first visited cell of the prefixes
  int prefix_cells;    // visited cells of the prefixes, which come first
  int sequence_begin;  // the first column of the sequence, a multiple of 16
  int count;           // all visited cells

  __device__ __forceinline__ VisitedCells(const AttentionParams& p, int64_t batch_row, int64_t first, int64_t last)
      : batch(batch_row), prefixes(p, batch_row), prefix_begin(0) {
    const Span shown = shown_prefixes(p, batch_row);
    if (prefixes.slots == 1) prefix_begin = static_cast<int>(visible_prefix_begin(p, first, prefixes.total)) / kCell;
    prefix_begin = max(prefix_begin, prefixes.cells_before(p, shown.begin, 0));
    prefix_cells = max(0, prefixes.cells_before(p, shown.end, kCell - 1) - prefix_begin);
    const Span sequence =
        Span{to_span(visible_sequence(p, first)).begin, to_span(visible_sequence(p, last)).end}.within(
            shown_sequence(p, batch_row));
    sequence_begin = sequence.begin / kCell * kCell;
    count = prefix_cells + max(0, (sequence.end - sequence_begin + kCell - 1) / kCell);
  }

  // The i-th visited cell.
  __device__ __forceinline__ Cell cell(const AttentionParams& p, int i) const {
    if (i >= prefix_cells) {
      const int column = sequence_begin + (i - prefix_cells) * kCell;
      return {0, column, min(kCell, static_cast<int>(p.k_len) - column), 0};
    }
    const int from_first = prefix_begin + i;
    const int slot = prefixes.slots == 1 ? 0 : from_first / prefixes.cells_per_slot;
    const int column = (from_first - slot * prefixes.cells_per_slot) * kCell;
    const int before = p.window_includes_prefix ? prefixes.columns_before(p, batch, slot) + column : 0;
    return {1 + slot, column, max(0, min(kCell, prefixes.length(p, batch, slot) - column)), before};
  }
};

// The columns that one query sees.
struct QueryView {
  Span sequence;     // columns of the sequence
  int prefix_begin;  // first visible column, counted over the existing columns of the row's prefixes

  __device__ __forceinline__ QueryView(const AttentionParams& p, const PrefixSlots& prefixes, int64_t position)
      : sequence(to_span(visible_sequence(p, position))),
        prefix_begin(static_cast<int>(visible_prefix_begin(p, position, prefixes.total))) {}

  // The columns of a cell that the query sees, counted from the cell's first.
  __device__ __forceinline__ Span in(const Cell& cell) const {
    if (cell.segment == 0) return {sequence.begin - cell.first, min(cell.count, sequence.end - cell.first)};
    return {prefix_begin - cell.before, cell.count};
  }
};

// Copies tiles of visited cells, of either key or value, into shared memory. All threads of the block take part.
template <typename T, int kHeadDim, int kThreads>
class TileLoader {
  static constexpr int kLanes = kLanesPerRow<kHeadDim>;
  static constexpr int kRowsPerPass = kThreads / kLanes;
  static_assert(kRowsPerPass % kCell == 0, "the threads of a warp work on one cell");

 public:
  // `aligned_sequence`, `aligned_prefix`: results of has_aligned_chunks.
  __device__ __forceinline__ TileLoader(const Operand& sequence, bool aligned_sequence, const Operand& prefix,
                                        bool aligned_prefix, int64_t batch, int kv_head, int thread)
      : sequence_(sequence),
        prefix_(prefix),
        aligned_sequence_(aligned_sequence),
        aligned_prefix_(aligned_prefix),
        kv_head_(kv_head),
        row_(thread / kLanes),
        lane_(thread % kLanes) {}

  // Copies the visited cells [first, first + kCells), as many as there are. `head_dim`: that of the operands.
  template <int kCells>
  __device__ __forceinline__ void load(T* tile, const AttentionParams& p, const VisitedCells& cells, int first,
                                       int head_dim) const {
    const bool in_sequence = first >= cells.prefix_cells;
    const bool in_prefix = cells.prefixes.slots == 1 && first + kCells <= cells.prefix_cells;
    if (in_sequence ? aligned_sequence_ : in_prefix && aligned_prefix_) {
      const HeadRows segment(in_sequence ? sequence_ : prefix_, in_sequence ? cells.batch : cells.prefixes.only_prefix,
                             kv_head_, true);
      const int column = in_sequence ? cells.sequence_begin + (first - cells.prefix_cells) * kCell
                                     : (cells.prefix_begin + first) * kCell;
      load_run<kCells>(tile, segment, column, in_sequence ? static_cast<int>(p.k_len) : cells.prefixes.only_length,
                       head_dim);
      return;
    }
#pragma unroll 1
    for (int tile_row = row_; tile_row < kCells * kCell; tile_row += kRowsPerPass) {
      const int i = first + tile_row / kCell;
      if (i >= cells.count) break;
      const Cell cell = cells.cell(p, i);
      const int in_cell = tile_row % kCell;
      const bool valid = in_cell < cell.count;
      if (cell.count == 0) continue;
      const bool in_sequence = cell.segment == 0;
      const int64_t owner = in_sequence ? cells.batch : cells.prefixes.prefix(p, cells.batch, cell.segment - 1);
      const HeadRows rows(in_sequence ? sequence_ : prefix_, owner, kv_head_,
                          in_sequence ? aligned_sequence_ : aligned_prefix_);
      copy_row<T, kHeadDim>(tile, tile_row, rows.row(cell.first + (valid ? in_cell : 0)), rows.dtype,
                            rows.aligned_chunks, lane_, head_dim, valid);
    }
  }

 private:
  // Copies a tile that lies in one segment of `length` rows, so that its rows are consecutive. Rows that do not exist
  // become zero, up to the tile's end.
  template <int kCells>
  __device__ __forceinline__ void load_run(T* tile, const HeadRows& segment, int first_column, int length,
                                           int head_dim) const {
    if (!goes_async<T>(segment.dtype, true)) {
      convert_rows<T, kHeadDim, kCells * kCell, kThreads>(tile, segment, first_column, length, row_ * kLanes + lane_,
                                                          head_dim);
      return;
    }
    const int64_t row_bytes = segment.row_stride * static_cast<int64_t>(sizeof(T));
    const char* row = segment.data + (first_column + row_) * row_bytes;
    T* const first = pin_to_register(tile + SharedTile<kHeadDim>::offset(row_, lane_));
    const int rows = length - first_column - row_;
#pragma unroll
    for (int i = 0; i < kCells * kCell; i += kRowsPerPass) {
      copy_chunks<T, kHeadDim>(first + i * kHeadDim, row, kDTypeOf<T>, true, lane_, head_dim, i < rows);
      row += kRowsPerPass * row_bytes;
    }
  }

  const Operand& sequence_;
  const Operand& prefix_;
  bool aligned_sequence_;
  bool aligned_prefix_;
  int kv_head_;
  int row_;
  int lane_;
};

}  // namespace prefix_kernels::cuda
