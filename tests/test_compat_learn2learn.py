"""learn2learn's names: the gradients of the definition, and what learn2learn 0.2.0 does with modules.

benchmarks/learn2learn_tests.sh runs learn2learn's own tests on these names; benchmarks/maml.py compares its gradients.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import innerloop
import innerloop.compat.learn2learn as l2l
from innerloop import TaskBatch
from innerloop.compat.learn2learn.algorithms.base_learner import BaseLearner
from innerloop.compat.learn2learn.algorithms.maml import maml_update
from innerloop.compat.learn2learn.algorithms.meta_sgd import meta_sgd_update
from nets import assert_close, conv_module, make, make_tasks, mlp_module

Loss = Callable[[Tensor, Tensor], Tensor]
cross_entropy: Loss = nn.functional.cross_entropy


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class _Tied(nn.Module):
    """One layer under two names, and its weight as a third module's too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second = self.first
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.last):
            x = torch.tanh(layer(x))
        return self.head(x)


class _Listed(nn.Module):
    """Calls its layers by a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp_module()
        self.order = list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


MODULES: dict[str, tuple[Callable[[], nn.Module], Sequence[int]]] = {
    "mlp": (mlp_module, (6,)),
    "conv with BatchNorm": (conv_module, (2, 4, 4)),
    "RNN": (lambda: _Recurrent(nn.RNN), (2, 3)),
    "LSTM": (lambda: _Recurrent(nn.LSTM), (2, 3)),
    "GRU": (lambda: _Recurrent(nn.GRU), (2, 3)),
    "tied": (_Tied, (6,)),
    "listed": (_Listed, (6,)),
    "attention": (_Attention, (3, 4)),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))), (6,)),
}


def reference(
    model: nn.Module, tasks: TaskBatch, rates: Mapping[str, float | Tensor], steps: int, first_order: bool
) -> Tensor:
    """The mean of the tasks' query losses, as the equations stand."""
    plain = model
    if isinstance(model, _Listed):
        plain = model.layers
        rates = {name.removeprefix("layers."): rate for name, rate in rates.items()}
    initial = dict(zip(dict(plain.named_parameters()), model.parameters(), strict=True))

    def outputs(theta: dict[str, Tensor], x: Tensor) -> Tensor:
        # A copy: functional_call does not put a module back as it was that it finds under two names.
        return functional_call(copy.deepcopy(plain), theta, (x,))

    losses = []
    for support_x, support_y, query_x, query_y in each(tasks):
        theta: dict[str, Tensor] = dict(initial)
        for _ in range(steps):
            loss = cross_entropy(outputs(theta, support_x), support_y)
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {
                name: value - rates[name] * (gradient.detach() if first_order else gradient)
                for (name, value), gradient in zip(theta.items(), gradients, strict=True)
            }
        losses.append(cross_entropy(outputs(theta, query_x), query_y))
    return torch.stack(losses).mean()


def each(tasks: TaskBatch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return zip(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, strict=True)


def looped(maml: l2l.algorithms.MAML | l2l.algorithms.MetaSGD, tasks: TaskBatch, steps: int) -> Tensor:
    """The same as scripts write it."""
    total = torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in each(tasks):
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(cross_entropy(learner(support_x), support_y))
        total = total + cross_entropy(learner(query_x), query_y) / len(tasks)
    return total


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_maml_has_the_gradients_of_the_definition(name: str, first_order: bool) -> None:
    module, shape = MODULES[name]
    model, tasks = make(module), make_tasks(shape)
    expected = reference(model, tasks, dict.fromkeys(dict(model.named_parameters()), 0.3), 2, first_order)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = looped(l2l.algorithms.MAML(model, lr=0.3, first_order=first_order), tasks, 2)
    loss.backward()
    assert_close(loss, expected, "loss")
    for (parameter_name, parameter), gradient in zip(model.named_parameters(), expected_gradients, strict=True):
        assert_close(parameter.grad, gradient, parameter_name)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_meta_sgd_has_the_gradients_of_the_definition(name: str, first_order: bool) -> None:
    module, shape = MODULES[name]
    model, tasks = make(module), make_tasks(shape)
    meta = l2l.algorithms.MetaSGD(model, lr=0.3, first_order=first_order)
    torch.manual_seed(3)
    with torch.no_grad():
        for rate in meta.lrs:
            rate.copy_(0.1 + 0.4 * torch.rand_like(rate))
    rates = dict(zip(dict(model.named_parameters()), meta.lrs, strict=True))
    learned = [*model.parameters(), *meta.lrs]
    expected = torch.autograd.grad(reference(model, tasks, rates, 2, first_order), learned)
    looped(meta, tasks, 2).backward()
    assert len(list(meta.parameters())) == len(learned)
    for index, (parameter, gradient) in enumerate(zip(learned, expected, strict=True)):
        assert_close(parameter.grad, gradient, f"{index}")


@pytest.mark.parametrize(("name", "steps"), [("mlp", 3), ("conv with BatchNorm", 1)])
def test_maml_loss_replaces_the_loop(name: str, steps: int) -> None:
    module, shape = MODULES[name]
    model, tasks = make(module), make_tasks(shape)
    maml = l2l.algorithms.MAML(model, lr=0.3)
    loss = looped(maml, tasks, steps)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    batched = innerloop.maml_loss(model, tasks, inner_lr=0.3, inner_steps=steps)
    batched.backward()
    assert_close(batched, loss, "loss")
    for (parameter_name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert_close(parameter.grad, gradient, parameter_name)


def test_settings_of_a_clone_and_of_a_step_win_over_the_wrappers() -> None:
    maml = l2l.algorithms.MAML(mlp_module(), lr=0.1, first_order=True, allow_nograd=True)
    assert (maml.allow_unused, maml.clone().first_order, maml.clone().allow_nograd) == (True, True, True)
    assert l2l.algorithms.MAML(mlp_module(), 0.1, allow_unused=False, allow_nograd=True).allow_unused is False
    clone = maml.clone(first_order=False, allow_unused=False, allow_nograd=False)
    assert (clone.first_order, clone.allow_unused, clone.allow_nograd) == (False, False, False)

    def second_order_reaches(learner: l2l.algorithms.MAML, **step: bool) -> bool:
        """Whether the adapted bias depends on the first weight; with a constant gradient it does not."""
        learner.adapt(learner(torch.ones(1, 6)).square().sum(), **step)
        dependence = torch.autograd.grad(learner.module[2].bias.sum(), maml.module[0].weight, allow_unused=True)
        return dependence[0] is not None

    assert not second_order_reaches(maml.clone())
    assert second_order_reaches(maml.clone(first_order=False))
    assert second_order_reaches(maml.clone(), first_order=False)
    assert not second_order_reaches(maml.clone(first_order=False), first_order=True)


def test_a_learning_rate_may_be_learned() -> None:
    model, tasks = make(mlp_module), make_tasks((6,))
    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rates = dict.fromkeys(dict(model.named_parameters()), rate)
    (expected,) = torch.autograd.grad(reference(model, tasks, rates, 2, first_order=False), [rate])
    looped(l2l.algorithms.MAML(model, lr=rate), tasks, 2).backward()
    assert_close(rate.grad, expected, "lr")


def test_parameters_without_gradient_need_leave_and_keep_their_values() -> None:
    model, x = make(mlp_module), torch.ones(2, 6, dtype=torch.float64)
    model[0].weight.requires_grad_(False)
    learner = l2l.algorithms.MAML(model, lr=0.3).clone()
    loss = learner(x).square().sum()
    with pytest.raises(RuntimeError, match="allow_nograd=True"):
        learner.adapt(loss)
    learner.adapt(loss, allow_nograd=True)  # the failed step used nothing up
    assert torch.equal(learner.module[0].weight, model[0].weight)
    assert not torch.equal(learner.module[0].bias, model[0].bias)
    learner(x).square().sum().backward()
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None


@pytest.mark.parametrize("allowed", [False, True])
def test_parameters_that_the_loss_does_not_depend_on_need_leave(allowed: bool) -> None:
    model, x = make(mlp_module), torch.ones(2, 6, dtype=torch.float64)
    learner = l2l.algorithms.MAML(model, lr=0.3, allow_unused=allowed).clone()
    loss = learner.module[0](x).square().sum()
    if not allowed:
        with pytest.raises(RuntimeError, match="allow_unused=True"):
            learner.adapt(loss)
        return
    learner.adapt(loss)
    assert torch.equal(learner.module[2].weight, model[2].weight)
    assert not torch.equal(learner.module[0].weight, model[0].weight)


def test_a_clone_shares_buffers_unless_they_require_grad() -> None:
    model = make(conv_module)
    model.scale = nn.Buffer(torch.ones((), dtype=torch.float64, requires_grad=True))
    clone = l2l.clone_module(model)
    before = model[1].running_mean.clone()
    clone(torch.randn(3, 2, 4, 4, dtype=torch.float64))
    assert clone[1].running_mean is model[1].running_mean
    assert not torch.equal(model[1].running_mean, before)
    assert clone.scale is not model.scale
    clone.scale.backward()
    assert model.scale.grad == 1


def test_a_clone_has_the_same_structure_and_leaves_the_module_alone() -> None:
    model = make(_Tied)
    model.empty = nn.ModuleList([nn.Linear(2, 1), None])
    names, state = list(dict(model.named_parameters())), copy.deepcopy(model.state_dict())
    clone = l2l.clone_module(model)
    assert list(dict(clone.named_parameters())) == names
    assert clone.second is clone.first
    assert clone.last.weight is clone.first.weight
    assert clone.empty[1] is None
    assert {p.data_ptr() for p in clone.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    l2l.update_module(clone, [torch.ones_like(p) for p in clone.parameters()])
    clone.extra = nn.Linear(1, 1)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "extra")
    assert l2l.clone_module(None) is None


def test_modules_that_share_parameters_are_cloned_with_one_memo() -> None:
    one = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    other.weight = one.weight
    memo: dict[Tensor, Tensor] = {}
    clones = l2l.clone_module(one, memo=memo), l2l.clone_module(other, memo=memo)
    assert clones[0].weight is clones[1].weight


def test_updates_are_added_and_stay_in_the_graph() -> None:
    model = make(_Tied)
    clone = l2l.clone_module(model)
    updates = [torch.randn_like(p).requires_grad_() for p in clone.parameters()]
    given: list[Tensor | None] = [*updates[:-1], None]
    assert l2l.update_module(clone, given) is clone
    for parameter, updated, update in zip(model.parameters(), clone.parameters(), given, strict=True):
        assert torch.equal(updated, parameter if update is None else parameter + update)
    assert clone.last.weight is clone.first.weight
    torch.stack([p.sum() for p in clone.parameters()]).sum().backward()
    assert all(torch.equal(update.grad, torch.ones_like(update)) for update in updates[:-1])
    assert updates[-1].grad is None


def test_an_update_may_wait_in_an_attribute() -> None:
    model = nn.Linear(2, 1)
    model.count = nn.Buffer(torch.zeros(1))
    clone = l2l.clone_module(model)
    clone.bias.update = torch.ones(1)
    clone.count.update = torch.ones(1)
    for _ in range(2):  # used up by the first
        maml_update(clone, lr=0.1)
        assert torch.equal(clone.bias, model.bias + 1)
        assert torch.equal(clone.count, torch.ones(1))
    assert torch.equal(clone.weight, model.weight)


def test_updates_that_are_too_few_are_named() -> None:
    clone = l2l.clone_module(nn.Linear(2, 1))
    with pytest.warns(UserWarning, match="updates has 1 entries, expected 2"):
        l2l.update_module(clone, [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="lrs has 1 entries, expected 2"):
        meta_sgd_update(clone, [torch.ones(1)], [torch.ones(1, 2), torch.ones(1)])


@pytest.mark.parametrize("keep", [False, True])
def test_detaching_cuts_the_graph_in_place(keep: bool) -> None:
    model = make(lambda: _Recurrent(nn.GRU))
    clone = l2l.clone_module(model)
    clone.head.bias.requires_grad_()
    before = list(clone.parameters())
    l2l.detach_module(clone, keep_requires_grad=keep)
    assert all(a is b for a, b in zip(clone.parameters(), before, strict=True))
    assert all(p.is_leaf and p.requires_grad is keep for p in clone.parameters())
    if keep:
        clone(torch.ones(1, 2, 3, dtype=torch.float64)).sum().backward()
        assert all(p.grad is not None for p in clone.parameters())
    assert all(p.grad is None for p in model.parameters())
    l2l.detach_module(None)


def test_a_wrapper_has_the_modules_attributes_and_learn2learns_names_in_its_state() -> None:
    model = nn.Linear(2, 1)
    model.note = "kept"
    maml = l2l.algorithms.MAML(model, lr=0.1)
    assert isinstance(maml, BaseLearner)
    assert (maml.note, maml.in_features, maml.clone().note) == ("kept", 2, "kept")
    with pytest.raises(AttributeError, match="absent"):
        _ = maml.absent
    assert list(maml.state_dict()) == ["module.weight", "module.bias"]
    assert list(l2l.algorithms.MetaSGD(model).state_dict()) == ["module.weight", "module.bias", "lrs.0", "lrs.1"]
    twin = copy.deepcopy(maml)
    assert twin.lr == 0.1
    assert twin.module is not model


def test_small_helpers() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    box = l2l.magic_box(x)
    assert torch.equal(box, torch.ones(2))
    assert torch.equal(torch.autograd.grad(box.sum(), x)[0], torch.ones(2))
    assert l2l.magic_box(1.0) == 1.0
    assert l2l.utils.accuracy(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1])) == 0.5
    (clone,) = l2l.clone_parameters([x])
    assert clone is not x
    assert torch.equal(torch.autograd.grad(clone.sum(), x)[0], torch.ones(2))
    assert list(l2l.clone_named_parameters({"x": x})) == ["x"]


def test_other_names_come_from_learn2learn_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not hasattr(l2l, "__wrapped__")
    monkeypatch.setitem(sys.modules, "learn2learn", None)  # Python's way to say: not installed
    with pytest.raises(AttributeError, match=r"innerloop\.compat\.learn2learn.*'vision'.*cannot be imported"):
        _ = l2l.vision
    package = tmp_path / "learn2learn"
    package.mkdir()
    (package / "__init__.py").write_text("from learn2learn import algorithms\nvision, MAML = 'theirs', 'theirs'\n")
    (package / "algorithms.py").write_text("GBML, MAML = 'theirs', 'theirs'\n")
    monkeypatch.delitem(sys.modules, "learn2learn")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert l2l.vision == l2l.algorithms.GBML == "theirs"
        assert l2l.algorithms.MAML is not l2l.MAML
        with pytest.raises(AttributeError, match="absent"):
            _ = l2l.absent
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "learn2learn"]:
            del sys.modules[name]
