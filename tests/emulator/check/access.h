// The one question of check mode: may this thread do this to these bytes now?
#pragma once

#include <cstddef>

#include "../lane.h"
#include "place.h"

namespace emulator::check {

enum class Kind { kRead, kWrite, kAtomic, kCopy };

// Ends the launch with a report if not. `alignment` 1: any address will do.
void access(const Lane& lane, Kind kind, const void* address, size_t bytes, size_t alignment, Place place);

}  // namespace emulator::check
