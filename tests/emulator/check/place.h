// Where in the source an access stands, in 32 bits: the shadow keeps four of them for every two bytes of memory.
#pragma once

#include <cstdint>
#include <string>

#include "../source_line.h"

namespace emulator::check {

// The return address of a hook, as an offset into this library; or, with the highest bit set, the number of a Where.
using Place = uint32_t;

Place place_of(const void* return_address);
Place place_of(Where where);

std::string text(Place place);

}  // namespace emulator::check
