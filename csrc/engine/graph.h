// A program as an executor of whole networks walks it: steps, and what has to be computed for which purpose.
#pragma once

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "engine/request.h"

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

struct Graph {
  std::vector<Step> steps;
  std::vector<bool> tracked;      // by parameter: adapted, or its gradient is wanted: v follows it
  std::vector<bool> moves;        // by value
  std::vector<bool> has_tracked;  // by value: there is a tracked parameter above it, so its gradient is of use
  // Values that do not move, read by steps that do (or the output): what the inner steps find there is computed once a
  // task, and the gradients that arrive there go on upwards once a task, too.
  std::vector<int> boundary;
  // Under bn = support, whether a BatchNorm moves: then a query pass needs a support pass at its parameters.
  bool moving_statistics = false;

  bool is_boundary(int value) const { return std::ranges::find(boundary, value) != boundary.end(); }
};

inline std::vector<int> parameters_of(const Node& node) {
  std::vector<int> found;
  for (const int parameter : {node.weight, node.bias}) {
    if (parameter >= 0) found.push_back(parameter);
  }
  return found;
}

// A step for every node.
inline std::vector<Step> plain_steps(const Program& program) {
  std::vector<Step> steps;
  for (size_t index = 0; index < program.nodes.size(); ++index) {
    const Node& node = program.nodes[index];
    Step step;
    step.nodes = {static_cast<int>(index)};
    step.inputs = node.inputs;
    step.output = node.output;
    step.parameters = parameters_of(node);
    step.description = kind_name(node.kind);
    steps.push_back(step);
  }
  return steps;
}

// The node that reads a value, if it is the only one and of that kind; −1 otherwise.
inline int only_consumer(const Program& program, int value, Kind kind) {
  const std::vector<int> consumers = program.consumers(value);
  if (consumers.size() != 1 || value == program.output) return -1;
  return program.nodes[static_cast<size_t>(consumers[0])].kind == kind ? consumers[0] : -1;
}

// Brings nodes into one step wherever nodes_at(first node) names several, and calls fused(step) for it.
template <class NodesAt, class Fused>
void fuse(const Program& program, std::vector<Step>& steps, const NodesAt& nodes_at, const Fused& fused) {
  std::vector<bool> absorbed(program.nodes.size(), false);
  for (Step& step : steps) {
    const std::vector<int> nodes = nodes_at(step.nodes[0]);
    if (nodes.size() < 2) continue;
    step.nodes = nodes;
    step.output = program.nodes[static_cast<size_t>(nodes.back())].output;
    step.parameters.clear();
    step.description.clear();
    for (const int node : nodes) {
      absorbed[static_cast<size_t>(node)] = node != nodes[0];
      std::ranges::copy(parameters_of(program.nodes[static_cast<size_t>(node)]), std::back_inserter(step.parameters));
      step.description +=
          (node == nodes[0] ? "" : " + ") + std::string(kind_name(program.nodes[static_cast<size_t>(node)].kind));
    }
    fused(step);
  }
  std::erase_if(steps, [&](const Step& step) { return absorbed[static_cast<size_t>(step.nodes[0])]; });
}

// From the steps: which values move, which have tracked parameters above them, and where the two regions meet.
template <class T>
void analyse(Graph& graph, const Request<T>& request) {
  const Program& program = *request.program;
  for (size_t parameter = 0; parameter < program.parameters.size(); ++parameter) {
    const bool wanted = !request.gradients.empty() && request.gradients[parameter] != nullptr;
    graph.tracked.push_back(wanted || (request.wants_gradients() && request.is_adapted(static_cast<int>(parameter))));
  }
  const auto is_tracked = [&](int parameter) { return graph.tracked[static_cast<size_t>(parameter)]; };
  graph.moves.assign(program.values.size(), false);
  graph.has_tracked.assign(program.values.size(), false);
  for (Step& step : graph.steps) {
    step.adapted = std::ranges::any_of(step.parameters, [&](int p) { return request.is_adapted(p); });
    step.tracked = std::ranges::any_of(step.parameters, is_tracked);
    bool moves = step.adapted, has_tracked = step.tracked;
    for (const int input : step.inputs) {
      moves = moves || graph.moves[static_cast<size_t>(input)];
      has_tracked = has_tracked || graph.has_tracked[static_cast<size_t>(input)];
    }
    step.moves = moves;
    const bool has_statistics = std::ranges::any_of(
        step.nodes, [&](int node) { return program.nodes[static_cast<size_t>(node)].kind == Kind::batch_norm; });
    graph.moving_statistics =
        graph.moving_statistics || (moves && has_statistics && request.batch_norm == BatchNormMode::support);
    graph.moves[static_cast<size_t>(step.output)] = moves;
    graph.has_tracked[static_cast<size_t>(step.output)] = has_tracked;
  }
  for (size_t value = 0; value < program.values.size(); ++value) {
    if (graph.moves[value] || !graph.has_tracked[value]) continue;
    const bool meets = std::ranges::any_of(graph.steps, [&](const Step& step) {
      return step.moves && std::ranges::find(step.inputs, static_cast<int>(value)) != step.inputs.end();
    });
    if (meets || static_cast<int>(value) == program.output) graph.boundary.push_back(static_cast<int>(value));
  }
}

// One line for each step.
inline std::string describe(const Graph& graph) {
  std::string text;
  for (const Step& step : graph.steps) {
    text += step.description;
    if (!step.moves) text += " (not adapted: once a task)";
    text += "\n";
  }
  return text;
}

}  // namespace innerloop::INNERLOOP_ISA
