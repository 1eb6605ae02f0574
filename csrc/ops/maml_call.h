// What the ops of the inner loop take, checked and made into a request, on any device.
//
// A Place says where the tensors lie:
//
//     holds(tensor)       whether the tensor lies there
//     description()       "a CPU tensor"
//     is_readable         whether the host may read its memory: then labels and masks are checked too
//     zeros(like, sizes)  a new tensor there, of like's type
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "engine/request.h"
#include "program/program.h"

namespace innerloop {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::vector<int64_t> sizes_of(const Tensor& tensor, int64_t from = 0) {
  std::vector<int64_t> sizes;
  for (int64_t dim = from; dim < tensor.dim(); ++dim) sizes.push_back(tensor.size(dim));
  return sizes;
}

// The arguments that maml and maml_adapt have in common.
struct InnerLoopArguments {
  std::vector<Tensor> parameters, rates, buffers;
  std::vector<int64_t> program;
  int64_t batch_norm, loss;
  double label_smoothing;
  int64_t steps;
  std::vector<int64_t> paths;
};

struct SideArguments {
  Tensor x, y;
  MaybeTensor mask;
};

template <class T>
const T* data_of(const Tensor& tensor) {
  return tensor.const_data_ptr<T>();
}

inline Use checked_use(int64_t use) {
  STD_TORCH_CHECK(use >= 0 && use <= 2, "paths must hold 0 (off), 1 (automatic) or 2 (forced)");
  return static_cast<Use>(use);
}

// Checks every tensor, and makes the request that points into them, and into contiguous copies that it keeps alive; the
// tensors must outlive it.
template <class T, class Place>
class CheckedCall {
 public:
  CheckedCall(const Place& place, const InnerLoopArguments& arguments, const SideArguments& support,
              const SideArguments* query)
      : place_(place) {
    check_floating(support.x, "support_x");
    STD_TORCH_CHECK(support.x.dim() >= 3 && support.x.size(0) >= 1, "support_x must be [T, samples, ...]");
    request.tasks = support.x.size(0);
    STD_TORCH_CHECK(arguments.steps >= 0 && arguments.steps <= 1'000'000, "steps must be 0 … 1,000,000");
    request.steps = arguments.steps;
    STD_TORCH_CHECK(arguments.batch_norm >= 0 && arguments.batch_norm <= 2, "bn must be 0, 1 or 2");
    request.batch_norm = static_cast<BatchNormMode>(arguments.batch_norm);
    STD_TORCH_CHECK(arguments.loss == 0 || arguments.loss == 1, "loss must be 0 or 1");
    request.loss = static_cast<LossKind>(arguments.loss);
    STD_TORCH_CHECK(arguments.label_smoothing >= 0 && arguments.label_smoothing <= 1,
                    "label_smoothing must be between 0 and 1");
    request.label_smoothing = static_cast<T>(arguments.label_smoothing);
    read_paths(arguments.paths);
    read_network(arguments, support.x);
    read_rates(arguments);
    read_side(support, "support", request.support);
    if (query) read_side(*query, "query", request.query);
    request.step_weights.assign(static_cast<size_t>(request.steps) + 1, T(0));
    request.gradient_scale = T(1) / static_cast<T>(request.tasks);
  }

  // The direction of the next parameter; returns the tensor that the product will be in. Without elements: not wanted.
  Tensor add_direction(const Tensor& vector) {
    check_like_x(vector, "vectors");
    if (vector.numel() == 0) {
      request.directions.push_back(nullptr);
      request.products.push_back(nullptr);
      return place_.zeros(vector, {0});
    }
    std::vector<int64_t> shape = program_.parameters[request.directions.size()];
    shape.insert(shape.begin(), request.tasks);
    STD_TORCH_CHECK(sizes_of(vector) == shape,
                    "vectors must have the shapes of parameters with the tasks in front, or no elements");
    const Tensor product = place_.zeros(vector, shape);
    request.directions.push_back(data_of<T>(keep(vector)));
    request.products.push_back(product.mutable_data_ptr<T>());
    return product;
  }

  // Whoever takes BatchNorm statistics of a set calls this. Those of one value are none: the output would be β for any
  // input, and torch refuses them, too.
  void check_statistics(const std::string& name, const Samples<T>& samples) const {
    const bool one_is_too_few = std::ranges::any_of(program_.nodes, [&](const Node& node) {
      const Shape& in = program_.values[static_cast<size_t>(node.inputs[0])];
      return node.kind == Kind::batch_norm && in.height * in.width == 1;
    });
    if (!one_is_too_few) return;
    for (int64_t task = 0; task < request.tasks; ++task) {
      int64_t valid = samples.count;
      if (Place::is_readable && samples.mask) {
        const bool* row = samples.mask + task * samples.count;
        valid = std::count(row, row + samples.count, true);
      }
      STD_TORCH_CHECK(valid > 1, name, "_x gives a BatchNorm layer one value for each channel in task ", task,
                      ", expected at least 2 to take statistics of");
    }
  }

  int64_t outputs() const { return program_.values[static_cast<size_t>(program_.output)].channels; }

  Request<T> request;

 private:
  void read_paths(const std::vector<int64_t>& paths) {
    STD_TORCH_CHECK(paths.size() == 6, "paths must have 6 entries");
    request.paths = {checked_use(paths[0]), checked_use(paths[1]), checked_use(paths[2]),
                     checked_use(paths[3]), checked_use(paths[4]), checked_use(paths[5])};
  }

  const Tensor& keep(const Tensor& tensor) {
    // Through the dispatcher only where there is something to copy: a call on small networks takes 0.1 ms.
    if (tensor.is_contiguous()) return tensor;
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back();
  }

  void check_floating(const Tensor& tensor, const char* name) const {
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, " must be float32 or float64");
    STD_TORCH_CHECK(place_.holds(tensor), name, " must be ", place_.description());
  }

  void check_like_x(const Tensor& tensor, const char* name) const {
    check_floating(tensor, name);
    STD_TORCH_CHECK(tensor.scalar_type() == type_, name, " must have support_x's dtype");
  }

  void read_network(const InnerLoopArguments& arguments, const Tensor& x) {
    type_ = x.scalar_type();
    std::vector<std::vector<int64_t>> shapes;
    for (const Tensor& parameter : arguments.parameters) {
      check_like_x(parameter, "parameters");
      shapes.push_back(sizes_of(parameter));
    }
    std::vector<int64_t> buffers;
    for (const Tensor& buffer : arguments.buffers) {
      check_like_x(buffer, "buffers");
      STD_TORCH_CHECK(buffer.dim() == 1, "buffers must have 1 dimension, one has ", buffer.dim());
      buffers.push_back(buffer.size(0));
    }
    program_ = decode_program(arguments.program, sizes_of(x, 2), shapes, buffers, request.tasks);
    request.program = &program_;
    for (size_t p = 0; p < shapes.size(); ++p) {
      request.parameters.push_back({data_of<T>(keep(arguments.parameters[p])), program_.per_task[p]});
    }
    for (const Tensor& buffer : arguments.buffers) request.buffers.push_back(data_of<T>(keep(buffer)));
    if (request.batch_norm == BatchNormMode::running) {
      for (const Node& node : program_.nodes) {
        STD_TORCH_CHECK(node.kind != Kind::batch_norm || node.running_mean >= 0,
                        "bn is running, but a batch_norm has no running statistics");
      }
    }
  }

  void read_rates(const InnerLoopArguments& arguments) {
    STD_TORCH_CHECK(arguments.rates.size() == arguments.parameters.size(), "rates must be as many as parameters");
    for (size_t p = 0; p < arguments.rates.size(); ++p) {
      const Tensor& rate = arguments.rates[p];
      check_like_x(rate, "rates");
      STD_TORCH_CHECK(rate.dim() == 2, "rates must have 2 dimensions, one has ", rate.dim());
      if (rate.numel() == 0) {
        request.rates.push_back({});
        continue;
      }
      const int64_t size = program_.parameter_size(static_cast<int>(p));
      STD_TORCH_CHECK(
          (rate.size(0) == 1 || rate.size(0) == request.steps) && (rate.size(1) == 1 || rate.size(1) == size),
          "rates must have shape [1 or steps, 1 or the parameter's size]");
      request.rates.push_back({data_of<T>(keep(rate)), rate.size(0) > 1, rate.size(1) > 1});
    }
  }

  void read_side(const SideArguments& side, const std::string& name, Samples<T>& to) {
    check_like_x(side.x, (name + "_x").c_str());
    const std::vector<int64_t> sample = sizes_of(side.x, 2);
    STD_TORCH_CHECK(side.x.dim() >= 3 && side.x.size(0) == request.tasks && side.x.size(1) >= 1 &&
                        (sample_.empty() || sample == sample_),
                    name, "_x must be [T, samples, ...] with the tasks and the sample shape of support_x");
    sample_ = sample;
    to.count = side.x.size(1);
    to.x = data_of<T>(keep(side.x));
    read_mask(side, name, to);
    const bool fits = side.y.dim() >= 2 && side.y.size(0) == request.tasks && side.y.size(1) == to.count;
    STD_TORCH_CHECK(place_.holds(side.y) && fits, name, "_y must begin with the sizes that ", name, "_x begins with");
    if (request.loss == LossKind::mse) {
      check_like_x(side.y, (name + "_y").c_str());
      STD_TORCH_CHECK(side.y.dim() == 3 && side.y.size(2) == outputs(), name, "_y must have shape [T, samples, ",
                      outputs(), "], that of the model's outputs");
      to.targets = data_of<T>(keep(side.y));
    } else {
      STD_TORCH_CHECK(side.y.scalar_type() == ScalarType::Long && side.y.dim() == 2, name,
                      "_y must hold int64 labels [T, samples]");
      to.labels = data_of<int64_t>(keep(side.y));
      if constexpr (Place::is_readable) check_labels(name, to);
    }
  }

  void check_labels(const std::string& name, const Samples<T>& samples) const {
    for (int64_t i = 0; i < request.tasks * samples.count; ++i) {
      const int64_t label = samples.labels[i];
      STD_TORCH_CHECK((samples.mask && !samples.mask[i]) || (label >= 0 && label < outputs()), name,
                      "_y holds the label ", label, ", expected 0 … ", outputs() - 1, ": the model has ", outputs(),
                      " outputs");
    }
  }

  void read_mask(const SideArguments& side, const std::string& name, Samples<T>& to) {
    if (!side.mask) return;
    const Tensor& mask = *side.mask;
    STD_TORCH_CHECK(place_.holds(mask) && mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 &&
                        mask.size(0) == request.tasks && mask.size(1) == to.count,
                    name, "_mask must be bool [T, samples]");
    to.mask = data_of<bool>(keep(mask));
    if constexpr (Place::is_readable) check_mask(name, to);
  }

  void check_mask(const std::string& name, const Samples<T>& samples) const {
    for (int64_t task = 0; task < request.tasks; ++task) {
      const bool* row = samples.mask + task * samples.count;
      STD_TORCH_CHECK(std::find(row, row + samples.count, true) != row + samples.count, name, "_mask leaves task ",
                      task, " without a valid sample");
    }
  }

  const Place& place_;
  Program program_;
  ScalarType type_{};
  std::vector<int64_t> sample_;
  std::vector<Tensor> kept_;
};

// Calls work with a CheckedCall of the tensors' type.
template <class Place, class Work>
void with_call(const Place& place, const InnerLoopArguments& arguments, const SideArguments& support,
               const SideArguments* query, const Work& work) {
  if (support.x.scalar_type() == ScalarType::Double) {
    CheckedCall<double, Place> call(place, arguments, support, query);
    work(call);
  } else {
    CheckedCall<float, Place> call(place, arguments, support, query);
    work(call);
  }
}

// What maml alone takes.
struct MetaArguments {
  std::vector<double> step_weights;
  double support_weight;
  bool first_order;
  std::vector<bool> needs_gradient;
  bool rate_gradients;
};

template <class T>
void read_meta(const MetaArguments& meta, Request<T>& request) {
  STD_TORCH_CHECK(meta.step_weights.size() == request.step_weights.size(), "step_weights must have steps + 1 entries");
  for (size_t k = 0; k < meta.step_weights.size(); ++k) request.step_weights[k] = static_cast<T>(meta.step_weights[k]);
  request.support_weight = static_cast<T>(meta.support_weight);
  request.first_order = meta.first_order;
}

// Makes the tensors that gradients go to and has the request point into them; a 0-element tensor where none is wanted.
template <class T, class Place>
void add_gradients(const Place& place, const std::vector<Tensor>& like, const std::vector<bool>& wanted,
                   std::vector<Tensor>& results, std::vector<T*>& pointers) {
  for (size_t i = 0; i < like.size(); ++i) {
    if (wanted[i]) {
      results.push_back(place.zeros(like[i], sizes_of(like[i])));
      pointers.push_back(results.back().mutable_data_ptr<T>());
    } else {
      results.push_back(place.zeros(like[i], {0}));
      pointers.push_back(nullptr);
    }
  }
}

// maml's results; run(request, mean_loss) fills them.
template <class Place, class Run>
std::vector<Tensor> maml_results(const Place& place, const InnerLoopArguments& arguments, const SideArguments& support,
                                 const SideArguments& query, const MetaArguments& meta, const Run& run) {
  STD_TORCH_CHECK(meta.needs_gradient.size() == arguments.parameters.size(),
                  "needs_gradient must be as long as parameters");
  std::vector<Tensor> results;
  with_call(place, arguments, support, &query, [&]<class T>(CheckedCall<T, Place>& call) {
    Request<T>& request = call.request;
    read_meta(meta, request);
    const bool of_query = request.batch_norm == BatchNormMode::transductive;
    const bool passes_support = request.steps > 0 || request.support_weight != 0;
    if (request.batch_norm == BatchNormMode::support || (of_query && passes_support)) {
      call.check_statistics("support", request.support);
    }
    if (of_query) call.check_statistics("query", request.query);
    results.push_back(place.zeros(support.x, {}));
    results.push_back(place.zeros(support.x, {request.tasks}));
    results.push_back(place.zeros(support.x, {request.tasks, request.query.count, call.outputs()}));
    request.task_losses = results[1].template mutable_data_ptr<T>();
    request.logits = results[2].template mutable_data_ptr<T>();
    const bool any = std::ranges::find(meta.needs_gradient, true) != meta.needs_gradient.end();
    std::vector<T*> gradients, for_rates;
    add_gradients(place, arguments.parameters, meta.needs_gradient, results, gradients);
    if (any) request.gradients = gradients;
    if (meta.rate_gradients) {
      std::vector<bool> learned;
      for (const Tensor& rate : arguments.rates) learned.push_back(rate.numel() > 0);
      add_gradients(place, arguments.rates, learned, results, for_rates);
      request.rate_gradients = for_rates;
    }
    run(request, results[0].template mutable_data_ptr<T>());
  });
  return results;
}

// maml_adapt's results; run(request) fills them.
template <class Place, class Run>
std::vector<Tensor> adapt_results(const Place& place, const InnerLoopArguments& arguments, const SideArguments& support,
                                  double proximal, const Run& run) {
  STD_TORCH_CHECK(std::isfinite(proximal), "proximal must be finite");
  std::vector<Tensor> results;
  with_call(place, arguments, support, nullptr, [&]<class T>(CheckedCall<T, Place>& call) {
    Request<T>& request = call.request;
    request.proximal = static_cast<T>(proximal);
    if (request.batch_norm != BatchNormMode::running && request.steps > 0) {
      call.check_statistics("support", request.support);
    }
    for (size_t p = 0; p < arguments.parameters.size(); ++p) {
      if (!request.is_adapted(static_cast<int>(p))) {
        results.push_back(place.zeros(arguments.parameters[p], {0}));
        request.adapted.push_back(nullptr);
        continue;
      }
      std::vector<int64_t> shape = request.program->parameters[p];
      shape.insert(shape.begin(), request.tasks);
      results.push_back(place.zeros(arguments.parameters[p], shape));
      request.adapted.push_back(results.back().template mutable_data_ptr<T>());
    }
    run(request);
  });
  return results;
}

// hessian_vector_product's results, given the arguments but for the rates; run(request) fills them.
template <class Place, class Run>
std::vector<Tensor> product_results(const Place& place, InnerLoopArguments arguments,
                                    const std::vector<Tensor>& vectors, const SideArguments& support, const Run& run) {
  STD_TORCH_CHECK(vectors.size() == arguments.parameters.size(), "vectors must be as many as parameters");
  const ScalarType type = support.x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "support_x must be float32 or float64");
  STD_TORCH_CHECK(place.holds(support.x), "support_x must be ", place.description());
  // To the engine, what the Hessian is of is what an inner loop adapts; α itself is not read.
  const Tensor some_rate = place.zeros(support.x, {1, 1}), no_rate = place.zeros(support.x, {0, 0});
  for (const Tensor& vector : vectors) arguments.rates.push_back(vector.numel() > 0 ? some_rate : no_rate);
  std::vector<Tensor> results;
  with_call(place, arguments, support, nullptr, [&]<class T>(CheckedCall<T, Place>& call) {
    if (call.request.batch_norm != BatchNormMode::running) call.check_statistics("support", call.request.support);
    for (const Tensor& vector : vectors) results.push_back(call.add_direction(vector));
    if (!results.empty()) run(call.request);
  });
  return results;
}

}  // namespace innerloop
