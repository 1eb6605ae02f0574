"""Training and evaluation shared between the processes of torch.distributed.

Every process holds the whole algorithm and the same random streams. A batch of tasks is cut into shares of whole tasks,
each process computes its share's gradient, and the gradients are added up: the meta-gradient of a mean over tasks is
the mean of the tasks' gradients, so the result is that of one process up to rounding. Without a process group, or with
one process, everything here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; the one with 0 writes files and talks."""
    return dist.get_rank() if world_size() > 1 else 0


def is_launched() -> bool:
    """Whether torchrun, or its like, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_restarted() -> bool:
    """Whether torchrun started this process in place of one that failed."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def process_group() -> Iterator[None]:
    """Inside, the processes that torchrun started are one group (gloo for CPU tensors); nothing for one by itself."""
    if not is_launched():
        yield
        return
    # torchrun keeps its store over a restart: by keys of its own, no process takes the address of a dead one from it.
    store, own_rank, size = next(rendezvous("env://"))
    # Public by torch's documentation; torch.distributed only does not list it for type checkers.
    attempt = dist.PrefixStore(f"attempt {_restarts()}", store)  # type: ignore[attr-defined]
    dist.init_process_group(store=attempt, rank=own_rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(count: int) -> range:
    """Which of so many tasks are this process's: consecutive ones, as many as others have, or one more or less."""
    size, own = world_size(), rank()
    return range(count * own // size, count * (own + 1) // size)


def add_up(values: Tensor) -> Tensor:
    """values, added up over the processes; in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def add_up_gradients(parameters: Iterable[nn.Parameter], weight: float) -> None:
    """Replace every gradient by the sum over the processes of their weight times theirs; one without counts as 0.

    One call for each dtype and device, over all of them laid end to end.
    """
    if world_size() == 1:
        return
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    present = add_up(torch.tensor([parameter.grad is not None for parameter in learned], dtype=torch.int32))
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter, holders in zip(learned, present.tolist(), strict=True):
        if holders:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for members in groups.values():
        parts = [member.new_zeros(member.shape) if member.grad is None else member.grad for member in members]
        total = add_up(torch.cat([part.flatten() for part in parts]).mul_(weight))
        for member, part in zip(members, total.split([part.numel() for part in parts]), strict=True):
            member.grad = part.view_as(member)


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every process the values that the first one has; in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
