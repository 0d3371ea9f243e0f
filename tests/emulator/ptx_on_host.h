// The instructions of ptx.cuh for the host compiler: the same names and signatures, plus the source line of the caller.
#pragma once

#include <cmath>
#include <cstdint>

#include "instructions.h"

namespace prefix_kernels::cuda::ptx {

using emulator::Where;

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - emulator::shared_memory());
}

inline void cp_async_16(void* shared, const void* global, bool valid, Where where = Where::current()) {
  emulator::copy_async(shared, global, valid, where);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulator::wait_for_copies(kPending);
}

inline void ldmatrix_x1(uint32_t (&r)[1], const void* shared_row, Where where = Where::current()) {
  emulator::load_matrices(r, 1, false, shared_row, where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row, Where where = Where::current()) {
  emulator::load_matrices(r, 2, false, shared_row, where);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, Where where = Where::current()) {
  emulator::load_matrices(r, 4, false, shared_row, where);
}
inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* shared_row, Where where = Where::current()) {
  emulator::load_matrices(r, 1, true, shared_row, where);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row, Where where = Where::current()) {
  emulator::load_matrices(r, 2, true, shared_row, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, Where where = Where::current()) {
  emulator::load_matrices(r, 4, true, shared_row, where);
}

inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tag<half>,
                      Where where = Where::current()) {
  emulator::multiply_16x8x16(d, a, b, false, where);
}
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tag<bfloat16>,
                      Where where = Where::current()) {
  emulator::multiply_16x8x16(d, a, b, true, where);
}

inline int load_relaxed(const int* address, Where where = Where::current()) {
  return emulator::load_relaxed(address, where);
}
inline void wait_for_value(const int* address, int value, Where where = Where::current()) {
  emulator::wait_for_value(address, value, where);
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float tanh_approx(float x) { return std::tanh(x); }
inline float rcp_approx(float x) { return 1.0f / x; }

}  // namespace prefix_kernels::cuda::ptx
