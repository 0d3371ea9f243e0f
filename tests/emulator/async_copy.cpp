#include "async_copy.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>

#include "block.h"
#include "check.h"
#include "source_line.h"

namespace emulator {
namespace {
constexpr size_t kBytes = 16;

std::atomic<int64_t> copied_bytes{0};

bool misaligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kBytes != 0; }
}  // namespace

void AsyncCopies::reset() {
  copies_.clear();
  committed_ = 0;
}

void AsyncCopies::issue(void* shared, const void* global, bool valid, Where where) {
  const auto refuse = [&](const char* what) {
    current_block->fail("cp.async at " + text(where) + " by " + name_of(*current_lane) + ": " + what);
  };
  if (!current_block->shared_memory().holds(shared, kBytes)) refuse("the destination is not in shared memory");
  if (misaligned(shared)) refuse("the destination is not aligned to 16 bytes");
  if (valid && misaligned(global)) refuse("the source is not aligned to 16 bytes");
  if (valid) {
    check::read(*current_lane, global, kBytes, where);
    copied_bytes.fetch_add(kBytes, std::memory_order_relaxed);
  }
  check::begin_copy(*current_lane, shared, kBytes, where);
  // From here to its wait the hardware may write at any time: nobody can count on what is there.
  std::memset(shared, 0xFF, kBytes);
  copies_.push_back({shared, valid ? global : nullptr, committed_, where});
}

void AsyncCopies::wait(int pending) {
  size_t landed = 0;
  for (; landed < copies_.size() && copies_[landed].group < committed_ - pending; ++landed) {
    const Copy& copy = copies_[landed];
    if (copy.global == nullptr) {
      std::memset(copy.shared, 0, kBytes);
    } else {
      std::memcpy(copy.shared, copy.global, kBytes);
    }
    check::land_copy(*current_lane, copy.shared, kBytes, copy.where);
  }
  copies_.erase(copies_.begin(), copies_.begin() + static_cast<ptrdiff_t>(landed));
}

void AsyncCopies::require_all_landed(const Lane& lane) const {
  if (copies_.empty()) return;
  current_block->fail(name_of(lane) + " returned before its cp.async of " + text(copies_.front().where) +
                      " was waited for");
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) int64_t prefix_kernels_emulator_take_copied_bytes() {
  return emulator::copied_bytes.exchange(0);
}
