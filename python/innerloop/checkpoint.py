"""Training state on disk: one safetensors file, written whole or not at all. No pickle is written or read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from innerloop.atomic import write_atomically

FORMAT = "innerloop-checkpoint-1"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit; the message names the file."""


def save_checkpoint(
    path: Path, module: nn.Module, state: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Write a module's parameters and buffers, an optimizer's state and JSON data as one consistent file."""
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    header: dict[str, Any] = {"state": dict(state)}
    if optimizer is not None:
        saved = optimizer.state_dict()
        header["param_groups"] = saved["param_groups"]
        header["optimizer_numbers"] = {}
        for index, entries in saved["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                else:
                    header["optimizer_numbers"][f"{index}.{key}"] = value
        tensors["random"] = torch.get_rng_state()
    # Tied parameters share memory, which safetensors refuses: each is written out.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, save(tensors, metadata={"format": FORMAT, "json": json.dumps(header)}))


def load_checkpoint(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Read a checkpoint into a module, and with an optimizer into it and torch's random state; returns the JSON data.

    Nothing is changed where the file cannot be read whole.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint, or of another module.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping, but has keys)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of innerloop (format {metadata.get('format')!r})")
    header = json.loads(metadata["json"])
    own = {name.removeprefix("module."): value for name, value in tensors.items() if name.startswith("module.")}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {path} is of another model: {error}") from error
    if optimizer is not None:
        if "param_groups" not in header:
            raise CheckpointError(f"checkpoint {path} holds no optimizer state to resume from")
        entries: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = value
        for name, value in header["optimizer_numbers"].items():
            index, key = name.split(".", 1)
            entries.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": entries, "param_groups": header["param_groups"]})
        torch.set_rng_state(tensors["random"])
    state: dict[str, Any] = header["state"]
    return state
