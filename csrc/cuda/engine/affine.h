// y = x Wᵀ + b for rows of every task: a Linear layer on its samples, a convolution on its patches.
#pragma once

#include <algorithm>

#include "cuda/engine/each.h"
#include "cuda/engine/layer.h"
#include "cuda/engine/products.h"

namespace innerloop::gpu {

template <class T>
struct AddToRows {  // y [tasks][rows][columns] += b [tasks][columns]
  const T* b;
  T* y;
  int64_t rows, columns;
  __device__ void operator()(int64_t i) const { y[i] += b[i / columns / rows * columns + i % columns]; }
};

template <class T>
struct ColumnTerms {
  const T* from;
  int64_t rows, columns;
  __device__ Pair<T> operator()(int64_t task, int64_t row, int64_t column) const {
    return {from[(task * rows + row) * columns + column], T(0)};
  }
};

template <class T>
struct AddColumnSums {
  T* to;
  int64_t columns;
  __device__ void operator()(int64_t task, int64_t column, const Pair<double>& sum) const {
    to[task * columns + column] += static_cast<T>(sum.first);
  }
};

template <class T>
class Affine {
 public:
  Affine(const Node& node, const LayerContext<T>& context)
      : device_(context.device),
        scratch_(context.scratch),
        weight_(node.weight),
        bias_(node.bias),
        outputs_(context.request.program->parameters[static_cast<size_t>(node.weight)][0]),
        inputs_(context.request.program->parameter_size(node.weight) / outputs_) {}

  int64_t inputs() const { return inputs_; }

  // For one task; without what gradients of x ask.
  ScratchSize scratch_size(int64_t rows) const {
    return {0, std::max(outputs_ * inputs_, rows * outputs_), sums_size(rows, outputs_)};
  }

  void forward(int64_t tasks, int64_t rows, const T* x, const Parameters<T>& theta, T* y) const {
    multiply(device_, tasks, in(x, rows), weight(theta).transpose(), y);
    add_bias(tasks, rows, theta, y);
  }

  // gradient += that of W and b
  void add_gradient(int64_t tasks, int64_t rows, const T* x, const T* dy, const Parameters<T>& gradient) const {
    if (T* to = at(gradient, weight_)) {
      multiply_add(device_, tasks, out(dy, rows).transpose(), in(x, rows), to, scratch_.product);
    }
    if (T* to = at(gradient, bias_)) {
      sum_rows(device_, tasks, rows, outputs_, scratch_.sums, ColumnTerms<T>{dy, rows, outputs_},
               AddColumnSums<T>{to, outputs_});
    }
  }

  // dx = dy W
  void input_gradient(int64_t tasks, int64_t rows, const T* dy, const Parameters<T>& theta, T* dx) const {
    multiply(device_, tasks, out(dy, rows), weight(theta), dx);
  }

  // ẏ = ẋ Wᵀ + x Ẇᵀ + ḃ; x_tangent null: 0
  void forward_tangent(int64_t tasks, int64_t rows, const T* x, const T* x_tangent, const Parameters<T>& theta,
                       const Parameters<T>& direction, T* y) const {
    const bool weight_moves = at(direction, weight_) != nullptr;
    if (x_tangent) {
      multiply(device_, tasks, in(x_tangent, rows), weight(theta).transpose(), y);
      if (weight_moves) {
        multiply_add(device_, tasks, in(x, rows), weight(direction).transpose(), y, scratch_.product);
      }
    } else if (weight_moves) {
      multiply(device_, tasks, in(x, rows), weight(direction).transpose(), y);
    } else {
      each(device_, tasks * rows * outputs_, Zero<T>{y});
    }
    add_bias(tasks, rows, direction, y);
  }

  // product += dẏᵀ x + dyᵀ ẋ and Σ dẏ
  void add_gradient_tangent(int64_t tasks, int64_t rows, const T* x, const T* x_tangent, const T* dy,
                            const T* dy_tangent, const Parameters<T>& product) const {
    add_gradient(tasks, rows, x, dy_tangent, product);
    T* to = at(product, weight_);
    if (to && x_tangent) {
      multiply_add(device_, tasks, out(dy, rows).transpose(), in(x_tangent, rows), to, scratch_.product);
    }
  }

  // dẋ = dẏ W + dy Ẇ; scratch is of dẋ's size
  void input_gradient_tangent(int64_t tasks, int64_t rows, const T* dy, const T* dy_tangent, const Parameters<T>& theta,
                              const Parameters<T>& direction, T* dx, T* scratch) const {
    multiply(device_, tasks, out(dy_tangent, rows), weight(theta), dx);
    if (at(direction, weight_)) multiply_add(device_, tasks, out(dy, rows), weight(direction), dx, scratch);
  }

 private:
  Matrices<T> in(const T* x, int64_t rows) const { return {x, rows, inputs_}; }
  Matrices<T> out(const T* y, int64_t rows) const { return {y, rows, outputs_}; }
  Matrices<T> weight(const Parameters<T>& theta) const { return {at(theta, weight_), outputs_, inputs_}; }

  void add_bias(int64_t tasks, int64_t rows, const Parameters<T>& theta, T* y) const {
    if (const T* b = at(theta, bias_)) {
      each(device_, tasks * rows * outputs_, AddToRows<T>{b, y, rows, outputs_});
    }
  }

  const Device& device_;
  const Scratch<T>& scratch_;
  const int weight_, bias_;
  const int64_t outputs_, inputs_;
};

}  // namespace innerloop::gpu
