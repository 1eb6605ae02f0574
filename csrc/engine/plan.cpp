#include "engine/plan.h"

#include <algorithm>

#include "engine/conv_block.h"
#include "engine/convolution_shape.h"
#include "engine/first_block.h"
#include "engine/low_rank_linear.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// A flatten of the samples takes no step: they are loaded as the vectors that they already are in torch's memory.
void load_flat(const Program& program, Plan& plan) {
  const std::vector<int> consumers = program.consumers(0);
  if (consumers.size() != 1) return;
  const Node& node = program.nodes[static_cast<size_t>(consumers[0])];
  if (node.kind != Kind::flatten || node.output == program.output) return;
  plan.input = node.output;
  std::erase_if(plan.steps, [&](const Step& step) { return step.output == plan.input; });
}

bool halves(const Window& w) {
  return w.kernel_height == 2 && w.kernel_width == 2 && w.stride_height == 2 && w.stride_width == 2 &&
         w.pad_height == 0 && w.pad_width == 0;
}

// The nodes of the fused block that starts at this one: conv2d, batch_norm, relu, and a max_pool that halves the image
// where there is one. Empty: there is no such block.
std::vector<int> block_at(const Program& program, int first) {
  std::vector<int> nodes = {first};
  const auto output = [&] { return program.nodes[static_cast<size_t>(nodes.back())].output; };
  if (program.nodes[static_cast<size_t>(first)].kind != Kind::conv2d) return {};
  for (const Kind kind : {Kind::batch_norm, Kind::relu}) {
    const int next = only_consumer(program, output(), kind);
    if (next < 0) return {};
    nodes.push_back(next);
  }
  const int pool = only_consumer(program, output(), Kind::max_pool);
  if (pool >= 0 && halves(program.nodes[static_cast<size_t>(pool)].window)) nodes.push_back(pool);
  return nodes;
}

// Brings the nodes of every block into one step.
void fuse_blocks(const Program& program, std::vector<Step>& steps) {
  fuse(
      program, steps, [&](int first) { return block_at(program, first); },
      [](Step& step) {
        step.implementation = Implementation::conv_block;
        step.description += ": one block";
      });
}

bool reads_unpadded(Kind kind) {
  return kind == Kind::linear || kind == Kind::conv2d || kind == Kind::flatten;
}

template <class T>
std::vector<ValueLayout> layouts_of(const Program& program, int input) {
  std::vector<ValueLayout> layouts(program.values.size());
  for (size_t value = 0; value < layouts.size(); ++value) {
    ValueLayout& layout = layouts[value];
    layout.shape = program.values[value];
    bool padded = static_cast<int>(value) != input;
    for (const int consumer : program.consumers(static_cast<int>(value))) {
      const Node& node = program.nodes[static_cast<size_t>(consumer)];
      padded = padded || !reads_unpadded(node.kind);
      layout.halo = std::max({layout.halo, node.window.pad_height, node.window.pad_width});
    }
    layout.stride = padded ? round_up(layout.shape.channels, lanes<T>) : layout.shape.channels;
  }
  return layouts;
}

// The packed form of a parameter that this node reads.
template <class T>
PackedParameter packed_form(const Program& program, const std::vector<ValueLayout>& values, const Node& node,
                            int parameter) {
  const std::vector<int64_t>& shape = program.parameters[static_cast<size_t>(parameter)];
  PackedParameter packed;
  packed.outputs = shape[0];
  packed.output_stride = round_up(shape[0], lanes<T>);
  if (parameter == node.weight && node.kind == Kind::linear) {
    packed.inputs = packed.input_stride = shape[1];
  } else if (parameter == node.weight && node.kind == Kind::conv2d) {
    packed.inputs = shape[1];
    packed.input_stride = values[static_cast<size_t>(node.inputs[0])].stride;
    packed.taps = shape[2] * shape[3];
  } else if (shape.size() == 3) {  // layer_norm on images
    packed.taps = shape[1] * shape[2];
  }
  return packed;
}

template <class T>
std::unique_ptr<Layer<T>> make_plain(const Node& node, const LayerContext<T>& context) {
  switch (node.kind) {
    case Kind::linear:
      return make_linear(node, context);
    case Kind::conv2d:
      return make_conv2d(node, context);
    case Kind::batch_norm:
      return make_batch_norm(node, context);
    case Kind::layer_norm:
    case Kind::group_norm:
      return make_sample_norm(node, context);
    case Kind::max_pool:
    case Kind::avg_pool:
    case Kind::global_avg_pool:
      return make_pool(node, context);
    case Kind::flatten:
      return make_flatten(node, context);
    case Kind::add:
      return make_add(node, context);
    default:
      return make_activation(node, context);
  }
}

BlockNodes block_nodes(const Step& step, const Program& program) {
  const auto node = [&](size_t i) { return &program.nodes[static_cast<size_t>(step.nodes[i])]; };
  return {node(0), node(1), node(2), step.nodes.size() > 3 ? node(3) : nullptr};
}

void use_patch_moments(const Program& program, const std::vector<ValueLayout>& values, std::vector<Step>& steps) {
  for (Step& step : steps) {
    if (step.implementation != Implementation::conv_block) continue;
    if (!is_first_block(block_nodes(step, program), values)) continue;
    step.implementation = Implementation::first_block;
    step.description += ", by the moments of its patches";
  }
}

// Says which convolutions go by Winograd's form: the layers choose it by the same function.
template <class T>
void describe_winograd(const Program& program, const std::vector<ValueLayout>& values, Use use,
                       std::vector<Step>& steps) {
  for (Step& step : steps) {
    const Node& node = program.nodes[static_cast<size_t>(step.nodes[0])];
    if (node.kind != Kind::conv2d || step.implementation == Implementation::first_block) continue;
    const ValueLayout& in = values[static_cast<size_t>(step.inputs[0])];
    const int64_t outputs = values[static_cast<size_t>(step.output)].stride;
    const int tile = winograd_tile<T>(convolution_shape(node.window, in, outputs, 0), winograd_use(use));
    if (tile != 0) step.description += ", by Winograd's F(" + std::to_string(tile) + " × " + std::to_string(tile) + ")";
  }
}

// Linear layers whose input stays as it is while they move, and has no gradient to go on to.
template <class T>
void use_low_rank(Plan& plan, const Request<T>& request) {
  if (request.paths.low_rank == Use::off || plan.moving_statistics) return;
  for (size_t s = 0; s < plan.steps.size(); ++s) {
    Step& step = plan.steps[s];
    const Node& node = request.program->nodes[static_cast<size_t>(step.nodes[0])];
    const size_t input = static_cast<size_t>(step.inputs[0]);
    if (step.implementation != Implementation::plain || !low_rank_applies(node, request)) continue;
    if (plan.moves[input] || plan.has_tracked[input]) continue;
    if (request.paths.low_rank == Use::automatic && !low_rank_pays(node, request)) continue;
    step.implementation = Implementation::low_rank_linear;
    step.description += ", by low-rank updates";
    plan.owners[static_cast<size_t>(node.weight)] = static_cast<int>(s);
  }
}

// Places of the parameters in packed arrays; those that a layer stands for come last.
template <class T>
void pack_parameters(Plan& plan, const Program& program) {
  for (const bool owned : {false, true}) {
    for (const Node& node : program.nodes) {
      for (const int parameter : parameters_of(node)) {
        if ((plan.owners[static_cast<size_t>(parameter)] >= 0) != owned) continue;
        PackedParameter packed = packed_form<T>(program, plan.values, node, parameter);
        packed.offset = plan.packed_size;
        plan.packed_size += packed.packed_size();
        plan.parameters[static_cast<size_t>(parameter)] = packed;
      }
    }
    if (!owned) plan.moving_size = plan.packed_size;
  }
}

}  // namespace

int64_t Plan::largest_collected() const {
  int64_t largest = 0;
  for (size_t value = 0; value < values.size(); ++value) {
    int64_t readers = 0;
    for (const Step& step : steps) readers += std::ranges::count(step.inputs, static_cast<int>(value));
    if (readers >= 2 || is_boundary(static_cast<int>(value))) largest = std::max(largest, values[value].dense_size());
  }
  return largest;
}

template <class T>
Plan make_plan(const Request<T>& request) {
  const Program& program = *request.program;
  Plan plan;
  plan.steps = plain_steps(program);
  load_flat(program, plan);
  // The block's statistics are those of its own pass.
  if (request.paths.conv_block != Use::off && request.batch_norm == BatchNormMode::transductive) {
    fuse_blocks(program, plan.steps);
  }
  plan.values = layouts_of<T>(program, plan.input);
  if (request.paths.patch_moments != Use::off) use_patch_moments(program, plan.values, plan.steps);
  describe_winograd<T>(program, plan.values, request.paths.winograd, plan.steps);
  plan.parameters.resize(program.parameters.size());
  for (PackedParameter& unread : plan.parameters) unread.offset = -1;
  plan.owners.assign(program.parameters.size(), -1);
  analyse(plan, request);
  use_low_rank(plan, request);
  pack_parameters<T>(plan, program);
  return plan;
}

template <class T>
std::vector<std::unique_ptr<Layer<T>>> make_layers(const Plan& plan, const Request<T>& request, Memory<T>& memory,
                                                   ConvolutionScratch<T>& scratch) {
  const LayerContext<T> context{
      request, plan.values, plan.parameters, std::max(request.support.count, request.query.count), memory, scratch};
  std::vector<std::unique_ptr<Layer<T>>> layers;
  for (const Step& step : plan.steps) {
    const Node& first = request.program->nodes[static_cast<size_t>(step.nodes[0])];
    switch (step.implementation) {
      case Implementation::plain:
        layers.push_back(make_plain(first, context));
        break;
      case Implementation::first_block:
        layers.push_back(make_first_block(block_nodes(step, *request.program), context));
        break;
      case Implementation::low_rank_linear:
        layers.push_back(make_low_rank_linear(first, context));
        break;
      case Implementation::conv_block:
        layers.push_back(make_conv_block(block_nodes(step, *request.program), context));
        break;
    }
  }
  return layers;
}

template Plan make_plan(const Request<float>&);
template Plan make_plan(const Request<double>&);
template std::vector<std::unique_ptr<Layer<float>>> make_layers(const Plan&, const Request<float>&, Memory<float>&,
                                                                ConvolutionScratch<float>&);
template std::vector<std::unique_ptr<Layer<double>>> make_layers(const Plan&, const Request<double>&, Memory<double>&,
                                                                 ConvolutionScratch<double>&);

}  // namespace innerloop::INNERLOOP_ISA
