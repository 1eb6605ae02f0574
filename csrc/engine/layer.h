// What a layer of the blocks executor is: four functions, and the memory they share.
//
// To add one: derive from Layer, write the four functions, make it in plan.cpp, and give program.h its kind.
// docs/adding-a-layer.md goes through an example.
#pragma once

#include <cstdint>
#include <memory>

#include "engine/layout.h"
#include "engine/request.h"

namespace innerloop::INNERLOOP_ISA {

// One layer's memory in one pass of N samples. x and y have their values' layouts; dx and dy are their gradients,
// dense. Null: not wanted, or not there.
template <class T>
struct Primal {
  Side side = Side::support;
  int64_t step = 0;  // k: the parameters are θ_k
  int64_t samples = 0;
  const T* x[2] = {};  // a second one for two inputs alone
  T* y = nullptr;      // written inside its halo alone; forward's only
  const T* dy = nullptr;
  T* dx[2] = {};         // overwritten, not added to
  T* state = nullptr;    // Layer::state_size(N) elements: whatever forward and backward leave for those after them
  T* partner = nullptr;  // bn = support, in a query pass: the state of the support pass at the same parameters
};

// The derivatives of all that along a direction of the parameters.
template <class T>
struct Tangent {
  const T* x[2] = {};  // null: that input does not move
  T* y = nullptr;
  const T* dy = nullptr;
  T* dx[2] = {};
  T* state = nullptr;  // Layer::tangent_state_size(N) elements
};

// What a layer reads after the pass that wrote it. What nobody reads shares its memory with others.
struct Reads {
  bool x = true;          // p.x, once forward is over
  bool dy = true;         // p.dy, in backward_tangent
  bool x_tangent = true;  // t.x, in backward_tangent
};

// θ, direction, gradient and product are packed arrays (layout.h); a layer reads and writes its own parameters in them.
// It is one thread's own: it may keep scratch memory, but nothing from one task to the next.
template <class T>
class Layer {
 public:
  virtual ~Layer() = default;

  virtual int64_t state_size(int64_t samples) const { return samples * 0; }
  virtual int64_t tangent_state_size(int64_t samples) const { return samples * 0; }

  virtual Reads reads() const { return {}; }

  // y from x.
  virtual void forward(const T* theta, const Primal<T>& p) = 0;

  // dx from dy, and gradient += ∂L/∂parameters (null: not wanted). Follows the forward of the same pass.
  virtual void backward(const T* theta, const Primal<T>& p, T* gradient) = 0;

  // ẏ from ẋ and the parameters' direction (null: this layer's parameters do not move). p is as backward left it.
  virtual void forward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t) = 0;

  // dẋ from dẏ (and from dy, ẋ and the direction), and product += the derivative of backward's gradient (null: not
  // wanted). Follows the forward_tangent.
  virtual void backward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t,
                                T* product) = 0;

  // A new task starts: for a layer that keeps something about it.
  virtual void start_task() {}

  // --- for a layer that stands for its weight itself (LowRankLinear) ------------------------------------
  // Then θ_k, the gradients and the directions hold nothing of the weight, θ₀ and the sum of v over tasks do; and the
  // layer is told what becomes of it.

  virtual bool owns_weight() const { return false; }

  // What it reads of a new task's samples, at every step. theta is θ₀.
  virtual void prepare(const T* /*theta*/, const Primal<T>& /*support*/, const Primal<T>& /*query*/) {}

  // The operations of the recurrence, for the weight.
  virtual void descend(int64_t /*k*/) {}
  virtual T rate_gradient(int64_t /*k*/) { return 0; }
  virtual void add_support_gradient(T /*u*/) {}
  // sum += v_0 of the weight.
  virtual void finish_task(T* /*sum*/) {}
};

}  // namespace innerloop::INNERLOOP_ISA
