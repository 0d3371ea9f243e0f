// The functions that g++ -fsanitize=thread calls before every load and store of a kernel. The library is not linked to
// ThreadSanitizer: these take its place, and a process that loads the library needs no preparation.
#include <cstddef>

#include "../lane.h"
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

#define EMULATOR_HOOKS(BYTES)                                                                                          \
  void __tsan_read##BYTES(void* address) { check(Kind::kRead, address, BYTES, BYTES, __builtin_return_address(0)); }   \
  void __tsan_write##BYTES(void* address) { check(Kind::kWrite, address, BYTES, BYTES, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##BYTES(void* address) {                                                                   \
    check(Kind::kRead, address, BYTES, 1, __builtin_return_address(0));                                                \
  }                                                                                                                    \
  void __tsan_unaligned_write##BYTES(void* address) {                                                                  \
    check(Kind::kWrite, address, BYTES, 1, __builtin_return_address(0));                                               \
  }

extern "C" {
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)

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
