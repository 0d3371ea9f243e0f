// CUDA's built-in vector types, with CUDA's alignment.
#pragma once

#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

#if defined(PREFIX_KERNELS_CHECKED)

// Ends the launch where a kernel loads or stores a vector of 16 bytes at another address than a multiple of 16.
void require_vector_alignment(const void* vector);

// g++ tells the hooks of check mode the same of a vector as of any 16 bytes that are aligned to 8: vectors look after
// themselves.
template <typename T>
struct alignas(16) Vector4 {
  T x, y, z, w;
  Vector4() = default;
  constexpr Vector4(T x_, T y_, T z_, T w_) : x(x_), y(y_), z(z_), w(w_) {}
  Vector4(const Vector4& from) {
    require_vector_alignment(&from);
    x = from.x, y = from.y, z = from.z, w = from.w;
  }
  Vector4& operator=(const Vector4& from) {
    require_vector_alignment(this);
    require_vector_alignment(&from);
    x = from.x, y = from.y, z = from.z, w = from.w;
    return *this;
  }
};

#else

template <typename T>
struct alignas(16) Vector4 {
  T x, y, z, w;
};

#endif

}  // namespace emulator

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
using float4 = emulator::Vector4<float>;
using int4 = emulator::Vector4<int>;
using uint4 = emulator::Vector4<unsigned>;

constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr double2 make_double2(double x, double y) { return {x, y}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
