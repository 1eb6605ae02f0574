#include "program/program.h"

#include <array>
#include <bit>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace innerloop {
namespace {

constexpr int64_t format = 1;
// Sizes up to this keep every product of the engine (samples × channels × positions × bytes) inside int64.
constexpr int64_t largest_size = int64_t{1} << 31;

[[noreturn]] void refuse(const std::string& message) {
  throw std::invalid_argument("program: " + message);
}

int64_t checked_product(const std::vector<int64_t>& sizes, const std::string& what) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size < 1) refuse(what + " has size " + std::to_string(size) + ", expected at least 1");
    if (__builtin_mul_overflow(product, size, &product) || product > largest_size) refuse(what + " is too large");
  }
  return product;
}

std::string text(const std::vector<int64_t>& sizes) {
  std::string joined = "[";
  for (const int64_t size : sizes) {
    if (joined.size() > 1) joined += ", ";
    joined += std::to_string(size);
  }
  joined += "]";
  return joined;
}

std::string text(const Shape& shape) {
  if (!shape.is_image) return text(std::vector{shape.channels});
  return text(std::vector{shape.channels, shape.height, shape.width});
}

// Reads the integers one after another.
class Reader {
 public:
  explicit Reader(std::span<const int64_t> code) : code_(code) {}

  int64_t next(int64_t lowest, int64_t highest, const char* what) {
    if (position_ == code_.size()) refuse(std::string("ends before ") + what);
    const int64_t value = code_[position_++];
    if (value < lowest || value > highest) {
      refuse(std::string(what) + " is " + std::to_string(value) + ", expected " + std::to_string(lowest) + " … " +
             std::to_string(highest));
    }
    return value;
  }

  double next_number(const char* what) {
    constexpr int64_t low = std::numeric_limits<int64_t>::min(), high = std::numeric_limits<int64_t>::max();
    const auto number = std::bit_cast<double>(next(low, high, what));
    if (!(number > -1e30 && number < 1e30)) refuse(std::string(what) + " is not a finite number");
    return number;
  }

  bool at_end() const { return position_ == code_.size(); }

 private:
  std::span<const int64_t> code_;
  size_t position_ = 0;
};

struct Layout {
  int inputs, parameters, attributes;
};

Layout layout_of(Kind kind) {
  switch (kind) {
    case Kind::linear:
      return {1, 2, 0};
    case Kind::conv2d:
      return {1, 2, 4};
    case Kind::batch_norm:
      return {1, 2, 3};
    case Kind::layer_norm:
      return {1, 2, 1};
    case Kind::group_norm:
      return {1, 2, 2};
    case Kind::leaky_relu:
    case Kind::gelu:
      return {1, 0, 1};
    case Kind::max_pool:
      return {1, 0, 6};
    case Kind::avg_pool:
      return {1, 0, 7};
    case Kind::add:
      return {2, 0, 0};
    default:
      return {1, 0, 0};
  }
}

int64_t windows_in(int64_t size, int64_t kernel, int64_t stride, int64_t pad) {
  return size + 2 * pad < kernel ? 0 : (size + 2 * pad - kernel) / stride + 1;
}

class Decoder {
 public:
  Decoder(std::span<const int64_t> code, Program program, int64_t tasks)
      : reader_(code), program_(std::move(program)), tasks_(tasks), used_(program_.parameters.size(), false) {}

  Program run() {
    reader_.next(format, format, "the format");
    const int64_t nodes = reader_.next(1, 100000, "the number of nodes");
    const auto parameters = static_cast<int64_t>(program_.parameters.size());
    const auto buffers = static_cast<int64_t>(program_.buffers.size());
    reader_.next(parameters, parameters, "the number of parameters");
    reader_.next(buffers, buffers, "the number of buffers");
    program_.output = static_cast<int>(reader_.next(1, nodes, "the output value"));
    for (int64_t index = 0; index < nodes; ++index) {
      Node node = next_node(static_cast<int>(index));
      program_.values.push_back(output_shape(node));
      program_.nodes.push_back(node);
    }
    if (!reader_.at_end()) refuse("goes on after its last node");
    for (int value = 0; value <= nodes; ++value) {
      if (value != program_.output && program_.consumers(value).empty()) {
        refuse("nothing reads value " + std::to_string(value));
      }
    }
    const Shape& output = program_.values[static_cast<size_t>(program_.output)];
    if (output.is_image) refuse("the output has shape " + text(output) + ", expected a vector [outputs]");
    return std::move(program_);
  }

 private:
  Node next_node(int index) {
    Node node;
    node.kind = static_cast<Kind>(reader_.next(0, static_cast<int64_t>(Kind::add), "a node's kind"));
    node.output = index + 1;
    where_ = "node " + std::to_string(index) + " (" + kind_name(node.kind) + ")";
    const Layout layout = layout_of(node.kind);
    reader_.next(layout.inputs, layout.inputs, "a node's number of inputs");
    for (int i = 0; i < layout.inputs; ++i) node.inputs.push_back(static_cast<int>(reader_.next(0, index, "an input")));
    reader_.next(layout.parameters, layout.parameters, "a node's number of parameters");
    const int64_t last_parameter = static_cast<int64_t>(program_.parameters.size()) - 1;
    if (layout.parameters == 2) {
      node.weight = static_cast<int>(reader_.next(-1, last_parameter, "a weight"));
      node.bias = static_cast<int>(reader_.next(-1, last_parameter, "a bias"));
      take_parameter(node, node.weight);
      take_parameter(node, node.bias);
    }
    reader_.next(layout.attributes, layout.attributes, "a node's number of attributes");
    read_attributes(node);
    return node;
  }

  // A parameter has one place, where its gradient is written. Splits a leading task dimension off its shape.
  void take_parameter(const Node& node, int parameter) {
    if (parameter < 0) return;
    const auto index = static_cast<size_t>(parameter);
    if (used_[index]) refuse(where_ + " shares a parameter with another node");
    used_[index] = true;
    std::vector<int64_t>& shape = program_.parameters[index];
    if (shape.size() != dimensions(node, parameter, shape.size()) + 1) return;
    if (shape[0] != tasks_) {
      refuse(where_ + " has a parameter " + text(shape) + ": expected its first size to be the number of tasks, " +
             std::to_string(tasks_));
    }
    shape.erase(shape.begin());
    program_.per_task[index] = true;
  }

  // Of a parameter that tasks share. A layer norm's are those of a vector or of an image, 1 or 3.
  static size_t dimensions(const Node& node, int parameter, size_t given) {
    if (node.kind == Kind::layer_norm) return given % 2 == 1 ? given : given - 1;
    if (parameter != node.weight) return 1;
    return node.kind == Kind::linear ? 2 : node.kind == Kind::conv2d ? 4 : 1;
  }

  void read_attributes(Node& node) {
    switch (node.kind) {
      case Kind::conv2d:
        node.window.stride_height = reader_.next(1, 1 << 16, "a stride");
        node.window.stride_width = reader_.next(1, 1 << 16, "a stride");
        node.window.pad_height = reader_.next(0, 1 << 16, "a padding");
        node.window.pad_width = reader_.next(0, 1 << 16, "a padding");
        break;
      case Kind::max_pool:
      case Kind::avg_pool:
        node.window.kernel_height = reader_.next(1, 1 << 16, "a kernel size");
        node.window.kernel_width = reader_.next(1, 1 << 16, "a kernel size");
        node.window.stride_height = reader_.next(1, 1 << 16, "a stride");
        node.window.stride_width = reader_.next(1, 1 << 16, "a stride");
        node.window.pad_height = reader_.next(0, node.window.kernel_height / 2, "a pool's padding");
        node.window.pad_width = reader_.next(0, node.window.kernel_width / 2, "a pool's padding");
        if (node.kind == Kind::avg_pool) node.flag = reader_.next(0, 1, "count_include_pad") == 1;
        break;
      case Kind::batch_norm: {
        node.number = reader_.next_number("eps");
        const int64_t last_buffer = static_cast<int64_t>(program_.buffers.size()) - 1;
        node.running_mean = static_cast<int>(reader_.next(-1, last_buffer, "a buffer"));
        node.running_var = static_cast<int>(reader_.next(-1, last_buffer, "a buffer"));
        if ((node.running_mean < 0) != (node.running_var < 0)) refuse(where_ + " has one of two running statistics");
        break;
      }
      case Kind::layer_norm:
        node.number = reader_.next_number("eps");
        break;
      case Kind::group_norm:
        node.number = reader_.next_number("eps");
        node.groups = reader_.next(1, largest_size, "groups");
        break;
      case Kind::leaky_relu:
        node.number = reader_.next_number("the slope");
        break;
      case Kind::gelu:
        node.flag = reader_.next(0, 1, "gelu's form") == 1;
        break;
      default:
        break;
    }
    const bool is_norm =
        node.kind == Kind::batch_norm || node.kind == Kind::layer_norm || node.kind == Kind::group_norm;
    if (is_norm && !(node.number > 0)) refuse(where_ + " has eps " + std::to_string(node.number) + ", expected > 0");
  }

  Shape output_shape(Node& node) {
    const Shape in = program_.values[static_cast<size_t>(node.inputs[0])];
    switch (node.kind) {
      case Kind::linear: {
        if (in.is_image) refuse(where_ + " reads " + text(in) + ", expected a vector: flatten it first");
        const std::vector<int64_t> weight = required_weight(node);
        if (weight.size() != 2 || weight[1] != in.channels) {
          refuse(where_ + " has a weight " + text(weight) + " and reads " + text(in) + ": expected [outputs, " +
                 std::to_string(in.channels) + "]");
        }
        check_vector(node.bias, weight[0], "bias");
        return {weight[0], 1, 1, false};
      }
      case Kind::conv2d: {
        check_image(in);
        const std::vector<int64_t> weight = required_weight(node);
        if (weight.size() != 4 || weight[1] != in.channels) {
          refuse(where_ + " has a weight " + text(weight) + " and reads " + text(in) + ": expected [outputs, " +
                 std::to_string(in.channels) + ", height, width]");
        }
        node.window.kernel_height = weight[2];
        node.window.kernel_width = weight[3];
        check_vector(node.bias, weight[0], "bias");
        return windowed(node, in, weight[0]);
      }
      case Kind::batch_norm:
        check_vector(node.weight, in.channels, "weight");
        check_vector(node.bias, in.channels, "bias");
        for (const int buffer : {node.running_mean, node.running_var}) {
          if (buffer >= 0 && program_.buffers[static_cast<size_t>(buffer)] != in.channels) {
            refuse(where_ + " has running statistics of " +
                   std::to_string(program_.buffers[static_cast<size_t>(buffer)]) + " channels, expected " +
                   std::to_string(in.channels));
          }
        }
        return in;
      case Kind::layer_norm:
        check_sample_shaped(node.weight, in, "weight");
        check_sample_shaped(node.bias, in, "bias");
        return in;
      case Kind::group_norm:
        check_vector(node.weight, in.channels, "weight");
        check_vector(node.bias, in.channels, "bias");
        if (in.channels % node.groups != 0) refuse(where_ + ": groups do not divide the channels of " + text(in));
        return in;
      case Kind::max_pool:
      case Kind::avg_pool:
        check_image(in);
        return windowed(node, in, in.channels);
      case Kind::global_avg_pool:
        check_image(in);
        return {in.channels, 1, 1, true};
      case Kind::flatten:
        return {in.size(), 1, 1, false};
      case Kind::add: {
        const Shape& other = program_.values[static_cast<size_t>(node.inputs[1])];
        if (!(other == in)) refuse(where_ + " adds " + text(in) + " and " + text(other) + ": expected one shape");
        return in;
      }
      default:
        return in;
    }
  }

  Shape windowed(const Node& node, const Shape& in, int64_t channels) const {
    const Window& w = node.window;
    const Shape out{channels, windows_in(in.height, w.kernel_height, w.stride_height, w.pad_height),
                    windows_in(in.width, w.kernel_width, w.stride_width, w.pad_width), true};
    if (out.height < 1 || out.width < 1) {
      refuse(where_ + " with a window of " + std::to_string(w.kernel_height) + " × " + std::to_string(w.kernel_width) +
             " reads " + text(in) + ", which is too small");
    }
    checked_product({out.channels, out.height, out.width}, where_ + ": the output");
    return out;
  }

  const std::vector<int64_t>& required_weight(const Node& node) const {
    if (node.weight < 0) refuse(where_ + " has no weight");
    return program_.parameters[static_cast<size_t>(node.weight)];
  }

  void check_image(const Shape& in) const {
    if (!in.is_image) refuse(where_ + " reads " + text(in) + ", expected an image [channels, height, width]");
  }

  void check_vector(int parameter, int64_t size, const char* what) const { check_parameter(parameter, {size}, what); }

  void check_sample_shaped(int parameter, const Shape& in, const char* what) const {
    if (in.is_image) {
      check_parameter(parameter, {in.channels, in.height, in.width}, what);
    } else {
      check_parameter(parameter, {in.channels}, what);
    }
  }

  void check_parameter(int parameter, const std::vector<int64_t>& expected, const char* what) const {
    if (parameter >= 0 && program_.parameters[static_cast<size_t>(parameter)] != expected) {
      refuse(where_ + " has a " + what + " " + text(program_.parameters[static_cast<size_t>(parameter)]) +
             ", expected " + text(expected));
    }
  }

  Reader reader_;
  Program program_;
  int64_t tasks_;
  std::vector<bool> used_;
  std::string where_;
};

Shape input_shape(std::span<const int64_t> sizes) {
  checked_product({sizes.begin(), sizes.end()}, "a sample");
  switch (sizes.size()) {
    case 1:
      return {sizes[0], 1, 1, false};
    case 2:  // [C, L]: only a flatten may read it, and that keeps torch's order
      return {sizes[0], sizes[1], 1, true};
    case 3:
      return {sizes[0], sizes[1], sizes[2], true};
    default:
      refuse("a sample has " + std::to_string(sizes.size()) + " dimensions, expected 1 … 3");
  }
}

}  // namespace

const char* kind_name(Kind kind) {
  constexpr std::array names{"linear",          "conv2d",  "batch_norm", "layer_norm", "group_norm", "relu",
                             "leaky_relu",      "gelu",    "tanh",       "sigmoid",    "max_pool",   "avg_pool",
                             "global_avg_pool", "flatten", "add"};
  return names[static_cast<size_t>(kind)];
}

std::vector<int> Program::consumers(int value) const {
  std::vector<int> found;
  for (size_t index = 0; index < nodes.size(); ++index) {
    for (const int input : nodes[index].inputs) {
      if (input == value) found.push_back(static_cast<int>(index));
    }
  }
  return found;
}

int64_t Program::parameter_size(int parameter) const {
  const auto& shape = parameters[static_cast<size_t>(parameter)];
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

Program decode_program(std::span<const int64_t> code, std::span<const int64_t> sample_shape,
                       const std::vector<std::vector<int64_t>>& parameter_shapes,
                       const std::vector<int64_t>& buffer_sizes, int64_t tasks) {
  Program program;
  program.values.push_back(input_shape(sample_shape));
  program.parameters = parameter_shapes;
  program.per_task.assign(parameter_shapes.size(), false);
  program.buffers = buffer_sizes;
  for (size_t index = 0; index < parameter_shapes.size(); ++index) {
    checked_product(parameter_shapes[index], "parameter " + std::to_string(index));
  }
  return Decoder(code, std::move(program), tasks).run();
}

}  // namespace innerloop
