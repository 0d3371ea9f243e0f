// The division of the columns [prefixes ; sequence] among threads.
#pragma once

#include "tiles.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// The number of parts that the columns of each task are worth dividing into; one if the tasks alone keep the threads
// busy.
inline int64_t column_parts(int64_t tasks, int threads, int64_t columns) {
  constexpr int64_t kPartsPerThread = 4;  // several, because causal masks and padding make parts of different cost
  constexpr int64_t kLeastColumns = 256;  // least columns of a part
  if (threads == 1 || tasks == 0 || tasks >= 2 * threads) return 1;
  const int64_t most = columns / kLeastColumns;
  return clamp_to(ceil_div(kPartsPerThread * threads, tasks), 1, most < 1 ? 1 : most);
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
