#include <torch/csrc/stable/ops.h>

#include <array>

#include "cuda/engine/each.h"
#include "cuda/engine/products.h"

namespace innerloop::gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType type_of = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;

template <class T>
Tensor tensor_of(const Device& device, int64_t tasks, const Matrices<T>& m) {
  const std::array<int64_t, 3> sizes{tasks, m.transposed ? m.columns : m.rows, m.transposed ? m.rows : m.columns};
  const std::array<int64_t, 3> strides{m.rows * m.columns, m.transposed ? 1 : m.columns, m.transposed ? m.columns : 1};
  // The tensor is read from, or is the result that the caller has given as writable.
  return torch::stable::from_blob(const_cast<T*>(m.data), {sizes.data(), sizes.size()},
                                  {strides.data(), strides.size()}, device.place(), type_of<T>);
}

}  // namespace

template <class T>
void multiply(const Device& device, int64_t tasks, const Matrices<T>& a, const Matrices<T>& b, T* out) {
  const int64_t rows = a.transposed ? a.columns : a.rows, columns = b.transposed ? b.rows : b.columns;
  const Tensor result = tensor_of<T>(device, tasks, {out, rows, columns});
  std::array<StableIValue, 3> stack{torch::stable::detail::from(tensor_of(device, tasks, a)),
                                    torch::stable::detail::from(tensor_of(device, tasks, b)),
                                    torch::stable::detail::from(result)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result once more, to be given back
}

template <class T>
void multiply_add(const Device& device, int64_t tasks, const Matrices<T>& a, const Matrices<T>& b, T* out, T* scratch) {
  multiply(device, tasks, a, b, scratch);
  const int64_t rows = a.transposed ? a.columns : a.rows, columns = b.transposed ? b.rows : b.columns;
  each(device, tasks * rows * columns, Add<T>{scratch, out});
}

template void multiply(const Device&, int64_t, const Matrices<float>&, const Matrices<float>&, float*);
template void multiply(const Device&, int64_t, const Matrices<double>&, const Matrices<double>&, double*);
template void multiply_add(const Device&, int64_t, const Matrices<float>&, const Matrices<float>&, float*, float*);
template void multiply_add(const Device&, int64_t, const Matrices<double>&, const Matrices<double>&, double*, double*);

}  // namespace innerloop::gpu
