"""innerloop.fit on tasks that one has already: a list of TaskBatch, with the two-layer net of the MAML baselines."""

from __future__ import annotations

import torch

import innerloop
from innerloop import TaskBatch

# Each task has its own two prototypes, which differ in the first 20 features; a sample is one of them with noise in all
# of 784. What can be learned across tasks is where to look.
torch.manual_seed(0)
tasks = []
for _ in range(200):
    prototypes = torch.cat((2 * torch.randn(8, 2, 1, 20), torch.zeros(8, 2, 1, 764)), dim=3)
    samples = prototypes + torch.randn(8, 2, 6, 784)
    labels = torch.arange(2)[:, None].expand(8, 2, 6)
    support, query = samples.split([1, 5], dim=2)
    support_y, query_y = labels.split([1, 5], dim=2)
    tasks.append(TaskBatch(support.flatten(1, 2), support_y.flatten(1, 2), query.flatten(1, 2), query_y.flatten(1, 2)))

algorithm = innerloop.get("maml")(innerloop.models.SimpleModel(784, 128, 2), inner_lr=0.1, inner_steps=2)
history = innerloop.fit(algorithm, tasks)
for record in history.steps[::40]:
    print(f"step {record['step']}: loss {record['loss']:.3f}, accuracy {record['accuracy']:.2f}")
