"""Learning to learn by gradient descent by gradient descent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from innerloop import engine as engines
from innerloop.contract import Algorithm, Result
from innerloop.functional import FunctionalModel
from innerloop.inner_loop import BatchNormMode
from innerloop.losses import Loss
from innerloop.native_engine import inner_loop
from innerloop.ops.coordinate_lstm import coordinate_lstm, coordinate_lstm_weight_gradients
from innerloop.ops.maml import with_gradients
from innerloop.optimizees import Optimizees, by_name, drawn_parameters, own_parameters
from innerloop.tasks import TaskBatch


@dataclass(frozen=True)
class Trajectory:
    """An optimization of T tasks.

    Attributes:
        losses: support losses before the first step and after each, [K + 1, T].
        parameters: θ_K, [T, P].
        gradients: of the LSTM's weights; empty where they were not wanted.
    """

    losses: Tensor
    parameters: Tensor
    gradients: list[Tensor]


class LearnedOptimizer(Algorithm):
    """A learned optimizer: an LSTM makes the updates of the model's parameters (Andrychowicz et al. 2016).

    A task is an optimizee, the model on a support set: θₖ₊₁ = θₖ + c·m(∇L_support(θₖ), hₖ; φ), where the two-layer LSTM
    m works on each coordinate of θ by itself. What is trained is φ, on the paper's equation 3 with all weights 1: the
    support loss after each step, whose gradient with respect to θ's own gradients is dropped, as in the paper. Query
    sets are only looked at to report. In train() each task starts from parameters that the model's modules draw anew
    (``reset_parameters``), and a training step goes back through one segment of ``truncation`` steps, drawn at random,
    with the steps before it taken without a gradient; in eval() it starts from the model's own, and runs all
    ``inner_steps``.

    Dropping the second derivatives leaves ∂L/∂(update k) = Σ ∇L_support(θₛ) over s > k, of gradients that the LSTM has
    been given already: no graph of the optimizee is kept. ``.loss`` is therefore differentiable once.

    Args:
        model: what is optimized; its outputs are logits, or the targets' shape for regression. It is not trained.
        inner_steps: optimization steps of a task.
        truncation: steps of a segment of truncated back-propagation through time.
        hidden: units of each of the two layers.
        averaged: global averaging cells of each layer (the paper's appendix B): they pass on their mean over all
            coordinates of a task. With them plain torch takes the place of the native kernel.
        scale: c, by which the LSTM's output is multiplied.
        p: of the gradients' preprocessing (appendix A).
        batch_size: samples of the support set that a step's loss and gradient are of, drawn at random for each step; in
            eval() the same in every call. 0: all of them.
        bn: BatchNorm statistics: "transductive" of the batch at hand, "support" of the support set, "running".
        loss: "cross_entropy", "mse", or a callable; None chooses by the targets.
        engine: for the optimizees' gradients: "auto", "native" or "torch".
    """

    training_defaults: ClassVar = {
        **{"steps": 300, "meta_batch_size": 2, "shots": 5, "lr": 5e-3, "schedule": "cosine", "clip": 1.0},
        **{"validate_every": 100, "validation_episodes": 40},
    }
    model_defaults: ClassVar = {
        "mlp": {"hidden": 20, "activation": "sigmoid"},
        "conv4": {"filters": 8, "downsample": "stride"},
    }

    def __init__(
        self,
        model: nn.Module,
        inner_steps: int = 100,
        truncation: int = 20,
        hidden: int = 20,
        averaged: int = 0,
        scale: float = 0.1,
        p: float = 10.0,
        batch_size: int = 0,
        bn: BatchNormMode = "transductive",
        loss: Loss | None = None,
        engine: engines.Engine = "auto",
    ) -> None:
        super().__init__(model)
        for name, number in (("inner_steps", inner_steps), ("truncation", truncation), ("hidden", hidden)):
            if number < 1:
                raise ValueError(f"{name} is {number}, expected at least 1")
        if batch_size < 0:
            raise ValueError(f"batch_size is {batch_size}, expected at least 0")
        if not 0 <= averaged <= hidden:
            raise ValueError(f"averaged is {averaged}, expected 0 … {hidden}, the hidden units")
        for name, value in (("scale", scale), ("p", p)):
            if not value > 0:
                raise ValueError(f"{name} is {value}, expected a positive number")
        self.inner_steps = inner_steps
        self.truncation = truncation
        self.averaged = averaged
        self.scale = scale
        self.p = p
        self.batch_size = batch_size
        self.bn = bn
        self.loss = loss
        self.engine = engines.check_engine(engine)
        # Refuses bad options here, not at the first step.
        inner_loop(model, inner_lr=0.0, inner_steps=0, bn=bn, loss=loss or "cross_entropy")
        if engine == "native":
            engines.check_lowers(model)
        like = next(model.parameters()).detach()
        bound = 1 / math.sqrt(hidden)  # nn.LSTMCell's
        #: The layers' weights and the output's, as :func:`innerloop.ops.coordinate_lstm` takes them.
        self.first, self.second, self.output = (
            nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device).uniform_(-bound, bound))
            for shape in ((4 * hidden, hidden + 3), (4 * hidden, 2 * hidden + 1), (hidden + 1,))
        )

    def forward(self, tasks: TaskBatch) -> Result:
        optimizees = self.optimizees(tasks)
        if self.training:
            initial = drawn_parameters(self.model, tasks.num_tasks)
            first = self.truncation * int(torch.randint(math.ceil(self.inner_steps / self.truncation), ()))
            last = min(first + self.truncation, self.inner_steps)
        else:
            initial, first, last = own_parameters(self.model, tasks.num_tasks), 0, self.inner_steps
        weights = [weight for weight in self.weights() if weight.requires_grad and torch.is_grad_enabled()]
        trajectory = self.optimize(optimizees, initial, last, first if weights else None)
        task_losses = trajectory.losses[first + 1 :].mean(0)
        loss = task_losses.mean()
        if weights:
            pairs = zip(self.weights(), trajectory.gradients, strict=True)
            loss = with_gradients(loss, [gradient for weight, gradient in pairs if weight.requires_grad], weights)
        after = optimizees.query_result(trajectory.parameters)
        return Result(loss, task_losses, after.logits, after.task_accuracies)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        x, y = support_x.detach()[None], support_y.detach()[None]
        optimizees = self.optimizees(TaskBatch(x, y, x, y))
        trajectory = self.optimize(optimizees, own_parameters(self.model, 1), self.inner_steps)
        fixed = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        parameters = fixed | by_name(self.model, trajectory.parameters[0])
        return FunctionalModel(self.model, self.bn).as_module(parameters, support_x)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """φ, as :func:`innerloop.ops.coordinate_lstm` takes it."""
        return self.first, self.second, self.output

    def optimizees(self, tasks: TaskBatch) -> Optimizees:
        """The model on the tasks' support sets, as the options stand now."""
        seed = int(torch.randint(2**31, ())) if self.training and self.batch_size else 0
        return Optimizees(self.model, tasks, self.bn, self.loss, self.engine, self.batch_size, seed)

    @torch.no_grad()
    def optimize(
        self, optimizees: Optimizees, parameters: Tensor, steps: int, differentiate_from: int | None = None
    ) -> Trajectory:
        """K steps from θ₀ = parameters [T, P].

        Args:
            differentiate_from: a multiple of truncation, s: with the gradients of φ of the mean over tasks of the mean
                over the losses after step s + 1 … K, back through segments of truncation steps. None: without.
        """
        tasks, weights = optimizees.tasks.num_tasks, self.weights()
        state = parameters.new_zeros(4, len(self.output) - 1, parameters.numel())
        totals = [] if differentiate_from is None else [torch.zeros_like(weight) for weight in weights]
        losses, gradient = optimizees.losses_and_gradients(parameters)
        history = [losses]
        for first in range(0, steps, self.truncation):
            start, seen = state, [gradient.flatten()]
            for _ in range(first, min(first + self.truncation, steps)):
                update, state = coordinate_lstm(
                    gradient.view(1, -1), state, *weights, p=self.p, averaged=self.averaged, tasks=tasks
                )
                parameters = parameters + self.scale * update.view_as(parameters)
                losses, gradient = optimizees.losses_and_gradients(parameters)
                history.append(losses)
                seen.append(gradient.flatten())
            if differentiate_from is not None and first >= differentiate_from:
                # Of update k: the sum of the gradients after it.
                upstream = torch.stack(seen[1:]).flip(0).cumsum(0).flip(0)
                upstream *= self.scale / (tasks * (steps - differentiate_from))
                found = coordinate_lstm_weight_gradients(
                    upstream, torch.stack(seen[:-1]), start, weights, p=self.p, averaged=self.averaged, tasks=tasks
                )
                torch._foreach_add_(totals, found)
        return Trajectory(torch.stack(history), parameters, totals)
