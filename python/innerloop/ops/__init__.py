"""The native ops: checked, differentiable functions over ``torch.ops.innerloop``.

Call these, not ``torch.ops.innerloop`` itself: under torch.func's transforms and forward mode, torch differentiates a
direct call of a custom op wrongly without a word.
"""

from innerloop.ops.attention_classify import attention_classify
from innerloop.ops.coordinate_lstm import coordinate_lstm
from innerloop.ops.inner_update import inner_update
from innerloop.ops.pairwise_distance import pairwise_distance
from innerloop.ops.prototype_logits import prototype_logits, prototype_loss
from innerloop.ops.prototypes import prototypes
from innerloop.ops.ridge_head import ridge_head
from innerloop.ops.svm_head import SvmSolution, svm_head, svm_solve

__all__ = [
    "SvmSolution",
    "attention_classify",
    "coordinate_lstm",
    "inner_update",
    "pairwise_distance",
    "prototype_logits",
    "prototype_loss",
    "prototypes",
    "ridge_head",
    "svm_head",
    "svm_solve",
]
