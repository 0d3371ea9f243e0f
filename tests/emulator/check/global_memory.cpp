#include "global_memory.h"

#include <algorithm>

#include "../emulator_launch.h"

namespace emulator {
namespace check {

GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

void GlobalMemory::add(const void* data, size_t bytes, const char* name, bool writable, bool initialized) {
  if (bytes == 0) return;
  auto shadow = writable ? std::make_unique<Shadow>(bytes + kGrain, false) : nullptr;
  Allocation allocation{static_cast<const char*>(data), bytes, name, writable, initialized, std::move(shadow)};
  // Writable ones first: find() takes the first that fits.
  const auto at = writable ? allocations_.begin() : allocations_.end();
  allocations_.insert(at, std::move(allocation));
}

void GlobalMemory::clear() { allocations_.clear(); }

Allocation* GlobalMemory::find(const void* address, size_t bytes) {
  const auto found = std::find_if(allocations_.begin(), allocations_.end(),
                                  [&](const Allocation& each) { return each.holds(address, bytes); });
  return found == allocations_.end() ? nullptr : &*found;
}

std::string GlobalMemory::near(const void* address) const {
  constexpr ptrdiff_t kNear = 1 << 20;
  const auto* byte = static_cast<const char*>(address);
  std::string result;
  ptrdiff_t nearest = kNear;
  for (const Allocation& each : allocations_) {
    const ptrdiff_t before = each.begin - byte, behind = byte - (each.begin + each.bytes);
    const ptrdiff_t distance = std::max({before, behind, ptrdiff_t{0}});
    if (distance >= nearest) continue;
    nearest = distance;
    if (before > 0) {
      result = std::to_string(before) + " bytes before the begin of '" + each.name + "'";
    } else if (behind >= 0) {
      result = std::to_string(behind) + " bytes behind the end of '" + each.name + "'";
    } else {
      result = "across the end of '" + each.name + "'";
    }
    result += " of " + std::to_string(each.bytes) + " bytes";
  }
  return result.empty() ? "near nothing that was registered" : result;
}

}  // namespace check

void register_global(const void* data, size_t bytes, const char* name, bool writable, bool initialized) {
  check::global_memory().add(data, bytes, name, writable, initialized);
}

void clear_globals() { check::global_memory().clear(); }

}  // namespace emulator
