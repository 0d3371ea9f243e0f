// The part of CUDA C++ that kernels may use, for the host compiler. platform.cuh includes it where nvcc is not at work.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "instructions.h"
#include "lane.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define __constant__ static const

#define threadIdx (::emulator::current_lane->thread_index)
#define blockIdx (::emulator::current_lane->block_index)
#define blockDim (::emulator::current_lane->block_dim)
#define gridDim (::emulator::current_lane->grid_dim)
inline constexpr int warpSize = 32;

namespace emulator {

// Bytes to leave between two sub-buffers of shared memory, so that running over the end of one is noticed.
inline constexpr int kSharedGap = 128;

}  // namespace emulator

inline void __syncthreads(emulator::Where where = emulator::Where::current()) { emulator::sync_threads(where); }
inline void __syncwarp(unsigned mask = ~0u, emulator::Where where = emulator::Where::current()) {
  emulator::sync_warp(mask, where);
}

// A lane gets its own value where the source would lie outside its segment of `width` lanes.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Where where = emulator::Where::current()) {
  const int lane = emulator::current_lane->lane;
  const int from = (lane & ~(width - 1)) | (source & (width - 1));
  return emulator::exchange_value("__shfl_sync", mask, value, from, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  emulator::Where where = emulator::Where::current()) {
  const int lane = emulator::current_lane->lane, from = lane ^ lane_mask;
  const bool inside = from <= (lane | (width - 1));
  return emulator::exchange_value("__shfl_xor_sync", mask, value, inside ? from : lane, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulator::Where where = emulator::Where::current()) {
  const int lane = emulator::current_lane->lane;
  const bool inside = (lane & (width - 1)) + static_cast<int>(delta) < width;
  return emulator::exchange_value("__shfl_down_sync", mask, value, inside ? lane + static_cast<int>(delta) : lane,
                                  where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulator::Where where = emulator::Where::current()) {
  const int lane = emulator::current_lane->lane;
  const bool inside = (lane & (width - 1)) >= static_cast<int>(delta);
  return emulator::exchange_value("__shfl_up_sync", mask, value, inside ? lane - static_cast<int>(delta) : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::ballot("__ballot_sync", mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::ballot("__any_sync", mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::ballot("__all_sync", mask, predicate == 0, where) == 0;
}

template <typename T>
T atomicAdd(T* address, T value, emulator::Where where = emulator::Where::current()) {
  return emulator::atomic_add(address, value, where);
}

inline void __threadfence() { emulator::thread_fence(); }

[[noreturn]] inline void __trap(emulator::Where where = emulator::Where::current()) { emulator::trap(where); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((uint64_t{x} * y) >> 32); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
