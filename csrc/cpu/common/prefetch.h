// Prefetches the data of the next steps while the matrix products run. In a [batch, rows, heads, head_dim] layout, rows
// of one head lie a page or so apart, where the hardware does not prefetch. A thread can only wait for some 20 lines at
// a time, so the lines are asked for a few at once, spread over the register blocks of the products.
#pragma once

#include "tiles.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

inline constexpr int kCacheLine = 64;

class Prefetcher {
 public:
  void clear() { count_ = at_ = line_ = lines_ = 0; }

  // Adds rows [first, first + rows) of one head.
  void add_rows(const Operand& x, int64_t first, int64_t rows, int64_t depth) {
    if (count_ == kMaxRanges || x.data == nullptr || rows <= 0) return;
    const int64_t size = dtype_size(x.dtype);
    const int64_t lines = (depth * size + kCacheLine - 1) / kCacheLine;
    ranges_[count_++] = {static_cast<const char*>(x.data) + first * x.row_stride * size, x.row_stride * size, rows,
                         lines};
    lines_ += rows * lines;
  }

  // Adds the rows of a block's queries, if they belong to one head.
  void add_queries(const Operand& x, const QueryBlock& block, int64_t depth) {
    if (block.one_head) add_rows(head_of(x, block.batch, block.head(0), block.row(0)), 0, block.count, depth);
  }

  // Spreads the rows over about this many calls of advance(); over fewer rather than more, since some may not come.
  void spread(int64_t calls) { per_call_ = ceil_div(lines_ * 3, calls < 2 ? 2 : calls * 2); }

  void advance() {
    for (int64_t left = per_call_; left > 0 && at_ < count_;) {
      Range& range = ranges_[at_];
      const char* row = range.row;
      int64_t rows = range.rows, line = line_;
      for (; rows > 0 && left > 0; --left) {
        __builtin_prefetch(row + line * kCacheLine, 0, 2);  // into the second level: the first is full
        if (++line < range.lines) continue;
        line = 0;
        row += range.stride;
        --rows;
      }
      range.row = row;
      range.rows = rows;
      line_ = line;
      if (rows == 0) ++at_;
    }
  }

 private:
  struct Range {
    const char* row;
    int64_t stride;
    int64_t rows;
    int64_t lines;  // cache lines of one row
  };
  static constexpr int kMaxRanges = 12;

  Range ranges_[kMaxRanges];
  int count_ = 0, at_ = 0;
  int64_t line_ = 0, lines_ = 0, per_call_ = 0;
};

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
