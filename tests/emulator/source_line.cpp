#include "source_line.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <utility>
#include <vector>

namespace emulator {
namespace {

using Segment = std::pair<const char*, const char*>;

struct Library {
  std::string path;
  const char* base = nullptr;
  std::vector<Segment> segments;
};

Library find_this_library() {
  Library library;
  Dl_info info;
  dladdr(reinterpret_cast<const void*>(&find_this_library), &info);
  library.path = info.dli_fname;
  library.base = static_cast<const char*>(info.dli_fbase);
  const auto visit = [](dl_phdr_info* module, size_t, void* data) {
    std::vector<Segment> segments;
    bool ours = false;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const auto& header = module->dlpi_phdr[i];
      if (header.p_type != PT_LOAD) continue;
      const auto* begin = reinterpret_cast<const char*>(module->dlpi_addr + header.p_vaddr);
      segments.push_back({begin, begin + header.p_memsz});
      const auto* self = reinterpret_cast<const char*>(&find_this_library);
      ours = ours || (self >= begin && self < begin + header.p_memsz);
    }
    if (ours) static_cast<Library*>(data)->segments = segments;
    return ours ? 1 : 0;
  };
  dl_iterate_phdr(visit, &library);
  return library;
}

const Library& this_library() {
  static const Library library = find_this_library();
  return library;
}

std::string output_of(const std::string& command) {
  std::string output;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return output;
  char buffer[512];
  while (fgets(buffer, sizeof buffer, pipe) != nullptr) output += buffer;
  pclose(pipe);
  return output;
}

// "/work/main/csrc/cuda/sm80/x/../rows.cuh:120 (discriminator 3)" -> "sm80/rows.cuh:120"
std::string shortened(const std::string& line) {
  const std::string place = line.substr(0, line.find(" (discriminator"));
  const std::filesystem::path path = std::filesystem::path(place).lexically_normal();
  return path.has_parent_path() ? (path.parent_path().filename() / path.filename()).string() : path.string();
}

// What addr2line says of an address of this library.
std::string addr2line(const std::string& options, const void* address) {
  char offset[32];
  std::snprintf(offset, sizeof offset, "0x%tx", static_cast<const char*>(address) - library_base());
  return output_of("addr2line " + options + " -e '" + this_library().path + "' " + offset + " 2>/dev/null");
}

}  // namespace

std::string text(Where where) {
  return shortened(std::string(where.file_name()).append(":").append(std::to_string(where.line())));
}

std::string line_of(const void* instruction) {
  const std::string frames = addr2line("-i", instruction);
  constexpr int kMostFrames = 6;
  std::string result;
  size_t begin = 0;
  for (int depth = 0; begin < frames.size() && depth < kMostFrames; ++depth) {
    const size_t end = std::min(frames.find('\n', begin), frames.size());
    if (depth > 0) result += " < ";
    result += shortened(frames.substr(begin, end - begin));
    begin = end + 1;
  }
  return result;
}

std::string function_at(const void* address) {
  const std::string answer = addr2line("-C -f", address);
  return answer.substr(0, answer.find('\n'));
}

bool in_this_library(const void* address) {
  const auto* byte = static_cast<const char*>(address);
  const auto holds = [byte](const Segment& segment) { return byte >= segment.first && byte < segment.second; };
  return std::any_of(this_library().segments.begin(), this_library().segments.end(), holds);
}

const char* library_base() { return this_library().base; }

}  // namespace emulator
