// What the GPU executor has in common with the CPU's: the request, the graph, its passes and the recurrence, compiled
// for the host that drives the GPU.
#pragma once

// Names the namespace of csrc/engine (kernels/isa.h).
#ifndef INNERLOOP_ISA
#define INNERLOOP_ISA gpu
#endif

#include "engine/graph.h"
#include "engine/pass.h"
#include "engine/recurrence.h"
#include "engine/request.h"
