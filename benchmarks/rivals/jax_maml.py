"""JAX: value_and_grad through the inner loop under jit; tasks by vmap, by lax.map, or one call for each.

Images are channels-last, which XLA's CPU backend runs faster than NCHW. Pooling as a reshape and a maximum would be
faster still (Omniglot at K = 1, 0.18 s a task against 0.27), but jit of jax 0.10.2 compiles its gradient wrongly where
a map of 3 × 3 is cropped to 2 × 2: 0.6 off in float64 and right without jit.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from innerloop.bench.rivals import Step
from innerloop.bench.workloads import Workload, make_arrays, make_model

OverTasks = Literal["vmap", "map", "loop"]


def _linear(parameters, x):
    weight, bias = parameters
    return x @ weight.T + bias


def _perceptron(parameters, x):
    x = x.reshape(len(x), -1)
    layers = [parameters[index : index + 2] for index in range(0, len(parameters), 2)]
    for layer in layers[:-1]:
        x = jax.nn.relu(_linear(layer, x))
    return _linear(layers[-1], x)


def _conv4_body(parameters, x, pooled):
    stride = 1 if pooled else 2
    for block in range(4):
        weight, bias, scale, shift = parameters[4 * block : 4 * block + 4]
        x = bias + lax.conv_general_dilated(
            x, weight, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "OIHW", "NHWC")
        )
        mean = x.mean((0, 1, 2), keepdims=True)
        variance = ((x - mean) ** 2).mean((0, 1, 2), keepdims=True)
        x = jax.nn.relu((x - mean) * lax.rsqrt(variance + 1e-5) * scale + shift)
        if pooled:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # in the order in which torch flattens


def _is_conv4(workload: Workload) -> bool:
    return workload.net == "conv4"


def _net(workload: Workload):
    """(body(parameters, x), learner(parameters, x), how many parameters are the body's)."""
    if not _is_conv4(workload):
        return (lambda _, x: x), _perceptron, 0
    pooled = workload.options.get("downsample") != "stride"

    def body(parameters, x):
        return _conv4_body(parameters, x, pooled)

    if workload.adapt == "head":
        return body, _linear, 16
    return (lambda _, x: x), (lambda parameters, x: _linear(parameters[16:], body(parameters, x))), 0


def cannot(workload: Workload, over_tasks: OverTasks) -> str | None:
    if _is_conv4(workload) and over_tasks != "loop":
        return "convolutions in lax.map, and grouped ones, run 7 to 10 times slower than one call a task"
    return None


def make(workload: Workload, dtype: str, over_tasks: OverTasks) -> Step:
    jax.config.update("jax_enable_x64", dtype == "float64")
    parameters = [jnp.asarray(value.detach().numpy()) for value in make_model(workload, dtype).parameters()]
    support_x, support_y, query_x, query_y = make_arrays(workload, dtype)
    if _is_conv4(workload):
        support_x, query_x = (np.moveaxis(x, 2, 4) for x in (support_x, query_x))
    data = [jnp.asarray(array) for array in (support_x, support_y, query_x, query_y)]
    body, learner, of_body = _net(workload)

    def loss_of(outputs, y):
        if workload.loss == "mse":
            return ((outputs - y) ** 2).mean()
        return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1).mean()

    def task_loss(parameters, support_x, support_y, query_x, query_y):
        fixed, adapted = parameters[:of_body], parameters[of_body:]
        support = body(fixed, support_x)
        for _ in range(workload.steps):
            gradients = jax.grad(lambda adapted: loss_of(learner(adapted, support), support_y))(adapted)
            if workload.first_order:
                gradients = lax.stop_gradient(gradients)
            adapted = [value - workload.inner_lr * gradient for value, gradient in zip(adapted, gradients, strict=True)]
        return loss_of(learner(adapted, body(fixed, query_x)), query_y)

    def meta_loss(parameters, *data):
        return jax.vmap(task_loss, (None, 0, 0, 0, 0))(parameters, *data).mean()

    def mapped(parameters, *data):
        losses, gradients = lax.map(lambda task: jax.value_and_grad(task_loss)(parameters, *task), data)
        return losses.mean(), jax.tree.map(lambda gradient: gradient.mean(0), gradients)

    if over_tasks == "loop":
        return _loop(jax.value_and_grad(task_loss), parameters, data)
    meta_gradient = jax.jit(jax.value_and_grad(meta_loss) if over_tasks == "vmap" else mapped)
    return lambda: jax.block_until_ready(meta_gradient(parameters, *data))


def _loop(task_gradient, parameters, data) -> Step:
    """One task a call, each adding to what the tasks before it came to."""
    tasks = list(zip(*data, strict=True))

    @jax.jit
    def add(total, parameters, *task):
        return jax.tree.map(lambda sum, value: sum + value / len(tasks), total, task_gradient(parameters, *task))

    zero = (jnp.zeros((), parameters[0].dtype), [jnp.zeros_like(value) for value in parameters])

    def step():
        total = zero
        for task in tasks:
            total = add(total, parameters, *task)
        return jax.block_until_ready(total)

    return step
