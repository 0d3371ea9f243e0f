#include "clocks.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace emulator::check {

void Clocks::begin_launch() {
  launch_begin_ = ++epoch_;
  releases_.clear();
  released_at_.clear();
}

void Clocks::begin_block(int threads) {
  block_begin_ = ++epoch_;
  threads_ = threads;
  any_fence_ = false;
  acquired_by_block_.clear();
  for (int thread = 0; thread < threads; ++thread) {
    for (Releases* each : {&fenced_[thread], &seen_[thread], &acquired_[thread]}) each->clear();
  }
  std::memset(clock_, 0, sizeof(clock_[0]) * static_cast<size_t>(threads));
  std::memset(known_, 0, sizeof(known_[0]) * static_cast<size_t>(threads));
}

void Clocks::block_barrier() {
  ++epoch_;
  if (!any_fence_) return;
  for (int thread = 0; thread < threads_; ++thread)
    acquired_by_block_.insert(acquired_[thread].begin(), acquired_[thread].end());
}

void Clocks::warp_barrier(int warp, uint32_t lanes) {
  uint32_t joined[kLanes] = {};
  Releases acquired;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest), thread = warp * kLanes + lane;
    known_[thread][lane] = ++clock_[thread];
    for (int other = 0; other < kLanes; ++other) joined[other] = std::max(joined[other], known_[thread][other]);
    if (any_fence_) acquired.insert(acquired_[thread].begin(), acquired_[thread].end());
  }
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const int thread = warp * kLanes + std::countr_zero(rest);
    std::memcpy(known_[thread], joined, sizeof joined);
    if (any_fence_) acquired_[thread] = acquired;
  }
}

void Clocks::fence(int thread) {
  any_fence_ = true;
  acquired_[thread].insert(seen_[thread].begin(), seen_[thread].end());
  Release release{block_begin_, epoch_, thread / kLanes, {}};
  known_[thread][thread % kLanes] = ++clock_[thread];
  std::memcpy(release.known, known_[thread], sizeof release.known);
  fenced_[thread] = acquired_by_block_;
  fenced_[thread].insert(acquired_[thread].begin(), acquired_[thread].end());
  fenced_[thread].insert(releases_.size());
  releases_.push_back(release);
}

void Clocks::atomic(const void* address, int thread) {
  Releases& released = released_at_[address];
  seen_[thread].insert(released.begin(), released.end());
  released.insert(fenced_[thread].begin(), fenced_[thread].end());
}

bool Clocks::Release::holds(const Event& event) const {
  if (event.epoch < block_begin || event.epoch > epoch) return false;
  return event.epoch < epoch || (event.thread / kLanes == warp && event.clock < known[event.thread % kLanes]);
}

bool Clocks::is_acquired(const Event& event, const Releases& acquired) const {
  return std::any_of(acquired.begin(), acquired.end(), [&](size_t i) { return releases_[i].holds(event); });
}

bool Clocks::is_before(const Event& event, int thread) const {
  if (event.epoch < launch_begin_) return true;
  if (event.epoch < block_begin_)
    return is_acquired(event, acquired_by_block_) || is_acquired(event, acquired_[thread]);
  if (event.thread == thread || event.epoch < epoch_) return true;
  if (event.thread / kLanes != thread / kLanes) return false;
  return event.clock < known_[thread][event.thread % kLanes];
}

}  // namespace emulator::check
