// Draws few-shot tasks from samples that are grouped by class.
#pragma once

#include <cstdint>
#include <span>

namespace innerloop {

struct TaskShape {
  int64_t ways, shots, queries;
};

// Fills support [tasks, ways*shots] and query [tasks, ways*queries] with sample indices, class by class, for the tasks
// first_task … first_task + tasks - 1 of a seed. Class c holds the samples starts[c] … starts[c+1]-1; classes are those
// that may be drawn. Classes of a task differ, and so do a class's support and query samples.
// The caller has checked that there are enough of both.
void sample_tasks(std::span<const int64_t> starts, std::span<const int64_t> classes, TaskShape shape, uint64_t seed,
                  uint64_t first_task, int64_t tasks, int64_t* support, int64_t* query);

}  // namespace innerloop
