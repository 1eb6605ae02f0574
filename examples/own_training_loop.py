"""MAML in a training loop of one's own: any model, any torch optimizer, any source of tasks."""

from __future__ import annotations

import torch

import innerloop

tasks = innerloop.data.get("glyphs").split("train")
model = innerloop.models.SimpleModel(784, 128, 5)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

for step in range(200):
    batch = tasks.sample(tasks=16, ways=5, shots=1, queries=5, seed=0, first_task=16 * step)
    loss = innerloop.maml_loss(model, batch, inner_lr=0.1, inner_steps=3)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if (step + 1) % 50 == 0:
        print(f"step {step + 1}: meta-loss {loss.item():.3f}")
