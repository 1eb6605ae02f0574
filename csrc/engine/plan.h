// How a program will be run by the blocks executor: which layer does which nodes, where values and parameters lie, and
// what has to be computed for which purpose.
#pragma once

#include <string>
#include <vector>

#include "engine/layers.h"

namespace innerloop::INNERLOOP_ISA {

enum class Implementation : uint8_t { plain, conv_block, first_block, low_rank_linear };

// One layer of the executor: one node, or several that an optimised layer does together.
struct Step {
  Implementation implementation = Implementation::plain;
  std::vector<int> nodes;
  std::vector<int> inputs;  // values
  int output = 0;           // value
  std::vector<int> parameters;
  std::string description;

  bool moves = false;    // its output changes over the inner steps: something above it, or in it, is adapted
  bool adapted = false;  // some parameter of its own is adapted
  bool tracked = false;  // some parameter of its own is tracked
};

struct Plan {
  std::vector<Step> steps;
  int input = 0;  // the value that samples are loaded into
  std::vector<ValueLayout> values;
  std::vector<PackedParameter> parameters;  // by parameter; one that no step reads has offset -1
  int64_t packed_size = 0;
  // Of a packed array without the weights that layers stand for themselves, which come last.
  int64_t moving_size = 0;
  std::vector<int> owners;  // by parameter: the step that stands for it, or -1

  std::vector<bool> tracked;      // by parameter: adapted, or its gradient is wanted: v follows it
  std::vector<bool> moves;        // by value
  std::vector<bool> has_tracked;  // by value: there is a tracked parameter above it, so its gradient is of use
  // Values that do not move, read by steps that do (or the output): what the inner steps find there is computed once a
  // task, and the gradients that arrive there go on upwards once a task, too.
  std::vector<int> boundary;
  // Under bn = support, whether a BatchNorm moves: then a query pass needs a support pass at its parameters.
  bool moving_statistics = false;
};

template <class T>
Plan make_plan(const Request<T>& request);

// The layers of the plan's steps, for one thread.
template <class T>
std::vector<std::unique_ptr<Layer<T>>> make_layers(const Plan& plan, const Request<T>& request);

// One line for each step.
std::string describe(const Plan& plan);

}  // namespace innerloop::INNERLOOP_ISA
