// What a layer of the GPU executor is: the four functions of engine/layer.h, for all tasks of a chunk at once.
//
// Values, their gradients and the tangents of both are channels-last and dense, [tasks][samples][height][width]
// [channels]. Parameters keep torch's layout with the tasks in front. All tasks have the same number of samples here:
// those that a mask leaves out are 0, enter no loss and no statistic, and the gradients that reach them are 0.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/engine/host.h"
#include "cuda/launch.h"

namespace innerloop::gpu {

// By parameter: [tasks, *parameter]. Null: not there, or not wanted.
template <class T>
using Parameters = std::vector<T*>;

// One layer's memory in one pass. Null: not wanted, or not there.
template <class T>
struct Primal {
  Side side = Side::support;
  int64_t tasks = 0;
  int64_t samples = 0;         // of a task
  const bool* mask = nullptr;  // [tasks, samples], null: all are valid
  const T* valid = nullptr;    // [tasks]: how many are
  const T* x[2] = {};          // a second one for two inputs alone
  T* y = nullptr;
  const T* dy = nullptr;
  T* dx[2] = {};         // overwritten, not added to
  T* state = nullptr;    // tasks × Layer::state_size(samples) elements: for whatever comes after in this pass
  T* partner = nullptr;  // bn = support, in a query pass: the state of the support pass at the same parameters
};

// The derivatives of all that along a direction of the parameters.
template <class T>
struct Tangent {
  const T* x[2] = {};  // null: that input does not move
  T* y = nullptr;
  const T* dy = nullptr;
  T* dx[2] = {};
  T* state = nullptr;
};

// Memory that layers use in turn. A layer finds nothing there from one call to the next.
template <class T>
struct Scratch {
  T* patches[2] = {};
  T* product = nullptr;
  double* sums = nullptr;
};

// How much of it a layer needs, for each task.
struct ScratchSize {
  int64_t patches = 0, product = 0, sums = 0;
};

template <class T>
class Layer {
 public:
  Layer() = default;
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;
  virtual ~Layer() = default;

  // For one task of that many samples.
  virtual int64_t state_size(int64_t /*samples*/) const { return 0; }
  virtual int64_t tangent_state_size(int64_t /*samples*/) const { return 0; }
  virtual ScratchSize scratch_size(int64_t /*samples*/) const { return {}; }

  // y from x.
  virtual void forward(const Parameters<T>& theta, const Primal<T>& p) = 0;

  // dx from dy, and gradient += ∂L/∂parameters. Follows the forward of the same pass.
  virtual void backward(const Parameters<T>& theta, const Primal<T>& p, const Parameters<T>& gradient) = 0;

  // ẏ from ẋ and the parameters' direction (null: that parameter does not move). p is as backward left it.
  virtual void forward_tangent(const Parameters<T>& theta, const Parameters<T>& direction, const Primal<T>& p,
                               const Tangent<T>& t) = 0;

  // dẋ from dẏ (and from dy, ẋ and the direction), and product += the derivative of backward's gradient. Follows the
  // forward_tangent.
  virtual void backward_tangent(const Parameters<T>& theta, const Parameters<T>& direction, const Primal<T>& p,
                                const Tangent<T>& t, const Parameters<T>& product) = 0;
};

// What a layer is made from. The scratch memory is there when the layer runs, not yet when it is made.
template <class T>
struct LayerContext {
  const Device& device;
  const Request<T>& request;
  const Scratch<T>& scratch;

  const Shape& value(int index) const { return request.program->values[static_cast<size_t>(index)]; }
};

template <class T>
T* at(const Parameters<T>& parameters, int index) {
  return index < 0 ? nullptr : parameters[static_cast<size_t>(index)];
}

// The layers, each from its nodes in the program.
template <class T>
std::unique_ptr<Layer<T>> make_linear(const Node& node, const LayerContext<T>& context);
template <class T>
std::unique_ptr<Layer<T>> make_conv2d(const Node& node, const LayerContext<T>& context);
// With the relu and the max_pool behind it, where there are any.
template <class T>
std::unique_ptr<Layer<T>> make_batch_norm(const Node& node, const Node* relu, const Node* max_pool,
                                          const LayerContext<T>& context);
// layer_norm and group_norm
template <class T>
std::unique_ptr<Layer<T>> make_sample_norm(const Node& node, const LayerContext<T>& context);
template <class T>
std::unique_ptr<Layer<T>> make_activation(const Node& node, const LayerContext<T>& context);
// max_pool, avg_pool, global_avg_pool
template <class T>
std::unique_ptr<Layer<T>> make_pool(const Node& node, const LayerContext<T>& context);
template <class T>
std::unique_ptr<Layer<T>> make_flatten(const Node& node, const LayerContext<T>& context);
template <class T>
std::unique_ptr<Layer<T>> make_add(const Node& node, const LayerContext<T>& context);

}  // namespace innerloop::gpu
