// A[M][K] B[K][N]: one matrix product that serves all five of attention.
//
// B is row-major with N in the SIMD lanes (a multiple of the lane count). A is read one element at a time and
// broadcast, in its natural layout: row-major (keys times queries) or transposed (values^T times probabilities).
// A is not packed, so a tile of 20 prefix rows costs 20 rows. The caller takes over each block of results, still in
// registers: finish(block, row, column), where block is a Vec<T>[rows][vectors]. While blocks are computed,
// `prefetcher` asks for the data of the next steps, a few lines a block.
#pragma once

#include "prefetch.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

enum class ALayout { kRowMajor, kTransposed };

// The rows of a register block of C with N/lanes = kVectors columns: as many as leave registers for B and A.
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

template <class T, ALayout kLayout, int kRows, int kVectors, class Finish>
__attribute__((noinline)) void gemm_block(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                                          int64_t row, int64_t column, const Finish& finish) {
  constexpr int kN = kLanes<T>;
  Vec<T> acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[m][v] = Vec<T>{};
#pragma GCC unroll 2  // measured: one is slower by some percent, four no faster, sixteen slower
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
  finish(acc, row, column);
}

// The last rows, fewer than a register block.
template <class T, ALayout kLayout, int kRows, int kVectors, class Finish>
PREFIX_KERNELS_INLINE void gemm_tail(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b,
                                     int64_t b_stride, int64_t row, int64_t column, const Finish& finish) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      gemm_block<T, kLayout, kRows, kVectors>(depth, a, a_stride, b, b_stride, row, column, finish);
    } else {
      gemm_tail<T, kLayout, kRows - 1, kVectors>(rows, depth, a, a_stride, b, b_stride, row, column, finish);
    }
  }
}

template <class T, ALayout kLayout, int kVectors, class Finish>
void gemm_panel(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t column,
                Prefetcher& prefetcher, const Finish& finish) {
  constexpr int kRows = block_rows<kVectors>();
  const int64_t a_row = kLayout == ALayout::kRowMajor ? a_stride : 1;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows, a += kRows * a_row) {
    prefetcher.advance();
    gemm_block<T, kLayout, kRows, kVectors>(depth, a, a_stride, b, b_stride, row, column, finish);
  }
  gemm_tail<T, kLayout, kRows - 1, kVectors>(rows - row, depth, a, a_stride, b, b_stride, row, column, finish);
}

template <class T, ALayout kLayout, int kVectors, class Finish>
PREFIX_KERNELS_INLINE void gemm_panels(int64_t columns, int64_t rows, int64_t depth, const T* a, int64_t a_stride,
                                       const T* b, int64_t b_stride, int64_t column, Prefetcher& prefetcher,
                                       const Finish& finish) {
  constexpr int64_t kColumns = kVectors * kLanes<T>;
  for (; column + kColumns <= columns; column += kColumns)
    gemm_panel<T, kLayout, kVectors>(rows, depth, a, a_stride, b + column, b_stride, column, prefetcher, finish);
  if constexpr (kVectors > 1) {
    if (column < columns)
      gemm_panels<T, kLayout, kVectors - 1>(columns, rows, depth, a, a_stride, b, b_stride, column, prefetcher, finish);
  }
}

// Computes the product block by block. a_stride steps from row to row of A as stored: over m for kRowMajor, over k for
// kTransposed.
template <ALayout kLayout, class T, class Finish>
void gemm(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
          Prefetcher& prefetcher, const Finish& finish) {
  gemm_panels<T, kLayout, kMaxBlockVectors>(columns, rows, depth, a, a_stride, b, b_stride, 0, prefetcher, finish);
}

// The approximate number of whole register blocks of a product of this size.
template <class T>
int64_t gemm_blocks(int64_t rows, int64_t columns) {
  return rows / block_rows<kMaxBlockVectors>() * ceil_div(columns, kMaxBlockVectors * kLanes<T>);
}

template <class T, int kRows, int kVectors>
PREFIX_KERNELS_INLINE void store_block(const Vec<T> (&block)[kRows][kVectors], T* at, int64_t stride) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(at + m * stride + v * kLanes<T>, block[m][v]);
}

template <class T, int kRows, int kVectors>
PREFIX_KERNELS_INLINE void load_block(Vec<T> (&block)[kRows][kVectors], const T* at, int64_t stride) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) block[m][v] = load(at + m * stride + v * kLanes<T>);
}

// C += the block. The old value of C is added last: sums over many calls then round once a call and not once a term.
template <class T>
struct AddTo {
  T* c;
  int64_t stride;

  template <int kRows, int kVectors>
  PREFIX_KERNELS_INLINE void operator()(Vec<T> (&acc)[kRows][kVectors], int64_t row, int64_t column) const {
    T* at = c + row * stride + column;
    const int64_t step = stride;  // a copy: stores might change the member, for all that the compiler knows
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m, at += step)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(at + v * kLanes<T>, load(at + v * kLanes<T>) + acc[m][v]);
  }
};

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
