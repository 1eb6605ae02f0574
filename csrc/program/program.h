// The lowered network: what python/innerloop/program.py encodes as integers, decoded and validated.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace innerloop {

// The numbers are the encoding's; program.py has the same list.
enum class Kind : uint8_t {
  linear = 0,
  conv2d = 1,
  batch_norm = 2,
  layer_norm = 3,
  group_norm = 4,
  relu = 5,
  leaky_relu = 6,
  gelu = 7,
  tanh = 8,
  sigmoid = 9,
  max_pool = 10,
  avg_pool = 11,
  global_avg_pool = 12,
  flatten = 13,
  add = 14,
};

const char* kind_name(Kind kind);

// One sample's shape: an image [channels, height, width], or a vector [channels] with height = width = 1.
struct Shape {
  int64_t channels = 0, height = 1, width = 1;
  bool is_image = false;

  int64_t size() const { return channels * height * width; }
  bool operator==(const Shape&) const = default;
};

struct Window {  // of a convolution or a pooling
  int64_t kernel_height = 1, kernel_width = 1, stride_height = 1, stride_width = 1, pad_height = 0, pad_width = 0;
};

struct Node {
  Kind kind{};
  std::vector<int> inputs;                  // values
  int weight = -1, bias = -1;               // parameters
  Window window;                            // conv2d and pools
  double number = 0;                        // eps of a norm, slope of leaky_relu
  int64_t groups = 1;                       // group_norm
  bool flag = false;                        // gelu: the tanh form; avg_pool: padding counts
  int running_mean = -1, running_var = -1;  // buffers, batch_norm
  int output = 0;                           // value
};

struct Program {
  std::vector<Node> nodes;
  std::vector<Shape> values;                     // value 0 is the network's input
  std::vector<std::vector<int64_t>> parameters;  // shapes, of one task's
  std::vector<bool> per_task;                    // by parameter: every task has its own
  std::vector<int64_t> buffers;                  // sizes
  int output = 0;

  // Nodes that read a value.
  std::vector<int> consumers(int value) const;
  int64_t parameter_size(int parameter) const;
};

// Decodes and checks a program for samples of a shape. parameter_shapes and buffer_sizes are those of the tensors at
// hand; a parameter with one dimension more than its layer's has a leading one for the tasks.
// Throws std::invalid_argument that says what does not fit.
// Every value but the output is read by some node.
Program decode_program(std::span<const int64_t> code, std::span<const int64_t> sample_shape,
                       const std::vector<std::vector<int64_t>>& parameter_shapes,
                       const std::vector<int64_t>& buffer_sizes, int64_t tasks);

}  // namespace innerloop
