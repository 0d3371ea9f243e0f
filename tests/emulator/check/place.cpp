#include "place.h"

#include <map>
#include <utility>
#include <vector>

namespace emulator::check {
namespace {

constexpr Place kIsWhere = 0x80000000u;

std::vector<Where>& wheres() {
  static std::vector<Where> list;
  return list;
}

}  // namespace

Place place_of(const void* return_address) {
  return static_cast<Place>(static_cast<const char*>(return_address) - library_base());
}

Place place_of(Where where) {
  static std::map<std::pair<const char*, uint32_t>, Place> known;
  const auto [entry, is_new] = known.try_emplace({where.file_name(), where.line()}, 0);
  if (is_new) {
    entry->second = kIsWhere | static_cast<Place>(wheres().size());
    wheres().push_back(where);
  }
  return entry->second;
}

std::string text(Place place) {
  if (place & kIsWhere) return emulator::text(wheres()[place & ~kIsWhere]);
  // The call itself stands before its return address.
  return line_of(library_base() + place - 1);
}

}  // namespace emulator::check
