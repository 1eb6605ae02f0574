"""All rivals by name: those of innerloop.bench.rivals, which says what a rival is, and other libraries.

The modules here are found, in a worker's process, because it looks in the folders of this process too. Of HEADS, make
takes a HeadWorkload; the loss is the mean over tasks, the gradients those of the embeddings of support and query.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from innerloop.bench import rivals as own
from innerloop.bench.rivals import Rival

#: Whose folders are the environments that peers.sh makes.
PEERS = Path(__file__).parents[2] / ".cache" / "peers"


def _peer(title: str, module: str, distribution: str, **options: Any) -> Rival:
    """Of another library, in the environment of its name."""
    return Rival(title, f"{__name__}.{module}", distribution, PEERS / distribution, options)


def _here(title: str, module: str, distribution: str = "torch", **options: Any) -> Rival:
    return Rival(title, f"{__name__}.{module}", distribution, options=options)


RIVALS = {
    **own.RIVALS,
    "learn2learn": _peer("learn2learn", "learn2learn_maml", "learn2learn"),
    "compat": _here(
        "learn2learn names, compat", "learn2learn_maml", "innerloop", package="innerloop.compat.learn2learn"
    ),
    "higher": _peer("higher", "higher_maml", "higher"),
    "torchopt": _peer("TorchOpt", "torchopt_maml", "torchopt"),
    "torchmeta": _peer("torchmeta", "torchmeta_maml", "torchmeta"),
    "parallel-metalearn": _peer("parallel-metalearn", "parallel_metalearn_maml", "parallel-metalearn"),
    "jax-vmap": _peer("JAX jit, vmap over tasks", "jax_maml", "jax", over_tasks="vmap"),
    "jax-map": _peer("JAX jit, lax.map over tasks", "jax_maml", "jax", over_tasks="map"),
    "jax-loop": _peer("JAX jit, a call for each task", "jax_maml", "jax", over_tasks="loop"),
}

#: Of heads: names begin with the kind of workload.
HEADS = {
    "prototypes-innerloop": _here("innerloop", "prototypes_innerloop", "innerloop"),
    "prototypes-reference": _here("torch, differences [T, Q, N, D]", "prototypes_torch", form="reference"),
    "prototypes-expanded": _here("torch, expanded", "prototypes_torch", form="expanded"),
    "prototypes-no-norms": _here("torch, expanded without ‖q‖²", "prototypes_torch", form="no_norms"),
    "prototypes-cdist": _here("torch.cdist", "prototypes_torch", form="cdist"),
    "prototypes-easyfsl": _peer("easyfsl", "prototypes_easyfsl", "easyfsl"),
    "prototypes-learn2learn": _peer("learn2learn", "prototypes_learn2learn", "learn2learn"),
    "prototypes-torchmeta": _peer("torchmeta", "prototypes_torchmeta", "torchmeta"),
    "prototypes-jax": _peer("JAX jit", "prototypes_jax", "jax", query_norms=True),
    "prototypes-jax-no-norms": _peer("JAX jit, without ‖q‖²", "prototypes_jax", "jax", query_norms=False),
    "ridge-innerloop": _here("innerloop", "ridge_innerloop", "innerloop"),
    "ridge-reference": _here("torch, linalg.solve", "ridge_torch", solver="solve"),
    "ridge-cholesky": _here("torch, Cholesky", "ridge_torch", solver="cholesky"),
    "svm-innerloop": _here("innerloop", "svm_innerloop", "innerloop", native=True),
    "svm-reference": _here("torch, dense interior point", "svm_innerloop", native=False),
    "svm-qpth": _peer("qpth, the authors' form", "svm_qpth", "qpth"),
}

ALL_RIVALS = {**RIVALS, **HEADS}
