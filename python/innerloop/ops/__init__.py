"""The native ops: checked, differentiable functions over ``torch.ops.innerloop``.

Call these, not ``torch.ops.innerloop`` itself: under torch.func's transforms and forward mode, torch differentiates a
direct call of a custom op wrongly without a word.
"""

from innerloop.ops.inner_update import inner_update
from innerloop.ops.pairwise_distance import pairwise_distance
from innerloop.ops.prototypes import prototypes

__all__ = ["inner_update", "pairwise_distance", "prototypes"]
