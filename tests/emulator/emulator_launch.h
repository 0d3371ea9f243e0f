// What the host code calls in place of kernel<<<grid, block, shared_bytes>>>(params), and how it sets the emulator up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "vector_types.h"

namespace emulator {

// What a kernel did wrong: where, which threads, and what each of them was doing.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  void (*kernel)() = nullptr;                                    // of its own type: see `call`
  void (*call)(void (*kernel)(), const void* params) = nullptr;  // one thread's call of the kernel
  const void* params = nullptr;
  size_t params_bytes = 0;
};

// Runs every block of the grid; throws Error at the first thing that a GPU would not have done, or not reliably.
void run(const Launch& launch);

template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes,
            const std::type_identity_t<Params>& params) {
  static_assert(std::is_trivially_copyable_v<Params>, "a kernel's parameters are copied to the device byte by byte");
  run({grid, block, shared_bytes, reinterpret_cast<void (*)()>(kernel),
       [](void (*k)(), const void* p) { reinterpret_cast<void (*)(Params)>(k)(*static_cast<const Params*>(p)); },
       &params, sizeof(Params)});
}

// In check mode a launch may touch what was registered since the last clear_globals(), and nothing else.
void register_global(const void* data, size_t bytes, const char* name, bool writable = true, bool initialized = true);
void clear_globals();

}  // namespace emulator

extern "C" {
// The order of blocks, warps and lanes: 0 is their natural order, every other number is another random one.
__attribute__((visibility("default"))) void prefix_kernels_emulator_seed(uint64_t seed);
// Kernels that were launched since the last call.
__attribute__((visibility("default"))) int64_t prefix_kernels_emulator_take_launches();
// Host threads over which the blocks of a launch are spread; check mode uses one.
__attribute__((visibility("default"))) void prefix_kernels_emulator_threads(int count);
}
