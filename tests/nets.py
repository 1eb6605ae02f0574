"""Small nets written twice, as modules and as functions of their parameters, and the definition of the meta-loss on
the functions: what the engines are compared with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop import TaskBatch

Parameters = Mapping[str, Tensor]
Statistics = tuple[Tensor, Tensor]  # mean and biased variance of every channel
Net = Callable[[Parameters, Tensor, "Statistics | None"], "tuple[Tensor, Statistics]"]

NO_STATISTICS = (torch.zeros(0), torch.zeros(0))


def mlp_module() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def mlp_net(p: Parameters, x: Tensor, statistics: Statistics | None) -> tuple[Tensor, Statistics]:
    hidden = torch.tanh(x @ p["0.weight"].T + p["0.bias"])
    return hidden @ p["2.weight"].T + p["2.bias"], NO_STATISTICS


def conv_module() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def conv_net(p: Parameters, x: Tensor, statistics: Statistics | None) -> tuple[Tensor, Statistics]:
    x = F.conv2d(x, p["0.weight"], p["0.bias"], padding=1)
    mean, var = own = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
    if statistics is not None:
        mean, var = statistics
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    x = torch.tanh(x * p["1.weight"][:, None, None] + p["1.bias"][:, None, None])
    return F.avg_pool2d(x, 2).flatten(1) @ p["5.weight"].T + p["5.bias"], own


def make(module: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The module in float64, with the norms' parameters and running statistics away from 0 and 1."""
    torch.manual_seed(seed)
    model = module().double()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
                for tensor in (*layer.parameters(), *layer.buffers()):
                    if tensor.is_floating_point():
                        tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


def make_tasks(
    shape: Sequence[int], tasks: int = 3, support: int = 6, query: int = 5, out: int | None = None, seed: int = 1
) -> TaskBatch:
    """Random float64 tasks: three classes, or targets [out]."""
    g = torch.Generator().manual_seed(seed)

    def targets(count: int) -> Tensor:
        if out is not None:
            return torch.randn(tasks, count, out, generator=g, dtype=torch.float64)
        return torch.stack([torch.randperm(count, generator=g) % 3 for _ in range(tasks)])

    def inputs(count: int) -> Tensor:
        return torch.randn(tasks, count, *shape, generator=g, dtype=torch.float64)

    return TaskBatch(inputs(support), targets(support), inputs(query), targets(query))


def definition(
    net: Net,
    parameters: Parameters,
    tasks: TaskBatch,
    alpha: Callable[[str, int], Tensor | float],
    *,
    inner_steps: int = 1,
    step_weights: Sequence[float] | None = None,
    support_weight: float = 0.0,
    first_order: bool = False,
    running: Statistics | None = None,
    per_task: Collection[str] = (),
    bn: str = "transductive",
) -> tuple[Tensor, Tensor]:
    """([T] meta-losses, [T, Q, out] outputs at θ_K), as the equations stand; where α is 0 a parameter is fixed."""
    weights = [0.0] * inner_steps + [1.0] if step_weights is None else step_weights
    loss = F.mse_loss if tasks.support_y.is_floating_point() else F.cross_entropy
    losses, outputs = [], []
    for t in range(tasks.num_tasks):
        keep_s = slice(None) if tasks.support_mask is None else tasks.support_mask[t]
        keep_q = slice(None) if tasks.query_mask is None else tasks.query_mask[t]
        theta = {name: p[t] if name in per_task else p for name, p in parameters.items()}
        total = torch.zeros((), dtype=torch.float64)
        for k in range(inner_steps + 1):
            out, statistics = net(theta, tasks.support_x[t][keep_s], running)
            support = loss(out, tasks.support_y[t][keep_s])
            given = statistics if bn == "support" else running
            out, _ = net(theta, tasks.query_x[t][keep_q], given)
            total = total + weights[k] * loss(out, tasks.query_y[t][keep_q])
            if k == 0:
                total = total + support_weight * support
            if k < inner_steps:
                gradients = torch.autograd.grad(support, list(theta.values()), create_graph=True)
                theta = {
                    name: value - alpha(name, k) * (gradient.detach() if first_order else gradient)
                    for (name, value), gradient in zip(theta.items(), gradients, strict=True)
                }
        losses.append(total)
        outputs.append(out.detach())
    return torch.stack(losses), torch.nn.utils.rnn.pad_sequence(outputs, batch_first=True)


def assert_close(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    """Within 1e-9 of each other, relative to the largest entry; None is a zero gradient."""
    if actual is None or expected is None:
        present = actual if expected is None else expected
        assert present is None or present.abs().max() < 1e-12, f"{what}: one is None"
        return
    scale = float(expected.detach().abs().max()) or 1.0
    assert float((actual - expected).detach().abs().max()) <= 1e-9 * scale + 1e-14, what


def ragged(tasks: TaskBatch) -> TaskBatch:
    """The same tasks with the last samples of the first one masked, and NaN and a wild label in the padding."""
    support_mask = torch.ones(tasks.support_y.shape[:2], dtype=torch.bool)
    query_mask = torch.ones(tasks.query_y.shape[:2], dtype=torch.bool)
    support_mask[0, -2:] = False
    query_mask[0, -1:] = False
    tensors = [t.clone() for t in (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)]
    tensors[0][0, -2:] = torch.nan
    tensors[2][0, -1:] = torch.nan
    tensors[1][0, -2:] = -100
    tensors[3][0, -1:] = 99
    return TaskBatch(*tensors, support_mask, query_mask)


class function_of(nn.Module):
    """A layer followed by a function."""

    def __init__(self, layer: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))
