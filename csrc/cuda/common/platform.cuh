// The only place that knows whether nvcc or the host compiler reads the kernels.
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

// Bytes left free after each piece of a kernel's shared memory, and the declaration of a piece: on the host an access
// to shared memory outside all declared pieces is an error.
inline constexpr int kSharedGap = 0;
__device__ __forceinline__ void shared_buffer(void*, size_t) {}

// The same number, pin_to_register in a register: what follows from it is computed from it, where it is needed. Without
// this the compiler takes addresses that change from tile to tile apart and keeps a register for every sum; after it,
// constants added to an address become part of instructions.
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
