"""What must work where innerloop was installed, without its sources: run by that Python, in any folder."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

import innerloop
from innerloop import _library

warnings.simplefilter("error")

for module in (innerloop.__file__, _library.CPU_LIBRARY):
    assert module is not None
    assert Path(module).is_relative_to(sys.prefix), module

torch.manual_seed(0)
tasks = innerloop.data.get("glyphs").split("train").sample(tasks=3, ways=5, shots=1, queries=5, seed=0)
assert tasks.support_x.shape == (3, 5, 1, 28, 28)
model = innerloop.models.conv4(tasks.support_x.shape[2:], 5, filters=8).double()
gradients = {}
for engine in ("native", "torch"):
    loss = innerloop.maml_loss(model, tasks.to(torch.float64), inner_lr=0.1, inner_steps=2, engine=engine)
    gradients[engine] = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
torch.testing.assert_close(gradients["native"], gradients["torch"], rtol=1e-9, atol=1e-12)
assert gradients["native"].norm() > 0
