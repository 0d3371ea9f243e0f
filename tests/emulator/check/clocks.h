// The order in which accesses happened: barriers order the threads of a block, fences and atomics two blocks.
//
// Time is counted in epochs: one ends at every __syncthreads() and with every block. Accesses of the same block in
// different epochs are ordered; so are two of one thread. Within an epoch only __syncwarp() orders lanes of a warp:
// each lane has a clock that it advances there, and knows the clocks of the lanes that it met (a vector clock).
//
// A thread's __threadfence() releases what its block did before it, as far as the thread knows. The release goes to
// every address on which the thread then does an atomic. A thread of another block that does an atomic on this address
// later, and then passes a fence itself, has acquired it, and a barrier hands it on.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <vector>

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
  void begin_launch();
  void begin_block(int threads);
  void block_barrier();
  void warp_barrier(int warp, uint32_t lanes);
  void fence(int thread);
  void atomic(const void* address, int thread);

  Event event(int thread, Place place) const { return {epoch_, clock_[thread], place, static_cast<uint16_t>(thread)}; }
  // Whether the event is over, for sure, when `thread` does what it is about to do.
  bool is_before(const Event& event, int thread) const;
  bool in_this_block(const Event& event) const { return event.epoch >= block_begin_; }

 private:
  // Accesses of a block that a fence of one of its threads lets others see.
  struct Release {
    uint32_t block_begin;
    uint32_t epoch;          // all accesses of the block in earlier epochs, and in this one those
    int warp;                // of the lanes of this warp
    uint32_t known[kLanes];  // whose clock is below this
    bool holds(const Event& event) const;
  };
  using Releases = std::set<size_t>;  // indices into releases_

  bool is_acquired(const Event& event, const Releases& acquired) const;

  uint32_t epoch_ = 0;
  uint32_t launch_begin_ = 0;
  uint32_t block_begin_ = 0;
  uint32_t clock_[kMaxThreads] = {};
  // known_[t][l]: t's accesses come after those of lane l of its warp whose clock is below this.
  uint32_t known_[kMaxThreads][kLanes] = {};

  int threads_ = 0;                              // of the block
  bool any_fence_ = false;                       // in this block
  std::vector<Release> releases_;                // in this launch
  std::map<const void*, Releases> released_at_;  // by the address of the atomic
  Releases fenced_[kMaxThreads];                 // behind a thread's last fence
  Releases seen_[kMaxThreads];                   // by a thread's atomics, without a fence as yet
  Releases acquired_[kMaxThreads];
  Releases acquired_by_block_;  // before its last barrier
};

}  // namespace emulator::check
