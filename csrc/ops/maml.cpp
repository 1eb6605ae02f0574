// maml: the losses and the exact meta-gradient of a batch of tasks in one call; maml_adapt: its inner loop alone;
// maml_plan: how maml would run; hessian_vector_product: the product that the meta-gradient is made of. See
// csrc/engine/recurrence.h for the symbols.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "engine/request.h"
#include "ops/maml_call.h"
#include "ops/task_parallel.h"

namespace innerloop {
namespace {

struct Cpu {
  static constexpr bool is_readable = true;
  bool holds(const Tensor& tensor) const { return tensor.defined() && tensor.is_cpu(); }
  const char* description() const { return "a CPU tensor"; }

  // new_zeros would do, but looks itself up by name: a microsecond for each of many results.
  Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes) const {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t dim = sizes.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * std::max<int64_t>(sizes[dim], 1);
    int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                    type, aoti_torch_device_type_cpu(), 0, &made));
    const Tensor tensor(made);
    if (tensor.numel() > 0) {  // none have no memory, which memset must not be given
      std::memset(tensor.mutable_data_ptr(), 0, static_cast<size_t>(tensor.numel()) * tensor.element_size());
    }
    return tensor;
  }
};

template <class T>
std::unique_ptr<Engine<T>> engine_for(const Request<T>& request) {
  return INNERLOOP_CALL(make_engine, request);
}

std::vector<Tensor> maml_cpu(std::vector<Tensor> parameters, std::vector<Tensor> rates, std::vector<Tensor> buffers,
                             Tensor support_x, Tensor support_y, Tensor query_x, Tensor query_y,
                             MaybeTensor support_mask, MaybeTensor query_mask, std::vector<int64_t> program, int64_t bn,
                             int64_t loss, double label_smoothing, int64_t steps, std::vector<double> step_weights,
                             double support_weight, bool first_order, std::vector<bool> needs_gradient,
                             bool rate_gradients, std::vector<int64_t> paths) {
  return maml_results(Cpu{}, {parameters, rates, buffers, program, bn, loss, label_smoothing, steps, paths},
                      {support_x, support_y, support_mask}, {query_x, query_y, query_mask},
                      {step_weights, support_weight, first_order, needs_gradient, rate_gradients},
                      [&]<class T>(const Request<T>& request, T* mean_loss) {
                        run_in_parallel(*engine_for(request));
                        const double sum =
                            std::accumulate(request.task_losses, request.task_losses + request.tasks, 0.0);
                        *mean_loss = static_cast<T>(sum / static_cast<double>(request.tasks));
                      });
}

std::vector<Tensor> maml_adapt_cpu(std::vector<Tensor> parameters, std::vector<Tensor> rates,
                                   std::vector<Tensor> buffers, Tensor support_x, Tensor support_y,
                                   MaybeTensor support_mask, std::vector<int64_t> program, int64_t bn, int64_t loss,
                                   double label_smoothing, int64_t steps, double proximal, std::vector<int64_t> paths) {
  return adapt_results(Cpu{}, {parameters, rates, buffers, program, bn, loss, label_smoothing, steps, paths},
                       {support_x, support_y, support_mask}, proximal,
                       [](const auto& request) { run_in_parallel(*engine_for(request)); });
}

std::vector<Tensor> hessian_vector_product_cpu(std::vector<Tensor> parameters, std::vector<Tensor> vectors,
                                               std::vector<Tensor> buffers, Tensor support_x, Tensor support_y,
                                               MaybeTensor support_mask, std::vector<int64_t> program, int64_t bn,
                                               int64_t loss, double label_smoothing, std::vector<int64_t> paths) {
  return product_results(Cpu{}, {parameters, {}, buffers, program, bn, loss, label_smoothing, 0, paths}, vectors,
                         {support_x, support_y, support_mask},
                         [](const auto& request) { run_in_parallel(*engine_for(request)); });
}

std::string maml_plan_cpu(std::vector<Tensor> parameters, std::vector<Tensor> rates, std::vector<Tensor> buffers,
                          Tensor support_x, Tensor support_y, Tensor query_x, Tensor query_y, MaybeTensor support_mask,
                          MaybeTensor query_mask, std::vector<int64_t> program, int64_t bn, int64_t loss,
                          double label_smoothing, int64_t steps, std::vector<double> step_weights,
                          double support_weight, bool first_order, std::vector<int64_t> paths) {
  const InnerLoopArguments arguments{parameters, rates, buffers, program, bn, loss, label_smoothing, steps, paths};
  const SideArguments support{support_x, support_y, support_mask}, query{query_x, query_y, query_mask};
  std::string text;
  with_call(Cpu{}, arguments, support, &query, [&]<class T>(CheckedCall<T, Cpu>& call) {
    read_meta({step_weights, support_weight, first_order, {}, false}, call.request);
    // As a training step would run: with a gradient for every parameter.
    T nowhere = 0;
    call.request.gradients.assign(parameters.size(), &nowhere);
    text = engine_for(call.request)->plan_text();
  });
  return text;
}

}  // namespace
}  // namespace innerloop

STABLE_TORCH_LIBRARY_FRAGMENT(innerloop, m) {
  m.def(
      "maml(Tensor[] parameters, Tensor[] rates, Tensor[] buffers, Tensor support_x, Tensor support_y, "
      "Tensor query_x, Tensor query_y, Tensor? support_mask, Tensor? query_mask, int[] program, int bn, int loss, "
      "float label_smoothing, int steps, float[] step_weights, float support_weight, bool first_order, "
      "bool[] needs_gradient, bool rate_gradients, int[] paths) -> Tensor[]");
  m.def(
      "maml_adapt(Tensor[] parameters, Tensor[] rates, Tensor[] buffers, Tensor support_x, Tensor support_y, "
      "Tensor? support_mask, int[] program, int bn, int loss, float label_smoothing, int steps, float proximal, "
      "int[] paths) -> Tensor[]");
  m.def(
      "hessian_vector_product(Tensor[] parameters, Tensor[] vectors, Tensor[] buffers, Tensor support_x, "
      "Tensor support_y, Tensor? support_mask, int[] program, int bn, int loss, float label_smoothing, int[] paths) "
      "-> Tensor[]");
  m.def(
      "maml_plan(Tensor[] parameters, Tensor[] rates, Tensor[] buffers, Tensor support_x, Tensor support_y, "
      "Tensor query_x, Tensor query_y, Tensor? support_mask, Tensor? query_mask, int[] program, int bn, int loss, "
      "float label_smoothing, int steps, float[] step_weights, float support_weight, bool first_order, int[] paths) "
      "-> str");
}

STABLE_TORCH_LIBRARY_IMPL(innerloop, CPU, m) {
  m.impl("maml", TORCH_BOX(&innerloop::maml_cpu));
  m.impl("maml_adapt", TORCH_BOX(&innerloop::maml_adapt_cpu));
  m.impl("hessian_vector_product", TORCH_BOX(&innerloop::hessian_vector_product_cpu));
  m.impl("maml_plan", TORCH_BOX(&innerloop::maml_plan_cpu));
}
