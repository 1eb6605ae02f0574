"""The native call inside a step of innerloop_step.py: without autograd, and without reading maml_loss's arguments."""

from __future__ import annotations

from innerloop import TaskBatch
from innerloop.bench.rivals import LossAndGradients, Step
from innerloop.bench.rivals.innerloop_step import inner_loop_of
from innerloop.bench.rivals.torch_parts import batch
from innerloop.bench.workloads import Workload, make_model
from innerloop.inner_loop import InnerLoop
from innerloop.lowering import lowered
from innerloop.native_engine import native_call
from innerloop.ops.maml import _eager_call


def make(workload: Workload, dtype: str) -> Step:
    model = make_model(workload, dtype)
    inner = InnerLoop.create(model, **inner_loop_of(workload, model))
    tasks = TaskBatch(*batch(workload, dtype))
    parameters, rates, buffers, tasks, settings = native_call(model, tasks, inner)
    parameters = [parameter.detach() for parameter in parameters]
    places = [lowered(model).names.index(name) for name, _ in model.named_parameters()]

    def step() -> LossAndGradients:
        loss, _, _, *gradients = _eager_call(
            parameters, rates, buffers, tasks, settings, [True] * len(parameters), False
        )
        return loss, [gradients[place] for place in places]

    return step
