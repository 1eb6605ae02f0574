"""Running a module with parameters from outside, without touching the module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from innerloop.inner_loop import AnyBatchNormMode
from innerloop.norms import PerStepBatchNorm, is_batch_norm
from innerloop.second_order import Kernels

_MAY_REFER_TO_MODULES = (nn.Module, MethodType, list, tuple, dict, OrderedDict)


def head_path(model: nn.Module) -> str:
    """Where the last module is that has parameters of its own: the head."""
    return [path for path, module in model.named_modules() if list(module.parameters(recurse=False))][-1]


def head_parameters(model: nn.Module) -> list[str]:
    """The names of the head's parameters."""
    path = head_path(model)
    return [f"{path}.{name}" if path else name for name, _ in model.get_submodule(path).named_parameters(recurse=False)]


class TaskBatchNorm(nn.Module):
    """BatchNorm inside one task: its mode is given, its running statistics are never written.

    Replaces a BatchNorm layer in a :class:`FunctionalModel`. In mode "support" the model says, by ``start_pass``,
    whether a pass is the support set's (whose statistics are used and kept) or the query set's (which reads them). A
    layer that a pass calls more than once has statistics for each call.

    Args:
        source: the layer replaced. mode: see :class:`innerloop.inner_loop.InnerLoop`.
        elementary: normalise in elementary operations. torch.func differentiates F.batch_norm twice wrongly
            (docs/numerics.md), so whatever runs under it must set this.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    support_mean: Tensor | None  # [calls, 1, C, ...]
    support_var: Tensor | None

    def __init__(self, source: _BatchNorm, mode: AnyBatchNormMode, elementary: bool) -> None:
        super().__init__()
        self._parameters = dict(source._parameters)
        self._buffers = {**source._buffers, "support_mean": None, "support_var": None}
        self.mode = mode
        self.elementary = elementary
        self.eps = source.eps
        self.start_pass(recording=True)
        if mode == "running" and source.running_mean is None:
            raise ValueError("bn is 'running', but the model has a BatchNorm layer with track_running_stats=False")

    def start_pass(self, recording: bool) -> None:
        """recording: the pass is the support set's."""
        self.recording = recording
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "running":
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        if self.mode == "transductive" and not self.elementary:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        if self.mode == "transductive" or self.recording:
            over = [dim for dim in range(x.dim()) if dim != 1]
            if x.numel() == x.shape[1]:  # as F.batch_norm does: the output would be the bias for any input
                raise ValueError(f"Expected more than 1 value per channel to take statistics of, got {list(x.shape)}")
            var, mean = torch.var_mean(x, over, correction=0, keepdim=True)
            if self.mode == "support":
                self._keep(mean, var)
        else:
            assert self.support_mean is not None
            assert self.support_var is not None
            var, mean = self.support_var[self.calls], self.support_mean[self.calls]
            self.calls = (self.calls + 1) % len(self.support_mean)  # a learner's next pass begins anew
        out = (x - mean) * torch.rsqrt(var + self.eps)
        shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        if self.weight is not None:
            out = out * self.weight.view(shape)
        return out if self.bias is None else out + self.bias.view(shape)

    def _keep(self, mean: Tensor, var: Tensor) -> None:
        """The statistics of this call, beside those of the calls before it in this pass."""
        if self.calls == 0 or self.support_mean is None or self.support_var is None:
            self.support_mean, self.support_var = mean[None], var[None]
        else:
            self.support_mean = torch.cat([self.support_mean, mean[None]])
            self.support_var = torch.cat([self.support_var, var[None]])
        self.calls += 1


def copy_structure(
    model: nn.Module, replace: Callable[[nn.Module], nn.Module | None] = lambda module: None
) -> dict[int, nn.Module]:
    """Copies of a module and of every module under it, by the id of the one copied.

    A copy has slots of its own for parameters, buffers and modules; its tensors are the model's. Attributes that refer
    to the model's modules (a list of layers, a bound method, a hook) refer to the copies here.

    Args:
        model: any module. replace: gives the module to put in the place of one, or None to copy it.
    """
    copies: dict[int, nn.Module] = {}
    for module in model.modules():
        twin = replace(module)
        if twin is None:
            twin = type(module).__new__(type(module))
            twin.__dict__ = dict(module.__dict__)
            twin.__dict__.pop("_compiled_call_impl", None)  # of module.compile(), and bound to the module
            twin._parameters = dict(module._parameters)
            twin._buffers = dict(module._buffers)
        copies[id(module)] = twin
    for twin in copies.values():
        for name, value in vars(twin).items():
            if isinstance(value, _MAY_REFER_TO_MODULES) and name not in ("_parameters", "_buffers"):
                twin.__dict__[name] = _redirect(value, copies)
    return copies


def _redirect(value: Any, copies: Mapping[int, nn.Module]) -> Any:
    """The value with the copies in place of the modules copied."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        if not value:  # a module has a dozen of them, for hooks
            return kind()
        return kind((key, _redirect(item, copies)) for key, item in value.items())
    if kind in (list, tuple):
        return kind(_redirect(item, copies) for item in value)
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _redirect(value.__self__, copies))
    return value


def gather_flat_weights(module: nn.RNNBase) -> None:
    """Make the list of weights that a recurrent layer's kernels read hold what its attributes hold now."""
    module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


class FunctionalModel:
    """A copy of a module's structure that runs with whatever parameters it is handed.

    The copy shares nothing that a forward pass writes: parameters are slots of its own, buffers are cloned for every
    task, BatchNorm follows ``bn`` alone. So several threads can run copies of one model at once, and the model stays
    as it is. Attributes that refer to the model's modules (a list of layers, a bound method, a hook) refer to the
    copies here.

    Args:
        model: any module. bn: BatchNorm's mode. elementary: see :class:`TaskBatchNorm`.
        second_order: whether the support passes are differentiated twice; kernels that cannot be are replaced then
            (:mod:`innerloop.second_order`).
        collecting: see :class:`innerloop.inner_loop.InnerLoop`.
    """

    def __init__(
        self,
        model: nn.Module,
        bn: AnyBatchNormMode,
        elementary: bool = False,
        second_order: bool = False,
        collecting: bool = False,
    ) -> None:
        self._norms: list[TaskBatchNorm] = []

        def task_norm(module: nn.Module) -> nn.Module | None:
            if not is_batch_norm(module):
                return None
            assert isinstance(module, _BatchNorm)
            self._norms.append(TaskBatchNorm(module, bn, elementary))
            return self._norms[-1]

        copies = copy_structure(model, task_norm)
        self.module = copies[id(model)]
        # Transformers without their fast path, which reads the layers' weights and calls no forward of theirs.
        for twin in copies.values():
            if isinstance(twin, nn.TransformerEncoderLayer):
                twin.activation_relu_or_gelu = 0
            elif isinstance(twin, nn.TransformerEncoder):
                twin.use_nested_tensor = False
        self._kernels = Kernels(model, self.module, second_order)
        self._is_first_pass = True
        self._per_step = [twin for twin in copies.values() if isinstance(twin, PerStepBatchNorm)]
        for norm in self._per_step:
            norm.collecting = collecting and norm.training
        collected = {id(norm) for norm in self._per_step if norm.collecting}
        self._buffers = [
            (twin, dict(twin._buffers)) for twin in copies.values() if twin._buffers and id(twin) not in collected
        ]
        self._slots: dict[str, list[tuple[nn.Module, str]]] = {}
        first_name: dict[int, str] = {}
        for path, module in self.module.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:  # a tied parameter has several places under its first name
                    name = first_name.setdefault(id(parameter), f"{path}.{leaf}" if path else leaf)
                    self._slots.setdefault(name, []).append((module, leaf))

    @property
    def reads_support_statistics(self) -> bool:
        """Whether a query pass needs a support pass at the same parameters before it."""
        return any(norm.mode == "support" for norm in self._norms)

    def start_task(self) -> None:
        """Give the buffers the model's values again, whatever an earlier task's passes wrote."""
        for module, buffers in self._buffers:
            module._buffers = {name: None if value is None else value.clone() for name, value in buffers.items()}
        self._is_first_pass = True

    def set(self, parameters: Mapping[str, Tensor]) -> None:
        """Put parameters into their places, by the names that model.named_parameters() gives."""
        for name, value in parameters.items():
            for module, leaf in self._slots[name]:
                module._parameters[leaf] = value  # type: ignore[assignment]
                if isinstance(module, nn.RNNBase):
                    gather_flat_weights(module)

    def support(self, parameters: Mapping[str, Tensor], x: Tensor, steps: int = 0) -> Tensor:
        """Outputs for the support set, whose BatchNorm statistics the query passes after it may read.

        steps: inner steps that led to these parameters.
        """
        is_first, self._is_first_pass = self._is_first_pass, False
        outputs = self._run(parameters, x, recording=True, set_of_norms=steps)
        if is_first and self._kernels.must_repeat(outputs, (x, *parameters.values())):
            self.start_task()
            return self.support(parameters, x, steps)
        return outputs

    def query(self, parameters: Mapping[str, Tensor], x: Tensor, steps: int = 0) -> Tensor:
        """Outputs for the query set; see :meth:`support`."""
        return self._run(parameters, x, recording=False, set_of_norms=max(0, steps - 1))

    def as_module(self, parameters: Mapping[str, Tensor], support_x: Tensor, steps: int = 0) -> nn.Module:
        """A module for queries alone, with these parameters and, where it reads them, the support set's statistics;
        steps as in :meth:`support`."""
        self.start_task()
        self.set({name: nn.Parameter(value.clone(), requires_grad=False) for name, value in parameters.items()})
        with torch.no_grad():
            if self.reads_support_statistics:
                self._prepare(recording=True, set_of_norms=0)
                self.module(support_x)
        self._prepare(recording=False, set_of_norms=max(0, steps - 1))
        return self.module

    def _run(self, parameters: Mapping[str, Tensor], x: Tensor, recording: bool, set_of_norms: int) -> Tensor:
        self._prepare(recording, set_of_norms)
        self.set(parameters)
        with self._kernels.chosen():
            return self.module(x)

    def _prepare(self, recording: bool, set_of_norms: int) -> None:
        for norm in self._norms:
            norm.start_pass(recording)
        for per_step in self._per_step:
            per_step.step = set_of_norms
