"""MAML and Meta-SGD as wrappers of a module (learn2learn.algorithms)."""

from __future__ import annotations

from innerloop.compat.learn2learn._peer import names_of
from innerloop.compat.learn2learn.algorithms.maml import MAML, maml_update
from innerloop.compat.learn2learn.algorithms.meta_sgd import MetaSGD, meta_sgd_update

__all__ = ["MAML", "MetaSGD", "maml_update", "meta_sgd_update"]

__getattr__ = names_of("learn2learn.algorithms")
