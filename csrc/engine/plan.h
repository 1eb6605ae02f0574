// How a program will be run by the blocks executor: which layer does which nodes, where values and parameters lie, and
// what has to be computed for which purpose.
#pragma once

#include <vector>

#include "engine/graph.h"
#include "engine/layers.h"

namespace innerloop::INNERLOOP_ISA {

struct Plan : Graph {
  int input = 0;  // the value that samples are loaded into
  std::vector<ValueLayout> values;
  std::vector<PackedParameter> parameters;  // by parameter; one that no step reads has offset -1
  int64_t packed_size = 0;
  // Of a packed array without the weights that layers stand for themselves, which come last.
  int64_t moving_size = 0;
  std::vector<int> owners;  // by parameter: the step that stands for it, or -1

  // Size of the largest gradient that may have to be added to another: of a value that is read more than once, or at
  // the boundary.
  int64_t largest_collected() const;
};

template <class T>
Plan make_plan(const Request<T>& request);

// The layers of the plan's steps, for one thread; memory and scratch must outlive them.
template <class T>
std::vector<std::unique_ptr<Layer<T>>> make_layers(const Plan& plan, const Request<T>& request, Memory<T>& memory,
                                                   ConvolutionScratch<T>& scratch);

}  // namespace innerloop::INNERLOOP_ISA
