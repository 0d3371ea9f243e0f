// Dividing the columns [prefixes ; sequence] among threads.
#pragma once

#include "tiles.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// Into how many parts the columns of each task are worth dividing: one where the tasks keep the threads busy as they
// are.
inline int64_t column_parts(int64_t tasks, int threads, int64_t columns) {
  constexpr int64_t kPartsPerThread = 4;  // of different cost, causal or by padding
  constexpr int64_t kLeastColumns = 256;  // of a part
  if (threads == 1 || tasks == 0 || tasks >= 2 * threads) return 1;
  const int64_t most = columns / kLeastColumns;
  return clamp_to(ceil_div(kPartsPerThread * threads, tasks), 1, most < 1 ? 1 : most);
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
