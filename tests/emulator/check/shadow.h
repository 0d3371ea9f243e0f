// What check mode remembers about memory: for every two bytes the last write and the last reads.
#pragma once

#include <cstddef>
#include <vector>

#include "clocks.h"

namespace emulator::check {

// Two bytes, the smallest thing that kernels store. (Two threads that store neighbouring single bytes would be taken
// for a race.)
inline constexpr size_t kGrain = 2;

struct Cell {
  Event write;
  // The last read, the last one by another thread than that, and the last one by another warp than that: enough to
  // find, in some order of lanes and warps, every read that a write does not wait for.
  Event reads[3];
};

// An access that an earlier one forbids.
struct Conflict {
  const Event* earlier = nullptr;  // null: no conflict
  const char* earlier_kind = "";
};

class Shadow {
 public:
  // `of_one_block`: each block finds the memory as if it were new.
  Shadow(size_t bytes, bool of_one_block) : cells_((bytes + kGrain - 1) / kGrain), of_one_block_(of_one_block) {}

  Conflict read(const Clocks& clocks, size_t offset, size_t bytes, const Event& event);
  Conflict write(const Clocks& clocks, size_t offset, size_t bytes, const Event& event);
  void land_copy(size_t offset, size_t bytes, const Event& event);

  bool written(const Clocks& clocks, size_t offset, size_t bytes) const;

 private:
  bool is_before(const Clocks& clocks, const Event& event, int thread) const;

  std::vector<Cell> cells_;
  bool of_one_block_;
};

}  // namespace emulator::check
