"""The forms of code that compute the same gradient, each behind the same two functions.

A rival is a module with

    make(workload, dtype, **options) -> step     step() computes (loss, gradients); arrays of any kind: of a Workload
                                                 the meta-loss, and a gradient for each of make_model(workload)'s
                                                 parameters
    cannot(workload, **options) -> str | None    why it does not run a workload; left out where it runs all

Everything that a user would do once (building the model, making tensors) happens in make; a step is what happens in
every iteration of training, without the outer optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

#: (loss, gradients): arrays of any kind.
LossAndGradients = tuple[Any, Sequence[Any]]
Step = Callable[[], LossAndGradients]


@dataclass(frozen=True)
class Rival:
    """Where a rival is found.

    Attributes:
        title: in the tables. module: by its full name. distribution: whose version the results record.
        environment: the folder of the virtual environment whose Python runs it; None for this process's.
        options: of make and cannot.
    """

    title: str
    module: str
    distribution: str = "torch"
    environment: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def cannot(self, workload: Any) -> str | None:
        reason = getattr(import_module(self.module), "cannot", None)
        return reason(workload, **self.options) if reason else None

    def make(self, workload: Any, dtype: str) -> Step:
        return import_module(self.module).make(workload, dtype, **self.options)


@dataclass(frozen=True)
class Order:
    """What a worker is told to run.

    Attributes:
        workload: what the rival's make takes. dtype: "float32" or "float64". threads: of torch, OpenMP and XLA.
    """

    rival: Rival
    workload: Any
    dtype: str
    threads: int


#: What everything is measured against, and what gradients are compared with.
OURS, ORACLE = "innerloop", "innerloop-torch"


def _here(title: str, module: str, distribution: str = "torch", **options: Any) -> Rival:
    return Rival(title, f"{__name__}.{module}", distribution, options=options)


#: Those that need nothing but torch.
RIVALS = {
    OURS: _here("innerloop, whole step", "innerloop_step", "innerloop", engine="native"),
    "innerloop-op": _here("innerloop, the op alone", "innerloop_op", "innerloop"),
    ORACLE: _here("innerloop, torch engine", "innerloop_step", "innerloop", engine="torch"),
    "loop": _here("torch loop", "torch_loop"),
    "vmap": _here("torch.func vmap", "torch_vmap"),
    "vmap-exact": _here("torch.func vmap, BatchNorm written out", "torch_vmap", exact_batch_norm=True),
    "compile": _here("torch.compile over vmap", "torch_vmap", exact_batch_norm=True, compiled=True),
}
