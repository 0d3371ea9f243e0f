// The Python module: what was compiled into it. The operators register themselves with torch (ops.cpp).
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

namespace py = pybind11;

namespace {

// The entries of a list that the build passes as one string, separated by semicolons.
py::list split(const std::string& entries) {
  py::list result;
  for (size_t begin = 0; begin < entries.size();) {
    const size_t end = std::min(entries.find(';', begin), entries.size());
    result.append(entries.substr(begin, end - begin));
    begin = end + 1;
  }
  return result;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = PREFIX_KERNELS_TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["abi"] = "GXX " + std::to_string(__GXX_ABI_VERSION) + (_GLIBCXX_USE_CXX11_ABI ? ", C++11" : ", before C++11");
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cpu_isas"] = split(PREFIX_KERNELS_CPU_ISAS);
  info["cuda_architectures"] = split(PREFIX_KERNELS_CUDA_ARCHITECTURES);
#if defined(PREFIX_KERNELS_CUDA_TOOLKIT)
  info["cuda_toolkit"] = PREFIX_KERNELS_CUDA_TOOLKIT;
#else
  info["cuda_toolkit"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "What this module was compiled with: torch, compiler, cxx_standard, abi, openmp, cpu_isas,\n"
        "cuda_architectures, and cuda_toolkit, None without one.");
}
