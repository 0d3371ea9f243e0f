#include "instructions.h"

#include <atomic>
#include <bit>
#include <chrono>
#include <string>
#include <thread>

#include "block.h"
#include "check.h"
#include "source_line.h"

namespace emulator {
namespace {

struct Exchange {
  uint64_t value;
  int source;
  uint64_t result;
};

void perform_exchange(void* const* payloads, uint32_t lanes) {
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    auto* mine = static_cast<Exchange*>(payloads[std::countr_zero(rest)]);
    const auto* theirs = static_cast<const Exchange*>(payloads[mine->source]);
    if (theirs == nullptr) {
      current_block->fail_collective("lane " + std::to_string(std::countr_zero(rest)) + " reads lane " +
                                     std::to_string(mine->source) + ", which takes no part in it");
    }
    mine->result = theirs->value;
  }
}

struct Ballot {
  bool predicate;
  uint32_t result;
};

void perform_ballot(void* const* payloads, uint32_t lanes) {
  uint32_t result = 0;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    result |= static_cast<uint32_t>(static_cast<const Ballot*>(payloads[lane])->predicate) << lane;
  }
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    static_cast<Ballot*>(payloads[std::countr_zero(rest)])->result = result;
  }
}

void perform_warp_barrier(void* const*, uint32_t lanes) {
  check::warp_barrier(current_block->warp_of_collective(), lanes);
}

template <typename T>
T add(T* address, T value, Where where) {
  check::atomic(*current_lane, address, sizeof(T), where);
  return std::atomic_ref<T>(*address).fetch_add(value);
}

}  // namespace

void sync_threads(Where where) { current_block->meet_block(*current_lane, where); }

void sync_warp(uint32_t mask, Where where) {
  current_block->meet_warp(*current_lane, {"__syncwarp", mask, where, nullptr, nullptr, &perform_warp_barrier});
}

uint64_t exchange(const char* name, uint32_t mask, uint64_t value, int source, Where where) {
  Exchange payload{value, source, 0};
  current_block->meet_warp(*current_lane, {name, mask, where, &payload, nullptr, &perform_exchange});
  return payload.result;
}

uint32_t ballot(const char* name, uint32_t mask, bool predicate, Where where) {
  Ballot payload{predicate, 0};
  current_block->meet_warp(*current_lane, {name, mask, where, &payload, nullptr, &perform_ballot});
  return payload.result;
}

float atomic_add(float* address, float value, Where where) { return add(address, value, where); }
double atomic_add(double* address, double value, Where where) { return add(address, value, where); }
int atomic_add(int* address, int value, Where where) { return add(address, value, where); }
unsigned atomic_add(unsigned* address, unsigned value, Where where) { return add(address, value, where); }

unsigned atomic_increment(unsigned* address, unsigned limit, Where where) {
  check::atomic(*current_lane, address, sizeof(unsigned), where);
  const std::atomic_ref<unsigned> number(*address);
  unsigned old = number;
  while (!number.compare_exchange_weak(old, old >= limit ? 0 : old + 1)) {
  }
  return old;
}

void fence() {
  check::fence(*current_lane);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

int load_relaxed(const int* address, Where where) { return add(const_cast<int*>(address), 0, where); }

void wait_for_value(const int* address, int value, Where where) {
  constexpr auto kLongest = std::chrono::seconds(5);
  const auto begin = std::chrono::steady_clock::now();
  while (load_relaxed(address, where) != value) {
    if (std::chrono::steady_clock::now() - begin > kLongest)
      current_block->fail("wait at " + text(where) + " by " + name_of(*current_lane) + " for " + std::to_string(value) +
                          ": no block wrote it, got " + std::to_string(load_relaxed(address, where)));
    std::this_thread::yield();
  }
}

void copy_async(void* shared, const void* global, bool valid, Where where) {
  current_block->copies(*current_lane).issue(shared, global, valid, where);
}
void commit_copies() { current_block->copies(*current_lane).commit(); }
void wait_for_copies(int pending) { current_block->copies(*current_lane).wait(pending); }

void shared_buffer(const void* begin, size_t bytes) { check::shared_buffer(begin, bytes); }
char* shared_memory() { return current_block->shared_memory().begin(); }

void trap(Where where) { current_block->fail("trap at " + text(where) + " by " + name_of(*current_lane)); }

}  // namespace emulator
