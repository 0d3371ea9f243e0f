// The functions that g++ -fsanitize=thread calls before every load and store of a kernel. The library is not linked to
// ThreadSanitizer: these take its place, and a process that loads the library needs no preparation.
#include <cstddef>
#include <cstdint>

#include "../block.h"
#include "access.h"

namespace {

using emulator::current_lane;
using emulator::check::access;
using emulator::check::Kind;

inline void check(Kind kind, const void* address, size_t bytes, size_t alignment, const void* return_address) {
  // Host code in the same file is instrumented too.
  if (current_lane == nullptr) return;
  access(*current_lane, kind, address, bytes, alignment, emulator::check::place_of(return_address));
}

}  // namespace

void emulator::require_vector_alignment(const void* vector) {
  if (current_lane == nullptr || reinterpret_cast<uintptr_t>(vector) % 16 == 0) return;
  const auto place = emulator::check::place_of(__builtin_return_address(0));
  current_block->fail("misaligned vector of 16 bytes: " + name_of(*current_lane) + " at " +
                      emulator::check::text(place));
}

#define EMULATOR_HOOKS(BYTES, ALIGNMENT)                                         \
  void __tsan_read##BYTES(void* address) {                                       \
    check(Kind::kRead, address, BYTES, ALIGNMENT, __builtin_return_address(0));  \
  }                                                                              \
  void __tsan_write##BYTES(void* address) {                                      \
    check(Kind::kWrite, address, BYTES, ALIGNMENT, __builtin_return_address(0)); \
  }                                                                              \
  void __tsan_unaligned_read##BYTES(void* address) {                             \
    check(Kind::kRead, address, BYTES, 1, __builtin_return_address(0));          \
  }                                                                              \
  void __tsan_unaligned_write##BYTES(void* address) {                            \
    check(Kind::kWrite, address, BYTES, 1, __builtin_return_address(0));         \
  }

extern "C" {
EMULATOR_HOOKS(1, 1)
EMULATOR_HOOKS(2, 2)
EMULATOR_HOOKS(4, 4)
EMULATOR_HOOKS(8, 8)
// Called for structs that are aligned to 8, too; vectors of 16 bytes see vector_types.h.
EMULATOR_HOOKS(16, 8)

void __tsan_read_range(void* address, size_t bytes) {
  if (bytes > 0) check(Kind::kRead, address, bytes, 1, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  if (bytes > 0) check(Kind::kWrite, address, bytes, 1, __builtin_return_address(0));
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
