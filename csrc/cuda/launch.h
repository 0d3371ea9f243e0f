// Launching a kernel that takes its parameters by value: by the CUDA runtime, or by the emulator on the host.
#pragma once

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/platform.cuh"
#include "context.h"

#if !defined(__CUDACC__)
#include "emulator_launch.h"
#endif

namespace prefix_kernels::cuda {

// A grid of blocks in a row.
inline dim3 grid_of(int64_t blocks) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  if (blocks > kMost)
    throw std::runtime_error("prefix_kernels: expected at most " + std::to_string(kMost) + " blocks of a kernel, got " +
                             std::to_string(blocks) + "; split the batch");
  return dim3(static_cast<unsigned>(blocks));
}

#if defined(__CUDACC__)

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("prefix_kernels: ") + what + ": " + cudaGetErrorString(status));
}

// Lets the blocks of a kernel have so much shared memory on the current GPU. The driver is asked once for each kernel
// and GPU: small calls take no longer than its answer.
inline void allow_shared_memory(const void* kernel, size_t bytes) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int gpu = 0;
  check_cuda(cudaGetDevice(&gpu), "current device");
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, gpu}];
  if (bytes <= most) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
             "shared memory of a kernel");
  most = bytes;
}

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, const Params& params) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
  kernel<<<grid, block, shared_bytes, stream>>>(params);
  check_cuda(cudaGetLastError(), "launch of a kernel");
}

#else

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, Stream, const Params& params) {
  emulator::launch(kernel, grid, block, shared_bytes, params);
}

#endif

}  // namespace prefix_kernels::cuda
