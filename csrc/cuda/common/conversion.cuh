// Elements of any dtype as those of a tile.
#pragma once

#include "../../attention_params.h"
#include "numeric.cuh"

namespace prefix_kernels::cuda {

inline constexpr int kChunk = 8;  // elements in 16 bytes

template <typename T>
inline constexpr DType kDTypeOf = std::is_same_v<T, half> ? DType::kFloat16 : DType::kBFloat16;

__host__ __device__ __forceinline__ int dtype_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

__device__ __forceinline__ float load_element(const char* data, DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return to_float(*reinterpret_cast<const double*>(data));
    case DType::kFloat32:
      return *reinterpret_cast<const float*>(data);
    case DType::kBFloat16:
      return to_float(*reinterpret_cast<const bfloat16*>(data));
    default:
      return to_float(*reinterpret_cast<const half*>(data));
  }
}

// Converts a chunk of another dtype that begins at a multiple of 16 bytes; zero if it does not exist.
template <typename T, DType kSource>
__device__ __forceinline__ uint4 converted_chunk(const char* data, bool exists) {
  if (!exists) return make_uint4(0, 0, 0, 0);
  if constexpr (kSource == DType::kFloat64) {
    const double2* x = reinterpret_cast<const double2*>(data);
    uint32_t words[kChunk / 2];
#pragma unroll
    for (int w = 0; w < kChunk / 2; ++w) words[w] = pack2<T>(to_float(x[w].x), to_float(x[w].y));
    return make_uint4(words[0], words[1], words[2], words[3]);
  } else if constexpr (kSource == DType::kFloat32) {
    const float4 a = reinterpret_cast<const float4*>(data)[0], b = reinterpret_cast<const float4*>(data)[1];
    return make_uint4(pack2<T>(a.x, a.y), pack2<T>(a.z, a.w), pack2<T>(b.x, b.y), pack2<T>(b.z, b.w));
  } else {
    using Source = std::conditional_t<kSource == DType::kFloat16, half, bfloat16>;
    const uint4 x = *reinterpret_cast<const uint4*>(data);
    const auto converted = [](uint32_t pair) {
      const float2 both = unpack2<Source>(pair);
      return pack2<T>(both.x, both.y);
    };
    return make_uint4(converted(x.x), converted(x.y), converted(x.z), converted(x.w));
  }
}

// Calls visit(std::integral_constant<DType, dtype>) for the dtypes that a tile of T is converted from.
template <typename T, typename Visit>
__device__ __forceinline__ void with_source(DType dtype, const Visit& visit) {
  constexpr DType kOther = kDTypeOf<T> == DType::kFloat16 ? DType::kBFloat16 : DType::kFloat16;
  if (dtype == DType::kFloat32) return visit(std::integral_constant<DType, DType::kFloat32>());
  if (dtype == DType::kFloat64) return visit(std::integral_constant<DType, DType::kFloat64>());
  visit(std::integral_constant<DType, kOther>());
}

// Loads a chunk element by element, from any address.
template <typename T>
__device__ __forceinline__ void gather_chunk(T* shared, const char* row, DType dtype, int column, int head_dim,
                                             bool valid) {
  const int bytes = dtype_bytes(dtype);
  uint32_t words[kChunk / 2];
#pragma unroll
  for (int w = 0; w < kChunk / 2; ++w) {
    const int at = column + 2 * w;
    const float low = valid && at < head_dim ? load_element(row + at * bytes, dtype) : 0.0f;
    const float high = valid && at + 1 < head_dim ? load_element(row + (at + 1) * bytes, dtype) : 0.0f;
    words[w] = pack2<T>(low, high);
  }
  *reinterpret_cast<uint4*>(shared) = make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace prefix_kernels::cuda
