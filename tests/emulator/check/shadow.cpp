#include "shadow.h"

namespace emulator::check {
namespace {

size_t first_cell(size_t offset) { return offset / kGrain; }
size_t last_cell(size_t offset, size_t bytes) { return (offset + bytes - 1) / kGrain; }

bool same_warp(const Event& a, const Event& b) { return a.thread / kLanes == b.thread / kLanes; }

void remember_read(const Clocks& clocks, Cell& cell, const Event& event) {
  Event& last = cell.reads[0];
  if (last.epoch != 0 && (last.thread != event.thread || !clocks.in_this_block(last))) {
    if (!same_warp(last, event) || !clocks.in_this_block(last)) cell.reads[2] = last;
    cell.reads[1] = last;
  }
  last = event;
}

}  // namespace

Conflict Shadow::read(const Clocks& clocks, size_t offset, size_t bytes, const Event& event) {
  for (size_t i = first_cell(offset); i <= last_cell(offset, bytes); ++i) {
    Cell& cell = cells_[i];
    if (cell.write.copying && clocks.in_this_block(cell.write)) return {&cell.write, "copy that has not landed"};
    if (!clocks.is_before(cell.write, event.thread)) return {&cell.write, cell.write.atomic ? "atomic" : "write"};
    remember_read(clocks, cell, event);
  }
  return {};
}

Conflict Shadow::write(const Clocks& clocks, size_t offset, size_t bytes, const Event& event) {
  for (size_t i = first_cell(offset); i <= last_cell(offset, bytes); ++i) {
    Cell& cell = cells_[i];
    if (cell.write.copying && clocks.in_this_block(cell.write)) return {&cell.write, "copy that has not landed"};
    const bool both_atomic = cell.write.atomic && event.atomic;
    if (!both_atomic && !clocks.is_before(cell.write, event.thread)) {
      return {&cell.write, cell.write.atomic ? "atomic" : "write"};
    }
    for (Event& read : cell.reads) {
      if (!clocks.is_before(read, event.thread)) return {&read, "read"};
      read = {};
    }
    cell.write = event;
  }
  return {};
}

void Shadow::land_copy(size_t offset, size_t bytes, const Event& event) {
  for (size_t i = first_cell(offset); i <= last_cell(offset, bytes); ++i) cells_[i].write = event;
}

ptrdiff_t Shadow::first_unwritten(const Clocks& clocks, size_t offset, size_t bytes, bool in_block) const {
  for (size_t i = first_cell(offset); i <= last_cell(offset, bytes); ++i) {
    const Event& write = cells_[i].write;
    if (in_block ? !clocks.in_this_block(write) : write.epoch == 0) return static_cast<ptrdiff_t>(i * kGrain);
  }
  return -1;
}

}  // namespace emulator::check
