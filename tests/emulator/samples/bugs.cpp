// Kernels with one bug each. The line that the report must name bears the mark "BUG"; where a report names two lines,
// both do.
#include "samples.h"

namespace samples {
namespace {

using namespace prefix_kernels::cuda;

const float* floats(const Params& p) { return static_cast<const float*>(p.input); }
float* results(const Params& p) { return static_cast<float*>(p.output); }
float* shared_floats() { return reinterpret_cast<float*>(emulator::shared_memory()); }
int thread() { return static_cast<int>(threadIdx.x); }

// Shared memory that has been written: what is wrong with the access after it is its order alone.
void clear_shared(int floats_per_thread) {
  for (int i = 0; i < floats_per_thread; ++i) shared_floats()[thread() * floats_per_thread + i] = 0.0f;
  __syncthreads();
}

__global__ void missing_syncthreads(const Params p) {
  clear_shared(1);
  shared_floats()[thread()] = floats(p)[thread()];               // BUG missing_syncthreads
  results(p)[thread()] = shared_floats()[(thread() + 32) % 64];  // BUG missing_syncthreads
}

__global__ void missing_syncwarp(const Params p) {
  clear_shared(1);
  shared_floats()[thread()] = floats(p)[thread()];       // BUG missing_syncwarp
  results(p)[thread()] = shared_floats()[thread() ^ 1];  // BUG missing_syncwarp
}

// A shuffle makes the lanes meet, but orders none of their memory accesses.
__global__ void shuffle_for_barrier(const Params p) {
  clear_shared(1);
  shared_floats()[thread()] = floats(p)[thread()];  // BUG shuffle_for_barrier
  __shfl_sync(~0u, 0, 0);
  results(p)[thread()] = shared_floats()[thread() ^ 1];  // BUG shuffle_for_barrier
}

// The next iteration overwrites what others still read.
__global__ void overwritten_while_read(const Params p) {
  float total = 0.0f;
  for (int i = 0; i < 2; ++i) {
    shared_floats()[thread()] = floats(p)[thread() + i];  // BUG overwritten_while_read
    __syncthreads();
    total += shared_floats()[63 - thread()];  // BUG overwritten_while_read
  }
  results(p)[thread()] = total;
}

__global__ void sum_across_blocks(const Params p) {
  if (thread() == 0) results(p)[0] += floats(p)[blockIdx.x];  // BUG sum_across_blocks
}

// Every block writes 16 numbers, and the last to arrive adds them up: what is wrong is a fence or a barrier on the way.
// `share` writes the numbers, `arrive` counts, `add` reads them.
template <typename Share, typename Arrive, typename Add>
void add_in_last_block(const Params& p, Share share, Arrive arrive, Add add) {
  auto* shared = reinterpret_cast<unsigned*>(emulator::shared_memory());
  if (thread() % 4 == 0) share(16 * static_cast<int>(blockIdx.x) + thread() / 4);
  arrive([&] { shared[0] = atomicInc(reinterpret_cast<unsigned*>(results(p) + 1), gridDim.x - 1); });
  __syncthreads();
  if (shared[0] != gridDim.x - 1 || thread() != 40) return;
  float total = 0.0f;
  for (int i = 0; i < 16 * static_cast<int>(gridDim.x); ++i) total += add(i);
  results(p)[0] = total;
}

__global__ void no_fence_before_arrival(const Params p) {
  const auto share = [&](int i) { p.workspace[i] = floats(p)[i]; };  // BUG no_fence_before_arrival
  const auto arrive = [](auto count) {
    __syncthreads();
    if (thread() == 0) {
      count();
      __threadfence();
    }
  };
  add_in_last_block(p, share, arrive, [&](int i) { return p.workspace[i]; });  // BUG no_fence_before_arrival
}

__global__ void no_fence_after_arrival(const Params p) {
  const auto share = [&](int i) { p.workspace[i] = floats(p)[i]; };  // BUG no_fence_after_arrival
  const auto arrive = [](auto count) {
    __syncthreads();
    if (thread() == 0) {
      __threadfence();
      count();
    }
  };
  add_in_last_block(p, share, arrive, [&](int i) { return p.workspace[i]; });  // BUG no_fence_after_arrival
}

// A fence of one thread does not speak for those that it has not met yet.
__global__ void no_barrier_before_fence(const Params p) {
  const auto share = [&](int i) { p.workspace[i] = floats(p)[i]; };  // BUG no_barrier_before_fence
  const auto arrive = [](auto count) {
    if (thread() == 0) {
      __threadfence();
      count();
      __threadfence();
    }
  };
  add_in_last_block(p, share, arrive, [&](int i) { return p.workspace[i]; });  // BUG no_barrier_before_fence
}

__global__ void two_warps_one_output(const Params p) {
  results(p)[thread() % 32] = floats(p)[thread()];  // BUG two_warps_one_output
}

__global__ void unwritten_shared(const Params p) {
  if (thread() < 63) shared_floats()[thread()] = floats(p)[thread()];
  __syncthreads();
  results(p)[thread()] = shared_floats()[63 - thread()];  // BUG unwritten_shared
}

__global__ void unwritten_workspace(const Params p) {
  if (thread() < 63) p.workspace[thread()] = floats(p)[thread()];
  __syncthreads();
  results(p)[thread()] = p.workspace[63 - thread()];  // BUG unwritten_workspace
}

__global__ void behind_shared(const Params p) {
  shared_floats()[thread() + 1] = floats(p)[thread()];  // BUG behind_shared
}

__global__ void behind_buffer(const Params p) {
  float* first = shared_floats();
  float* second = first + 32 + emulator::kSharedGap / sizeof(float);
  emulator::shared_buffer(first, 32 * sizeof(float));
  emulator::shared_buffer(second, 32 * sizeof(float));
  second[thread()] = floats(p)[thread()];
  first[thread() + 1] = floats(p)[thread()];  // BUG behind_buffer
}

__global__ void unguarded_tail(const Params p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  results(p)[i] = 1.0f;  // BUG unguarded_tail
}

__global__ void writes_input(const Params p) {
  const_cast<float*>(floats(p))[thread()] = 0.0f;  // BUG writes_input
}

__global__ void misaligned_global(const Params p) {
  const float4 four = *reinterpret_cast<const float4*>(floats(p) + thread());  // BUG misaligned_global
  results(p)[thread()] = four.x + four.w;
}

__global__ void misaligned_shared(const Params p) {
  auto* pair = reinterpret_cast<float2*>(shared_floats() + 3 * thread());
  *pair = make_float2(floats(p)[thread()], 0.0f);  // BUG misaligned_shared
}

__global__ void barrier_in_branch(const Params p) {
  if (thread() < 32) {
    __syncthreads();  // BUG barrier_in_branch
  } else {
    __syncwarp();
    __syncthreads();  // BUG barrier_in_branch
  }
  results(p)[thread()] = 0.0f;
}

__global__ void barrier_nobody_reaches(const Params p) {
  const int lane = thread() % 32;
  if (lane < 16) {
    __syncthreads();  // BUG barrier_nobody_reaches
  } else {
    __syncwarp();  // BUG barrier_nobody_reaches
  }
  results(p)[thread()] = 0.0f;
}

__global__ void divergent_shuffle(const Params p) {
  float value = floats(p)[thread()];
  if (thread() % 2 == 0) {
    value += __shfl_xor_sync(~0u, value, 1);  // BUG divergent_shuffle
  } else {
    value += __shfl_down_sync(~0u, value, 1u);  // BUG divergent_shuffle
  }
  results(p)[thread()] = value;
}

__global__ void masks_disagree(const Params p) {
  const unsigned mask = thread() == 3 ? 0x0000000Fu : ~0u;
  results(p)[thread()] = __shfl_xor_sync(mask, floats(p)[thread()], 1);  // BUG masks_disagree
}

__global__ void not_in_own_mask(const Params p) {
  results(p)[thread()] = __shfl_xor_sync(0x0000FFFFu, floats(p)[thread()], 1);  // BUG not_in_own_mask
}

__global__ void shuffle_from_the_gone(const Params p) {
  if (thread() == 9) return;
  results(p)[thread()] = __shfl_sync(~0u, floats(p)[thread()], 9);  // BUG shuffle_from_the_gone
}

__global__ void mma_without_a_lane(const Params p) {
  if (thread() == 31) return;
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  ptx::mma_16816(d, a, b, Tag<half>{});  // BUG mma_without_a_lane
  results(p)[thread()] = d[0];
}

__global__ void misaligned_ldmatrix(const Params p) {
  for (int i = 0; i < 8; ++i) shared_floats()[thread() * 8 + i] = floats(p)[i];
  __syncthreads();
  uint32_t r[1];
  ptx::ldmatrix_x1(r, shared_floats() + thread() * 4 + 1);  // BUG misaligned_ldmatrix
  results(p)[thread()] = static_cast<float>(r[0]);
}

__global__ void copy_not_waited_for(const Params p) {
  ptx::cp_async_16(shared_floats() + 4 * thread(), floats(p) + 4 * thread(), true);  // BUG copy_not_waited_for
  ptx::cp_async_commit();
}

__global__ void read_before_wait(const Params p) {
  ptx::cp_async_16(shared_floats() + 4 * thread(), floats(p) + 4 * thread(), true);  // BUG read_before_wait
  ptx::cp_async_commit();
  results(p)[thread()] = shared_floats()[4 * thread()];  // BUG read_before_wait
  ptx::cp_async_wait<0>();
}

__global__ void miscounted_wait(const Params p) {
  ptx::cp_async_16(shared_floats() + 4 * thread(), floats(p) + 4 * thread(), true);  // BUG miscounted_wait
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  results(p)[thread()] = shared_floats()[4 * thread()];  // BUG miscounted_wait
  ptx::cp_async_wait<0>();
}

__global__ void copy_without_barrier(const Params p) {
  clear_shared(4);
  ptx::cp_async_16(shared_floats() + 4 * thread(), floats(p) + 4 * thread(), true);  // BUG copy_without_barrier
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  results(p)[thread()] = shared_floats()[4 * (thread() ^ 1)];  // BUG copy_without_barrier
}

__global__ void copy_into_live_buffer(const Params p) {
  for (int i = 0; i < 4; ++i) shared_floats()[4 * thread() + i] = floats(p)[i];
  __syncthreads();
  const float value = shared_floats()[(4 * thread() + 128) % 256];                   // BUG copy_into_live_buffer
  ptx::cp_async_16(shared_floats() + 4 * thread(), floats(p) + 4 * thread(), true);  // BUG copy_into_live_buffer
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  results(p)[thread()] = value;
}

__global__ void misaligned_copy(const Params p) {
  ptx::cp_async_16(shared_floats() + 4 * thread(), floats(p) + 1, true);  // BUG misaligned_copy
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

__global__ void null_pointer(const Params p) {
  float* nowhere = p.count > 1000000 ? results(p) : nullptr;
  nowhere[thread()] = 1.0f;  // BUG null_pointer
}

// The address of a local variable means nothing to another thread.
__global__ void others_local_memory(const Params p) {
  volatile float mine = floats(p)[thread()];
  const auto theirs = __shfl_sync(~0u, reinterpret_cast<uint64_t>(&mine), 0);
  results(p)[thread()] = *reinterpret_cast<volatile float*>(theirs);  // BUG others_local_memory
}

__global__ void trapped(const Params p) {
  if (floats(p)[thread()] < 1e30f) __trap();  // BUG trapped
}

}  // namespace

const Sample kBugs[] = {
    {"missing_syncthreads", &missing_syncthreads, 1, 64, 256},
    {"missing_syncwarp", &missing_syncwarp, 1, 32, 128},
    {"shuffle_for_barrier", &shuffle_for_barrier, 1, 32, 128},
    {"overwritten_while_read", &overwritten_while_read, 1, 64, 256},
    {"sum_across_blocks", &sum_across_blocks, 3, 32, 128},
    {"no_fence_before_arrival", &no_fence_before_arrival, 4, 64, 256},
    {"no_fence_after_arrival", &no_fence_after_arrival, 4, 64, 256},
    {"no_barrier_before_fence", &no_barrier_before_fence, 4, 64, 256},
    {"two_warps_one_output", &two_warps_one_output, 1, 64, 256},
    {"unwritten_shared", &unwritten_shared, 1, 64, 256},
    {"unwritten_workspace", &unwritten_workspace, 1, 64, 256},
    {"behind_shared", &behind_shared, 1, 32, 128},
    {"behind_buffer", &behind_buffer, 1, 32, 384},
    {"unguarded_tail", &unguarded_tail, 5, 64, 256},
    {"writes_input", &writes_input, 1, 32, 128},
    {"misaligned_global", &misaligned_global, 1, 32, 128},
    {"misaligned_shared", &misaligned_shared, 1, 32, 384},
    {"barrier_in_branch", &barrier_in_branch, 1, 64, 256},
    {"barrier_nobody_reaches", &barrier_nobody_reaches, 1, 32, 128},
    {"divergent_shuffle", &divergent_shuffle, 1, 32, 128},
    {"masks_disagree", &masks_disagree, 1, 32, 128},
    {"not_in_own_mask", &not_in_own_mask, 1, 32, 128},
    {"shuffle_from_the_gone", &shuffle_from_the_gone, 1, 32, 128},
    {"mma_without_a_lane", &mma_without_a_lane, 1, 32, 128},
    {"misaligned_ldmatrix", &misaligned_ldmatrix, 1, 32, 1024},
    {"copy_not_waited_for", &copy_not_waited_for, 1, 32, 512},
    {"read_before_wait", &read_before_wait, 1, 32, 512},
    {"miscounted_wait", &miscounted_wait, 1, 32, 512},
    {"copy_without_barrier", &copy_without_barrier, 1, 32, 512},
    {"copy_into_live_buffer", &copy_into_live_buffer, 1, 64, 1024},
    {"misaligned_copy", &misaligned_copy, 1, 32, 512},
    {"null_pointer", &null_pointer, 1, 32, 128},
    {"others_local_memory", &others_local_memory, 1, 32, 128},
    {"trapped", &trapped, 1, 32, 128},
};
const size_t kNumBugs = sizeof kBugs / sizeof kBugs[0];

}  // namespace samples
