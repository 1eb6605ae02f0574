"""Almost No Inner Loop."""

from __future__ import annotations

from innerloop.algorithms.maml import MAML
from innerloop.functional import head_parameters


class ANIL(MAML):
    """ANIL: MAML whose inner loop adapts the head alone (Raghu et al. 2020).

    The body is shared by all tasks and learned by the outer loop; the options are MAML's.
    """

    def adapted(self) -> list[str]:
        """The head's."""
        return head_parameters(self.model)
