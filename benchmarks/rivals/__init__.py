"""The libraries and forms of code that compute the same gradient, each behind the same two functions.

A rival is a module with

    make(workload, dtype, **options) -> step     step() computes (loss, gradients); arrays of any kind. Of RIVALS: the
                                                 meta-loss, and one for each of make_model(workload).parameters(); of
                                                 HEADS: the mean loss, and those of the embeddings of support and query
    cannot(workload, **options) -> str | None    why it does not run a workload; left out where it runs all

Everything that a user would do once (building the model, making tensors) happens in make; a step is what happens in
every iteration of training, without the outer optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from head_workloads import HeadWorkload
from workloads import Workload

Step = Callable[[], tuple[Any, Sequence[Any]]]


@dataclass(frozen=True)
class Rival:
    """Where a rival is found.

    Attributes:
        title: in the tables. module: in this folder. distribution: whose version the results record.
        peer: its folder under .cache/peers, made by peers.sh; None where the project's environment has it.
    """

    title: str
    module: str
    distribution: str = "torch"
    peer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def cannot(self, workload: Workload | HeadWorkload) -> str | None:
        reason = getattr(import_module(f"rivals.{self.module}"), "cannot", None)
        return reason(workload, **self.options) if reason else None

    def make(self, workload: Workload | HeadWorkload, dtype: str) -> Step:
        return import_module(f"rivals.{self.module}").make(workload, dtype, **self.options)


#: What everything is measured against.
OURS = "innerloop"

RIVALS = {
    OURS: Rival("innerloop, whole step", "innerloop_step", "innerloop", options={"engine": "native"}),
    "innerloop-op": Rival("innerloop, the op alone", "innerloop_op", "innerloop"),
    "innerloop-torch": Rival("innerloop, torch engine", "innerloop_step", "innerloop", options={"engine": "torch"}),
    "loop": Rival("torch loop", "torch_loop"),
    "vmap": Rival("torch.func vmap", "torch_vmap"),
    "vmap-exact": Rival("torch.func vmap, BatchNorm written out", "torch_vmap", options={"exact_batch_norm": True}),
    "compile": Rival("torch.compile over vmap", "torch_vmap", options={"exact_batch_norm": True, "compiled": True}),
    "learn2learn": Rival("learn2learn", "learn2learn_maml", "learn2learn", "learn2learn"),
    "compat": Rival(
        "learn2learn names, compat",
        "learn2learn_maml",
        "innerloop",
        options={"package": "innerloop.compat.learn2learn"},
    ),
    "higher": Rival("higher", "higher_maml", "higher", "higher"),
    "torchopt": Rival("TorchOpt", "torchopt_maml", "torchopt", "torchopt"),
    "torchmeta": Rival("torchmeta", "torchmeta_maml", "torchmeta", "torchmeta"),
    "parallel-metalearn": Rival(
        "parallel-metalearn", "parallel_metalearn_maml", "parallel-metalearn", "parallel-metalearn"
    ),
    "jax-vmap": Rival("JAX jit, vmap over tasks", "jax_maml", "jax", "jax", {"over_tasks": "vmap"}),
    "jax-map": Rival("JAX jit, lax.map over tasks", "jax_maml", "jax", "jax", {"over_tasks": "map"}),
    "jax-loop": Rival("JAX jit, a call for each task", "jax_maml", "jax", "jax", {"over_tasks": "loop"}),
}

#: Of heads: names begin with the kind of workload.
HEADS = {
    "prototypes-innerloop": Rival("innerloop", "prototypes_innerloop", "innerloop"),
    "prototypes-reference": Rival("torch, differences [T, Q, N, D]", "prototypes_torch", options={"form": "reference"}),
    "prototypes-expanded": Rival("torch, expanded", "prototypes_torch", options={"form": "expanded"}),
    "prototypes-no-norms": Rival("torch, expanded without ‖q‖²", "prototypes_torch", options={"form": "no_norms"}),
    "prototypes-cdist": Rival("torch.cdist", "prototypes_torch", options={"form": "cdist"}),
    "prototypes-easyfsl": Rival("easyfsl", "prototypes_easyfsl", "easyfsl", "easyfsl"),
    "prototypes-learn2learn": Rival("learn2learn", "prototypes_learn2learn", "learn2learn", "learn2learn"),
    "prototypes-torchmeta": Rival("torchmeta", "prototypes_torchmeta", "torchmeta", "torchmeta"),
    "prototypes-jax": Rival("JAX jit", "prototypes_jax", "jax", "jax", {"query_norms": True}),
    "prototypes-jax-no-norms": Rival("JAX jit, without ‖q‖²", "prototypes_jax", "jax", "jax", {"query_norms": False}),
    "ridge-innerloop": Rival("innerloop", "ridge_innerloop", "innerloop"),
    "ridge-reference": Rival("torch, linalg.solve", "ridge_torch", options={"solver": "solve"}),
    "ridge-cholesky": Rival("torch, Cholesky", "ridge_torch", options={"solver": "cholesky"}),
    "svm-innerloop": Rival("innerloop", "svm_innerloop", "innerloop", options={"native": True}),
    "svm-reference": Rival("torch, dense interior point", "svm_innerloop", options={"native": False}),
    "svm-qpth": Rival("qpth, the authors' form", "svm_qpth", "qpth", "qpth"),
}

ALL_RIVALS = {**RIVALS, **HEADS}
