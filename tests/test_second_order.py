"""Attention and recurrent nets in an inner loop that is differentiated through: kernels without a second derivative."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import innerloop
from innerloop import SecondOrderWarning, TaskBatch, second_order, torch_engine
from innerloop.inner_loop import InnerLoop
from nets import assert_close, make, make_tasks

maml_loss = partial(innerloop.maml_loss, inner_lr=0.3, inner_steps=2)


class _Attention(nn.Module):
    """Calls the function itself, as most models of today do."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.head, self.causal = nn.Linear(4, 12), nn.Linear(4, 3), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(attended.transpose(1, 2).flatten(2).mean(1))


class _Pooled(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x, x, x, need_weights=False)[0] if isinstance(self.body, nn.MultiheadAttention) else self.body(x)
        return self.head(x.mean(1))


def encoder_layer(**options: bool) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "the function": _Attention,
    "causal": partial(_Attention, causal=True),
    "MultiheadAttention": lambda: _Pooled(nn.MultiheadAttention(4, 2, batch_first=True)),
    "TransformerEncoderLayer": lambda: _Pooled(encoder_layer()),
    "TransformerEncoder": lambda: _Pooled(nn.TransformerEncoder(encoder_layer(), 2)),
}
SHAPE = (3, 4)  # of a sample: positions, features


def unrolled(
    model: nn.Module, tasks: TaskBatch, first_order: bool = False, adapt: tuple[str, ...] = ("",)
) -> tuple[Tensor, list[Tensor]]:
    """The meta-loss and its gradients as the equations stand, with attention's math kernel.

    adapt: endings of the names of the parameters that are adapted.
    """
    initial, losses = dict(model.named_parameters()), []
    with sdpa_kernel(SDPBackend.MATH):
        for task in tasks:
            support_x, support_y, query_x, query_y = (
                tensor[0] for tensor in (task.support_x, task.support_y, task.query_x, task.query_y)
            )
            theta = initial
            for _ in range(2):
                loss = F.cross_entropy(functional_call(model, theta, (support_x,)), support_y)
                adapted = {name: p for name, p in theta.items() if name.endswith(adapt)}
                gradients = torch.autograd.grad(loss, list(adapted.values()), create_graph=not first_order)
                stepped = {name: p - 0.3 * g for (name, p), g in zip(adapted.items(), gradients, strict=True)}
                theta = theta | stepped
            losses.append(F.cross_entropy(functional_call(model, theta, (query_x,)), query_y))
    total = torch.stack(losses).mean()
    return total, list(torch.autograd.grad(total, list(initial.values())))


def compare(model: nn.Module, loss: Tensor, expected: tuple[Tensor, list[Tensor]]) -> None:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert_close(loss, expected[0], "loss")
    for (name, _), actual, right in zip(model.named_parameters(), gradients, expected[1], strict=True):
        assert_close(actual, right, name)


def enabled() -> tuple[bool, ...]:
    backends = torch.backends.cuda
    return backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled()


@pytest.fixture(autouse=True)
def settings_stay_as_they_are() -> Iterator[None]:
    before = enabled(), torch.backends.cudnn.enabled
    yield
    assert (enabled(), torch.backends.cudnn.enabled) == before


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_math_kernel_and_one_warning_says_so(name: str, training: bool) -> None:
    model, tasks = make(MODELS[name]).train(training), make_tasks(SHAPE)
    with pytest.warns(
        SecondOrderWarning, match=f"{type(model).__name__}: ScaledDotProductFlash.*first_order=True"
    ) as w:
        loss = maml_loss(model, tasks)
    assert len(w) == 1
    compare(model, loss, unrolled(model, tasks))
    compare(model, maml_loss(model, tasks), unrolled(model, tasks))  # a second warning would be an error
    with pytest.warns(SecondOrderWarning):
        maml_loss(copy.deepcopy(model), tasks)


@pytest.mark.parametrize("name", MODELS)
def test_the_first_order_keeps_its_kernels(name: str) -> None:
    model, tasks = make(MODELS[name]), make_tasks(SHAPE)
    compare(model, maml_loss(model, tasks, first_order=True), unrolled(model, tasks, first_order=True))
    with torch.no_grad():
        maml_loss(model, tasks)
    maml_loss(model, tasks, inner_steps=0).backward()
    innerloop.get("maml")(model, inner_lr=0.3).adapt(tasks.support_x[0], tasks.support_y[0])


def test_the_gradient_is_that_of_finite_differences() -> None:
    model, tasks = make(_Attention), make_tasks(SHAPE, tasks=2)
    inner = InnerLoop.create(model, inner_lr=0.3, inner_steps=2)
    names, values = zip(
        *((name, p.detach().clone().requires_grad_()) for name, p in model.named_parameters()), strict=True
    )

    def meta_loss(*theta: Tensor) -> Tensor:
        return torch_engine.meta_result(model, dict(zip(names, theta, strict=True)), tasks, inner).loss

    with pytest.warns(SecondOrderWarning):
        meta_loss(*values)
    assert torch.autograd.gradcheck(meta_loss, values)


def test_the_meta_loss_has_a_second_derivative_too() -> None:
    model, tasks = make(_Attention), make_tasks(SHAPE, tasks=1)
    with pytest.warns(SecondOrderWarning):
        loss = maml_loss(model, tasks)
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    penalty = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(penalty, list(model.parameters())))


def test_attention_in_front_of_the_model_is_differentiated_once_and_keeps_its_kernel() -> None:
    model, tasks, encoder = make(lambda: _Pooled(nn.Identity())), make_tasks(SHAPE, tasks=1), make(encoder_layer)
    encoded = TaskBatch(
        encoder(tasks.support_x[0])[None], tasks.support_y, encoder(tasks.query_x[0])[None], tasks.query_y
    )
    assert second_order.once_differentiable(encoded.support_x)
    maml_loss(model, encoded).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_pass_that_is_done_again_finds_the_buffers_as_they_were() -> None:
    class Counting(_Attention):
        def __init__(self) -> None:
            super().__init__()
            self.passes = nn.Buffer(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return super().forward(x) * self.passes

    model, tasks = make(Counting), make_tasks(SHAPE, tasks=1)
    with pytest.warns(SecondOrderWarning):
        first = maml_loss(model, tasks)
    assert torch.equal(first, maml_loss(model, tasks))


def test_threads_may_share_a_transformer() -> None:
    model = make(MODELS["TransformerEncoder"])
    batches = [make_tasks(SHAPE, seed=seed) for seed in range(8)]

    def gradient(tasks: TaskBatch) -> Tensor:
        return torch.autograd.grad(maml_loss(model, tasks), model.head.weight)[0]

    with pytest.warns(SecondOrderWarning):
        alone = [gradient(tasks) for tasks in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradient, batches))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_layers_of_ones_own_inside_torchs_encoder_are_called() -> None:
    """torch's fast path, in eval mode without gradients, would read their weights alone."""

    class LowRank(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 8)
            self.lora_a, self.lora_b = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T

    def module() -> nn.Module:
        layer = encoder_layer()
        layer.linear1 = LowRank()
        return _Pooled(nn.TransformerEncoder(layer, 1))

    model, tasks = make(module).requires_grad_(False), make_tasks(SHAPE)
    algorithm = innerloop.get("maml")(model, inner_lr=0.3, inner_steps=0)
    expected = algorithm.train()(tasks).logits
    with torch.no_grad():
        assert_close(algorithm.eval()(tasks).logits, expected, "logits")
    learner = algorithm.adapt(tasks.support_x[0], tasks.support_y[0])
    assert_close(learner(tasks.query_x[0]), expected[0], "the learner's logits")


def test_matrices_of_low_rank_alone_are_adapted_by_their_pattern() -> None:
    """LoRA (Hu et al. 2022): the outer gradient of everything, with an inner loop over lora_a and lora_b."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_a, self.lora_b = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(12, 1))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.lora_b @ self.lora_a

    def module() -> nn.Module:
        body = encoder_layer()
        nn.utils.parametrize.register_parametrization(body.self_attn, "in_proj_weight", LowRank())
        return _Pooled(body)

    model, tasks = make(module), make_tasks(SHAPE)
    with pytest.warns(SecondOrderWarning):
        loss = maml_loss(model, tasks, adapt="*.lora_*")
    compare(model, loss, unrolled(model, tasks, adapt=("lora_a", "lora_b")))
    algorithm = innerloop.get("maml")(model, inner_lr={"*.lora_*": 0.3}, inner_steps=2)
    compare(model, algorithm(tasks).loss, unrolled(model, tasks, adapt=("lora_a", "lora_b")))
    learner = algorithm.adapt(tasks.support_x[0], tasks.support_y[0])
    changed = [
        name
        for (name, a), b in zip(learner.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert [name.rpartition(".")[2] for name in changed] == ["lora_a", "lora_b"]


# --- recurrent layers -------------------------------------------------------------------------------


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.mix, self.rnn, self.head = nn.Linear(4, 4), kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.mix(x))[0][:, -1])


class _Watched(nn.LSTM):
    """Notes whether cuDNN was enabled when it ran."""

    seen: ClassVar[list[bool]]  # a copy of the model has it too

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        self.seen.append(torch.backends.cudnn.enabled)
        return super().forward(x)


def watched(training: bool) -> tuple[_Recurrent, list[bool], list[bool]]:
    """A net, and whether cuDNN was enabled in its recurrent layer, and in another."""
    _Watched.seen, elsewhere = [], []
    model = _Recurrent(_Watched).train(training)
    model.mix.register_forward_hook(lambda *_: elsewhere.append(torch.backends.cudnn.enabled))
    return model, _Watched.seen, elsewhere


def test_recurrent_layers_alone_run_without_cudnn_where_its_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # No cuDNN here: oneDNN's kernel, which float32 takes on a CPU, stands in for one that is differentiable once.
    monkeypatch.setattr(second_order, "_ONCE_DIFFERENTIABLE", ("MkldnnRnnLayer",))
    model, seen, elsewhere = watched(training=True)
    tasks = make_tasks(SHAPE, tasks=1).to(torch.float32)
    maml_loss(model, tasks, first_order=True)
    assert set(seen) == {True}
    seen.clear()
    with pytest.warns(SecondOrderWarning, match="MkldnnRnnLayerBackward0 has no second derivative"):
        maml_loss(model, tasks).backward()
    assert seen == [True, False, False, False]  # the pass that was done again, another step, the query set
    assert set(elsewhere) == {True}


def test_recurrent_layers_in_eval_mode_run_without_cudnn_wherever_a_gradient_is_taken() -> None:
    model, seen, elsewhere = watched(training=False)
    tasks = make_tasks(SHAPE, tasks=1).to(torch.float32)
    with torch.no_grad():
        maml_loss(model, tasks, inner_steps=1)
    assert seen == [False, True]  # support, query
    assert set(elsewhere) == {True}


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_cpus_recurrent_kernels_need_no_others(kind: type[nn.RNNBase]) -> None:
    model, tasks = _Recurrent(kind), make_tasks(SHAPE).to(torch.float32)
    loss = maml_loss(model, tasks)  # a warning would be an error
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    exact, exact_gradients = unrolled(model.double(), make_tasks(SHAPE))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for actual, expected in zip(gradients, exact_gradients, strict=True):
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", *MODELS])
def test_on_cuda(name: str, training: bool, cuda: torch.device) -> None:
    module = MODELS[name] if name in MODELS else partial(_Recurrent, getattr(nn, name))
    model, tasks = make(module).train(training), make_tasks(SHAPE)
    expected, expected_gradients = unrolled(model, tasks)
    model.to(cuda, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecondOrderWarning)  # which kernel torch takes there is its own choice
        loss = maml_loss(model, tasks.to(cuda, torch.float32))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for actual, right in zip(gradients, expected_gradients, strict=True):
        assert (actual.cpu() - right).abs().max() <= 1e-3 * right.abs().max() + 1e-6
