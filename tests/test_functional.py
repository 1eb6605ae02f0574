"""Running a user's module with parameters from outside: cases where a wrong gradient would look like a right one."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop
from innerloop import TaskBatch, torch_engine
from innerloop.inner_loop import InnerLoop
from nets import assert_close, conv_module, definition, make, make_tasks, mlp_module, mlp_net


def gradient_and_reference(model: nn.Module, tasks: TaskBatch, plain: nn.Module) -> None:
    """model gives the loss and the gradients of plain, which computes the same in an ordinary way."""
    for each in (model, plain):
        each.zero_grad()
        innerloop.maml_loss(each, tasks, inner_lr=0.3, inner_steps=2).backward()
    for (name, a), e in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(a.grad, e.grad, name)


class _Listed(nn.Module):
    """Keeps its layers in a plain list too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*mlp_module())
        self.order = [self.layers[0], (self.layers[1], self.layers[2])]

    def forward(self, x: Tensor) -> Tensor:
        first, (second, third) = self.order
        return third(second(first(x)))


class _Bound(nn.Module):
    """Calls a method of its own that it bound at construction."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*mlp_module())
        self.run = self._run

    def _run(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class _Tapped(nn.Module):
    """Reads what a hook, a method of its own, left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*mlp_module())
        self.layers.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.kept = output

    def forward(self, x: Tensor) -> Tensor:
        self.layers(x)
        return self.kept


class _Twice(nn.Module):
    """Uses one layer twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("module", [_Listed, _Bound, _Tapped])
def test_modules_reached_by_another_way_than_their_name_are_adapted(module: type[nn.Module]) -> None:
    model, plain = make(module), make(mlp_module)
    plain.load_state_dict({name.removeprefix("layers."): value for name, value in model.state_dict().items()})
    gradient_and_reference(model, make_tasks((6,)), plain)
    assert not hasattr(model, "kept"), "a forward pass wrote to the model"


def test_a_tied_parameter_is_one_parameter() -> None:
    model, tasks = make(_Twice), make_tasks((6,))

    def net(p: Any, x: Tensor, statistics: Any) -> Any:
        for _ in range(2):
            x = torch.tanh(x @ p["first.weight"].T + p["first.bias"])
        return x @ p["head.weight"].T + p["head.bias"], ()

    parameters = dict(model.named_parameters())
    losses, _ = definition(net, parameters, tasks, lambda name, k: 0.3, inner_steps=2)
    expected = torch.autograd.grad(losses.mean(), list(parameters.values()))
    innerloop.maml_loss(model, tasks, inner_lr=0.3, inner_steps=2).backward()
    for (name, a), e in zip(parameters.items(), expected, strict=True):
        assert_close(a.grad, e, name)


def test_a_parametrized_or_recurrent_model_is_adapted() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    for model, shape in [
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))), (6,)),
        (Recurrent(), (2, 3)),
    ]:
        model, tasks = model.double(), make_tasks(shape)
        before = [p.detach().clone() for p in model.parameters()]
        loss = innerloop.maml_loss(model, tasks, inner_lr=0.5, inner_steps=1, bn="running")
        assert loss < innerloop.maml_loss(model, tasks, inner_lr=0.0, inner_steps=1) + 1
        expected = 0.0
        for task in tasks:  # the step by hand, on a copy
            twin = copy.deepcopy(model)
            F.cross_entropy(twin(task.support_x[0]), task.support_y[0]).backward()
            with torch.no_grad():
                for p in twin.parameters():
                    p -= 0.5 * p.grad
                expected += F.cross_entropy(twin(task.query_x[0]), task.query_y[0]) / 3
        assert_close(loss, expected, "loss after one step")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_parameter_computed_from_another_is_a_variable_of_its_own_in_the_inner_loop() -> None:
    """As in ProtoMAML, whose head comes from the encoder that is adapted beside it."""
    model, tasks = make(mlp_module), make_tasks((6,))
    root = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    given = dict(model.named_parameters())
    for first_order in (False, True):
        parameters = {
            **given,
            "0.bias": root.sum(0),
            "2.weight": root,
            "0.weight": given["0.weight"] + root.sum(0)[:, None],
        }
        options: dict[str, Any] = {"inner_steps": 2, "first_order": first_order, "support_weight": 0.5}
        inner = InnerLoop.create(model, inner_lr=0.3, **options)
        values: dict[int, list[Tensor]] = {}
        for limit in (0, 100_000):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch_engine, "VMAP_MAX_PARAMETERS", limit)
                loss = torch_engine.meta_result(model, parameters, tasks, inner).loss
            values[limit] = list(torch.autograd.grad(loss, [root, given["0.weight"]], retain_graph=True))
        # The same, with the relation applied outside: the meta-gradient at independent parameters, then the chain rule.
        free = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        losses, _ = definition(mlp_net, free, tasks, lambda name, k: 0.3, **options)
        upstream = torch.autograd.grad(losses.mean(), list(free.values()))
        expected = torch.autograd.grad(list(parameters.values()), [root, given["0.weight"]], upstream)
        for a, b, e in zip(values[0], values[100_000], expected, strict=True):
            assert_close(a, e, "loop")
            assert_close(b, e, "vmap")


def test_a_model_whose_modules_cannot_be_reached_raises() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers = mlp_module()
            self.run = lambda x: layers(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    with pytest.raises(ValueError, match="does not depend on any adapted parameter"):
        innerloop.maml_loss(make(Hidden), make_tasks((6,)), inner_lr=0.1)


@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
def test_the_model_is_never_written(bn: Any) -> None:
    model, tasks = make(conv_module), make_tasks((2, 4, 4))
    before = copy.deepcopy(model.state_dict())
    layers = list(model.modules())
    innerloop.maml_loss(model, tasks, inner_lr=0.3, inner_steps=2, bn=bn).backward()
    algorithm = innerloop.get("maml")(model, bn=bn)
    learner = algorithm.adapt(tasks.support_x[0], tasks.support_y[0])
    learner(tasks.query_x[0])
    for tensor in [*learner.parameters(), *learner.buffers()]:
        tensor.data.fill_(7)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        innerloop.maml_loss(model, make_tasks((2, 6, 6)), inner_lr=0.3, bn=bn)
    assert list(model.modules()) == layers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_threads_may_share_a_model() -> None:
    model = make(conv_module)
    batches = [make_tasks((2, 4, 4), seed=seed) for seed in range(8)]

    def gradient(tasks: TaskBatch) -> Tensor:
        loss = innerloop.maml_loss(model, tasks, inner_lr=0.3, inner_steps=2, bn="support")
        return torch.autograd.grad(loss, model[0].weight)[0]

    alone = [gradient(tasks) for tasks in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradient, batches))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_dropout_follows_train_and_eval() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    tasks = make_tasks((6,))
    different = {float(innerloop.maml_loss(model, tasks, inner_lr=0.1).detach()) for _ in range(3)}
    model.eval()
    same = {float(innerloop.maml_loss(model, tasks, inner_lr=0.1).detach()) for _ in range(3)}
    assert (len(different), len(same)) == (3, 1)


def test_a_batch_norm_with_a_forward_of_its_own_runs_as_it_is() -> None:
    class Activated(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    torch.manual_seed(0)
    plain = make(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)))
    model = make(lambda: nn.Sequential(nn.Linear(6, 8), Activated(8), nn.Identity(), nn.Linear(8, 3)))
    model.load_state_dict(plain.state_dict())
    before = model[1].running_mean.clone()
    gradient_and_reference(model, make_tasks((6,)), plain)
    assert torch.equal(model[1].running_mean, before)


class _Normalised(nn.Module):
    """Two Linear layers, each with a BatchNorm after it: one of its own, or the same for both."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(6, affine=False) for _ in range(norms)])

    def forward(self, x: Tensor) -> Tensor:
        for place in range(2):
            x = torch.tanh(self.norms[place % len(self.norms)](self.layers[place](x)))
        head: Tensor = self.layers[2](x)
        return head


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_each_call_of_a_batch_norm_reads_the_support_statistics_of_that_call(engine: Any) -> None:
    shared, apart = make(lambda: _Normalised(1)), make(lambda: _Normalised(2))
    apart.load_state_dict(shared.state_dict(), strict=False)
    tasks = make_tasks((6,))
    for model, chosen in ((shared, engine), (apart, "torch")):
        innerloop.maml_loss(model, tasks, inner_lr=0.3, inner_steps=2, bn="support", engine=chosen).backward()
    for (name, a), e in zip(shared.named_parameters(), apart.parameters(), strict=True):
        if not name.startswith(("layers.0.bias", "layers.1.bias")):  # before BatchNorm: 0 but for rounding
            assert_close(a.grad, e.grad, name)
    x, y, query = tasks.support_x[0], tasks.support_y[0], tasks.query_x[0]
    learners = [innerloop.get("maml")(m, bn="support", engine=engine).adapt(x, y) for m in (shared, apart)]
    for _ in range(2):
        assert_close(learners[0](query), learners[1](query), "outputs")
