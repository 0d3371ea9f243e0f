// The scheduler of one block: its warps and lanes take turns on one host thread.
//
// A lane runs until it has to wait for others, at a collective of its warp or at __syncthreads(). The lane that comes
// last does the work of the collective for all of them. Which of the lanes that can go on is the next to run is random:
// a kernel that is right gives the same result in every order.
#pragma once

#include <cstdint>
#include <string>

#include "async_copy.h"
#include "emulator_launch.h"
#include "fiber.h"
#include "random.h"
#include "shared_memory.h"

namespace emulator {

inline constexpr int kLanes = 32;
inline constexpr int kMaxWarps = kMaxThreads / kLanes;

// What a lane brings to a collective, and gets from it.
struct Post {
  const char* name = nullptr;  // of the instruction; null: it does not wait
  uint32_t mask = 0;           // the lanes it waits for; unused at __syncthreads()
  Where where;
  void* payload = nullptr;
  bool (*agrees)(const void* mine, const void* theirs) = nullptr;  // null: nothing to compare
  void (*perform)(void* const* payloads, uint32_t lanes) = nullptr;
};

class Block {
 public:
  Block();

  // Runs one block of the launch to its end. Throws Error.
  void run(const Launch& launch, dim3 index, uint64_t seed);

  // Called by lanes.
  void meet_warp(Lane& lane, const Post& post);
  void meet_block(Lane& lane, Where where);
  [[noreturn]] void fail(const std::string& message);

  AsyncCopies& copies(const Lane& lane) { return copies_[lane.thread]; }
  SharedMemory& shared_memory() { return shared_; }
  Lane& lane(int warp, int lane) { return lanes_[warp * kLanes + lane]; }
  // While a collective is performed: its warp, and fail() with its name and line.
  int warp_of_collective() const { return collective_warp_; }
  [[noreturn]] void fail_collective(const std::string& message);

 private:
  struct Warp {
    uint32_t live = 0;     // lanes that exist and have not returned
    uint32_t ready = 0;    // lanes that can go on
    uint32_t waiting = 0;  // lanes at a warp collective
    int rotation = 0;      // where the turn starts
    Post posts[kLanes];
    Where barrier[kLanes];
  };

  static void lane_main(Lane* lane);
  void lane_returned(Lane& lane);
  void wait(Lane& lane);
  Lane* next_lane();
  void switch_from(Lane& lane, Lane* next);
  void require_agreement(const Lane& lane, const Post& post);
  void complete_warp(int warp);
  void complete_block();
  void shuffle_turns(int warp);
  [[noreturn]] void deadlock();
  std::string name_of_lanes(int warp, uint32_t mask) const;

  Stacks lanes_;
  AsyncCopies copies_[kMaxThreads];
  SharedMemory shared_;
  Warp warps_[kMaxWarps];
  const Launch* launch_ = nullptr;
  int num_warps_ = 0;
  int live_ = 0;        // lanes that have not returned
  int at_barrier_ = 0;  // of these, lanes at __syncthreads()
  int current_warp_ = 0;
  int collective_warp_ = 0;
  const Post* collective_ = nullptr;
  bool in_order_ = true;
  Random random_{0};
  void* host_context_ = nullptr;
  std::string failure_;
};

// The block that this host thread is running.
extern __thread Block* current_block __attribute__((tls_model("initial-exec")));

// As reports print it: "thread 37 (warp 1 lane 5)".
std::string name_of(const Lane& lane);

}  // namespace emulator
