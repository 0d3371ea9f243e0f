#include "common/mask.cuh"
#include "common/padding.cuh"
#include "launch.h"
#include "padding.h"

namespace prefix_kernels::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kNowhere = 0x7FFFFFFF;

struct PaddingParams {
  MaskOperand mask;
  ShownColumns* shown;
  int k_len;
};

// The smallest range of the `count` columns at `row` that contains everything the mask shows. All threads of the block
// take part; its warps exchange their ranges through `memory`.
__device__ Span shown_columns(const MaskOperand& mask, const char* row, int count, int* memory) {
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  Span shown{kNowhere, 0};
#pragma unroll 4
  for (int column = thread; column < count; column += kThreads) {
    if (element_bias(mask, row + column * mask.column_stride * mask_bytes(mask)) != -INFINITY)
      shown = {min(shown.begin, column), column + 1};
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    shown.begin = min(shown.begin, __shfl_xor_sync(~0u, shown.begin, distance));
    shown.end = max(shown.end, __shfl_xor_sync(~0u, shown.end, distance));
  }
  __syncthreads();  // the memory's last readers are done
  if (lane == 0) {
    memory[2 * (thread / kWarpSize)] = shown.begin;
    memory[2 * (thread / kWarpSize) + 1] = shown.end;
  }
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp)
    shown = {min(shown.begin, memory[2 * warp]), max(shown.end, memory[2 * warp + 1])};
  return shown.end > 0 ? shown : Span{0, 0};
}

// Scans one row of the mask per block.
__global__ void __launch_bounds__(kThreads) find_padding_kernel(const PaddingParams params) {
  const MaskOperand& mask = params.mask;
  int* const memory = reinterpret_cast<int*>(shared_memory());
  const char* row = static_cast<const char*>(mask.data) + blockIdx.x * mask.batch_stride * mask_bytes(mask);
  const Span prefixes = shown_columns(mask, row, static_cast<int>(mask.prefix_columns), memory);
  row += mask.prefix_columns * mask.column_stride * mask_bytes(mask);
  const Span sequence = shown_columns(mask, row, params.k_len, memory);
  if (threadIdx.x == 0) params.shown[blockIdx.x] = {prefixes.begin, prefixes.end, sequence.begin, sequence.end};
}

}  // namespace

void find_padding(AttentionParams& p, const Context& context) {
  if (p.mask.data == nullptr || p.mask.row_stride != 0 || p.mask.head_stride != 0) return;
  const int64_t rows = p.mask.batch_stride == 0 ? 1 : p.batch;
  PaddingParams params;
  params.mask = p.mask;
  params.shown = static_cast<ShownColumns*>(context.allocate(static_cast<size_t>(rows) * sizeof(ShownColumns)));
  params.k_len = static_cast<int>(p.k_len);
  launch(find_padding_kernel, grid_of(rows), dim3(kThreads), 2 * kWarps * sizeof(int), context.stream, params);
  p.mask.shown = params.shown;
}

}  // namespace prefix_kernels::cuda
