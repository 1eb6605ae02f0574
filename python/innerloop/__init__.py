"""Meta-learning for PyTorch: exact meta-gradients of a whole batch of tasks in one call, and plug-in algorithms."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

from innerloop.contract import Algorithm, Dataset, EmbeddingAlgorithm, Result
from innerloop.registry import PluginError, UnknownNameError, algorithms
from innerloop.tasks import TaskBatch

available = algorithms.available
get = algorithms.get
register = algorithms.register

# Imported when first used, so that `import innerloop` stays light.
_LAZY = {
    "maml_loss": "innerloop.engine",
    "explain": "innerloop.explanation",
    "fit": "innerloop.training",
    "evaluate": "innerloop.evaluation",
    "data": "innerloop.data",
    "models": "innerloop.models",
    "ops": "innerloop.ops",
    "primitives": "innerloop.primitives",
    "SecondOrderWarning": "innerloop.second_order",
}

__all__ = [
    "Algorithm",
    "Dataset",
    "EmbeddingAlgorithm",
    "PluginError",
    "Result",
    "TaskBatch",
    "UnknownNameError",
    "available",
    "get",
    "register",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("innerloop")
    if name not in _LAZY:
        raise AttributeError(f"module 'innerloop' has no attribute {name!r}")
    module = import_module(_LAZY[name])
    value = module if _LAZY[name] == f"innerloop.{name}" else getattr(module, name)
    globals()[name] = value  # found at once the next time
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
