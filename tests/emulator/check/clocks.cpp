#include "clocks.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace emulator::check {

void Clocks::begin_block(int threads) {
  block_begin_ = ++epoch_;
  std::memset(clock_, 0, sizeof(clock_[0]) * static_cast<size_t>(threads));
  std::memset(known_, 0, sizeof(known_[0]) * static_cast<size_t>(threads));
}

void Clocks::warp_barrier(int warp, uint32_t lanes) {
  uint32_t joined[kLanes] = {};
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest), thread = warp * kLanes + lane;
    known_[thread][lane] = ++clock_[thread];
    for (int other = 0; other < kLanes; ++other) joined[other] = std::max(joined[other], known_[thread][other]);
  }
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    std::memcpy(known_[warp * kLanes + std::countr_zero(rest)], joined, sizeof joined);
  }
}

bool Clocks::is_before(const Event& event, int thread) const {
  if (event.epoch < launch_begin_) return true;
  if (event.epoch < block_begin_) return false;
  if (event.thread == thread || event.epoch < epoch_) return true;
  if (event.thread / kLanes != thread / kLanes) return false;
  return event.clock < known_[thread][event.thread % kLanes];
}

}  // namespace emulator::check
