// attn_mask as an additive bias on a tile of scores.
#pragma once

#include <limits>

#include "pack.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

struct BoolMask {
  uint8_t attend;
};
PREFIX_KERNELS_INLINE float to_float(BoolMask m) {
  return m.attend != 0 ? 0.0f : -std::numeric_limits<float>::infinity();
}

template <class F>
PREFIX_KERNELS_INLINE void dispatch_mask(const MaskOperand& mask, F&& f) {
  if (mask.is_bool)
    f(static_cast<BoolMask*>(nullptr));
  else
    dispatch_dtype(mask.dtype, f);
}

// The mask's first column for the query in a lane.
template <class Src>
PREFIX_KERNELS_INLINE const Src* mask_row(const MaskOperand& mask, const QueryBlock& block, int lane) {
  return static_cast<const Src*>(mask.data) + block.batch * mask.batch_stride + block.head(lane) * mask.head_stride +
         block.query(lane) * mask.row_stride;
}

// Whether all queries of a block share one row of the mask.
inline bool shares_mask_row(const MaskOperand& mask, const QueryBlock& block) {
  return mask.row_stride == 0 && (block.one_head || mask.head_stride == 0);
}

template <class T>
struct TileBias {
  enum Kind { kNone, kPerKey, kFull };
  Kind kind = kNone;
  T* data;        // [count] per key, or [count][kBlockQ]
  int64_t first;  // the tile without the rows at its ends that are hidden from every lane; a multiple of kCell
  int count;

  // Rows [first, first + count) of the segment; buffer holds kBlockK * kBlockQ.
  TileBias(const QueryBlock& block, const Segment& segment, int64_t first, int count, T* buffer)
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

  // Keeps the rows [begin, end) out of the count that were filled.
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

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
