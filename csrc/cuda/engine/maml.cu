// maml, maml_adapt, hessian_vector_product and maml_plan on CUDA: the ops of csrc/ops/maml.cpp under the same names.
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/engine/network.h"
#include "cuda/engine/run.h"
#include "cuda/launch.h"
#include "ops/checks.h"
#include "ops/maml_call.h"

namespace innerloop {
namespace {

// Where support_x is: the other tensors must be there too. Current as long as it lives.
class Gpu {
 public:
  static constexpr bool is_readable = false;

  Gpu(const Tensor& support_x, const char* op) : support_x_(checked(support_x)), device_(support_x, op) {}

  bool holds(const Tensor& tensor) const {
    return tensor.defined() && is_on_device(tensor) && tensor.get_device_index() == support_x_.get_device_index();
  }
  const char* description() const { return "on support_x's device"; }
  Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes) const {
    return torch::stable::new_zeros(like, sizes);
  }

  const Device& device() const { return device_; }

 private:
  static const Tensor& checked(const Tensor& support_x) {
    check_device(support_x, "support_x");
    return support_x;
  }

  const Tensor support_x_;
  const Device device_;
};

// How many tasks run at once: INNERLOOP_TASK_CHUNK in the environment; 0: all of them. It bounds memory, which is a
// matter of the GPU at hand; no result depends on it but for rounding.
int64_t task_chunk() {
  const char* wish = std::getenv("INNERLOOP_TASK_CHUNK");
  if (wish == nullptr || *wish == '\0') return 0;
  char* end = nullptr;
  const long long chunk = std::strtoll(wish, &end, 10);
  STD_TORCH_CHECK(*end == '\0' && chunk > 0, "the environment variable INNERLOOP_TASK_CHUNK is '", wish,
                  "', expected a positive number of tasks");
  return chunk;
}

std::vector<Tensor> maml_cuda(std::vector<Tensor> parameters, std::vector<Tensor> rates, std::vector<Tensor> buffers,
                              Tensor support_x, Tensor support_y, Tensor query_x, Tensor query_y,
                              MaybeTensor support_mask, MaybeTensor query_mask, std::vector<int64_t> program,
                              int64_t bn, int64_t loss, double label_smoothing, int64_t steps,
                              std::vector<double> step_weights, double support_weight, bool first_order,
                              std::vector<bool> needs_gradient, bool rate_gradients, std::vector<int64_t> paths) {
  const Gpu place(support_x, "maml");
  return maml_results(place, {parameters, rates, buffers, program, bn, loss, label_smoothing, steps, paths},
                      {support_x, support_y, support_mask}, {query_x, query_y, query_mask},
                      {step_weights, support_weight, first_order, needs_gradient, rate_gradients},
                      [&]<class T>(const Request<T>& request, T* mean_loss) {
                        gpu::run(place.device(), request, task_chunk(), mean_loss);
                      });
}

std::vector<Tensor> maml_adapt_cuda(std::vector<Tensor> parameters, std::vector<Tensor> rates,
                                    std::vector<Tensor> buffers, Tensor support_x, Tensor support_y,
                                    MaybeTensor support_mask, std::vector<int64_t> program, int64_t bn, int64_t loss,
                                    double label_smoothing, int64_t steps, double proximal,
                                    std::vector<int64_t> paths) {
  const Gpu place(support_x, "maml_adapt");
  return adapt_results(place, {parameters, rates, buffers, program, bn, loss, label_smoothing, steps, paths},
                       {support_x, support_y, support_mask}, proximal, [&]<class T>(const Request<T>& request) {
                         gpu::run<T>(place.device(), request, task_chunk(), nullptr);
                       });
}

std::vector<Tensor> hessian_vector_product_cuda(std::vector<Tensor> parameters, std::vector<Tensor> vectors,
                                                std::vector<Tensor> buffers, Tensor support_x, Tensor support_y,
                                                MaybeTensor support_mask, std::vector<int64_t> program, int64_t bn,
                                                int64_t loss, double label_smoothing, std::vector<int64_t> paths) {
  const Gpu place(support_x, "hessian_vector_product");
  return product_results(place, {parameters, {}, buffers, program, bn, loss, label_smoothing, 0, paths}, vectors,
                         {support_x, support_y, support_mask}, [&]<class T>(const Request<T>& request) {
                           gpu::run<T>(place.device(), request, task_chunk(), nullptr);
                         });
}

std::string maml_plan_cuda(std::vector<Tensor> parameters, std::vector<Tensor> rates, std::vector<Tensor> buffers,
                           Tensor support_x, Tensor support_y, Tensor query_x, Tensor query_y, MaybeTensor support_mask,
                           MaybeTensor query_mask, std::vector<int64_t> program, int64_t bn, int64_t loss,
                           double label_smoothing, int64_t steps, std::vector<double> step_weights,
                           double support_weight, bool first_order, std::vector<int64_t> paths) {
  const Gpu place(support_x, "maml_plan");
  const InnerLoopArguments arguments{parameters, rates, buffers, program, bn, loss, label_smoothing, steps, paths};
  const SideArguments support{support_x, support_y, support_mask}, query{query_x, query_y, query_mask};
  std::string text;
  with_call(place, arguments, support, &query, [&]<class T>(CheckedCall<T, Gpu>& call) {
    read_meta({step_weights, support_weight, first_order, {}, false}, call.request);
    // As a training step would run: with a gradient for every parameter.
    T nowhere = 0;
    call.request.gradients.assign(parameters.size(), &nowhere);
    text = describe(gpu::make_graph(call.request));
  });
  return text;
}

}  // namespace
}  // namespace innerloop

INNERLOOP_CUDA_OPS(m) {
  m.impl("maml", TORCH_BOX(&innerloop::maml_cuda));
  m.impl("maml_adapt", TORCH_BOX(&innerloop::maml_adapt_cuda));
  m.impl("hessian_vector_product", TORCH_BOX(&innerloop::hessian_vector_product_cuda));
  m.impl("maml_plan", TORCH_BOX(&innerloop::maml_plan_cuda));
}
