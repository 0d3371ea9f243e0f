// Fibers: each CUDA thread has a stack of its own, and a switch between two of them costs a few nanoseconds.
#pragma once

#include <cstddef>

#include "lane.h"

namespace emulator {

inline constexpr int kMaxThreads = 1024;
inline constexpr size_t kStackBytes = 128 * 1024;

// The stacks of a block's threads, a page that cannot be touched below each.
class Stacks {
 public:
  Stacks();
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  // Lane `thread`, ready to be switched to; it will begin with start(lane). Its stack is filled with 0xFF, so that a
  // variable that was never set does not happen to be zero.
  Lane& reset(int thread, void (*start)(Lane*));
  Lane& operator[](int thread);

  bool contains(const void* address) const {
    return address >= base_ && static_cast<const char*>(address) < base_ + kMaxThreads * kStackBytes;
  }

 private:
  char* slot(int thread) const;
  char* base_;
};

// Saves the running context's stack pointer in *from and goes on with the context saved as `to`.
extern "C" void emulator_switch(void** from, void* to) __attribute__((visibility("hidden")));

}  // namespace emulator
