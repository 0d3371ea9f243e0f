// The device that a kernel is launched on, for host code without torch and CUDA headers.
#pragma once

#include <cstddef>

struct CUstream_st;

namespace prefix_kernels::cuda {

using Stream = CUstream_st*;  // a cudaStream_t

struct Context {
  int architecture = 0;  // 80, 86, 90, ...: the compute capability without its dot
  int sm_count = 0;      // streaming multiprocessors
  int shared_bytes = 0;  // shared memory that one block may have
  Stream stream = nullptr;

  // Device memory, 256-byte aligned and not initialised, for kernels launched on `stream` until the operator returns.
  void* allocate(size_t bytes) const { return allocate_in(owner, bytes); }

  // Counters that are zero and that a kernel launched on `stream` leaves zero; null if there are not so many.
  unsigned* counters(size_t count) const { return counters_in(owner, count); }

  void* (*allocate_in)(void* owner, size_t bytes) = nullptr;
  void* owner = nullptr;

  int max_grid_yz = 65535;  // blocks of a grid along y, and along z, at most

  unsigned* (*counters_in)(void* owner, size_t count) = nullptr;
};

}  // namespace prefix_kernels::cuda
