#include <algorithm>
#include <vector>

#include "cuda/engine/network.h"

namespace innerloop::gpu {
namespace {

bool windows_lie_side_by_side(const Window& w) {
  return w.kernel_height == w.stride_height && w.kernel_width == w.stride_width && w.pad_height == 0 &&
         w.pad_width == 0;
}

// The nodes of the fused layer that starts at this one: batch_norm, relu, and a max_pool whose windows lie side by side
// where there is one.
std::vector<int> norm_block_at(const Program& program, int first) {
  const auto node = [&](int index) -> const Node& { return program.nodes[static_cast<size_t>(index)]; };
  std::vector<int> nodes{first};
  if (node(first).kind != Kind::batch_norm) return nodes;
  const int relu = only_consumer(program, node(first).output, Kind::relu);
  if (relu < 0) return nodes;
  nodes.push_back(relu);
  const int pool = only_consumer(program, node(relu).output, Kind::max_pool);
  if (pool >= 0 && windows_lie_side_by_side(node(pool).window)) nodes.push_back(pool);
  return nodes;
}

}  // namespace

template <class T>
Graph make_graph(const Request<T>& request) {
  const Program& program = *request.program;
  Graph graph;
  graph.steps = plain_steps(program);
  if (request.paths.conv_block != Use::off) {
    fuse(
        program, graph.steps, [&](int first) { return norm_block_at(program, first); },
        [](Step& step) { step.description += ": one layer"; });
  }
  analyse(graph, request);
  return graph;
}

template <class T>
std::unique_ptr<Layer<T>> make_layer(const Step& step, const LayerContext<T>& context) {
  const auto node = [&](size_t i) {
    return i < step.nodes.size() ? &context.request.program->nodes[static_cast<size_t>(step.nodes[i])] : nullptr;
  };
  switch (node(0)->kind) {
    case Kind::linear:
      return make_linear(*node(0), context);
    case Kind::conv2d:
      return make_conv2d(*node(0), context);
    case Kind::batch_norm:
      return make_batch_norm(*node(0), node(1), node(2), context);
    case Kind::layer_norm:
    case Kind::group_norm:
      return make_sample_norm(*node(0), context);
    case Kind::max_pool:
    case Kind::avg_pool:
    case Kind::global_avg_pool:
      return make_pool(*node(0), context);
    case Kind::flatten:
      return make_flatten(*node(0), context);
    case Kind::add:
      return make_add(*node(0), context);
    case Kind::relu:
    case Kind::leaky_relu:
    case Kind::gelu:
    case Kind::tanh:
    case Kind::sigmoid:
      return make_activation(*node(0), context);
    default:
      STD_TORCH_CHECK(false, kind_name(node(0)->kind), " has no CUDA form");
  }
}

int64_t largest_collected(const Program& program, const Graph& graph) {
  int64_t largest = 0;
  for (size_t value = 0; value < program.values.size(); ++value) {
    const int index = static_cast<int>(value);
    if (program.consumers(index).size() > 1 || graph.is_boundary(index)) {
      largest = std::max(largest, program.values[value].size());
    }
  }
  return largest;
}

template Graph make_graph(const Request<float>&);
template Graph make_graph(const Request<double>&);
template std::unique_ptr<Layer<float>> make_layer(const Step&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_layer(const Step&, const LayerContext<double>&);

}  // namespace innerloop::gpu
