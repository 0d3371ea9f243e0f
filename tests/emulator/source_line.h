// Source lines as reports print them: "sm80/forward.cuh:120".
#pragma once

#include <string>

#include "lane.h"

namespace emulator {

std::string text(Where where);

// The line of an instruction of this library, followed by the lines that inlined it: "a.cuh:3 < b.cuh:20".
std::string line_of(const void* instruction);

// The name of the function that begins at this address.
std::string function_at(const void* address);

// Whether the address is in this library's code or data, and where these begin.
bool in_this_library(const void* address);
const char* library_base();

}  // namespace emulator
