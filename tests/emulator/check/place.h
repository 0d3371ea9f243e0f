// Where in the source an access stands, in 32 bits: the shadow keeps four of them for every two bytes of memory.
#pragma once

#include <cstdint>
#include <string>

#include "../lane.h"

namespace emulator::check {

// The return address of a hook, as an offset into this library; or, with the highest bit set, the number of a Where.
using Place = uint32_t;

Place place_of(const void* return_address);
Place place_of(Where where);

// "sm80/forward.cuh:120", followed by the lines that inlined it.
std::string text(Place place);

// Whether the address is in this library's code or data.
bool in_this_library(const void* address);

}  // namespace emulator::check
