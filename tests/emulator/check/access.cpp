#include "access.h"

#include <bit>
#include <map>
#include <string>
#include <vector>

#include "../block.h"
#include "../check.h"
#include "../emulator_launch.h"
#include "clocks.h"
#include "global_memory.h"
#include "shadow.h"

namespace emulator::check {
namespace {

struct State {
  Clocks clocks;
  Shadow shared{kMaxSharedBytes, true};
  std::vector<std::pair<const char*, const char*>> declared;  // sub-buffers of shared memory
  const Launch* launch = nullptr;
};

State& state() {
  static State instance;
  return instance;
}

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kRead:
      return "read";
    case Kind::kWrite:
      return "write";
    case Kind::kAtomic:
      return "atomic";
    case Kind::kCopy:
      return "cp.async";
  }
  return "";
}

std::string name_of_thread(int thread) {
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / kLanes) + " lane " +
         std::to_string(thread % kLanes) + ")";
}

// One access on its way through the checks.
struct Attempt {
  const Lane& lane;
  Kind kind;
  const char* address;
  size_t bytes;
  Place place;

  std::string text() const {
    return std::string(name_of(kind)) + " of " + std::to_string(bytes) + " bytes by " + emulator::name_of(lane) +
           " at " + check::text(place);
  }

  [[noreturn]] void refuse(const std::string& what) const { current_block->fail(what + ": " + text()); }

  void require_no_conflict(Shadow& shadow, size_t offset, const std::string& memory) const {
    const Clocks& clocks = state().clocks;
    Event event = clocks.event(lane.thread, place);
    event.atomic = kind == Kind::kAtomic;
    event.copying = kind == Kind::kCopy;
    const Conflict conflict =
        kind == Kind::kRead ? shadow.read(clocks, offset, bytes, event) : shadow.write(clocks, offset, bytes, event);
    if (conflict.earlier == nullptr) return;
    const Event& earlier = *conflict.earlier;
    std::string report = earlier.copying ? "cp.async not waited for" : "race";
    report += " on " + memory + ": " + text() + "\n  after the " + conflict.earlier_kind + " by " +
              name_of_thread(earlier.thread) + (clocks.in_this_block(earlier) ? "" : " of another block") + " at " +
              check::text(earlier.place) + (earlier.copying ? "" : ", with no barrier between");
    current_block->fail(report);
  }

  void check_shared() const {
    const SharedMemory& shared = current_block->shared_memory();
    const auto offset = static_cast<size_t>(address - shared.begin());
    if (!shared.holds(address, bytes)) {
      refuse("out of bounds: byte " + std::to_string(address - shared.begin()) + " of " +
             std::to_string(shared.end() - shared.begin()) + " bytes of shared memory");
    }
    if (!declared()) refuse("between the declared buffers: byte " + std::to_string(offset) + " of shared memory");
    const bool needs_value = kind == Kind::kRead || kind == Kind::kAtomic;
    if (needs_value && !state().shared.written(state().clocks, offset, bytes)) {
      refuse("byte " + std::to_string(offset) + " of shared memory, which this block has not written");
    }
    require_no_conflict(state().shared, offset, "shared memory");
  }

  bool declared() const {
    const auto& buffers = state().declared;
    if (buffers.empty()) return true;
    for (const auto& [begin, end] : buffers) {
      if (address >= begin && address + bytes <= end) return true;
    }
    return false;
  }

  void check_global() const {
    Allocation* found = global_memory().find(address, bytes);
    if (found == nullptr) refuse("out of bounds: " + global_memory().near(address));
    if (!found->writable) {
      if (kind != Kind::kRead) refuse("'" + found->name + "' may only be read");
      return;
    }
    const auto offset = static_cast<size_t>(address - found->begin);
    if (kind != Kind::kWrite && !found->initialized && !found->shadow->written(state().clocks, offset, bytes)) {
      refuse("byte " + std::to_string(offset) + " of '" + found->name + "', which nobody has written");
    }
    require_no_conflict(*found->shadow, offset, "'" + found->name + "' byte " + std::to_string(offset));
    if (kind == Kind::kAtomic) state().clocks.atomic(address, lane.thread);
  }
};

// What belongs to the emulation and not to the emulated memory: the thread's stack, which is its local memory, its
// parameters, constants, and the emulator's own two pointers.
bool is_local(const Lane& lane, const char* address) {
  if (address >= lane.stack_begin && address < lane.stack_end) return true;
  const Launch& launch = *state().launch;
  const auto* params = static_cast<const char*>(launch.params);
  if (address >= params && address < params + launch.params_bytes) return true;
  const auto* pointer = reinterpret_cast<const char*>(&current_lane);
  if (address >= pointer && address < pointer + sizeof current_lane) return true;
  return in_this_library(address);
}

}  // namespace

void access(const Lane& lane, Kind kind, const void* address, size_t bytes, size_t alignment, Place place) {
  const Attempt attempt{lane, kind, static_cast<const char*>(address), bytes, place};
  if (current_block->shared_memory().contains(address)) {
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0) attempt.refuse("misaligned in shared memory");
    attempt.check_shared();
  } else if (!is_local(lane, attempt.address)) {
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0) attempt.refuse("misaligned in global memory");
    attempt.check_global();
  }
}

void begin_launch(const Launch& launch) {
  state().launch = &launch;
  state().clocks.begin_launch();
}

void begin_block(int threads, dim3) {
  state().declared.clear();
  state().clocks.begin_block(threads);
}

void block_barrier() { state().clocks.block_barrier(); }

void warp_barrier(int warp, uint32_t lanes) { state().clocks.warp_barrier(warp, lanes); }

void fence(const Lane& lane) { state().clocks.fence(lane.thread); }

void read(const Lane& lane, const void* address, size_t bytes, Where where) {
  access(lane, Kind::kRead, address, bytes, 1, place_of(where));
}

void atomic(const Lane& lane, const void* address, size_t bytes, Where where) {
  access(lane, Kind::kAtomic, address, bytes, bytes, place_of(where));
}

void begin_copy(const Lane& lane, const void* shared, size_t bytes, Where where) {
  access(lane, Kind::kCopy, shared, bytes, 1, place_of(where));
}

void land_copy(const Lane& lane, const void* shared, size_t bytes, Where where) {
  const auto offset = static_cast<size_t>(static_cast<const char*>(shared) - current_block->shared_memory().begin());
  state().shared.land_copy(offset, bytes, state().clocks.event(lane.thread, place_of(where)));
}

void shared_buffer(const void* begin, size_t bytes) {
  const auto* first = static_cast<const char*>(begin);
  const SharedMemory& shared = current_block->shared_memory();
  if (bytes > 0 && !shared.holds(begin, bytes)) {
    current_block->fail("a shared buffer of bytes " + std::to_string(first - shared.begin()) + " to " +
                        std::to_string(first + bytes - shared.begin()) + " of " +
                        std::to_string(shared.end() - shared.begin()) + " bytes of shared memory");
  }
  const std::pair<const char*, const char*> buffer{first, first + bytes};
  for (const auto& known : state().declared) {
    if (known == buffer) return;
  }
  state().declared.push_back(buffer);
}

}  // namespace emulator::check
