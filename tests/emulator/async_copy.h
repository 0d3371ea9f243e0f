// cp.async: what is copied lands when its issuer waits for it, and not before.
#pragma once

#include "lane.h"

namespace emulator {

void copy_async(void* shared, const void* global, bool valid, Where where);
void commit_copies();
// Lands all but the `pending` youngest committed groups of this lane.
void wait_for_copies(int pending, Where where);
// A thread must not return while copies of its own are on their way.
void require_all_landed(const Lane& lane);

}  // namespace emulator
