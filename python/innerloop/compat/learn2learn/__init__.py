"""learn2learn's names: a script written for learn2learn 0.2.0 runs with one changed import.

    import innerloop.compat.learn2learn as l2l          # was: import learn2learn as l2l

    maml = l2l.algorithms.MAML(model, lr=0.4)
    for support_x, support_y, query_x, query_y in tasks:
        learner = maml.clone()
        learner.adapt(loss(learner(support_x), support_y))
        (loss(learner(query_x), query_y) / len(tasks)).backward()

Here are ``algorithms`` (MAML, MetaSGD and their updates) and ``utils`` (clone_module, update_module, detach_module and
the small ones), in modules of the same names and with the same signatures and gradients. Every other name (``data``,
``vision``, ``nn``, ``optim``, GBML …) is learn2learn's own, where that is installed. docs/learn2learn.md says what was
compared, and where this differs.

**This form cannot be batched.** A learner sees one task's loss, computed by the caller's code, so each task costs an
autograd graph of its own, here as in learn2learn. :func:`innerloop.maml_loss` takes the place of the whole loop, gives
the same gradients, and is several times as fast:

    loss = innerloop.maml_loss(model, innerloop.TaskBatch.from_tasks(tasks), inner_lr=0.4)
    loss.backward()
"""

from __future__ import annotations

from innerloop.compat.learn2learn import algorithms, utils
from innerloop.compat.learn2learn._peer import names_of
from innerloop.compat.learn2learn.utils import (
    accuracy,
    clone_module,
    clone_named_parameters,
    clone_parameters,
    detach_module,
    magic_box,
    update_module,
)

__all__ = [
    "accuracy",
    "algorithms",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "detach_module",
    "magic_box",
    "update_module",
    "utils",
]

__getattr__ = names_of("learn2learn")
