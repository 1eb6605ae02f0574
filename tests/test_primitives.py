"""innerloop.primitives against autograd of what they say they compute, in float64, on both engines."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import innerloop
from innerloop import TaskBatch, engine, native_engine, primitives, torch_engine
from innerloop.engine import Engine
from innerloop.inner_loop import Rate
from innerloop.ops import maml as native
from nets import Net, assert_close, conv_module, conv_net, definition, make, make_tasks, mlp_module, mlp_net, ragged
from test_lanes import BLOCKS, LANES, random_rates
from test_native_engine import COMMON, Case, bias_before_batch_norm, cases

on_both_engines = pytest.mark.parametrize("engine_name", ["native", "torch"])
with_and_without_masks = pytest.mark.parametrize("tasks_of", [lambda tasks: tasks, ragged], ids=["full", "ragged"])
#: Module, the same as a function, and the shape of a sample.
NETS: dict[str, tuple[Callable[[], nn.Module], Net, tuple[int, ...]]] = {
    "mlp": (mlp_module, mlp_net, (6,)),
    "conv": (conv_module, conv_net, (2, 4, 4)),
}


def plain(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def noisy(model: nn.Module, *leading: int, scale: float = 0.1, seed: int = 5) -> dict[str, Tensor]:
    """Tensors of the parameters' shapes near them, with other sizes in front."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: p + scale * torch.randn(*leading, *p.shape, generator=g, dtype=p.dtype)
        for name, p in plain(model).items()
    }


def of_task(parameters: dict[str, Tensor], model: nn.Module, task: int) -> dict[str, Tensor]:
    own = plain(model)
    return {name: value if value.shape == own[name].shape else value[task] for name, value in parameters.items()}


def support_loss(net: Net, tasks: TaskBatch, task: int, running: Any = None) -> Callable[[dict[str, Tensor]], Tensor]:
    keep = slice(None) if tasks.support_mask is None else tasks.support_mask[task]
    loss = F.mse_loss if tasks.support_y.is_floating_point() else F.cross_entropy
    return lambda theta: loss(net(theta, tasks.support_x[task][keep], running)[0], tasks.support_y[task][keep])


def dense_hessian(loss: Callable[[dict[str, Tensor]], Tensor], theta: dict[str, Tensor], names: list[str]) -> Tensor:
    """[P, P] with respect to the named parameters, side by side."""
    shapes = [theta[name].shape for name in names]

    def of_flat(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        named = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return loss({**theta, **named})

    return torch.autograd.functional.hessian(of_flat, torch.cat([theta[name].flatten() for name in names]))


# --- hessian_vector_product -----------------------------------------------------------------------


@on_both_engines
@with_and_without_masks
@pytest.mark.parametrize("per_task", [False, True], ids=["shared", "per task"])
@pytest.mark.parametrize("net", NETS)
def test_the_hessian_times_a_vector(net: str, per_task: bool, tasks_of: Any, engine_name: Any) -> None:
    module, function, shape = NETS[net]
    model, tasks = make(module), tasks_of(make_tasks(shape, support=9))
    leading = (tasks.num_tasks,) if per_task else ()
    phi, v = noisy(model, *leading), noisy(model, *leading, scale=1.0, seed=6)
    products = primitives.hessian_vector_product(model, tasks, v, parameters=phi, engine=engine_name)
    assert list(products) == list(v)
    for t in range(tasks.num_tasks):
        theta, along = of_task(phi, model, t), of_task(v, model, t)
        hessian = dense_hessian(support_loss(function, tasks, t), theta, list(v))
        expected = hessian @ torch.cat([value.flatten() for value in along.values()])
        ours = torch.cat([products[name][t].flatten() for name in v])
        assert_close(ours, expected, f"task {t}")


@on_both_engines
@pytest.mark.parametrize("names", [["5.weight", "5.bias"], ["0.weight"], ["1.weight", "5.bias"]])
def test_the_hessian_is_of_the_parameters_that_vectors_name(names: list[str], engine_name: Any) -> None:
    model, tasks = make(conv_module), make_tasks((2, 4, 4), support=9)
    v = {name: value for name, value in noisy(model, 3, scale=1.0).items() if name in names}
    products = primitives.hessian_vector_product(model, tasks, v, engine=engine_name)
    assert sorted(products) == sorted(names)
    for t in range(3):
        hessian = dense_hessian(support_loss(conv_net, tasks, t), plain(model), list(v))
        expected = hessian @ torch.cat([value[t].flatten() for value in v.values()])
        assert_close(torch.cat([products[name][t].flatten() for name in v]), expected, f"task {t}")


@on_both_engines
@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
def test_the_hessian_under_each_batch_norm_mode(bn: Any, engine_name: Any) -> None:
    model, tasks = make(conv_module), make_tasks((2, 4, 4), support=9)
    running = (model[1].running_mean, model[1].running_var) if bn == "running" else None
    v = noisy(model, scale=1.0)
    products = primitives.hessian_vector_product(model, tasks, v, bn=bn, engine=engine_name)
    for t in range(3):
        hessian = dense_hessian(support_loss(conv_net, tasks, t, running), plain(model), list(v))
        expected = hessian @ torch.cat([value.flatten() for value in v.values()])
        assert_close(torch.cat([products[name][t].flatten() for name in v]), expected, f"task {t}")


@on_both_engines
def test_the_hessian_of_other_losses(engine_name: Any) -> None:
    model, regression = make(mlp_module), make_tasks((6,), out=3)
    v = noisy(model, 3, scale=1.0)
    products = primitives.hessian_vector_product(model, regression, v, loss="mse", engine=engine_name)
    hessian = dense_hessian(support_loss(mlp_net, regression, 1), plain(model), list(v))
    expected = hessian @ torch.cat([value[1].flatten() for value in v.values()])
    assert_close(torch.cat([products[name][1].flatten() for name in v]), expected, "mse")
    tasks, smoothed = make_tasks((6,)), nn.CrossEntropyLoss(label_smoothing=0.2)
    products = primitives.hessian_vector_product(model, tasks, v, loss=smoothed, engine=engine_name)
    hessian = dense_hessian(
        lambda theta: smoothed(mlp_net(theta, tasks.support_x[2], None)[0], tasks.support_y[2]), plain(model), list(v)
    )
    expected = hessian @ torch.cat([value[2].flatten() for value in v.values()])
    assert_close(torch.cat([products[name][2].flatten() for name in v]), expected, "smoothed labels")


ONE = Rate(torch.tensor(1.0, dtype=torch.float64))


def assert_products_agree(case: Case, named: list[bool]) -> None:
    """Whatever the layers: the native op against double backward."""
    chosen = [name for name, wanted in zip(case.parameters, named, strict=False) if wanted] or list(case.parameters)
    count = case.tasks.num_tasks
    g = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in case.model.named_parameters()}
    v = {name: torch.randn(count, *shapes[name], generator=g, dtype=torch.float64) for name in chosen}
    inner = replace(case.inner, rates=dict.fromkeys(chosen, ONE), steps=0, step_weights=(1.0,))
    phi = {name: value.detach() for name, value in case.parameters.items()}
    expected = torch_engine.hessian_vector_products(case.model, phi, case.tasks, v, inner)
    call = native_engine.native_call(case.model, case.tasks, inner, phi, all_ways=False)
    values, _, buffers, tasks, options = call
    names = engine.lowered(case.model).names
    given = [v.get(name, torch.empty(0, dtype=torch.float64)) for name in names]
    found = native.hessian_vector_product(values, given, buffers, tasks, replace(options, paths=case.paths))
    # A bias before BatchNorm has rounding noise for its part of the Hessian, and so has all of one that is zero.
    noise, scale = bias_before_batch_norm(case.model), max(float(e.abs().max()) for e in expected.values())
    for name, product in zip(names, found, strict=True):
        if name not in v:
            assert product.numel() == 0
        elif name in noise or float(expected[name].abs().max()) < 1e-8 * scale:
            assert float((product - expected[name]).abs().max()) <= 1e-9 * max(scale, 1.0), name
        else:
            assert_close(product, expected[name], name)


@settings(COMMON, max_examples=60)
@given(cases(), st.lists(st.booleans(), min_size=40, max_size=40))
def test_the_engines_agree_on_the_hessian_of_any_network(case: Case, named: list[bool]) -> None:
    assert_products_agree(case, named)


@pytest.mark.slow
@settings(COMMON, max_examples=1000)
@given(cases(), st.lists(st.booleans(), min_size=40, max_size=40))
def test_the_engines_agree_on_the_hessian_over_many_draws(case: Case, named: list[bool]) -> None:
    assert_products_agree(case, named)


@pytest.mark.parametrize("paths", [LANES, BLOCKS, native.AUTOMATIC], ids=["lanes", "blocks", "both"])
def test_the_executors_agree_whatever_the_number_of_tasks_and_threads(force: Any, paths: Any) -> None:
    model, tasks = make(mlp_module), ragged(make_tasks((6,), tasks=9))  # two vectors of lanes and a task beside them
    phi, v = noisy(model, 9), noisy(model, 9, scale=1.0, seed=6)
    expected = primitives.hessian_vector_product(model, tasks, v, parameters=phi, engine="torch")
    force(paths)
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        found.append(primitives.hessian_vector_product(model, tasks, v, parameters=phi, engine="native"))
    for name in v:
        assert_close(found[1][name], expected[name], name)
        assert torch.equal(found[0][name], found[1][name])


def test_the_hessian_of_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))

    model, tasks = make(Attention), make_tasks((5, 4))
    v = noisy(model, scale=1.0)
    with pytest.warns(innerloop.SecondOrderWarning):  # its fused kernel has no second derivative
        products = primitives.hessian_vector_product(model, tasks, v)
    step = 1e-5  # … which central differences of the first stand in for
    for t in range(3):
        gradients = []
        for sign in (1, -1):
            moved = {name: p + sign * step * v[name] for name, p in plain(model).items()}
            each, _ = primitives.meta_gradient(
                model, tasks[t], parameters=moved, step_weights=[0.0], support_weight=1.0, engine="torch"
            )
            gradients.append(each)
        for name in v:
            quotient = (gradients[0][name] - gradients[1][name]) / (2 * step)
            torch.testing.assert_close(products[name][t], quotient, rtol=1e-6, atol=1e-8)


@on_both_engines
def test_a_parameter_that_the_loss_does_not_depend_on_has_no_hessian(engine_name: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unused = nn.Linear(6, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model, tasks = make(Model), make_tasks((6,))
    products = primitives.hessian_vector_product(model, tasks, noisy(model), engine=engine_name)
    assert float(products["layer.weight"].abs().max()) > 0
    assert torch.equal(products["unused.weight"], torch.zeros(3, 2, 2, dtype=torch.float64))
    alone = primitives.hessian_vector_product(model, tasks, {"unused.bias": torch.ones(2).double()}, engine=engine_name)
    assert torch.equal(alone["unused.bias"], torch.zeros(3, 2, dtype=torch.float64))


def test_float32_is_as_near_as_torch() -> None:
    model, tasks = make(conv_module), make_tasks((2, 4, 4), support=9)
    v = noisy(model, scale=1.0)
    exact = primitives.hessian_vector_product(model, tasks, v, engine="torch")
    single = TaskBatch(tasks.support_x.float(), tasks.support_y, tasks.query_x.float(), tasks.query_y)
    rounded = {name: value.float() for name, value in v.items()}
    errors = {}
    engines: list[Engine] = ["native", "torch"]
    for name in engines:
        products = primitives.hessian_vector_product(model.float(), single, rounded, engine=name)
        errors[name] = max(float((products[key] - exact[key]).abs().max()) for key in v)
    assert errors["native"] <= 4 * errors["torch"]


# --- adapt and learner ----------------------------------------------------------------------------


def proximal_loop(
    loss: Callable[[dict[str, Tensor]], Tensor], theta: dict[str, Tensor], alpha: Any, steps: int, weight: float
) -> dict[str, Tensor]:
    phi = theta
    for step in range(steps):
        variables = {name: value.detach().requires_grad_() for name, value in phi.items()}
        gradients = torch.autograd.grad(loss(variables), list(variables.values()))
        phi = {
            name: value.detach() - alpha(name, step) * (gradient + weight * (value.detach() - theta[name]))
            for (name, value), gradient in zip(variables.items(), gradients, strict=True)
        }
    return phi


@on_both_engines
@with_and_without_masks
@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("net", NETS)
def test_adapt_is_the_inner_loop(net: str, weight: float, tasks_of: Any, engine_name: Any) -> None:
    module, function, shape = NETS[net]
    model, tasks = make(module), tasks_of(make_tasks(shape, support=9))
    adapted = primitives.adapt(model, tasks, inner_lr=0.3, inner_steps=4, proximal=weight, engine=engine_name)
    for t in range(tasks.num_tasks):
        expected = proximal_loop(support_loss(function, tasks, t), plain(model), lambda *_: 0.3, 4, weight)
        for name, value in expected.items():
            assert adapted[name].shape == (tasks.num_tasks, *value.shape)
            assert_close(adapted[name][t], value, name)


@pytest.mark.parametrize("paths", [LANES, BLOCKS, native.AUTOMATIC], ids=["lanes", "blocks", "both"])
@pytest.mark.parametrize("elements", [False, True], ids=["α of each step", "α of each element and step"])
@pytest.mark.parametrize("per_task", [False, True], ids=["shared", "per task"])
def test_the_executors_hold_to_the_initial_parameters(
    force: Any,
    per_task: bool,
    elements: bool,
    paths: Any,
) -> None:
    torch.manual_seed(0)
    model, tasks = make(mlp_module), ragged(make_tasks((6,), tasks=5))
    rates = random_rates(model, 4, elements=elements)
    theta = noisy(model, 5) if per_task else plain(model)
    force(paths)
    options: dict[str, Any] = {"inner_lr": rates, "inner_steps": 4, "proximal": 0.9, "parameters": theta}
    adapted = primitives.adapt(model, tasks, **options, engine="native")
    for t in range(5):
        expected = proximal_loop(
            support_loss(mlp_net, tasks, t), of_task(theta, model, t), lambda name, k: rates[name][k], 4, 0.9
        )
        for name, value in expected.items():
            assert_close(adapted[name][t], value, f"{name} of task {t}")


@on_both_engines
def test_what_is_not_adapted_comes_back_as_it_came(engine_name: Any) -> None:
    model, tasks = make(mlp_module), make_tasks((6,))
    body = {"0.weight": noisy(model, 3)["0.weight"]}
    adapted = primitives.adapt(model, tasks, inner_lr=0.3, adapt=["2"], parameters=body, engine=engine_name)
    assert torch.equal(adapted["0.weight"], body["0.weight"])
    assert torch.equal(adapted["0.bias"], model[0].bias.detach())
    assert adapted["2.weight"].shape == (3, 3, 8)
    assert not any(value.requires_grad for value in adapted.values())


@on_both_engines
@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
def test_a_learner_is_the_adapted_model(bn: Any, engine_name: Any) -> None:
    model, tasks = make(conv_module), make_tasks((2, 4, 4), support=9)
    options: dict[str, Any] = {"bn": bn, "engine": engine_name}
    adapted = primitives.adapt(model, tasks, inner_lr=0.3, inner_steps=2, adapt=["5", "0"], **options)
    _, result = primitives.meta_gradient(model, tasks, parameters=adapted, **options)
    for t in range(3):
        x, y = tasks.support_x[t], tasks.support_y[t]
        learner = primitives.learner(model, x, y, inner_lr=0.3, inner_steps=2, adapt=["5", "0"], **options)
        assert_close(learner(tasks.query_x[t]), result.logits[t], f"task {t}")


# --- meta_gradient --------------------------------------------------------------------------------


@on_both_engines
@with_and_without_masks
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_the_meta_gradient(net: str, first_order: bool, tasks_of: Any, engine_name: Any) -> None:
    module, function, shape = NETS[net]
    model, tasks = make(module), tasks_of(make_tasks(shape, support=9))
    theta = {name: value.requires_grad_() for name, value in plain(model).items()}
    more: dict[str, Any] = {"inner_steps": 2, "step_weights": [0.5, 0.0, 1.0], "support_weight": 0.3}
    losses, _ = definition(function, theta, tasks, lambda *_: 0.3, first_order=first_order, **more)
    expected = torch.autograd.grad(losses.mean(), list(theta.values()))
    gradients, result = primitives.meta_gradient(
        model, tasks, inner_lr=0.3, first_order=first_order, engine=engine_name, **more
    )
    assert_close(result.task_losses, losses.detach(), "losses")
    assert not result.loss.requires_grad
    for (name, gradient), value in zip(gradients.items(), expected, strict=True):
        if name != "0.bias" or net == "mlp":  # before BatchNorm: rounding noise
            assert_close(gradient, value, name)
    assert all(parameter.grad is None for parameter in model.parameters())


@on_both_engines
@pytest.mark.parametrize("set_", ["support", "query"])
@pytest.mark.parametrize("net", NETS)
def test_the_gradient_of_each_task_at_its_own_parameters(net: str, set_: str, engine_name: Any) -> None:
    module, function, shape = NETS[net]
    model, tasks = make(module), ragged(make_tasks(shape, support=9))
    phi = noisy(model, 3)
    which: dict[str, Any] = {"step_weights": [0.0], "support_weight": 1.0} if set_ == "support" else {}
    gradients, _ = primitives.meta_gradient(model, tasks, parameters=phi, engine=engine_name, **which)
    for t in range(3):
        theta = {name: value[t].clone().requires_grad_() for name, value in phi.items()}
        x, y, mask = (getattr(tasks, f"{set_}_{part}")[t] for part in ("x", "y", "mask"))
        loss = F.cross_entropy(function(theta, x[mask], None)[0], y[mask])
        for name, expected in zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True):
            assert gradients[name].shape == phi[name].shape
            if name != "0.bias" or net == "mlp":
                assert_close(gradients[name][t], expected, f"{name} of task {t}")


@on_both_engines
def test_a_shared_parameter_has_the_mean_of_the_tasks_gradients(engine_name: Any) -> None:
    model, tasks = make(mlp_module), make_tasks((6,))
    each = {name: value.expand(3, *value.shape) for name, value in plain(model).items()}
    options: dict[str, Any] = {"inner_lr": 0.3, "inner_steps": 2, "engine": engine_name}
    shared, _ = primitives.meta_gradient(model, tasks, **options)
    own, _ = primitives.meta_gradient(model, tasks, parameters=each, **options)
    for name, gradient in own.items():
        assert_close(gradient.mean(0), shared[name], name)


@on_both_engines
def test_a_frozen_parameter_has_no_gradient_and_is_not_adapted(engine_name: Any) -> None:
    model, tasks = make(mlp_module), make_tasks((6,))
    model[0].requires_grad_(False)
    adapted = primitives.adapt(model, tasks, inner_lr=0.3, engine=engine_name)
    assert adapted["0.weight"].shape == model[0].weight.shape
    gradients, _ = primitives.meta_gradient(model, tasks, parameters=adapted, engine=engine_name)
    assert list(gradients) == ["2.weight", "2.bias"]


# --- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


PRIMITIVES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "adapt": lambda m, t, v, **o: primitives.adapt(m, t, inner_lr=0.3, inner_steps=2, proximal=0.5, **o),
    "meta_gradient": lambda m, t, v, **o: primitives.meta_gradient(m, t, inner_lr=0.3, inner_steps=2, **o)[0],
    "hessian_vector_product": lambda m, t, v, **o: primitives.hessian_vector_product(m, t, v, **o),
}


@on_both_engines
@pytest.mark.parametrize("name", PRIMITIVES)
def test_between_compiled_graphs(name: str, engine_name: Any, fresh_compiler: None) -> None:
    model, tasks, primitive = make(conv_module), make_tasks((2, 4, 4), support=9), PRIMITIVES[name]
    v = noisy(model, scale=1.0)

    def function(scale: Tensor) -> dict[str, Tensor]:
        phi = {"5.bias": scale + model[5].bias}
        found = primitive(model, tasks, v, parameters=phi, engine=engine_name)
        return {name: value.tanh() for name, value in found.items()}

    compiled = torch.compile(function, backend="aot_eager")
    with torch.no_grad():
        for scale in (torch.tensor(1.0).double(), torch.tensor(0.5).double()):
            model[5].weight.mul_(2)
            expected = function(scale)
            for name, value in compiled(scale).items():
                assert torch.equal(value, expected[name])
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="compute numbers, and no graph"):
            torch.compile(function, backend="aot_eager", fullgraph=True)(scale)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")  # dynamo does
def test_with_gradient_compiles_whole(fresh_compiler: None) -> None:
    model, tasks = make(mlp_module), make_tasks((6,))
    gradients, result = primitives.meta_gradient(model, tasks)
    compiled = torch.compile(
        lambda scale: primitives.with_gradient(
            result, model, {name: scale * gradient for name, gradient in gradients.items()}
        ).loss,
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    loss = compiled(torch.tensor(2.0).double())
    assert torch.equal(loss.detach(), result.loss)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * gradients[name])


# --- with_gradient --------------------------------------------------------------------------------


def test_a_result_with_a_gradient_is_what_an_optimizer_step_needs() -> None:
    model, tasks = make(mlp_module), make_tasks((6,))
    gradients, result = primitives.meta_gradient(model, tasks)
    per_task = noisy(model, 3, seed=8)["0.weight"]
    given = {"0.weight": per_task, "2.bias": gradients["2.bias"]}
    combined = primitives.with_gradient(result, model, given)
    assert torch.equal(combined.loss.detach(), result.loss)
    (3 * combined.loss).backward()
    torch.testing.assert_close(model[0].weight.grad, 3 * per_task.mean(0))
    torch.testing.assert_close(model[2].bias.grad, 3 * gradients["2.bias"])
    assert model[0].bias.grad is None
    with torch.no_grad():
        assert not primitives.with_gradient(result, model, given).loss.requires_grad
    again = torch.autograd.grad(
        primitives.with_gradient(result, model, given).loss, model[0].weight, create_graph=True
    )[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        again.sum().backward()


# --- what is refused ------------------------------------------------------------------------------


def setting() -> tuple[nn.Module, TaskBatch, dict[str, Tensor]]:
    model = make(mlp_module)
    return model, make_tasks((6,)), noisy(model)


def graphed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.requires_grad_() for name, value in tensors.items()}


def in_front(tasks: TaskBatch) -> TaskBatch:
    return replace(tasks, support_x=tasks.support_x.clone().requires_grad_())


hvp = primitives.hessian_vector_product
REFUSED: dict[str, tuple[Callable[[nn.Module, TaskBatch, dict[str, Tensor]], Any], type[Exception], str]] = {
    "vectors that require grad": (
        lambda m, t, v: hvp(m, t, graphed(v)), ValueError, r"vectors\['0.weight'\] requires grad.*pass it detached",
    ),
    "parameters that require grad": (
        lambda m, t, v: hvp(m, t, v, parameters=graphed(noisy(m))), ValueError, r"parameters\['0.weight'\] requires",
    ),
    "parameters of a meta-gradient that require grad": (
        lambda m, t, v: primitives.meta_gradient(m, t, parameters=graphed(v)), ValueError, "parameters.* requires grad",
    ),
    "a learned step size": (
        lambda m, t, v: primitives.adapt(m, t, inner_lr=torch.tensor(0.1, requires_grad=True)),
        ValueError, "inner_lr requires grad",
    ),
    "a learned step size in a mapping": (
        lambda m, t, v: primitives.adapt(m, t, inner_lr={"0": torch.tensor(0.1, requires_grad=True)}),
        ValueError, r"inner_lr\['0'\] requires grad",
    ),
    "an encoder in front": (lambda m, t, v: hvp(m, in_front(t), v), ValueError, "tasks.support_x requires grad"),
    "an encoder in front of adapt": (
        lambda m, t, v: primitives.adapt(m, in_front(t), inner_lr=0.1), ValueError, "tasks.support_x requires grad",
    ),
    "a torch.func transform": (
        lambda m, t, v: torch.func.grad(lambda x: hvp(m, t, {**v, "0.bias": x})["0.bias"].sum())(v["0.bias"]),
        ValueError, "torch.func transform",
    ),
    "inference mode": (
        lambda m, t, v: torch.inference_mode()(lambda: hvp(m, t, v))(), RuntimeError, "use torch.no_grad",
    ),
    "no vectors": (lambda m, t, v: hvp(m, t, {}), ValueError, "vectors is empty"),
    "an unknown name": (
        lambda m, t, v: hvp(m, t, {"0.wieght": v["0.weight"]}), ValueError,
        "vectors has '0.wieght', which is no parameter of the model. Did you mean '0.weight'",
    ),
    "an unknown name among parameters": (
        lambda m, t, v: primitives.adapt(m, t, inner_lr=0.1, parameters={"weight": v["0.weight"]}),
        ValueError, "parameters has 'weight', which is no parameter",
    ),
    "another shape": (
        lambda m, t, v: hvp(m, t, {"0.bias": torch.ones(3, dtype=torch.float64)}), ValueError,
        r"vectors\['0.bias'\] has shape \(3,\), expected \(8,\), or \(3, 8\) with one for each task",
    ),
    "another number of tasks": (
        lambda m, t, v: hvp(m, t, {"0.bias": torch.ones(2, 8, dtype=torch.float64)}), ValueError, r"shape \(2, 8\)",
    ),
    "another dtype": (
        lambda m, t, v: hvp(m, t, {"0.bias": torch.ones(8)}), TypeError,
        r"vectors\['0.bias'\] is torch.float32 on cpu, expected the parameter's torch.float64",
    ),
    "no tensor": (lambda m, t, v: hvp(m, t, {"0.bias": 1.0}), TypeError, "must be a torch.Tensor, got float"),
    "an engine misspelt": (lambda m, t, v: hvp(m, t, v, engine="natve"), ValueError, "engine is 'natve'.*'native'"),
    "steps without a size": (
        lambda m, t, v: primitives.meta_gradient(m, t, inner_steps=2), ValueError, "inner_lr is None with inner_steps",
    ),
    "a negative λ": (
        lambda m, t, v: primitives.adapt(m, t, inner_lr=0.1, proximal=-1.0), ValueError, "proximal is -1.0, expected",
    ),
    "a gradient of a frozen parameter": (
        lambda m, t, v: primitives.with_gradient(
            primitives.meta_gradient(m, t)[1], m.requires_grad_(False), {"0.bias": v["0.bias"]}
        ),
        ValueError, "gradients has '0.bias', which does not require grad",
    ),
    "a gradient of another shape": (
        lambda m, t, v: primitives.with_gradient(primitives.meta_gradient(m, t)[1], m, {"0.bias": v["2.bias"]}),
        ValueError, r"gradients\['0.bias'\] has shape \(3,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_would_be_silently_wrong_is_refused(wrong: str) -> None:
    call, error, message = REFUSED[wrong]
    with pytest.raises(error, match=message):
        call(*setting())


def test_under_no_grad_a_graph_is_of_no_consequence() -> None:
    model, tasks, v = setting()
    expected = hvp(model, tasks, v)
    with torch.no_grad():
        found = hvp(model, in_front(tasks), graphed(noisy(model)), parameters=dict(model.named_parameters()))
        gradients, _ = primitives.meta_gradient(model, in_front(tasks))
    for name, product in expected.items():
        assert torch.equal(found[name], product)
        assert torch.equal(gradients[name], primitives.meta_gradient(model, tasks)[0][name])


def test_native_says_why_it_cannot_and_auto_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make(lambda: nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 3)))
    tasks, v = make_tasks((6,)), noisy(model, 3, scale=1.0)
    calls: list[Callable[..., Any]] = [
        lambda **which: hvp(model, tasks, v, **which),
        lambda **which: primitives.adapt(model, tasks, inner_lr=0.1, **which),
        lambda **which: primitives.meta_gradient(model, tasks, **which)[0],
    ]
    with caplog.at_level(logging.WARNING, "innerloop"):
        for call in calls:
            with pytest.raises(ValueError, match="Softplus"):
                call(engine="native")
            for name, value in call(engine="auto").items():
                assert_close(value, call(engine="torch")[name], name)
    assert len([record for record in caplog.records if "Softplus" in record.getMessage()]) == 1


# --- the op ---------------------------------------------------------------------------------------


def raw_call(model: nn.Module, tasks: TaskBatch, vectors: list[Tensor] | None = None) -> list[Any]:
    inner = native_engine.inner_loop(model, **{**OPTIONS, "inner_steps": 0, "inner_lr": 1.0})
    call = native_engine.native_call(model, tasks, inner)
    values, _, buffers, _, o = call
    given = [torch.randn(tasks.num_tasks, *value.shape, dtype=value.dtype) for value in values]
    return [
        values, given if vectors is None else vectors, buffers, tasks.support_x, tasks.support_y, tasks.support_mask,
        list(o.program), o.bn, o.loss, o.label_smoothing, list(o.paths),
    ]  # fmt: skip


def raw_adaptation(model: nn.Module, tasks: TaskBatch, in_front: bool) -> list[Any]:
    """Of all parameters but the first; in_front: with tasks in front."""
    inner = native_engine.inner_loop(model, **OPTIONS, inner_steps=2, inner_lr=0.1)
    call = native_engine.native_call(model, tasks, inner)
    values, rates, buffers, _, o = call
    if in_front:
        values = [torch.stack([value + 0.1 * t for t in range(tasks.num_tasks)]) for value in values]
    return [
        values, [torch.empty(0, 0, dtype=torch.float64), *rates[1:]], buffers,
        tasks.support_x, tasks.support_y, tasks.support_mask,
        list(o.program), o.bn, o.loss, o.label_smoothing, o.steps, 0.5, list(o.paths),
    ]  # fmt: skip


OPTIONS: dict[str, Any] = {"loss": "cross_entropy", "bn": "transductive"}


@pytest.mark.filterwarnings("ignore")
def test_opcheck() -> None:
    for module, _, shape in NETS.values():
        model = make(module).requires_grad_(False)
        call = raw_call(model, ragged(make_tasks(shape, support=9)))
        torch.library.opcheck(torch.ops.innerloop.hessian_vector_product.default, tuple(call))
        call[1][0] = torch.empty(0, dtype=torch.float64)
        torch.library.opcheck(torch.ops.innerloop.hessian_vector_product.default, tuple(call))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("in_front", [False, True])
def test_opcheck_of_adaptation(in_front: bool) -> None:
    for module, _, shape in NETS.values():
        model = make(module).requires_grad_(False)
        call = raw_adaptation(model, ragged(make_tasks(shape, support=9)), in_front)
        torch.library.opcheck(torch.ops.innerloop.maml_adapt.default, tuple(call))


def test_the_raw_ops_cannot_be_differentiated() -> None:
    model, tasks = make(mlp_module), make_tasks((6,))
    products = torch.ops.innerloop.hessian_vector_product(*raw_call(model, tasks))
    with pytest.raises(RuntimeError, match="hessian_vector_product cannot be differentiated"):
        products[0].sum().backward()
    adapted = torch.ops.innerloop.maml_adapt(*raw_adaptation(model, tasks, False))
    with pytest.raises(RuntimeError, match="maml_adapt cannot be differentiated"):
        adapted[1].sum().backward()


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([], "vectors must be as many as parameters"),
        ([(3, 8, 6), (3, 8), (3, 3, 8), (3, 4)], "vectors must have the shapes of parameters with the tasks in front"),
        ([(3, 8, 6), (8,), (3, 3, 8), (3, 3)], "vectors must have the shapes of parameters with the tasks in front"),
        ([(2, 8, 6), (3, 8), (3, 3, 8), (3, 3)], "vectors must have the shapes of parameters with the tasks in front"),
    ],
)
def test_a_direct_call_checks_before_it_reads(vectors: list[tuple[int, ...]], message: str) -> None:
    tensors = [torch.ones(shape, dtype=torch.float64) for shape in vectors]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.innerloop.hessian_vector_product(*raw_call(make(mlp_module), make_tasks((6,)), tensors))
    single = [torch.ones(3, *p.shape) for p in make(mlp_module).parameters()]
    with pytest.raises(RuntimeError, match="vectors must have support_x's dtype"):
        torch.ops.innerloop.hessian_vector_product(*raw_call(make(mlp_module), make_tasks((6,)), single))
