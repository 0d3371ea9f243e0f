// What check mode is told: every access to memory and every event that orders accesses. Empty in fast mode.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lane.h"

namespace emulator {

struct Launch;

namespace check {

#if defined(PREFIX_KERNELS_CHECKED)
#define EMULATOR_HOOK(DECLARATION) DECLARATION;
#else
#define EMULATOR_HOOK(DECLARATION) \
  inline DECLARATION {}
#endif

EMULATOR_HOOK(void begin_launch(const Launch& launch))
EMULATOR_HOOK(void begin_block(int threads, dim3 index))
EMULATOR_HOOK(void block_barrier())
EMULATOR_HOOK(void warp_barrier(int warp, uint32_t lanes))
EMULATOR_HOOK(void fence(const Lane& lane))
EMULATOR_HOOK(void read(const Lane& lane, const void* address, size_t bytes, Where where))
EMULATOR_HOOK(void atomic(const Lane& lane, const void* address, size_t bytes, Where where))
// Between these two nobody may touch the bytes of shared memory that an asynchronous copy is going to fill.
EMULATOR_HOOK(void begin_copy(const Lane& lane, const void* shared, size_t bytes, Where where))
EMULATOR_HOOK(void land_copy(const Lane& lane, const void* shared, size_t bytes, Where where))
EMULATOR_HOOK(void shared_buffer(const void* begin, size_t bytes))

}  // namespace check
}  // namespace emulator
