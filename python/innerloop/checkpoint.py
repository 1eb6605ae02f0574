"""Training state on disk: one safetensors file, written whole or not at all. No pickle is written or read.

The file's metadata hold a SHA-256 of all that it says, so that a damaged one is refused instead of silently read. The
checkpoint that a new one replaces stays beside it as NAME.previous.safetensors, and is offered where the new one is
refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from innerloop.atomic import write_atomically

FORMAT = "innerloop-checkpoint-2"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit; the message names the file."""


def previous_of(path: Path) -> Path:
    """Where the checkpoint that was at path before stays."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


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
    text = json.dumps(header)
    metadata = {"format": FORMAT, "json": text, "sha256": _digest(tensors, text)}
    _keep_as_previous(path)
    write_atomically(path, save(tensors, metadata=metadata))


def load_checkpoint(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Read a checkpoint into a module, and with an optimizer into it and torch's random state; returns the JSON data.

    Nothing is changed where the file cannot be read whole.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint, or of another module.
    """
    try:
        tensors, header = _read(path)
    except CheckpointError as error:
        raise _with_offer(path, error) from error.__cause__
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


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON data) of a checkpoint that is what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping, but has keys)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of innerloop (format {metadata.get('format')!r})")
    text = metadata.get("json", "")
    if _digest(tensors, text) != metadata.get("sha256"):
        raise CheckpointError(f"checkpoint {path} is damaged: it is not what was written (SHA-256)")
    header: dict[str, Any] = json.loads(text)
    return tensors, header


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    hashed = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        hashed.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        hashed.update(value.flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _keep_as_previous(path: Path) -> None:
    """A second name for the file at path, which is about to be replaced."""
    with suppress(OSError):  # no file yet; or a file system without hard links, where none is kept
        previous_of(path).unlink(missing_ok=True)
        os.link(path, previous_of(path))


def _with_offer(path: Path, error: CheckpointError) -> CheckpointError:
    """The error, with the checkpoint before where that is sound."""
    previous = previous_of(path)
    try:
        step = _read(previous)[1]["state"].get("step", "?")
    except CheckpointError:
        return error
    return CheckpointError(
        f"{error}. The checkpoint before it, {previous} (step {step}), is sound: rename it to {path.name} to use it"
    )
