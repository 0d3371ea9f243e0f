// Which accesses happened before which: barriers order the threads of a block, nothing orders two blocks of a launch.
//
// Time is counted in epochs: one ends at every __syncthreads() and with every block. Accesses of the same block in
// different epochs are ordered; so are two of one thread. Within an epoch only __syncwarp() orders lanes of a warp:
// each lane has a clock that it advances there, and knows the clocks of the lanes that it met (a vector clock).
#pragma once

#include <cstdint>

#include "../block.h"
#include "place.h"

namespace emulator::check {

struct Event {
  uint32_t epoch = 0;  // 0: never happened
  uint32_t clock = 0;
  Place place = 0;
  uint16_t thread = 0;
  uint8_t atomic = 0;
  uint8_t copying = 0;  // an asynchronous copy that has not landed
};

class Clocks {
 public:
  void begin_launch() { launch_begin_ = ++epoch_; }
  void begin_block(int threads);
  void block_barrier() { ++epoch_; }
  void warp_barrier(int warp, uint32_t lanes);

  Event event(int thread, Place place) const { return {epoch_, clock_[thread], place, static_cast<uint16_t>(thread)}; }
  // Whether the event is over, for sure, when `thread` does what it is about to do.
  bool is_before(const Event& event, int thread) const;
  bool in_this_block(const Event& event) const { return event.epoch >= block_begin_; }

 private:
  uint32_t epoch_ = 0;
  uint32_t launch_begin_ = 0;
  uint32_t block_begin_ = 0;
  uint32_t clock_[kMaxThreads] = {};
  // known_[t][l]: t's accesses come after those of lane l of its warp whose clock is below this.
  uint32_t known_[kMaxThreads][kLanes] = {};
};

}  // namespace emulator::check
