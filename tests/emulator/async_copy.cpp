#include "async_copy.h"

#include <cstdint>
#include <cstring>
#include <string>

#include "block.h"
#include "check.h"

namespace emulator {
namespace {
constexpr size_t kBytes = 16;

bool misaligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kBytes != 0; }
}  // namespace

void copy_async(void* shared, const void* global, bool valid, Where where) {
  const auto refuse = [&](const char* what) {
    current_block->fail(std::string("cp.async at ") + text(where) + " by thread " +
                        std::to_string(current_lane->thread) + ": " + what);
  };
  char* target = static_cast<char*>(shared);
  if (target < current_block->shared_memory().begin() || target + kBytes > current_block->shared_memory().end()) {
    refuse("the destination is not in shared memory");
  }
  if (misaligned(shared)) refuse("the destination is not aligned to 16 bytes");
  if (valid && misaligned(global)) refuse("the source is not aligned to 16 bytes");
  if (valid) check::read(*current_lane, global, kBytes, where);
  check::begin_copy(*current_lane, shared, kBytes, where);
  // From here to its wait the hardware may write at any time: nobody can count on what is there.
  std::memset(shared, 0xFF, kBytes);
  current_lane->copies.push_back({shared, valid ? global : nullptr, current_lane->committed_groups, where});
}

void commit_copies() { ++current_lane->committed_groups; }

void wait_for_copies(int pending, Where where) {
  Lane& lane = *current_lane;
  size_t landed = 0;
  for (; landed < lane.copies.size() && lane.copies[landed].group < lane.committed_groups - pending; ++landed) {
    const AsyncCopy& copy = lane.copies[landed];
    if (copy.global == nullptr) {
      std::memset(copy.shared, 0, kBytes);
    } else {
      std::memcpy(copy.shared, copy.global, kBytes);
    }
    check::land_copy(lane, copy.shared, kBytes, where);
  }
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + static_cast<ptrdiff_t>(landed));
}

void require_all_landed(const Lane& lane) {
  if (lane.copies.empty()) return;
  current_block->fail("thread " + std::to_string(lane.thread) + " returned before its cp.async of " +
                      text(lane.copies.front().where) + " was waited for");
}

}  // namespace emulator
