// Kernels that are right: in every order of blocks, warps and lanes they give the same result and no report.
#include "samples.h"

namespace samples {
namespace {

using namespace prefix_kernels::cuda;

const float* floats(const Params& p) { return static_cast<const float*>(p.input); }
float* results(const Params& p) { return static_cast<float*>(p.output); }

// output[i] = input[i] + 1, by blocks of which the last has a tail.
__global__ void add_one(const Params p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < p.count) results(p)[i] = floats(p)[i] + 1.0f;
}

// output[0] += the sum of the input: a tree in shared memory, then one atomic per block.
__global__ void sum(const Params p) {
  auto* partial = reinterpret_cast<float*>(emulator::shared_memory());
  const int t = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x * blockDim.x) + t;
  partial[t] = i < p.count ? floats(p)[i] : 0.0f;
  for (int stride = static_cast<int>(blockDim.x) / 2; stride > 0; stride /= 2) {
    __syncthreads();
    if (t < stride) partial[t] += partial[t + stride];
  }
  if (t == 0) atomicAdd(results(p), partial[0]);
}

// output[0] = the sum of the input: every block writes 16 numbers, and the last to arrive adds those of all blocks in
// their order. The counter of arrivals, the bits of output[1], is zero again at the end.
__global__ void last_block_adds(const Params p) {
  auto* shared = reinterpret_cast<unsigned*>(emulator::shared_memory());
  const int t = static_cast<int>(threadIdx.x), numbers = 16 * static_cast<int>(gridDim.x);
  if (t % 4 == 0) {
    const int i = 16 * static_cast<int>(blockIdx.x) + t / 4;
    p.workspace[i] = floats(p)[i];
  }
  __syncthreads();
  if (t == 0) {
    __threadfence();
    shared[0] = atomicInc(reinterpret_cast<unsigned*>(results(p) + 1), gridDim.x - 1);
    __threadfence();
  }
  __syncthreads();
  if (shared[0] != gridDim.x - 1 || t != 40) return;
  float total = 0.0f;
  for (int i = 0; i < numbers; ++i) total += p.workspace[i];
  results(p)[0] = total;
}

// Eight rows of 32: what each lane gets from every kind of shuffle and vote.
__global__ void exchanges(const Params p) {
  const int lane = static_cast<int>(threadIdx.x);
  float* out = results(p);
  const float value = floats(p)[lane];
  out[lane] = __shfl_sync(~0u, value, 5);
  out[32 + lane] = __shfl_sync(~0u, value, 3, 8);
  out[64 + lane] = __shfl_xor_sync(~0u, value, 9);
  out[96 + lane] = __shfl_down_sync(~0u, value, 3u);
  out[128 + lane] = __shfl_up_sync(~0u, value, 3u);
  out[160 + lane] = static_cast<float>(__popc(__ballot_sync(~0u, lane % 3 == 0)));
  out[192 + lane] = static_cast<float>(__any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane == 7));
  // The halves of the warp go separate ways.
  const unsigned half_warp = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  float total = value;
  for (int step = 8; step > 0; step /= 2) total += __shfl_xor_sync(half_warp, total, step);
  out[224 + lane] = total;
}

// Each lane hands its value to its neighbour through shared memory.
__global__ void neighbours(const Params p) {
  auto* shared = reinterpret_cast<float*>(emulator::shared_memory());
  const int t = static_cast<int>(threadIdx.x), warp_begin = t / 32 * 32;
  shared[t] = floats(p)[t];
  __syncwarp();
  results(p)[t] = shared[warp_begin + (t + 1) % 32];
}

// output [16 x 8] = a [16 x 16] b [8 x 16]^T + a [16 x 16] c [16 x 8], where b and c follow a in the input.
template <typename T>
__global__ void products(const Params p) {
  auto* shared = reinterpret_cast<uint16_t*>(emulator::shared_memory());
  const auto* input = static_cast<const uint16_t*>(p.input);
  const int lane = static_cast<int>(threadIdx.x);
  for (int chunk = lane; chunk < 64; chunk += 32) ptx::cp_async_16(shared + chunk * 8, input + chunk * 8, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  const uint16_t *b_tile = shared + 256, *c_tile = shared + 384;
  uint32_t a[4], b[2], c[2];
  ptx::ldmatrix_x4(a, shared + lane % 16 * 16 + lane / 16 * 8);
  ptx::ldmatrix_x2(b, b_tile + lane % 8 * 16 + lane / 8 % 2 * 8);
  ptx::ldmatrix_x2_trans(c, c_tile + lane % 16 * 8);
  float d[4] = {};
  ptx::mma_16816(d, a, b, Tag<T>{});
  ptx::mma_16816(d, a, c, Tag<T>{});
  for (int i = 0; i < 4; ++i) results(p)[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// output[t] = the sum over tiles of input[tile][t] in four-float chunks: the next tile is on its way while one is read.
__global__ void pipeline(const Params p) {
  constexpr int kStages = 2;
  const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  auto* stages = reinterpret_cast<float4*>(emulator::shared_memory());
  const auto* input = static_cast<const float4*>(p.input);
  const int tiles = p.count / (threads * 4);
  const auto fetch = [&](int tile) {
    ptx::cp_async_16(stages + tile % kStages * threads + t, tile < tiles ? input + tile * threads + t : nullptr,
                     tile < tiles);
    ptx::cp_async_commit();
  };
  fetch(0);
  float4 total = make_float4(0, 0, 0, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();
    const float4 value = stages[tile % kStages * threads + (t + 1) % threads];
    total = make_float4(total.x + value.x, total.y + value.y, total.z + value.z, total.w + value.w);
    __syncthreads();
  }
  ptx::cp_async_wait<0>();
  static_cast<float4*>(p.output)[(t + 1) % threads] = total;
}

}  // namespace

const Sample kGood[] = {
    {"add_one", &add_one, 3, 64, 0},
    {"too many threads", &add_one, 1, 2048, 0},
    {"sum", &sum, 5, 128, 128 * sizeof(float)},
    {"last_block_adds", &last_block_adds, 4, 64, sizeof(unsigned)},
    {"exchanges", &exchanges, 1, 32, 0},
    {"neighbours", &neighbours, 1, 96, 96 * sizeof(float)},
    {"products float16", &products<half>, 1, 32, 1024},
    {"products bfloat16", &products<bfloat16>, 1, 32, 1024},
    {"pipeline", &pipeline, 1, 64, 2 * 64 * sizeof(float4)},
};
const size_t kNumGood = sizeof kGood / sizeof kGood[0];

}  // namespace samples
