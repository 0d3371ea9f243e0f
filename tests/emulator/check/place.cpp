#include "place.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <utility>
#include <vector>

#include "../block.h"

namespace emulator::check {
namespace {

constexpr Place kIsWhere = 0x80000000u;

struct Library {
  std::string path;
  const char* base = nullptr;
  std::vector<std::pair<const char*, const char*>> segments;
};

Library find_this_library() {
  Library library;
  Dl_info info;
  dladdr(reinterpret_cast<const void*>(&find_this_library), &info);
  library.path = info.dli_fname;
  library.base = static_cast<const char*>(info.dli_fbase);
  const auto visit = [](dl_phdr_info* module, size_t, void* data) {
    auto& found = *static_cast<Library*>(data);
    std::vector<std::pair<const char*, const char*>> segments;
    bool ours = false;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const auto& header = module->dlpi_phdr[i];
      if (header.p_type != PT_LOAD) continue;
      const auto* begin = reinterpret_cast<const char*>(module->dlpi_addr + header.p_vaddr);
      segments.push_back({begin, begin + header.p_memsz});
      const auto* self = reinterpret_cast<const char*>(&find_this_library);
      ours = ours || (self >= begin && self < begin + header.p_memsz);
    }
    if (ours) found.segments = segments;
    return ours ? 1 : 0;
  };
  dl_iterate_phdr(visit, &library);
  return library;
}

const Library& this_library() {
  static const Library library = find_this_library();
  return library;
}

std::vector<Where>& wheres() {
  static std::vector<Where> list;
  return list;
}

std::string run(const std::string& command) {
  std::string output;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return output;
  char buffer[512];
  while (fgets(buffer, sizeof buffer, pipe) != nullptr) output += buffer;
  pclose(pipe);
  return output;
}

// "/work/main/csrc/cuda/sm80/forward.cuh:120 (discriminator 3)" -> "sm80/forward.cuh:120"
std::string shortened(std::string line) {
  line = line.substr(0, line.find(" (discriminator"));
  size_t cut = line.rfind('/');
  if (cut != std::string::npos && cut > 0) cut = line.rfind('/', cut - 1);
  return line.substr(cut == std::string::npos ? 0 : cut + 1);
}

}  // namespace

Place place_of(const void* return_address) {
  return static_cast<Place>(static_cast<const char*>(return_address) - this_library().base);
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
  char offset[32];
  // The call itself stands before its return address.
  std::snprintf(offset, sizeof offset, "0x%x", place - 1);
  const std::string frames = run("addr2line -i -e '" + this_library().path + "' " + offset + " 2>/dev/null");
  std::string result;
  int depth = 0;
  for (size_t begin = 0; begin < frames.size() && depth < 6; ++depth) {
    const size_t end = std::min(frames.find('\n', begin), frames.size());
    result += (depth == 0 ? "" : " < ") + shortened(frames.substr(begin, end - begin));
    begin = end + 1;
  }
  return result.empty() ? std::string("offset ") + offset : result;
}

bool in_this_library(const void* address) {
  const auto* byte = static_cast<const char*>(address);
  return std::any_of(this_library().segments.begin(), this_library().segments.end(),
                     [byte](const auto& segment) { return byte >= segment.first && byte < segment.second; });
}

}  // namespace emulator::check
