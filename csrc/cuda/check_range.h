// The range check of integers in device memory.
#pragma once

#include <cstdint>

#include "context.h"

namespace prefix_kernels::cuda {

struct RangeCheck {
  const int64_t* data;  // [count]
  int64_t count;
  int64_t least;
  int64_t most;
  char name[16];  // name of the argument, for the message
};

// Prints the argument, what was expected and what came, and traps, as torch does for an index out of range.
void check_range(const RangeCheck& check, const Context& context);

}  // namespace prefix_kernels::cuda
