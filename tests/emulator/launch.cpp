#include <algorithm>
#include <atomic>
#include <bit>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "block.h"
#include "check.h"
#include "emulator_launch.h"
#include "faults.h"
#include "source_line.h"

namespace emulator {
namespace {

uint64_t seed = 0;
int host_threads = 1;
std::atomic<int64_t> launches{0};

// A block's stacks and shared memory are kept from launch to launch.
Block& this_threads_block() {
  static thread_local std::unique_ptr<Block> block;
  if (!block) block = std::make_unique<Block>();
  return *block;
}

// What a GPU refuses before it runs anything.
void require_launchable(const Launch& launch) {
  const auto require = [](bool ok, const std::string& what) {
    if (!ok) throw Error("launch: " + what);
  };
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  require(threads >= 1 && threads <= kMaxThreads,
          "expected 1 to 1024 threads per block, got " + std::to_string(threads));
  require(launch.block.z <= 64, "expected blockDim.z <= 64, got " + std::to_string(launch.block.z));
  require(launch.grid.x >= 1 && launch.grid.y >= 1 && launch.grid.z >= 1, "the grid is empty");
  require(launch.grid.x <= 0x7FFFFFFFu, "expected gridDim.x < 2^31, got " + std::to_string(launch.grid.x));
  require(launch.grid.y <= 65535 && launch.grid.z <= 65535, "expected gridDim.y and gridDim.z <= 65535, got " +
                                                                std::to_string(launch.grid.y) + " and " +
                                                                std::to_string(launch.grid.z));
  require(launch.shared_bytes <= kMaxSharedBytes, "expected at most " + std::to_string(kMaxSharedBytes) +
                                                      " bytes of shared memory, got " +
                                                      std::to_string(launch.shared_bytes));
  require(launch.params_bytes <= 4096,
          "expected at most 4096 bytes of parameters, got " + std::to_string(launch.params_bytes));
}

dim3 block_index(const Launch& launch, uint64_t linear) {
  const uint64_t x = launch.grid.x, y = launch.grid.y;
  return dim3(static_cast<unsigned>(linear % x), static_cast<unsigned>(linear / x % y),
              static_cast<unsigned>(linear / (x * y)));
}

void run_block(const Launch& launch, uint64_t linear) {
  const dim3 index = block_index(launch, linear);
  try {
    this_threads_block().run(launch, index, seed == 0 ? 0 : seed * 0x9E3779B97F4A7C15u + linear);
  } catch (const Error& error) {
    throw Error(std::string(error.what()) + "\n  in block (" + std::to_string(index.x) + ", " +
                std::to_string(index.y) + ", " + std::to_string(index.z) + ") of grid (" +
                std::to_string(launch.grid.x) + ", " + std::to_string(launch.grid.y) + ", " +
                std::to_string(launch.grid.z) + ") of " + function_at(reinterpret_cast<const void*>(launch.kernel)) +
                ", seed " + std::to_string(seed));
  }
}

}  // namespace

void run(const Launch& launch) {
  require_launchable(launch);
  ++launches;
  static std::mutex one_launch_at_a_time;
  const std::lock_guard lock_launch(one_launch_at_a_time);
  const FaultHandlers fault_handlers;
  check::begin_launch(launch);
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  // A random permutation without a table: steps of a random odd length around a power of two.
  Random random(seed);
  const uint64_t around = std::bit_ceil(blocks);
  const uint64_t step = seed == 0 ? 1 : random.next() | 1, start = seed == 0 ? 0 : random.next();

  std::atomic<uint64_t> turn{0};
  std::mutex mutex;
  std::string failure;
  const auto work = [&] {
    const SignalStack signal_stack;
    for (uint64_t i = turn++; i < around; i = turn++) {
      const uint64_t linear = (start + i * step) & (around - 1);
      if (linear >= blocks) continue;
      try {
        run_block(launch, linear);
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex);
        if (failure.empty()) failure = error.what();
        turn = around;
      }
    }
  };
#if defined(PREFIX_KERNELS_CHECKED)
  const uint64_t workers = 1;
#else
  const uint64_t workers = std::min<uint64_t>(static_cast<uint64_t>(host_threads), blocks);
#endif
  std::vector<std::thread> others;
  for (uint64_t i = 1; i < workers; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (!failure.empty()) throw Error(failure);
}

#if !defined(PREFIX_KERNELS_CHECKED)
void register_global(const void*, size_t, const char*, bool, bool) {}
void clear_globals() {}
#endif

}  // namespace emulator

void prefix_kernels_emulator_seed(uint64_t seed) { emulator::seed = seed; }
int64_t prefix_kernels_emulator_take_launches() { return emulator::launches.exchange(0); }
void prefix_kernels_emulator_threads(int count) { emulator::host_threads = count < 1 ? 1 : count; }
