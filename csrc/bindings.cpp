// The pybind11 module of plain data (numbers, strings, numpy arrays). Tensors go through the custom ops instead:
// a module with torch's tensor caster would lose torch's exception translation.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = INNERLOOP_VERSION;
  info["torch"] = INNERLOOP_TORCH_BUILD;
  info["compiler"] = INNERLOOP_COMPILER;
  info["cuda_compiler"] = INNERLOOP_CUDA_COMPILER;
  info["cuda_architectures"] = INNERLOOP_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Plain-data helpers of innerloop: the task sampler and what this build is.";
  module.def("build_info", &build_info,
             "Versions this package was built with; cuda_compiler is empty where no CUDA library was built.");
}
