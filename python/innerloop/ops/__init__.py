"""The native ops: checked, differentiable functions over ``torch.ops.innerloop``.

Call these, not ``torch.ops.innerloop`` itself: under torch.func's transforms and forward mode, torch differentiates a
direct call of a custom op wrongly without a word.
"""

from innerloop.ops.attention_classify import attention_classify
from innerloop.ops.inner_update import inner_update
from innerloop.ops.pairwise_distance import pairwise_distance
from innerloop.ops.prototype_logits import prototype_logits, prototype_loss
from innerloop.ops.prototypes import prototypes

__all__ = [
    "attention_classify",
    "inner_update",
    "pairwise_distance",
    "prototype_logits",
    "prototype_loss",
    "prototypes",
]
