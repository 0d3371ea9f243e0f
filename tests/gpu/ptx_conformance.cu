// One kernel of one warp per function of csrc/cuda/common/ptx.cuh, for tests/gpu/test_ptx_conformance.py: compiled by
// nvcc for a GPU and by g++ for the emulator, given the same bytes.
#include <cstring>

#include "../../csrc/cuda/common/ptx.cuh"
#include "../../csrc/cuda/launch.h"

namespace prefix_kernels::cuda {
namespace {

struct Bytes {
  const char* in;
  char* out;
};

__device__ inline int lane() { return threadIdx.x % kWarpSize; }

template <class T>
__device__ void read_lane(T* target, const char* from) {
  memcpy(target, from + lane() * sizeof(T), sizeof(T));
}

// in: 32 x 16 bytes, then 32 x 4 bytes: whether each lane's copy is valid. out: what lands, over 0xAB.
__global__ void cp_async_16(const Bytes bytes) {
  char* shared = shared_memory();
  for (int i = 0; i < 16; ++i) shared[16 * lane() + i] = static_cast<char>(0xAB);
  __syncwarp();
  uint32_t valid;
  read_lane(&valid, bytes.in + 512);
  ptx::cp_async_16(shared + 16 * lane(), bytes.in + 16 * lane(), valid != 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  // The neighbour's bytes: what a lane copied is seen by the others.
  const int other = lane() ^ 1;
  for (int i = 0; i < 16; ++i) bytes.out[16 * other + i] = shared[16 * other + i];
}

// in: two groups of 32 x 16 bytes. out: the first, read while the second may be under way, and then the second.
__global__ void cp_async_wait(const Bytes bytes) {
  char* shared = shared_memory();
  for (int group = 0; group < 2; ++group) {
    ptx::cp_async_16(shared + 512 * group + 16 * lane(), bytes.in + 512 * group + 16 * lane(), true);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  for (int i = 0; i < 16; ++i) bytes.out[16 * lane() + i] = shared[16 * lane() + i];
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 16; ++i) bytes.out[512 + 16 * lane() + i] = shared[512 + 16 * lane() + i];
}

// in: four 8 x 8 matrices of 16-bit elements, one row after another. out: 32 x 4 registers.
template <bool kTransposed>
__global__ void ldmatrix_x4(const Bytes bytes) {
  char* shared = shared_memory();
  for (int i = 0; i < 16; ++i) shared[16 * lane() + i] = bytes.in[16 * lane() + i];
  __syncwarp();
  uint32_t r[4];
  if constexpr (kTransposed)
    ptx::ldmatrix_x4_trans(r, shared + 16 * lane());
  else
    ptx::ldmatrix_x4(r, shared + 16 * lane());
  memcpy(bytes.out + sizeof(r) * lane(), r, sizeof(r));
}

// in: 32 x 4 floats of d, 32 x 4 registers of a, 32 x 2 of b. out: 32 x 4 floats.
template <class T>
__global__ void mma_16816(const Bytes bytes) {
  float d[4];
  uint32_t a[4], b[2];
  memcpy(d, bytes.in + 16 * lane(), sizeof(d));
  memcpy(a, bytes.in + 512 + 16 * lane(), sizeof(a));
  memcpy(b, bytes.in + 1024 + 8 * lane(), sizeof(b));
  ptx::mma_16816(d, a, b, Tag<T>());
  memcpy(bytes.out + 16 * lane(), d, sizeof(d));
}

// in: 32 ints. out: those of each lane's neighbour, which has stored them there.
template <bool kWaits>
__global__ void read_neighbour(const Bytes bytes) {
  int* const stored = reinterpret_cast<int*>(bytes.out);
  int own;
  read_lane(&own, bytes.in);
  stored[lane() ^ 1] = own;
  const int other = __shfl_xor_sync(~0u, own, 1);
  __syncwarp();
  if constexpr (kWaits)
    ptx::wait_for_value(stored + lane(), other);
  else
    own = ptx::load_relaxed(stored + lane());
  __syncwarp();
  stored[lane()] = kWaits ? other : own;
}

// in, out: 32 floats.
__global__ void exp2_approx(const Bytes bytes) {
  float x;
  read_lane(&x, bytes.in);
  x = ptx::exp2_approx(x);
  memcpy(bytes.out + sizeof(x) * lane(), &x, sizeof(x));
}

struct Named {
  const char* name;
  void (*kernel)(Bytes);
};

const Named kKernels[] = {
    {"cp_async_16", cp_async_16},
    {"cp_async_wait", cp_async_wait},
    {"ldmatrix_x4", ldmatrix_x4<false>},
    {"ldmatrix_x4_trans", ldmatrix_x4<true>},
    {"mma_16816_half", mma_16816<half>},
    {"mma_16816_bfloat16", mma_16816<bfloat16>},
    {"exp2_approx", exp2_approx},
    {"load_relaxed", read_neighbour<false>},
    {"wait_for_value", read_neighbour<true>},
};

constexpr size_t kSharedBytes = 1024;

std::string message;

void run(void (*kernel)(Bytes), const char* in, size_t in_bytes, char* out, size_t out_bytes) {
#if defined(__CUDACC__)
  char *device_in = nullptr, *device_out = nullptr;
  check_cuda(cudaMalloc(&device_in, in_bytes), "memory");
  check_cuda(cudaMalloc(&device_out, out_bytes), "memory");
  check_cuda(cudaMemcpy(device_in, in, in_bytes, cudaMemcpyHostToDevice), "copy");
  launch(kernel, dim3(1), dim3(kWarpSize), kSharedBytes, nullptr, Bytes{device_in, device_out});
  check_cuda(cudaMemcpy(out, device_out, out_bytes, cudaMemcpyDeviceToHost), "run");
  check_cuda(cudaFree(device_in), "memory");
  check_cuda(cudaFree(device_out), "memory");
#else
  emulator::register_global(in, in_bytes, "in", false, true);
  emulator::register_global(out, out_bytes, "out", true, false);
  launch(kernel, dim3(1), dim3(kWarpSize), kSharedBytes, nullptr, Bytes{in, out});
  emulator::clear_globals();
#endif
}

}  // namespace
}  // namespace prefix_kernels::cuda

// Returns null, or what went wrong. `in` must be 16-byte aligned.
extern "C" __attribute__((visibility("default"))) const char* ptx_conformance_run(const char* name, const char* in,
                                                                                  size_t in_bytes, char* out,
                                                                                  size_t out_bytes) {
  using prefix_kernels::cuda::message;
  try {
    for (const auto& each : prefix_kernels::cuda::kKernels) {
      if (std::strcmp(each.name, name) != 0) continue;
      prefix_kernels::cuda::run(each.kernel, in, in_bytes, out, out_bytes);
      return nullptr;
    }
    message = "no such kernel";
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
