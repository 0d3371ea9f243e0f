// What check mode is told: every access to memory and every event that orders accesses. Empty in fast mode.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lane.h"

namespace emulator::check {

#if defined(PREFIX_KERNELS_CHECKED)
#define EMULATOR_CHECK ;
#else
#define EMULATOR_CHECK \
  {                    \
  }
#endif

inline void begin_launch() EMULATOR_CHECK inline void begin_block(int /*threads*/) EMULATOR_CHECK
    inline void block_barrier() EMULATOR_CHECK inline void warp_barrier(int /*warp*/, uint32_t /*lanes*/) EMULATOR_CHECK
    inline void read(const Lane&, const void* /*address*/, size_t /*bytes*/, Where) EMULATOR_CHECK
    inline void write(const Lane&, const void* /*address*/, size_t /*bytes*/, Where) EMULATOR_CHECK
    inline void atomic(const Lane&, const void* /*address*/, size_t /*bytes*/, Where) EMULATOR_CHECK
    inline void begin_copy(const Lane&, const void* /*shared*/, size_t /*bytes*/, Where) EMULATOR_CHECK
    inline void land_copy(const Lane&, const void* /*shared*/, size_t /*bytes*/, Where) EMULATOR_CHECK
    inline void shared_buffer(const void* /*begin*/, size_t /*bytes*/) EMULATOR_CHECK

}  // namespace emulator::check
