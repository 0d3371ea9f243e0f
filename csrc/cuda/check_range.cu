#include <algorithm>

#include "check_range.h"
#include "common/check_range.cuh"
#include "launch.h"

namespace prefix_kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 1024;

__global__ void check_prefixes_kernel(const AttentionParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; p.prefix_ids != nullptr && i < p.batch * p.prefix_slots; i += step) check_prefix_id(p, i);
  check_prefix_lengths(p, first, step);
}

}  // namespace

void check_prefixes(const AttentionParams& p, const Context& context) {
  const int64_t ids = p.prefix_ids != nullptr ? p.batch * p.prefix_slots : 0;
  const int64_t count = std::max(ids, p.prefix_lens != nullptr ? p.num_prefixes : 0);
  if (count == 0) return;
  const int64_t blocks = std::min(kMaxBlocks, (count + kThreads - 1) / kThreads);
  launch(check_prefixes_kernel, grid_of(blocks), dim3(kThreads), 0, context.stream, p);
}

}  // namespace prefix_kernels::cuda
