#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <string>

#include "cuda/engine/executor.h"
#include "cuda/engine/run.h"

namespace innerloop::gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
int64_t bytes_for(const Device& device, const Request<T>& request, int64_t chunk) {
  Workspace measured;
  Executor<T>(device, request, chunk).allocate(measured);
  return measured.bytes();
}

// What cuBLAS takes beside the workspace (torch gives it 32 MiB on Hopper), and what rounding up adds to both.
constexpr int64_t of_products = int64_t{64} << 20;

// Of how many tasks at a time there is room for in that many bytes.
template <class T>
int64_t fitting_chunk(const Device& device, const Request<T>& request, int64_t chunk, int64_t asked,
                      int64_t available) {
  const double share = static_cast<double>(available) / static_cast<double>(asked);
  int64_t fitting = std::min(chunk - 1, static_cast<int64_t>(static_cast<double>(chunk) * share));
  while (fitting > 0 && bytes_for(device, request, fitting) > available) --fitting;
  return fitting;
}

// The workspace of a chunk, by torch's allocator.
template <class T>
Tensor memory_for(const Device& device, const Request<T>& request, int64_t chunk, int64_t bytes) {
  try {
    return torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, device.place());
  } catch (const std::exception&) {
    const std::optional<int64_t> available = available_bytes();
    if (!available) throw;  // after an earlier error that ended the device's context: memory is not what is missing
    const int64_t fitting = fitting_chunk(device, request, chunk, bytes, *available - of_products);
    STD_TORCH_CHECK(false, device.op(), ": out of memory: ", chunk, " tasks at once need ", bytes, " bytes, and ",
                    *available, " are free: ",
                    fitting > 0 ? "INNERLOOP_TASK_CHUNK=" + std::to_string(fitting) + " would fit"
                                : std::string("there is no room for one task"));
    throw;
  }
}

}  // namespace

template <class T>
void run(const Device& device, const Request<T>& request, int64_t task_chunk, T* mean_loss) {
  const int64_t chunk = task_chunk == 0 ? request.tasks : std::min(task_chunk, request.tasks);
  Executor<T> executor(device, request, chunk);
  Workspace measured;
  executor.allocate(measured);
  const Tensor memory = memory_for(device, request, chunk, measured.bytes());
  Workspace workspace(memory.mutable_data_ptr());
  executor.allocate(workspace);
  for (int64_t first = 0; first < request.tasks; first += chunk) executor.run_chunk(first);
  executor.scale_shared_results();
  if (mean_loss) each(device, 1, StoreMean<T>{request.task_losses, request.tasks, mean_loss});
}

template void run(const Device&, const Request<float>&, int64_t, float*);
template void run(const Device&, const Request<double>&, int64_t, double*);

}  // namespace innerloop::gpu
