// Small kernels for the tests of the emulator itself; run by name from tests/cuda/test_emulator.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_on_host.h"
#include "emulator_launch.h"

namespace prefix_kernels::cuda {
struct half {};
struct bfloat16 {};
template <typename T>
struct Tag {};
}  // namespace prefix_kernels::cuda
#include "ptx_on_host.h"

namespace samples {

// Every sample has an input that it may read, an output that it may write and a workspace that nobody has written.
struct Params {
  const void* input;
  void* output;
  float* workspace;
  int count;
};

struct Sample {
  const char* name;
  void (*kernel)(Params);
  unsigned blocks;
  unsigned threads;
  size_t shared_bytes;
};

extern const Sample kGood[];
extern const size_t kNumGood;
extern const Sample kBugs[];
extern const size_t kNumBugs;

}  // namespace samples
