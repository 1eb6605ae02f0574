"""Almost No Inner Loop."""

from __future__ import annotations

from innerloop.algorithms.maml import MAML


class ANIL(MAML):
    """ANIL: MAML whose inner loop adapts the head alone (Raghu et al. 2020).

    The body is shared by all tasks and learned by the outer loop; the options are MAML's.
    """

    def adapted(self) -> list[str]:
        """The parameters of the last module that has any of its own: the head."""
        owners = [path for path, module in self.model.named_modules() if list(module.parameters(recurse=False))]
        head = dict(self.model.named_modules())[owners[-1]]
        path = f"{owners[-1]}." if owners[-1] else ""
        return [path + name for name, _ in head.named_parameters(recurse=False)]
