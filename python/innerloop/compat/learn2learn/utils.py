"""Modules whose parameters are part of an autograd graph: cloned, updated and detached (learn2learn.utils)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from innerloop.compat.learn2learn._peer import names_of
from innerloop.functional import copy_structure, gather_flat_weights

Module = TypeVar("Module", bound="nn.Module | None")


def clone_module(module: Module, memo: MutableMapping[Tensor, Tensor] | None = None) -> Module:
    """A copy of a module whose parameters are clones of the module's in the autograd graph.

    So a loss of the copy reaches the module's parameters. Buffers that require grad are cloned too; the others, such as
    BatchNorm's running statistics, are shared: a forward pass of the copy in train mode writes the module's.

    Args:
        module: any module. What is none, an empty place in a ModuleList, is returned as it came.
        memo: tensor → its clone, for modules cloned by several calls that share parameters; filled in.
    """
    if not isinstance(module, nn.Module):
        return module
    memo = {} if memo is None else memo
    copies = copy_structure(module)
    for part in copies.values():
        for slots in _slots(part):
            for name, tensor in slots.items():
                if tensor is not None and (slots is part._parameters or tensor.requires_grad):
                    if tensor not in memo:
                        memo[tensor] = tensor.clone()
                    slots[name] = memo[tensor]
        if isinstance(part, nn.RNNBase):
            gather_flat_weights(part)
    clone: Any = copies[id(module)]
    return clone


def update_module(
    module: Module,
    updates: Sequence[Tensor | None] | None = None,
    memo: MutableMapping[Tensor, Tensor] | None = None,
) -> Module:
    """Replace each parameter p of a module by p + its update, differentiably; the module is changed and returned.

    Args:
        module: a clone, or any module whose parameters may become tensors of a graph.
        updates: one for each of module.parameters(), of its shape; None leaves a parameter. If the argument itself is
            None, an attribute ``update`` of a parameter or buffer is its update; it is used up.
        memo: tensor → what replaced it, for modules updated by several calls that share parameters; filled in.
    """
    if not isinstance(module, nn.Module):
        return module
    memo = {} if memo is None else memo
    if updates is not None:
        parameters = list(module.parameters())
        if len(updates) != len(parameters):
            warnings.warn(
                f"updates has {len(updates)} entries, expected {len(parameters)}, one for each parameter; they are "
                "paired in order, and what is left over is left out",
                stacklevel=2,
            )
        for parameter, update in zip(parameters, updates, strict=False):
            parameter.update = update  # type: ignore[attr-defined]  # where learn2learn's users put it too
    for part in module.modules():
        for slots in _slots(part):
            for name, tensor in slots.items():
                if tensor is None:
                    continue
                update = getattr(tensor, "update", None)
                if tensor not in memo and update is not None:
                    memo[tensor] = tensor + update
                    tensor.update = None
                slots[name] = memo.get(tensor, tensor)
        if isinstance(part, nn.RNNBase):
            gather_flat_weights(part)
    return module


def detach_module(module: nn.Module | None, keep_requires_grad: bool = False) -> None:
    """Cut a module's parameters, and its buffers that require grad, off their graph, in place.

    Args:
        module: any module; what is none is left alone.
        keep_requires_grad: those that required grad become leaves that do; else nothing requires grad any more.
    """
    if not isinstance(module, nn.Module):
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.requires_grad:
            tensor.detach_()
            if keep_requires_grad:
                tensor.requires_grad_()


def _slots(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a module keeps parameters, and buffers. A clone's parameters are tensors of a graph, which torch's own type
    of the first does not foresee."""
    return module._parameters, module._buffers


def clone_parameters(param_list: Iterable[Tensor]) -> list[Tensor]:
    """Clones of tensors, in their graph."""
    return [parameter.clone() for parameter in param_list]


def clone_named_parameters(param_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clones of tensors, in their graph, by the same names."""
    return {name: parameter.clone() for name, parameter in param_dict.items()}


def magic_box(x: Tensor) -> Tensor:
    """exp(x − x held constant): the value 1 with the gradient of x (DiCE, Foerster et al. 2018, equation 7).

    What is no tensor is returned as it came.
    """
    return torch.exp(x - x.detach()) if isinstance(x, Tensor) else x


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """The share of rows of preds [N, ways] whose largest entry is at the target [N]; 0-d float."""
    return (preds.argmax(dim=1) == targets).sum().float() / preds.size(0)


__getattr__ = names_of("learn2learn.utils")
