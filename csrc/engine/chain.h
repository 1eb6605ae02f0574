// A network that is a chain of Linear layers, as the lanes executor runs it.
#pragma once

#include <optional>
#include <vector>

#include "engine/request.h"

namespace innerloop::INNERLOOP_ISA {

// y = f(z), z = x·Wᵀ + b.
struct ChainLayer {
  int weight = -1, bias = -1;  // parameters
  int64_t inputs = 0, outputs = 0;
  const Node* activation = nullptr;  // null: y = z

  // tanh, sigmoid, gelu; the others are f(z) = z for z > 0 and a multiple of z below.
  bool is_smooth() const {
    return activation && activation->kind != Kind::relu && activation->kind != Kind::leaky_relu;
  }
  // That multiple; 1 where f is smooth, or y = z.
  double negative_slope() const {
    if (!activation || is_smooth()) return 1;
    return activation->kind == Kind::relu ? 0 : activation->number;
  }
};

inline bool is_activation(const Node& node) {
  switch (node.kind) {
    case Kind::relu:
    case Kind::tanh:
    case Kind::sigmoid:
    case Kind::gelu:
      return true;
    case Kind::leaky_relu:
      return node.number > 0;  // then the sign of y is that of z
    default:
      return false;
  }
}

// The program as a chain, if it is one.
inline std::optional<std::vector<ChainLayer>> chain_of(const Program& program) {
  std::vector<ChainLayer> chain;
  int value = 0;
  for (const Node& node : program.nodes) {
    if (node.inputs.size() != 1 || node.inputs[0] != value) return std::nullopt;
    if (node.kind == Kind::linear) {
      const std::vector<int64_t>& shape = program.parameters[static_cast<size_t>(node.weight)];
      chain.push_back({node.weight, node.bias, shape[1], shape[0]});
    } else if (is_activation(node) && !chain.empty() && !chain.back().activation) {
      chain.back().activation = &node;
    } else if (node.kind != Kind::flatten) {
      return std::nullopt;
    }
    value = node.output;
  }
  if (chain.empty() || value != program.output) return std::nullopt;
  return chain;
}

}  // namespace innerloop::INNERLOOP_ISA
