"""Body Only update in Inner Loop."""

from __future__ import annotations

from innerloop.algorithms.maml import MAML
from innerloop.functional import head_parameters


class BOIL(MAML):
    """BOIL: MAML whose inner loop adapts the body alone, and never the head (Oh et al. 2021).

    The head is shared by all tasks and learned by the outer loop; the options are MAML's.
    """

    def adapted(self) -> list[str]:
        """All parameters but the head's."""
        head = head_parameters(self.model)
        body = [name for name, _ in self.model.named_parameters() if name not in head]
        if not body:
            raise ValueError("model has no parameters before its head: BOIL has nothing to adapt")
        return body
