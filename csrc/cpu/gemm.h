// C[M][N] (+)= A[M][K] B[K][N]: the one matrix product of all five of attention's.
//
// B and C are row-major with N in the SIMD lanes (a multiple of the lane count). A is read one element at a time and
// broadcast, in its natural layout: row-major (keys times queries) or transposed (values^T times probabilities).
// Nothing of A is packed, so a tile of 20 prefix rows costs 20 rows.
#pragma once

#include "simd.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

enum class ALayout { kRowMajor, kTransposed };

// Rows of C that one register block holds beside N/lanes = kVectors columns: as many as leave room for B and A.
template <int kVectors>
constexpr int block_rows() {
#if defined(__AVX512F__)
  return kVectors == 4 ? 6 : kVectors == 3 ? 8 : 12;
#elif defined(__AVX2__)
  return kVectors == 2 ? 6 : 8;
#else
  return kVectors == 2 ? 4 : 8;
#endif
}

#if defined(__AVX512F__)
inline constexpr int kMaxBlockVectors = 4;
#else
inline constexpr int kMaxBlockVectors = 2;
#endif

template <class T, ALayout kLayout, int kRows, int kVectors>
void gemm_block(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c, int64_t c_stride,
                bool accumulate) {
  constexpr int kN = kLanes<T>;
  Vec<T> acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[m][v] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> bv[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) bv[v] = load(b + v * kN);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> av = broadcast(kLayout == ALayout::kRowMajor ? a[m * a_stride] : a[m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[m][v] += av * bv[v];
    }
    a += kLayout == ALayout::kRowMajor ? 1 : a_stride;
    b += b_stride;
  }
  // What C holds is added last: sums over many calls then round once a call and not once a term.
  if (accumulate) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[m][v] += load(c + m * c_stride + v * kN);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + m * c_stride + v * kN, acc[m][v]);
}

// The last rows, fewer than a register block.
template <class T, ALayout kLayout, int kRows, int kVectors>
PREFIX_KERNELS_INLINE void gemm_tail(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b,
                                     int64_t b_stride, T* c, int64_t c_stride, bool accumulate) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      gemm_block<T, kLayout, kRows, kVectors>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
    } else {
      gemm_tail<T, kLayout, kRows - 1, kVectors>(rows, depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
    }
  }
}

template <class T, ALayout kLayout, int kVectors>
void gemm_panel(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c,
                int64_t c_stride, bool accumulate) {
  constexpr int kRows = block_rows<kVectors>();
  const int64_t a_row = kLayout == ALayout::kRowMajor ? a_stride : 1;
  while (rows >= kRows) {
    gemm_block<T, kLayout, kRows, kVectors>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
    a += kRows * a_row;
    c += kRows * c_stride;
    rows -= kRows;
  }
  gemm_tail<T, kLayout, kRows - 1, kVectors>(rows, depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
}

template <class T, ALayout kLayout, int kVectors>
PREFIX_KERNELS_INLINE void gemm_panels(int64_t vectors, int64_t rows, int64_t depth, const T* a, int64_t a_stride,
                                       const T* b, int64_t b_stride, T* c, int64_t c_stride, bool accumulate) {
  while (vectors >= kVectors) {
    gemm_panel<T, kLayout, kVectors>(rows, depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
    b += kVectors * kLanes<T>;
    c += kVectors * kLanes<T>;
    vectors -= kVectors;
  }
  if constexpr (kVectors > 1) {
    if (vectors > 0)
      gemm_panels<T, kLayout, kVectors - 1>(vectors, rows, depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
  }
}

// a_stride steps from row to row of A as stored: over m for kRowMajor, over k for kTransposed.
template <ALayout kLayout, class T>
void gemm(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
          T* c, int64_t c_stride, bool accumulate) {
  gemm_panels<T, kLayout, kMaxBlockVectors>(columns / kLanes<T>, rows, depth, a, a_stride, b, b_stride, c, c_stride,
                                            accumulate);
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
