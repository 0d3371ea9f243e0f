// cp.async: what is copied lands when its issuer waits for it, and not before.
#pragma once

#include <vector>

#include "lane.h"

namespace emulator {

// The 16-byte copies to shared memory that one thread issued and that have not landed.
class AsyncCopies {
 public:
  void reset();
  void issue(void* shared, const void* global, bool valid, Where where);
  void commit() { ++committed_; }
  // Lands all but the `pending` youngest committed groups.
  void wait(int pending);
  // A thread must not return while copies of its own are on their way.
  void require_all_landed(const Lane& lane) const;

 private:
  struct Copy {
    void* shared;
    const void* global;  // null: zeros
    int group;
    Where where;
  };
  std::vector<Copy> copies_;
  int committed_ = 0;
};

}  // namespace emulator
