// The recurrence on a GPU, chunk of tasks by chunk: one stream of launches that the host never waits for.
#pragma once

#include <cstdint>

#include "cuda/engine/host.h"
#include "cuda/launch.h"

namespace innerloop::gpu {

// Runs a request whose pointers are the device's, task_chunk tasks at a time (0: all of them), and writes the mean loss
// where it is wanted. Results that tasks share are zero before.
// Throws: with the bytes asked and the task_chunk that would fit, where there is no memory for it.
template <class T>
void run(const Device& device, const Request<T>& request, int64_t task_chunk, T* mean_loss);

}  // namespace innerloop::gpu
