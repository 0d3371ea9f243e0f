// The geometry of one step of the forward pass: keys in the rows, queries in the SIMD lanes.
//
// A step is a tile of up to kBlockK keys from one segment times a block of up to kBlockQ queries. Where the tile
// crosses a diagonal, cells of kCell keys that a vector of queries cannot see are not visited.
#pragma once

#include "../common/mask.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// attn_mask as numbers to add to the scores of a step.
template <class T>
struct ForwardTileBias {
  enum Kind { kNone, kPerKey, kFull };
  Kind kind = kNone;
  T* data;        // [count] per key, or [count][kBlockQ]
  int64_t first;  // first row of the tile, trimmed of rows at its ends hidden from every lane; a multiple of kCell
  int count;

  // Rows [first, first + count) of the segment; buffer holds kBlockK * kBlockQ.
  ForwardTileBias(const QueryBlock& block, const Segment& segment, int64_t first, int count, T* buffer)
      : data(buffer), first(first), count(count) {
    if (!segment.masked) return;
    const MaskOperand& mask = block.params->mask;
    const int64_t column = segment.mask_column + first;
    dispatch_mask(mask, [&](auto* tag) {
      using Src = std::remove_pointer_t<decltype(tag)>;
      const auto row_of = [&](int lane) { return mask_row<Src>(mask, block, lane) + column * mask.column_stride; };
      if (shares_mask_row(mask, block)) {
        fill_per_key(row_of(0), mask.column_stride);
      } else {
        fill_full<Src>(row_of, block.count, mask.column_stride);
      }
    });
  }

 private:
  static constexpr T kHidden = -std::numeric_limits<T>::infinity();

  // Trims the tile to rows [begin, end) of those that were filled.
  void trim(int begin, int end, int row_size) {
    begin -= begin % kCell;
    data += begin * row_size;
    first += begin;
    count = end > begin ? end - begin : 0;
  }

  template <class Src>
  void fill_per_key(const Src* row, int64_t stride) {
    int begin = count, end = 0;
    bool nonzero = false;
    for (int r = 0; r < count; ++r) {
      data[r] = static_cast<T>(to_float(row[r * stride]));
      nonzero = nonzero || data[r] != 0;
      if (data[r] != kHidden) {
        begin = begin < r ? begin : r;
        end = r + 1;
      }
    }
    trim(begin, end, 1);
    kind = nonzero ? kPerKey : kNone;
  }

  template <class Src, class RowOf>
  void fill_full(RowOf row_of, int lanes, int64_t stride) {
    const int64_t padded = whole_vectors<T>(lanes);
    if (stride == 1) {
      pack_lanes<T, Src>(lanes, count, T(1), row_of, data, kBlockQ);
    } else {
      for (int l = 0; l < padded; ++l)
        for (int r = 0; r < count; ++r)
          data[r * kBlockQ + l] = l < lanes ? static_cast<T>(to_float(row_of(l)[r * stride])) : T(0);
    }
    int begin = count, end = 0;
    for (int r = 0; r < count; ++r) {
      bool visible = false;
      for (int l = 0; l < lanes; ++l) visible = visible || data[r * kBlockQ + l] != kHidden;
      if (visible) {
        begin = begin < r ? begin : r;
        end = r + 1;
      }
    }
    trim(begin, end, kBlockQ);
    kind = kFull;
  }
};

// The part of a tile that is computed: rectangles of rows times vectors, and for each vector of lanes its rows.
template <class T>
struct ForwardTilePlan {
  static constexpr int kMaxVectors = kBlockQ / kLanes<T>;

  struct Group {
    int row_begin, row_end, vector_begin, vector_end;
  };
  struct Rows {
    int begin, end;            // computed rows, whole cells
    int core_begin, core_end;  // computed rows that every lane sees; the others need the lanes' ranges
  };

  Group groups[kBlockK / kCell];
  int num_groups = 0;
  Rows rows[kMaxVectors];
  int vectors;

  // Rows [first, first + count) of the segment, first a multiple of kCell.
  ForwardTilePlan(const QueryBlock& block, const Segment& segment, int64_t first, int count)
      : vectors(block.vectors<T>()) {
    bool whole = true;
    for (int v = 0; v < vectors; ++v) {
      const int last_lane = v * kLanes<T> + kLanes<T> - 1;
      Rows hull = clip(block.visible(segment, v * kLanes<T>), first, count);
      if (block.one_head) {
        const Rows last = clip(block.visible(segment, last_lane), first, count);
        hull = {hull.begin, last.end, last.begin, hull.end};
      } else {
        for (int l = v * kLanes<T> + 1; l <= last_lane; ++l) {
          const Rows lane = clip(block.visible(segment, l), first, count);
          if (lane.begin > hull.core_begin) hull.core_begin = lane.begin;
          if (lane.end < hull.core_end) hull.core_end = lane.end;
        }
        hull.begin = 0;
        hull.end = count;
      }
      if (hull.begin < hull.end) {
        hull.begin -= hull.begin % kCell;
        const int end = (hull.end + kCell - 1) / kCell * kCell;
        hull.end = end < count ? end : count;
        if (hull.core_begin >= hull.core_end) hull.core_begin = hull.core_end = hull.end;
      } else {
        hull = {0, 0, 0, 0};
      }
      whole = whole && hull.begin == 0 && hull.end == count;
      rows[v] = hull;
    }
    if (whole) {
      groups[num_groups++] = {0, count, 0, vectors};
      return;
    }
    for (int r = 0; r < count; r += kCell) {
      int begin = 0, end = vectors;
      while (begin < end && (rows[begin].begin > r || rows[begin].end <= r)) ++begin;
      while (begin < end && (rows[end - 1].begin > r || rows[end - 1].end <= r)) --end;
      if (begin == end) continue;
      const int row_end = r + kCell < count ? r + kCell : count;
      Group* previous = num_groups > 0 ? &groups[num_groups - 1] : nullptr;
      if (previous != nullptr && previous->row_end == r && previous->vector_begin == begin &&
          previous->vector_end == end)
        previous->row_end = row_end;
      else
        groups[num_groups++] = {r, row_end, begin, end};
    }
  }

 private:
  static Rows clip(KeyRange range, int64_t first, int count) {
    const int begin = static_cast<int>(clamp_to(range.begin - first, 0, count));
    const int end = static_cast<int>(clamp_to(range.end - first, 0, count));
    return {begin, end, begin, end};
  }
};

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
