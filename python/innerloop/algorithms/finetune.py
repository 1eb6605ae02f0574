"""Fine-tuning: the transfer baseline, and the floor."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from innerloop import engine as engines
from innerloop.contract import Algorithm, Result, embed_tasks
from innerloop.functional import FunctionalModel
from innerloop.inner_loop import BatchNormMode, InnerLoop
from innerloop.models import Shape, output_shape
from innerloop.native_engine import inner_loop
from innerloop.pretraining import MINIBATCHES, pretraining_result
from innerloop.tasks import TaskBatch


class FineTune(Algorithm):
    """Fine-tuning: gradient steps on the support set, with no meta-training.

    To each task goes the whole network, with a new head of zeros, by plain gradient descent: MAML's inner loop, from
    weights that were not made for it. What they are is ``pretraining``'s to say. "classes" is the transfer baseline of
    the few-shot papers ("Baseline-finetune" of Ravi and Larochelle 2017, which Baseline, fitting the head alone, is
    too): train() learns to tell all training classes apart. "none" is the floor under all other results: train()
    learns nothing, and a task has its support set alone.

    The body changes with every task, so evaluation embeds the samples of each task anew.

    Args:
        model: an embedding, [N, ...] to [N, ...].
        input_shape: of one sample.
        training_classes: number of classes to pre-train on.
        pretraining: "classes", or "none".
        inner_lr: α, the step size on the support set.
        inner_steps: K, gradient steps on the support set.
        bn: BatchNorm statistics on a task: "transductive" of the batch at hand, "support" of the support set, or
            "running".
        engine: "auto", "native" or "torch".
    """

    needs_head = False
    training_defaults: ClassVar = MINIBATCHES

    def __init__(
        self,
        model: nn.Module,
        input_shape: Shape,
        training_classes: int,
        pretraining: Literal["classes", "none"] = "classes",
        inner_lr: float = 0.05,
        inner_steps: int = 10,
        bn: BatchNormMode = "support",
        engine: engines.Engine = "auto",
    ) -> None:
        super().__init__(model)
        if pretraining not in ("classes", "none"):
            raise ValueError(f"pretraining is {pretraining!r}, expected 'classes' or 'none'")
        self.dim = math.prod(output_shape(model, input_shape))
        self.pretraining = pretraining
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.bn = bn
        self.engine = engines.check_engine(engine)
        self.classifier = nn.Linear(self.dim, training_classes) if pretraining == "classes" else None
        self._networks: dict[int, nn.Sequential] = {}
        self.inner_loop_of(self.network(ways=2))  # refuses bad options here, not at the first task
        if engine == "native":
            engines.check_lowers(self.network(ways=2))

    def network(self, ways: int) -> nn.Sequential:
        """The model with a head of zeros for so many classes."""
        if ways not in self._networks:
            head = nn.utils.skip_init(nn.Linear, self.dim, ways)  # an ordinary one would draw from torch's random state
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
            self._networks[ways] = nn.Sequential(self.model, nn.Flatten(), head)
        network = self._networks[ways]
        network[2].to(next(self.model.parameters()))
        return network

    def inner_loop_of(self, network: nn.Module) -> InnerLoop:
        """The inner loop as the options stand now."""
        return inner_loop(
            network, inner_lr=self.inner_lr, inner_steps=self.inner_steps, bn=self.bn, loss="cross_entropy"
        )

    def forward(self, tasks: TaskBatch) -> Result:
        if self.training and self.classifier is not None:
            support, query = embed_tasks(lambda x: self.model(x).flatten(1), tasks)
            return pretraining_result(self.classifier, support, query, tasks)
        network = self.network(tasks.ways)
        with torch.no_grad():
            result = engines.meta_result(network, tasks, self.inner_loop_of(network), engine=self.engine)
        if not self.training:
            return result
        # Nothing is learned: a loss whose gradient is zero.
        nothing = sum((0 * parameter.sum() for parameter in self.model.parameters()), start=result.loss)
        return Result(nothing, result.task_losses, result.logits, result.task_accuracies)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        network = self.network(int(support_y.max()) + 1)
        inner = self.inner_loop_of(network)
        adapted = engines.adapt(network, support_x, support_y, inner, self.engine)
        return FunctionalModel(network, inner.bn).as_module(adapted, support_x)
