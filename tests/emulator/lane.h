// One CUDA thread while it runs: what it may ask about itself, and where it stands.
#pragma once

#include <cstdint>
#include <source_location>

#include "vector_types.h"

namespace emulator {

using Where = std::source_location;

struct Lane {
  uint3 thread_index;
  uint3 block_index;
  dim3 block_dim;
  dim3 grid_dim;

  int thread;  // in the block
  int warp;
  int lane;  // in the warp
  void* stack_pointer;
  char* stack_begin;
  char* stack_end;
};

// The lane that this host thread is executing; null outside a kernel. No fiber ever moves to another host thread.
extern __thread Lane* current_lane __attribute__((tls_model("initial-exec")));

}  // namespace emulator
