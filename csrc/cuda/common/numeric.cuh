// The 16-bit types and their conversions, alike on both compilers.
#pragma once

#include <type_traits>

#include "platform.cuh"

#if !defined(__CUDACC__)
#include <immintrin.h>

#include <bit>
#endif

namespace prefix_kernels::cuda {

#if defined(__CUDACC__)

using half = __half;
using bfloat16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (std::is_same_v<T, half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Two values in one register, `low` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, half>) {
    const __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  }
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t both) {
  if constexpr (std::is_same_v<T, half>) {
    return __half22float2(reinterpret_cast<const __half2&>(both));
  } else {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(both));
  }
}

#else

struct half {
  uint16_t bits;
};

struct bfloat16 {
  uint16_t bits;
};

inline float to_float(half x) { return _cvtsh_ss(x.bits); }
inline float to_float(bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

template <typename T>
inline T from_float(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (std::is_same_v<T, half>) {
    return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
  } else {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    // To nearest, ties to even.
    return {static_cast<uint16_t>(is_nan ? 0x7FFFu : (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16)};
  }
}

template <typename T>
inline uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <typename T>
inline float2 unpack2(uint32_t both) {
  return make_float2(to_float(T{static_cast<uint16_t>(both)}), to_float(T{static_cast<uint16_t>(both >> 16)}));
}

#endif

// Tells if x is infinity of either sign; not a number is not.
template <typename T>
__device__ __forceinline__ bool is_infinite(T x) {
  return x == T(INFINITY) || x == -T(INFINITY);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(double x) { return static_cast<float>(x); }

}  // namespace prefix_kernels::cuda
