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
    if (!is_before(clocks, cell.write, event.thread)) return {&cell.write, cell.write.atomic ? "atomic" : "write"};
    remember_read(clocks, cell, event);
  }
  return {};
}

Conflict Shadow::write(const Clocks& clocks, size_t offset, size_t bytes, const Event& event) {
  for (size_t i = first_cell(offset); i <= last_cell(offset, bytes); ++i) {
    Cell& cell = cells_[i];
    if (cell.write.copying && clocks.in_this_block(cell.write)) return {&cell.write, "copy that has not landed"};
    const bool both_atomic = cell.write.atomic && event.atomic;
    if (!both_atomic && !is_before(clocks, cell.write, event.thread)) {
      return {&cell.write, cell.write.atomic ? "atomic" : "write"};
    }
    for (Event& read : cell.reads) {
      if (!is_before(clocks, read, event.thread)) return {&read, "read"};
      read = {};
    }
    cell.write = event;
  }
  return {};
}

void Shadow::land_copy(size_t offset, size_t bytes, const Event& event) {
  for (size_t i = first_cell(offset); i <= last_cell(offset, bytes); ++i) cells_[i].write = event;
}

bool Shadow::written(const Clocks& clocks, size_t offset, size_t bytes) const {
  for (size_t i = first_cell(offset); i <= last_cell(offset, bytes); ++i) {
    const Event& write = cells_[i].write;
    if (of_one_block_ ? !clocks.in_this_block(write) : write.epoch == 0) return false;
  }
  return true;
}

bool Shadow::is_before(const Clocks& clocks, const Event& event, int thread) const {
  return (of_one_block_ && !clocks.in_this_block(event)) || clocks.is_before(event, thread);
}

}  // namespace emulator::check
