"""Almost No Inner Loop."""

from __future__ import annotations

from innerloop.algorithms.maml import MAML


class ANIL(MAML):
    """ANIL: MAML whose inner loop adapts the head alone (Raghu et al. 2020).

    The body is shared by all tasks and learned by the outer loop; the options are MAML's.
    """

    def adapted(self) -> list[str]:
        """The last module that has parameters of its own: the head."""
        owners = [name for name, module in self.model.named_modules() if list(module.parameters(recurse=False))]
        return owners[-1:]
