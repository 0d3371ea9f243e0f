// ldmatrix and mma.m16n8k16, with the fragment layouts of the PTX ISA ("Warp-level matrix instructions").
//
// A lane has a group, lane / 4, and a place in it, t = lane % 4. It holds two neighbouring 16-bit elements per
// register, the first in the low half:
//   ldmatrix      matrix i, row group, columns 2t, 2t+1; transposed: rows 2t, 2t+1, column group
//   A [16 x 16]   a0: row group, columns 2t, 2t+1   a1: row group+8   a2: row group, columns 2t+8, 2t+9   a3: both + 8
//   B [16 x 8]    b0: rows 2t, 2t+1, column group   b1: rows 2t+8, 2t+9
//   C [16 x 8]    c0, c1: row group, columns 2t, 2t+1   c2, c3: row group+8
#include <bit>
#include <cstring>
#include <string>

#include "block.h"
#include "check.h"
#include "instructions.h"
#include "source_line.h"

namespace emulator {
namespace {

void require_whole_warp(uint32_t lanes) {
  if (lanes != ~0u) current_block->fail_collective("some lanes of the warp do not exist or have returned");
}

struct LoadMatrices {
  uint32_t* registers;
  int count;
  bool transpose;
  const void* row;
  Where where;
};

bool same_load(const void* mine, const void* theirs) {
  const auto *a = static_cast<const LoadMatrices*>(mine), *b = static_cast<const LoadMatrices*>(theirs);
  return a->count == b->count && a->transpose == b->transpose;
}

void perform_load(void* const* payloads, uint32_t lanes) {
  require_whole_warp(lanes);
  constexpr size_t kRowBytes = 16;
  const LoadMatrices& any = *static_cast<const LoadMatrices*>(payloads[0]);
  const SharedMemory& shared = current_block->shared_memory();
  for (int matrix = 0; matrix < any.count; ++matrix) {
    uint16_t element[8][8];
    for (int row = 0; row < 8; ++row) {
      const int lane = matrix * 8 + row;
      const auto& load = *static_cast<const LoadMatrices*>(payloads[lane]);
      const char* address = static_cast<const char*>(load.row);
      const bool inside = shared.holds(address, kRowBytes);
      if (!inside || reinterpret_cast<uintptr_t>(address) % kRowBytes != 0) {
        current_block->fail_collective("the row that lane " + std::to_string(lane) + " names is " +
                                       (inside ? "not aligned to 16 bytes" : "not in shared memory"));
      }
      check::read(current_block->lane(current_block->warp_of_collective(), lane), address, kRowBytes, load.where);
      std::memcpy(element[row], address, kRowBytes);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int group = lane / 4, t = lane % 4;
      const uint32_t low = any.transpose ? element[2 * t][group] : element[group][2 * t];
      const uint32_t high = any.transpose ? element[2 * t + 1][group] : element[group][2 * t + 1];
      static_cast<LoadMatrices*>(payloads[lane])->registers[matrix] = low | high << 16;
    }
  }
}

struct Multiply {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <bool kBFloat16>
float element(uint32_t pair, int index) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * index));
  if constexpr (kBFloat16) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  } else {
    return static_cast<float>(std::bit_cast<_Float16>(bits));
  }
}

// Products are exact in float32, as in the tensor cores; the order of the sum and its rounding are not theirs.
template <bool kBFloat16>
void perform_multiply(void* const* payloads, uint32_t lanes) {
  require_whole_warp(lanes);
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& fragment = *static_cast<const Multiply*>(payloads[lane]);
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[group][2 * t + 8 * half + i] = element<kBFloat16>(fragment.a[2 * half], i);
        a[group + 8][2 * t + 8 * half + i] = element<kBFloat16>(fragment.a[2 * half + 1], i);
        b[2 * t + 8 * half + i][group] = element<kBFloat16>(fragment.b[half], i);
        c[group + 8 * half][2 * t + i] = fragment.d[2 * half + i];
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sum[8];
    for (int column = 0; column < 8; ++column) sum[column] = c[row][column];
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < 8; ++column) c[row][column] = sum[column];
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& fragment = *static_cast<const Multiply*>(payloads[lane]);
    const int group = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 2; ++i) fragment.d[2 * half + i] = c[group + 8 * half][2 * t + i];
    }
  }
}

}  // namespace

void load_matrices(uint32_t* registers, int count, bool transpose, const void* shared_row, Where where) {
  LoadMatrices payload{registers, count, transpose, shared_row, where};
  current_block->meet_warp(*current_lane, {"ldmatrix", ~0u, where, &payload, &same_load, &perform_load});
}

void multiply_16x8x16(float* d, const uint32_t* a, const uint32_t* b, bool bfloat16, Where where) {
  Multiply payload{d, a, b};
  const char* name = bfloat16 ? "mma bf16" : "mma f16";
  const auto perform = bfloat16 ? &perform_multiply<true> : &perform_multiply<false>;
  current_block->meet_warp(*current_lane, {name, ~0u, where, &payload, nullptr, perform});
}

}  // namespace emulator
