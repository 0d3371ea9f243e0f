#include <cstdio>

#include "check_range.h"
#include "launch.h"

namespace prefix_kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 1024;

__global__ void check_range_kernel(const RangeCheck check) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < check.count; i += step) {
    const int64_t x = check.data[i];
    if (x < check.least || x > check.most) {
      printf("prefix_attention: %s: expected values from %lld to %lld, got %lld at flat index %lld\n", check.name,
             static_cast<long long>(check.least), static_cast<long long>(check.most), static_cast<long long>(x),
             static_cast<long long>(i));
      __trap();
    }
  }
}

}  // namespace

void check_range(const RangeCheck& check, const Context& context) {
  if (check.count == 0) return;
  const int64_t blocks = (check.count + kThreads - 1) / kThreads;
  launch(check_range_kernel, dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)), dim3(kThreads), 0,
         context.stream, check);
}

}  // namespace prefix_kernels::cuda
