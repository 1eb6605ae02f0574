"""MAML of a small transformer whose inner loop adapts its LoRA matrices alone (Hu et al. 2022); the rest is shared."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop


class LoRALinear(nn.Linear):
    """A linear layer plus a product of two thin matrices, which begins as zero."""

    def __init__(self, inputs: int, outputs: int, rank: int = 4) -> None:
        super().__init__(inputs, outputs)
        self.lora_a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = LoRALinear(width, 3 * width), LoRALinear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attention(self.attention_norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.projection(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Classifies an image as a sequence of strips, four rows each."""

    def __init__(self, ways: int, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.position = nn.Linear(4 * 28, width), nn.Parameter(0.1 * torch.randn(7, width))
        self.blocks = nn.Sequential(Block(width, heads=4), Block(width, heads=4))
        self.head = nn.Sequential(nn.LayerNorm(width), LoRALinear(width, ways))

    def forward(self, x: Tensor) -> Tensor:
        strips = self.embedding(x.flatten(1).unflatten(1, (7, 4 * 28))) + self.position
        return self.head(self.blocks(strips).mean(1))


# Fused attention has no second derivative: the inner loop takes the math kernel, and says so once.
warnings.simplefilter("ignore", innerloop.SecondOrderWarning)

torch.manual_seed(0)
tasks = innerloop.data.get("glyphs").split("train")
model = Transformer(ways=5)
sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
adapted = sum(size for name, size in sizes.items() if ".lora_" in name)
print(f"The inner loop adapts {adapted:,} of {sum(sizes.values()):,} parameters")
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

recent = []
for step in range(50):
    batch = tasks.sample(tasks=4, ways=5, shots=1, queries=3, seed=0, first_task=4 * step)
    loss = innerloop.maml_loss(model, batch, inner_lr=0.3, inner_steps=2, adapt="*.lora_*")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    recent.append(loss.item())
    if (step + 1) % 10 == 0:
        print(f"step {step + 1}: loss {sum(recent) / len(recent):.3f}")
        recent.clear()
