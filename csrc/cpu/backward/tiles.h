// The geometry of one step of the backward pass: queries in the rows, keys in the SIMD lanes.
//
// A step is a block of up to kBlockQ queries times a tile of up to kBlockK keys from one segment. Where the tile
// crosses a diagonal, vectors of keys that a cell of kCell queries cannot see are not visited. Lanes behind the last
// key are arbitrary: no product reads them.
#pragma once

#include "../common/mask.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// The distance of rows in a step's tiles, and in keys and values with head_dim in the rows. It is not a power of two,
// whose rows would share a few sets of the cache.
inline constexpr int kKeyStride = kBlockK + kCell;

// attn_mask as numbers to add to the scores of a step.
template <class T>
struct BackwardTileBias {
  enum Kind { kNone, kPerKey, kFull };
  Kind kind = kNone;
  T* data;         // [kKeyStride], or [kBlockQ][kKeyStride]
  KeyRange shown;  // smallest range of the tile's keys that contains everything some query sees

  // Keys [first, first + count) of the segment; buffer holds kBlockQ * kKeyStride.
  BackwardTileBias(const QueryBlock& block, const Segment& segment, int64_t first, int count, T* buffer)
      : data(buffer), shown{0, count} {
    if (!segment.masked) return;
    const MaskOperand& mask = block.params->mask;
    const bool shared = shares_mask_row(mask, block);
    const int64_t padded = whole_vectors<T>(count);
    Int<T> seen[kBlockK / kLanes<T>] = {}, nonzero{};
    dispatch_mask(mask, [&](auto* tag) {
      using Src = std::remove_pointer_t<decltype(tag)>;
      for (int q = 0; q < (shared ? 1 : block.count); ++q) {
        T* const row = data + q * kKeyStride;
        copy_mask_row(mask_row<Src>(mask, block, q) + (segment.mask_column + first) * mask.column_stride,
                      mask.column_stride, count, row);
        for (int64_t k = 0; k < padded; k += kLanes<T>) {
          const Vec<T> x = load(row + k);
          seen[k / kLanes<T>] |= x != -std::numeric_limits<T>::infinity();
          nonzero |= x != 0;
        }
      }
    });
    if (any_lane<T>(nonzero)) kind = shared ? kPerKey : kFull;
    shown = {count, 0};
    for (int k = 0; k < count; ++k) {
      if (seen[k / kLanes<T>][k % kLanes<T>] == 0) continue;
      if (shown.begin > k) shown.begin = k;
      shown.end = k + 1;
    }
  }

 private:
  // Copies a row of the mask, followed by zeros up to a whole vector.
  template <class Src>
  static void copy_mask_row(const Src* src, int64_t stride, int count, T* row) {
    int k = 0;
    if (stride == 1)
      for (; k + kLanes<T> <= count; k += kLanes<T>) store(row + k, load_as<T, Src>(src + k));
    for (; k < count; ++k) row[k] = static_cast<T>(to_float(src[k * stride]));
    for (; k % kLanes<T> != 0; ++k) row[k] = 0;
  }
};

// The part of a step that is computed: rectangles of queries times vectors of keys, and for each query its keys.
template <class T>
struct BackwardTilePlan {
  struct Group {
    int row_begin, row_end, vector_begin, vector_end;
    bool whole;  // every query sees every key; otherwise the queries' ranges apply
  };

  Group groups[kBlockQ / kCell];
  int num_groups = 0;
  LaneIndex<T> begin[kBlockQ];  // keys of the tile that each query sees; filled for groups that are not whole
  LaneIndex<T> end[kBlockQ];

  // Keys [first, first + count) of the segment, of which the mask shows `shown`.
  BackwardTilePlan(const QueryBlock& block, const Segment& segment, int64_t first, int count, KeyRange shown) {
    const auto seen_by = [&](int row) {
      const KeyRange range = block.visible(segment, row);
      return KeyRange{clamp_to(range.begin - first, shown.begin, shown.end),
                      clamp_to(range.end - first, shown.begin, shown.end)};
    };
    if (block.one_head) {  // the ranges are monotone
      const KeyRange top = seen_by(0), bottom = seen_by(block.count - 1);
      if (bottom.begin == 0 && top.end == count && top.begin == 0 && bottom.end == count) {
        groups[num_groups++] = {0, block.count, 0, vectors(count), true};
        return;
      }
    }
    for (int row = 0; row < block.count; row += kCell) add_cell(row, block.count, count, seen_by);
  }

 private:
  static int vectors(int64_t keys) { return static_cast<int>((keys + kLanes<T> - 1) / kLanes<T>); }

  template <class SeenBy>
  void add_cell(int row, int rows, int count, SeenBy seen_by) {
    const int row_end = row + kCell < rows ? row + kCell : rows;
    KeyRange hull{count, 0}, core{0, count};
    for (int r = row; r < row_end; ++r) {
      const KeyRange range = seen_by(r);
      begin[r] = static_cast<LaneIndex<T>>(range.begin);
      end[r] = static_cast<LaneIndex<T>>(range.end);
      if (core.begin < range.begin) core.begin = range.begin;
      if (core.end > range.end) core.end = range.end;
      if (range.begin >= range.end) continue;
      if (hull.begin > range.begin) hull.begin = range.begin;
      if (hull.end < range.end) hull.end = range.end;
    }
    if (hull.begin >= hull.end) return;
    const int vector_begin = static_cast<int>(hull.begin / kLanes<T>), vector_end = vectors(hull.end);
    const int64_t last = vector_end * kLanes<T>;
    const bool whole = core.begin <= vector_begin * kLanes<T> && core.end >= (last < count ? last : count);
    Group* const previous = num_groups > 0 ? &groups[num_groups - 1] : nullptr;
    if (previous != nullptr && previous->row_end == row && previous->vector_begin == vector_begin &&
        previous->vector_end == vector_end) {
      previous->row_end = row_end;
      previous->whole = previous->whole && whole;
    } else {
      groups[num_groups++] = {row, row_end, vector_begin, vector_end, whole};
    }
  }
};

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
