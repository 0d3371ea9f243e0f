#include "block.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "check.h"
#include "source_line.h"

namespace emulator {

__thread Block* current_block = nullptr;

namespace {

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

}  // namespace

std::string name_of(const Lane& lane) {
  return "thread " + std::to_string(lane.thread) + " (warp " + std::to_string(lane.warp) + " lane " +
         std::to_string(lane.lane) + ")";
}

Block::Block() = default;

void Block::run(const Launch& launch, dim3 index, uint64_t seed) {
  launch_ = &launch;
  in_order_ = seed == 0;
  random_ = Random(seed);
  failure_.clear();
  shared_.reset(launch.shared_bytes);
  live_ = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  at_barrier_ = 0;
  num_warps_ = (live_ + kLanes - 1) / kLanes;

  for (int thread = 0; thread < live_; ++thread) {
    Lane& lane = lanes_.reset(thread, &Block::lane_main);
    const unsigned x = launch.block.x, y = launch.block.y, t = static_cast<unsigned>(thread);
    lane.thread_index = {t % x, t / x % y, t / (x * y)};
    lane.block_index = {index.x, index.y, index.z};
    lane.block_dim = launch.block;
    lane.grid_dim = launch.grid;
    lane.thread = thread;
    lane.warp = thread / kLanes;
    lane.lane = thread % kLanes;
    copies(lane).reset();
  }
  for (int warp = 0; warp < num_warps_; ++warp) {
    const int lanes = std::min(kLanes, live_ - warp * kLanes);
    warps_[warp].live = warps_[warp].ready = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    warps_[warp].waiting = 0;
    shuffle_turns(warp);
  }
  current_warp_ = in_order_ ? 0 : static_cast<int>(random_.below(num_warps_));
  check::begin_block(live_, index);

  Block* outer_block = current_block;
  Lane* outer_lane = current_lane;
  current_block = this;
  Lane* first = next_lane();
  current_lane = first;
  emulator_switch(&host_context_, first->stack_pointer);
  current_block = outer_block;
  current_lane = outer_lane;
  if (!failure_.empty()) throw Error(failure_);
}

void Block::lane_main(Lane* lane) {
  const Launch& launch = *current_block->launch_;
  launch.call(launch.kernel, launch.params);
  current_block->lane_returned(*lane);
}

void Block::lane_returned(Lane& lane) {
  copies(lane).require_all_landed(lane);
  Warp& warp = warps_[lane.warp];
  warp.live &= ~(1u << lane.lane);
  --live_;
  // A barrier counts the threads that have returned as arrived.
  complete_warp(lane.warp);
  if (live_ > 0) complete_block();
  switch_from(lane, next_lane());
  __builtin_unreachable();
}

void Block::fail(const std::string& message) {
  failure_ = message;
  void* abandoned;
  emulator_switch(&abandoned, host_context_);
  __builtin_unreachable();
}

void Block::fail_collective(const std::string& message) {
  fail(std::string(collective_->name) + " at " + text(collective_->where) + " by warp " +
       std::to_string(collective_warp_) + ": " + message);
}

void Block::shuffle_turns(int warp) { warps_[warp].rotation = in_order_ ? 0 : static_cast<int>(random_.below(kLanes)); }

Lane* Block::next_lane() {
  if (warps_[current_warp_].ready == 0) {
    const int start = in_order_ ? 0 : static_cast<int>(random_.below(num_warps_));
    int warp = start;
    while (warps_[warp].ready == 0) {
      warp = warp + 1 == num_warps_ ? 0 : warp + 1;
      if (warp == start) return nullptr;
    }
    current_warp_ = warp;
  }
  Warp& warp = warps_[current_warp_];
  const int lane = (std::countr_zero(std::rotr(warp.ready, warp.rotation)) + warp.rotation) % kLanes;
  warp.ready &= ~(1u << lane);
  return &lanes_[current_warp_ * kLanes + lane];
}

void Block::switch_from(Lane& lane, Lane* next) {
  if (next == &lane) return;
  if (next == nullptr) {
    if (live_ > 0) deadlock();
    void* finished;
    emulator_switch(&finished, host_context_);
  }
  current_lane = next;
  emulator_switch(&lane.stack_pointer, next->stack_pointer);
}

void Block::wait(Lane& lane) { switch_from(lane, next_lane()); }

void Block::require_agreement(const Lane& lane, const Post& post) {
  const Warp& warp = warps_[lane.warp];
  if ((post.mask >> lane.lane & 1) == 0) {
    fail(std::string(post.name) + " at " + text(post.where) + " by " + name_of_lanes(lane.warp, 1u << lane.lane) +
         ", which is not in its mask");
  }
  // Those that wait for each other have agreed: the first of them speaks for all.
  for (uint32_t others = warp.waiting; others != 0; others &= others - 1) {
    const int other = std::countr_zero(others);
    const Post& theirs = warp.posts[other];
    if ((theirs.mask & post.mask) == 0) continue;
    const bool same_line = same_place(theirs.where, post.where);
    if (theirs.name == post.name && theirs.mask == post.mask && same_line &&
        (post.agrees == nullptr || post.agrees(post.payload, theirs.payload))) {
      return;
    }
    fail("divergent collectives: " + name_of_lanes(lane.warp, 1u << lane.lane) + " is at " + post.name + " " +
         text(post.where) + " while lane " + std::to_string(other) + " is at " + theirs.name + " " +
         text(theirs.where) + (same_line ? " with another mask or other operands" : ""));
  }
}

void Block::meet_warp(Lane& lane, const Post& post) {
  Warp& warp = warps_[lane.warp];
  require_agreement(lane, post);
  warp.posts[lane.lane] = post;
  warp.waiting |= 1u << lane.lane;
  complete_warp(lane.warp);
  wait(lane);
}

void Block::complete_warp(int index) {
  Warp& warp = warps_[index];
  for (uint32_t rest = warp.waiting; rest != 0;) {
    const Post& post = warp.posts[std::countr_zero(rest)];
    const uint32_t expected = post.mask & warp.live;
    rest &= ~post.mask;
    if ((warp.waiting & expected) != expected) continue;
    void* payloads[kLanes] = {};
    for (uint32_t lanes = expected; lanes != 0; lanes &= lanes - 1) {
      const int lane = std::countr_zero(lanes);
      payloads[lane] = warp.posts[lane].payload;
    }
    collective_warp_ = index;
    collective_ = &post;
    post.perform(payloads, expected);
    warp.waiting &= ~expected;
    warp.ready |= expected;
    shuffle_turns(index);
    if (!in_order_ && random_.below(8) == 0) current_warp_ = static_cast<int>(random_.below(num_warps_));
  }
}

void Block::meet_block(Lane& lane, Where where) {
  Warp& warp = warps_[lane.warp];
  warp.barrier[lane.lane] = where;
  ++at_barrier_;
  complete_block();
  wait(lane);
}

// Completes __syncthreads() when every thread that has not returned stands at it.
void Block::complete_block() {
  if (at_barrier_ != live_) return;
  const Where* first = nullptr;
  int first_thread = 0;
  for (int index = 0; index < num_warps_; ++index) {
    for (uint32_t lanes = warps_[index].live; lanes != 0; lanes &= lanes - 1) {
      const int lane = std::countr_zero(lanes);
      const Where& where = warps_[index].barrier[lane];
      if (first == nullptr) {
        first = &where;
        first_thread = index * kLanes + lane;
      } else if (!same_place(where, *first)) {
        fail("divergent barrier: thread " + std::to_string(first_thread) + " is at __syncthreads() " + text(*first) +
             " while thread " + std::to_string(index * kLanes + lane) + " is at " + text(where));
      }
    }
  }
  for (int index = 0; index < num_warps_; ++index) {
    warps_[index].ready = warps_[index].live;
    shuffle_turns(index);
  }
  at_barrier_ = 0;
  check::block_barrier();
  if (!in_order_) current_warp_ = static_cast<int>(random_.below(num_warps_));
}

std::string Block::name_of_lanes(int warp, uint32_t mask) const {
  std::string names;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    int last = lane;
    while (last + 1 < kLanes && (mask >> (last + 1) & 1) != 0) ++last;
    if (!names.empty()) names += ",";
    names += std::to_string(lane);
    if (last > lane) names.append("-").append(std::to_string(last));
    lane = last;
  }
  return "warp " + std::to_string(warp) + (std::has_single_bit(mask) ? " lane " : " lanes ") + names;
}

// Nobody can go on: say who waits where.
void Block::deadlock() {
  std::string report = "deadlock:";
  for (int index = 0; index < num_warps_; ++index) {
    const Warp& warp = warps_[index];
    for (uint32_t rest = warp.live; rest != 0;) {
      const int lane = std::countr_zero(rest);
      const bool collective = warp.waiting >> lane & 1;
      const Where where = collective ? warp.posts[lane].where : warp.barrier[lane];
      uint32_t together = 0;
      for (int other = 0; other < kLanes; ++other) {
        if ((rest >> other & 1) == 0 || collective != (warp.waiting >> other & 1)) continue;
        const Where theirs = collective ? warp.posts[other].where : warp.barrier[other];
        if (theirs.line() == where.line()) together |= 1u << other;
      }
      report += "\n  " + name_of_lanes(index, together) + (together == 1 ? " waits" : " wait") + " at " +
                (collective ? warp.posts[lane].name : "__syncthreads()") + " " + text(where);
      rest &= ~together;
    }
  }
  fail(report);
}

}  // namespace emulator
