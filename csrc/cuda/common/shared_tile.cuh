// Tiles of 16-bit rows in shared memory, and the tensor cores' operands read from them.
//
// A row's 16-byte chunks are permuted so that the eight rows of an 8 x 8 matrix, which ldmatrix reads at once, lie in
// eight different groups of four banks. The permutation is the row's number among 8 if rows are multiples of 128 bytes,
// and the number of its pair among 4 if they are odd multiples of 64.
#pragma once

#include "conversion.cuh"
#include "ptx.cuh"

namespace prefix_kernels::cuda {

inline constexpr int kCell = 16;  // rows and columns of a tensor core operand; the columns of a cell of kv_tiles.cuh

template <int kHeadDim>
struct SharedTile {
  static_assert(kHeadDim % 32 == 0, "rows are permuted within 64 or 128 bytes");
  static constexpr int kChunks = kHeadDim / kChunk;
  static constexpr int kPermuted = kChunks % 8 == 0 ? 8 : 4;

  __host__ __device__ static constexpr int bytes(int rows) { return rows * kHeadDim * 2; }

  // The number that a row's chunk numbers are XORed with.
  __device__ __forceinline__ static int permutation(int row) { return kPermuted == 8 ? row & 7 : (row >> 1) & 3; }

  // Position of a chunk of a row in the tile, in elements.
  __device__ __forceinline__ static int offset(int row, int chunk) {
    return row * kHeadDim + (chunk ^ permutation(row)) * kChunk;
  }
};

// The order in which ldmatrix takes the four quarters of a 16 x 16 block of the tile. Down: top left, bottom left, top
// right, bottom right. Across: top left, top right, bottom left, bottom right.
enum class Quarters { kDown, kAcross };

// Reads 16 x 16 blocks of a tile and computes one lane's part of the addresses once. With rows as stored in the tile:
//
//   operand of mma_16816                       quarters  function
//   A = block                                  down      load
//   A = block^T                                across    load_transposed
//   B = block^T (two operands: 0, 1 and 2, 3)  across    load              scores: the block's rows are keys
//   B = block   (two operands: 0, 1 and 2, 3)  down      load_transposed   output: the block's rows are values
//
// A tile is read through a reader of its own: the few instructions that make one take no registers from tile to tile.
template <typename T, int kHeadDim, Quarters kQuarters>
class BlockReader {
  using Tile = SharedTile<kHeadDim>;

 public:
  // `first_column`: the block column of the tile that becomes the reader's column 0.
  __device__ __forceinline__ BlockReader(const T* tile, int lane_number, int first_column = 0) {
    const int lane = pin_to_register(lane_number);
    const int down = kQuarters == Quarters::kDown ? lane / 8 % 2 : lane / 16;
    const int across = kQuarters == Quarters::kDown ? lane / 16 : lane / 8 % 2;
    const int row = lane % 8 + 8 * down;
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      columns_[i] = pin_to_register(tile + Tile::offset(row, 2 * (first_column + i) + across));
  }

  __device__ __forceinline__ void load(uint32_t (&r)[4], int block_row, int block_column) const {
    ptx::ldmatrix_x4(r, address(block_row, block_column));
  }

  __device__ __forceinline__ void load_transposed(uint32_t (&r)[4], int block_row, int block_column) const {
    ptx::ldmatrix_x4_trans(r, address(block_row, block_column));
  }

 private:
  // Block columns (two chunks each) after which the permutation repeats. It also repeats after sixteen rows.
  static constexpr int kColumns = Tile::kPermuted / 2;

  __device__ __forceinline__ const T* address(int block_row, int block_column) const {
    return columns_[block_column % kColumns] + block_row * kCell * kHeadDim +
           block_column / kColumns * (kColumns * kCell);
  }

  const T* columns_[kColumns];
};

template <int kRowBlocks, int kColumns>
__device__ __forceinline__ void set_all(float (&accumulators)[kRowBlocks][kColumns][4], float value) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) accumulators[m][n][e] = value;
    }
  }
}

// d[16 x 16] += a b for the two B operands of one block, which make columns 0..7 and 8..15.
template <typename T>
__device__ __forceinline__ void mma_block(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[4]) {
  const uint32_t b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
  ptx::mma_16816(left, a, b_left, Tag<T>{});
  ptx::mma_16816(right, a, b_right, Tag<T>{});
}

// Two adjacent accumulators, 16 columns, as the A operand of a product over those columns.
template <typename T>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack2<T>(left[0], left[1]);
  a[1] = pack2<T>(left[2], left[3]);
  a[2] = pack2<T>(right[0], right[1]);
  a[3] = pack2<T>(right[2], right[3]);
}

}  // namespace prefix_kernels::cuda
