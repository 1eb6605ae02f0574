"""JAX: value_and_grad through the inner loop under jit, tasks by vmap or by lax.map."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from rivals import Step
from workloads import Workload, make_arrays, make_model


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
        x = lax.conv_general_dilated(x, weight, (stride, stride), ((1, 1), (1, 1))) + bias[:, None, None]
        mean = x.mean((0, 2, 3), keepdims=True)
        variance = ((x - mean) ** 2).mean((0, 2, 3), keepdims=True)
        x = (x - mean) * lax.rsqrt(variance + 1e-5) * scale[:, None, None] + shift[:, None, None]
        x = jax.nn.relu(x)
        if pooled:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return x.reshape(len(x), -1)


def _net(workload: Workload):
    """(body(parameters, x), learner(parameters, x), how many parameters are the body's)."""
    if not workload.is_convolutional:
        return (lambda _, x: x), _perceptron, 0
    pooled = "stride" not in workload.net

    def body(parameters, x):
        return _conv4_body(parameters, x, pooled)

    if workload.adapt == "head":
        return body, _linear, 16
    return (lambda _, x: x), (lambda parameters, x: _linear(parameters[16:], body(parameters, x))), 0


def cannot(workload: Workload, over_tasks: Literal["vmap", "map"]) -> str | None:
    if workload.is_convolutional and over_tasks == "vmap":
        return "grouped convolutions are many times slower than lax.map"
    return None


def make(workload: Workload, dtype: str, over_tasks: Literal["vmap", "map"]) -> Step:
    jax.config.update("jax_enable_x64", dtype == "float64")
    parameters = [jnp.asarray(value.detach().numpy()) for value in make_model(workload, dtype).parameters()]
    data = [jnp.asarray(array) for array in make_arrays(workload, dtype)]
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

    def summed_over_tasks(parameters, *data):
        losses, gradients = lax.map(lambda task: jax.value_and_grad(task_loss)(parameters, *task), data)
        return losses.mean(), jax.tree.map(lambda gradient: gradient.mean(0), gradients)

    meta_gradient = jax.jit(jax.value_and_grad(meta_loss) if over_tasks == "vmap" else summed_over_tasks)

    def step():
        return jax.block_until_ready(meta_gradient(parameters, *data))

    return step
