// Every kernel against naive loops: prints "<type> <case> <largest error relative to the largest result>" a line.
// Compiled once per instruction set by tests/test_kernels.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels/chosen_patches.h"
#include "kernels/convolution.h"
#include "kernels/gemm.h"

using namespace innerloop::INNERLOOP_ISA;

namespace {

template <class T>
using Array = std::vector<T>;

template <class T>
const char* type_name = sizeof(T) == 4 ? "float32" : "float64";

std::mt19937 generator(0);

template <class T>
Array<T> random(int64_t size) {
  std::normal_distribution<double> normal;
  Array<T> values(static_cast<size_t>(size) + lanes<T>);
  for (T& value : values) value = static_cast<T>(normal(generator));
  return values;
}

template <class T>
void report(const std::string& name, const Array<T>& got, const Array<double>& expected) {
  double error = 0, largest = 1e-30;
  for (size_t i = 0; i < expected.size(); ++i) {
    error = std::max(error, std::abs(static_cast<double>(got[i]) - expected[i]));
    if (std::isnan(got[i])) error = INFINITY;
    largest = std::max(largest, std::abs(expected[i]));
  }
  std::printf("%s %s %.3g\n", type_name<T>, name.c_str(), error / largest);
}

template <class T>
void check_products(int64_t rows, int64_t inner, int64_t vectors) {
  const int64_t columns = vectors * lanes<T>, a_row = inner + 3, out_row = columns + lanes<T>;
  const std::string size =
      std::to_string(rows) + "x" + std::to_string(inner) + "x" + std::to_string(vectors) + "vectors";
  const auto a = random<T>(2 * rows * a_row), b = random<T>(2 * inner * columns), bias = random<T>(columns);
  const auto second_a = a.data() + rows * a_row, second_b = b.data() + inner * columns;
  const auto dot = [&](int64_t i, int64_t j, bool two) {
    double sum = 0;
    for (int64_t r = 0; r < inner; ++r) {
      sum += double(a[i * a_row + r]) * b[r * columns + j];
      if (two) sum += double(second_a[i * a_row + r]) * second_b[r * columns + j];
    }
    return sum;
  };
  const ProductShape shape{
      .rows = rows, .inner = inner, .columns = columns, .a_row = a_row, .b_row = columns, .out_row = out_row};
  const Terms<T> one{{a.data(), b.data()}}, two{{a.data(), b.data()}, {second_a, second_b}};
  const auto compare = [&](const std::string& name, const Array<T>& before, const Array<T>& got, auto&& value) {
    Array<double> expected(before.begin(), before.end());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) expected[i * out_row + j] = value(i, j);
    }
    report<T>(name + " " + size, got, expected);  // what lies between the rows must be as before
  };
  const auto before = random<T>(rows * out_row);
  auto out = before;
  multiply<T>(shape, two, bias.data(), out.data());
  compare("multiply", before, out, [&](int64_t i, int64_t j) { return bias[j] + dot(i, j, true); });
  out = before;
  multiply_add<T>(shape, one, out.data());
  compare("multiply_add", before, out,
          [&](int64_t i, int64_t j) { return before[i * out_row + j] + dot(i, j, false); });

  // The transposed use of a: its columns are the rows of the product.
  ProductShape turned = shape;
  turned.a_row = 1;
  turned.a_inner = rows;
  out = before;
  multiply<T>(turned, one, nullptr, out.data());
  compare("multiply_transposed", before, out, [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t r = 0; r < inner; ++r) sum += double(a[r * rows + i]) * b[r * columns + j];
    return sum;
  });

  // The outer product has `inner` points and `rows` rows.
  const OuterShape outer{
      .points = inner, .rows = rows, .columns = columns, .a_row = rows, .b_row = columns, .out_row = out_row};
  out = before;
  add_outer<T>(outer, a.data(), b.data(), out.data());
  compare("add_outer", before, out, [&](int64_t i, int64_t j) {
    double sum = before[i * out_row + j];
    for (int64_t r = 0; r < inner; ++r) sum += double(a[r * rows + i]) * b[r * columns + j];
    return sum;
  });

  Array<T> gram(rows * (rows + 1));
  multiply_rows<T>(rows, rows, inner, a.data(), a_row, second_a, a_row, T(1), gram.data(), rows + 1);
  Array<double> expected(gram.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < rows; ++j) {
      double sum = 1;
      for (int64_t r = 0; r < inner; ++r) sum += double(a[i * a_row + r]) * second_a[j * a_row + r];
      expected[i * (rows + 1) + j] = sum;
    }
  }
  report<T>("multiply_rows " + size, gram, expected);

  Array<T> turned_a(inner * (rows + 1));
  transpose<T>(rows, inner, a.data(), a_row, turned_a.data(), rows + 1);
  expected.assign(turned_a.size(), 0);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < inner; ++j) expected[j * (rows + 1) + i] = a[i * a_row + j];
  }
  report<T>("transpose " + size, turned_a, expected);

  auto sums = bias;
  add_column_sums<T>(inner, columns, b.data(), columns, sums.data());
  expected.assign(bias.begin(), bias.end());
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t r = 0; r < inner; ++r) expected[j] += b[r * columns + j];
  }
  report<T>("add_column_sums " + size, sums, expected);
}

// Images with a halo of zeros around random pixels.
template <class T>
Array<T> random_images(int64_t images, int64_t height, int64_t width, int64_t channels, int64_t halo) {
  auto values = random<T>(images * (height + 2 * halo) * (width + 2 * halo) * channels);
  T* pixel = values.data();
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t y = -halo; y < height + halo; ++y) {
      for (int64_t x = -halo; x < width + halo; ++x, pixel += channels) {
        if (y < 0 || x < 0 || y >= height || x >= width) std::fill_n(pixel, channels, T(0));
      }
    }
  }
  return values;
}

struct Case {
  const char* name;
  int64_t images;
  int64_t height, width;
  int64_t kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
  int64_t channels;    // > 0: vectors; < 0: that many single channels
  int64_t outputs;     // vectors
  int64_t extra_halo;  // beyond the padding
};

template <class T>
void check_convolution(const Case& c, WinogradUse use) {
  const bool whole = c.channels > 0;
  const ConvolutionShape s{.height = c.height,
                           .width = c.width,
                           .channels = whole ? c.channels * lanes<T> : -c.channels,
                           .halo = std::max(c.padding_height, c.padding_width) + c.extra_halo,
                           .kernel_height = c.kernel_height,
                           .kernel_width = c.kernel_width,
                           .stride_height = c.stride_height,
                           .stride_width = c.stride_width,
                           .padding_height = c.padding_height,
                           .padding_width = c.padding_width,
                           .outputs = c.outputs * lanes<T>,
                           .output_halo = c.extra_halo};
  const Convolution<T> convolution(s, use);
  const int64_t oh = convolution.output_height(), ow = convolution.output_width(), dh = convolution.gradient_halo();
  const auto x = random_images<T>(c.images, s.height, s.width, s.channels, s.halo);
  const auto tangent = random_images<T>(c.images, s.height, s.width, s.channels, s.halo);
  const auto dy = random_images<T>(c.images, oh, ow, s.outputs, dh);
  const auto second_dy = random_images<T>(c.images, oh, ow, s.outputs, dh);
  const auto w = random<T>(convolution.weights_size()), direction = random<T>(convolution.weights_size());
  const auto bias = random<T>(s.outputs);

  const auto x_at = [&](int64_t n, int64_t y, int64_t xx) {
    return ((n * (s.height + 2 * s.halo) + y + s.halo) * (s.width + 2 * s.halo) + xx + s.halo) * s.channels;
  };
  const auto out_at = [&](int64_t n, int64_t y, int64_t xx, int64_t halo) {
    return ((n * (oh + 2 * halo) + y + halo) * (ow + 2 * halo) + xx + halo) * s.outputs;
  };
  const auto y_before = random<T>(c.images * (oh + 2 * s.output_halo) * (ow + 2 * s.output_halo) * s.outputs);
  Array<double> y(y_before.begin(), y_before.end()), y_tangent = y;
  Array<double> dx(static_cast<size_t>(c.images * s.height * s.width * s.channels)), dx_two = dx;
  const auto gradient_before = random<T>(convolution.weights_size());
  Array<double> dw(gradient_before.begin(), gradient_before.end());
  for (int64_t n = 0; n < c.images; ++n) {
    for (int64_t oy = 0; oy < oh; ++oy) {
      for (int64_t ox = 0; ox < ow; ++ox) {
        double* to = &y[out_at(n, oy, ox, s.output_halo)];
        double* to_tangent = &y_tangent[out_at(n, oy, ox, s.output_halo)];
        std::copy_n(bias.begin(), s.outputs, to);
        std::copy_n(bias.begin(), s.outputs, to_tangent);
        const T* gradient = &dy[out_at(n, oy, ox, dh)];
        const T* second_gradient = &second_dy[out_at(n, oy, ox, dh)];
        for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
          for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
            const int64_t iy = oy * s.stride_height - s.padding_height + ky;
            const int64_t ix = ox * s.stride_width - s.padding_width + kx;
            if (iy < 0 || ix < 0 || iy >= s.height || ix >= s.width) continue;
            for (int64_t i = 0; i < s.channels; ++i) {
              const double value = x[x_at(n, iy, ix) + i], moved = tangent[x_at(n, iy, ix) + i];
              const int64_t row = ((ky * s.kernel_width + kx) * s.channels + i) * s.outputs;
              double sum = 0, sum_two = 0;
              for (int64_t o = 0; o < s.outputs; ++o) {
                to[o] += value * w[row + o];
                to_tangent[o] += value * direction[row + o] + moved * w[row + o];
                dw[row + o] += value * second_gradient[o] + moved * gradient[o];
                sum += double(gradient[o]) * w[row + o];
                sum_two += double(second_gradient[o]) * w[row + o] + double(gradient[o]) * direction[row + o];
              }
              dx[((n * s.height + iy) * s.width + ix) * s.channels + i] += sum;
              dx_two[((n * s.height + iy) * s.width + ix) * s.channels + i] += sum_two;
            }
          }
        }
      }
    }
  }

  const std::string name =
      std::string(c.name) + " tile" + std::to_string(convolution.forward_tile()) + std::to_string(convolution.tile());
  Array<T> scratch(convolution.scratch_size(), NAN), prepared(convolution.prepared_size(), NAN), other = prepared;
  auto got = y_before;
  convolution.forward(c.images, x.data(), convolution.prepare_forward(w.data(), prepared.data()), bias.data(),
                      got.data(), scratch.data());
  report<T>("forward " + name, got, y);
  got = y_before;
  convolution.tangent(c.images,
                      {{x.data(), convolution.prepare_tangent(direction.data(), prepared.data())},
                       {tangent.data(), convolution.prepare_tangent(w.data(), other.data())}},
                      bias.data(), got.data(), scratch.data());
  report<T>("tangent " + name, got, y_tangent);
  if (whole) {
    const Term<T> plain{dy.data(), convolution.prepare_input_gradient(w.data(), prepared.data())};
    got.assign(dx.size(), NAN);
    convolution.input_gradient(c.images, {plain}, got.data(), scratch.data());
    report<T>("input_gradient " + name, got, dx);
    got.assign(dx.size(), NAN);
    const T* with_direction = convolution.prepare_input_gradient(direction.data(), other.data());
    convolution.input_gradient(c.images, {{second_dy.data(), plain.b}, {dy.data(), with_direction}}, got.data(),
                               scratch.data());
    report<T>("input_gradient_tangent " + name, got, dx_two);
  }
  got = gradient_before;
  convolution.start_weight_gradient(scratch.data());
  convolution.add_weight_gradient(c.images, x.data(), second_dy.data(), got.data(), scratch.data());
  convolution.add_weight_gradient(c.images, tangent.data(), dy.data(), got.data(), scratch.data());
  convolution.finish_weight_gradient(got.data(), scratch.data());
  report<T>("weight_gradient " + name, got, dw);
}

constexpr Case cases[] = {
    // name, images, height, width, kernel, stride, padding, channels, outputs, extra halo
    {"3x3", 3, 14, 14, 3, 3, 1, 1, 1, 1, 2, 2, 0},
    {"3x3_small_map", 90, 3, 3, 3, 3, 1, 1, 1, 1, 1, 3, 0},
    {"3x3_tiny_map", 4, 2, 2, 3, 3, 1, 1, 1, 1, 1, 2, 0},
    {"3x3_seven", 7, 7, 7, 3, 3, 1, 1, 1, 1, 2, 1, 0},
    {"3x3_odd_map", 5, 7, 9, 3, 3, 1, 1, 1, 1, 3, 1, 1},
    {"3x3_large_map", 1, 22, 21, 3, 3, 1, 1, 1, 1, 1, 1, 0},
    {"3x3_no_padding", 2, 8, 8, 3, 3, 1, 1, 0, 0, 1, 2, 1},
    {"3x3_full_padding", 2, 5, 4, 3, 3, 1, 1, 2, 2, 1, 1, 0},
    {"3x3_one_channel", 3, 12, 12, 3, 3, 1, 1, 1, 1, -1, 4, 0},
    {"3x3_three_channels", 2, 9, 9, 3, 3, 1, 1, 1, 1, -3, 2, 0},
    {"3x3_stride2", 4, 14, 14, 3, 3, 2, 2, 1, 1, 2, 2, 0},
    {"3x3_stride2_odd_map", 3, 7, 7, 3, 3, 2, 2, 1, 1, 1, 2, 1},
    {"1x1", 3, 6, 5, 1, 1, 1, 1, 0, 0, 2, 1, 0},
    {"1x1_stride2", 3, 6, 5, 1, 1, 2, 2, 0, 0, 1, 1, 0},
    {"5x3_stride1x2", 2, 9, 8, 5, 3, 1, 2, 2, 0, 1, 1, 0},
    {"2x2_stride3_pixels_without_use", 2, 8, 8, 2, 2, 3, 3, 0, 0, 1, 1, 0},
    {"4x4_stride2", 2, 8, 8, 4, 4, 2, 2, 1, 1, 1, 1, 0},
    {"kernel_as_large_as_the_map", 4, 5, 5, 5, 5, 1, 1, 0, 0, 1, 1, 0},
};

void check_chosen_patches([[maybe_unused]] int64_t pixel, [[maybe_unused]] int64_t vectors) {
  if constexpr (has_table_lookup) {
    const ChosenShape s{
        .height = 3, .width = 5, .channels = vectors * lanes<float>, .pixel = pixel, .x_row = 12 * pixel};
    const auto x = random<float>(8 * s.x_row), dy = random<float>(s.height * s.width * s.channels);
    const auto w = random<float>(9 * pixel * s.channels);
    std::vector<int32_t> choice(dy.size());
    for (int32_t& c : choice) c = static_cast<int32_t>(generator() % 5) - 1;
    auto patches = random<float>(9 * pixel * s.channels), sums = random<float>(s.channels);
    Array<double> expected(patches.begin(), patches.end()), expected_sums(sums.begin(), sums.end());
    Array<double> products(static_cast<size_t>(s.width * s.channels));
    const int64_t row = 1;  // of outputs, for the product
    Array<float> z(products.size());
    for (int64_t y = 0; y < s.height; ++y) {
      for (int64_t column = 0; column < s.width; ++column) {
        for (int64_t c = 0; c < s.channels; ++c) {
          const int64_t at = (y * s.width + column) * s.channels + c;
          if (choice[at] < 0) continue;
          expected_sums[c] += dy[at];
          for (int64_t k = 0; k < 9 * pixel; ++k) {
            const int64_t from = (2 * y + choice[at] / 2 + k / (3 * pixel)) * s.x_row +
                                 (2 * column + choice[at] % 2) * pixel + k % (3 * pixel);
            expected[k * s.channels + c] += double(x[from]) * dy[at];
            if (y == row) products[column * s.channels + c] += double(x[from]) * w[k * s.channels + c];
          }
        }
      }
    }
    const std::string name = std::to_string(pixel) + "x" + std::to_string(vectors) + "vectors";
    add_chosen_patches(s, x.data(), choice.data(), dy.data(), patches.data(), sums.data());
    report<float>("add_chosen_patches " + name, patches, expected);
    report<float>("add_chosen_patches_sums " + name, sums, expected_sums);
    const int64_t of_row = row * s.width * s.channels;
    multiply_chosen_patches(s, x.data() + 2 * row * s.x_row, choice.data() + of_row, w.data(), z.data());
    for (size_t i = 0; i < z.size(); ++i)
      z[i] = choice[of_row + i] < 0 ? 0 : z[i];  // anything, where nothing is chosen
    report<float>("multiply_chosen_patches " + name, z, products);
  }
}

template <class T>
void check_all() {
  for (const int64_t rows : {1, 5, 13, 31}) {
    for (const int64_t vectors : {1, 2, 3, 5}) check_products<T>(rows, 40 - rows, vectors);
  }
  check_products<T>(17, 210, 4);
  for (const Case& c : cases) {
    for (const WinogradUse use : {WinogradUse::off, WinogradUse::automatic, WinogradUse::forced}) {
      check_convolution<T>(c, use);
    }
  }
}

}  // namespace

int main() {
  check_all<double>();
  check_all<float>();
  for (const int64_t pixel : {1, 3}) {
    for (const int64_t vectors : {1, 2, 5}) check_chosen_patches(pixel, vectors);
  }
}
