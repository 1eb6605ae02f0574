// The pybind11 module of plain data (numbers, strings, dicts, numpy arrays). Tensors go through the custom ops instead:
// a module with torch's tensor caster would lose torch's exception translation.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>

#include "sampler/philox.h"
#include "sampler/task_sampler.h"

namespace py = pybind11;

namespace {

using Indices = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

std::span<const int64_t> view(const Indices& array, const char* name) {
  if (array.ndim() != 1) throw py::value_error(std::string(name) + " must have one dimension");
  return {array.data(), static_cast<size_t>(array.size())};
}

[[noreturn]] void refuse(const std::string& message) {
  throw py::value_error(message);
}

void check_classes(std::span<const int64_t> starts, std::span<const int64_t> classes, innerloop::TaskShape shape) {
  if (starts.empty() || starts[0] < 0) refuse("starts must begin with the index of the first sample");
  for (size_t c = 0; c + 1 < starts.size(); ++c) {
    if (starts[c + 1] < starts[c]) refuse("starts must not decrease");
  }
  const auto count = static_cast<int64_t>(starts.size()) - 1;
  for (const int64_t c : classes) {
    if (c < 0 || c >= count) {
      refuse("classes holds " + std::to_string(c) + ", expected 0 … " + std::to_string(count - 1));
    }
  }
  const int64_t available = static_cast<int64_t>(classes.size());
  if (available == 0) refuse("classes is empty: there is nothing to draw " + std::to_string(shape.ways) + " ways from");
  if (shape.ways < 1 || shape.ways > available) {
    refuse("ways is " + std::to_string(shape.ways) + ", expected 1 … " + std::to_string(available) +
           ", the number of classes");
  }
  if (shape.shots < 0 || shape.queries < 0) refuse("shots and queries must be at least 0");
  if (shape.shots > std::numeric_limits<int64_t>::max() - shape.queries) refuse("shots + queries is too large");
  for (const int64_t c : classes) {
    const int64_t size = starts[static_cast<size_t>(c) + 1] - starts[static_cast<size_t>(c)];
    if (size < shape.shots + shape.queries) {
      refuse("class " + std::to_string(c) + " has " + std::to_string(size) + " samples, but shots + queries is " +
             std::to_string(shape.shots + shape.queries));
    }
  }
}

// Sizes that fit one array of indices; ways is at most the number of classes by now, so only the products can overflow.
int64_t checked_product(int64_t a, int64_t b, const char* what) {
  int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product) || product > (int64_t{1} << 40)) {
    refuse(std::string(what) + " would be too large");
  }
  return product;
}

py::tuple sample_tasks(const Indices& starts_array, const Indices& classes_array, int64_t ways, int64_t shots,
                       int64_t queries, uint64_t seed, uint64_t first_task, int64_t tasks) {
  const auto starts = view(starts_array, "starts");
  const auto classes = view(classes_array, "classes");
  const innerloop::TaskShape shape{ways, shots, queries};
  if (tasks < 0) refuse("tasks is " + std::to_string(tasks) + ", expected at least 0");
  check_classes(starts, classes, shape);
  checked_product(tasks, checked_product(ways, shots + queries, "a task"), "the tasks");
  Indices support({tasks, ways * shots});
  Indices query({tasks, ways * queries});
  int64_t* support_data = support.mutable_data();
  int64_t* query_data = query.mutable_data();
  {
    py::gil_scoped_release unlocked;
    innerloop::sample_tasks(starts, classes, shape, seed, first_task, tasks, support_data, query_data);
  }
  return py::make_tuple(support, query);
}

// Whether dicts hold the very objects that `contents` lists: each dict itself, then its keys and values in turn.
bool hold_exactly(const py::list& dicts, const py::tuple& contents) {
  const Py_ssize_t size = PyTuple_GET_SIZE(contents.ptr());
  Py_ssize_t next = 0;
  const auto is_next = [&](const PyObject* object) {
    return next < size && PyTuple_GET_ITEM(contents.ptr(), next++) == object;
  };
  for (const py::handle dict : dicts) {
    if (!PyDict_Check(dict.ptr())) throw py::type_error("dicts must hold dicts");
    if (!is_next(dict.ptr())) return false;
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t position = 0; PyDict_Next(dict.ptr(), &position, &key, &value);) {
      if (!is_next(key) || !is_next(value)) return false;
    }
  }
  return next == size;
}

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
  module.doc() = "Plain-data helpers of innerloop: the task sampler, a comparison of dicts, and what this build is.";
  module.def("build_info", &build_info,
             "Versions this package was built with; cuda_compiler is empty where no CUDA library was built.");
  module.def(
      "hold_exactly", &hold_exactly, py::arg("dicts"), py::arg("contents"),
      "Whether dicts hold the very objects of a flat tuple: each dict itself, then its keys and values in turn.");
  module.def("philox", &innerloop::philox, py::arg("counter"), py::arg("key"),
             "One block of Philox 4x32-10: four 32-bit numbers from a counter of four and a key of two.");
  module.def("sample_tasks", &sample_tasks, py::arg("starts"), py::arg("classes"), py::arg("ways"), py::arg("shots"),
             py::arg("queries"), py::arg("seed"), py::arg("first_task"), py::arg("tasks"),
             R"(Sample indices of few-shot tasks, drawn without replacement.

Args:
    starts: [C + 1] int64; class c holds the samples starts[c] … starts[c + 1] - 1.
    classes: [M] int64, the classes that may be drawn.
    ways, shots, queries: classes of a task, support and query samples of a class.
    seed, first_task: task i of a seed is the same in whatever batch it is drawn.
    tasks: T.

Returns: support [T, ways * shots] and query [T, ways * queries], int64, class by class.

Raises:
    ValueError: too few classes, or a class with too few samples; the message names it.)");
}
