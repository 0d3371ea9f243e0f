// The only file that tells nvcc and the host compiler apart.
//
// nvcc sees CUDA itself. The host compiler finds the same names in tests/emulator, where a block's threads are fibers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_on_host.h"
#endif

namespace prefix_kernels::cuda {

inline constexpr int kWarpSize = 32;

#if defined(__CUDACC__)

// The block's dynamic shared memory.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// Bytes left free after each piece of a kernel's shared memory, and the declaration of a piece. The emulator reports an
// access outside all declared pieces as an error.
inline constexpr int kSharedGap = 0;
__device__ __forceinline__ void shared_buffer(void*, size_t) {}

// Stops the compiler from keeping every value derived from x alive instead of x itself. Without it, addresses that
// change from tile to tile are split into sums with a register each; with it, constants added to an address become part
// of the instructions.
__device__ __forceinline__ int pin_to_register(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <typename T>
__device__ __forceinline__ T* pin_to_register(T* shared) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
}

#else

using ::emulator::kSharedGap;
using ::emulator::shared_buffer;
using ::emulator::shared_memory;

inline int pin_to_register(int x) { return x; }

template <typename T>
inline T* pin_to_register(T* shared) {
  return shared;
}

#endif

}  // namespace prefix_kernels::cuda
