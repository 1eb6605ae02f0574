"""What a second process costs a training step: the same number of tasks for each process, alone and together.

    .venv/bin/python benchmarks/weak_scaling.py

In one pair of processes, a thread each, in turns: a step of the first process while the other waits, and a step of both
with their gradients added up. Wall clock, medians; of use on idle cores only.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from innerloop import TaskBatch, maml_loss
from innerloop.bench.rivals.innerloop_step import inner_loop_of
from innerloop.bench.rivals.torch_parts import batch
from innerloop.bench.workloads import WORKLOADS, Workload, make_model
from innerloop.distributed import add_up_gradients

#: Workload → tasks of a process.
TASKS = {"mlp784-k5": 32, "omniglot-k1": 4, "miniimagenet-k5": 1}
ROUNDS = 9


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    if rank == 0:
        print("| model | parameters | tasks a process | alone, ms | two processes, ms | × | adding up, ms | sent, MB |")
        print("|---|---|---|---|---|---|---|---|")
    for name, count in TASKS.items():
        row = measure(replace(WORKLOADS[name], tasks=count), rank)
        if rank == 0:
            print(row, flush=True)
    dist.destroy_process_group()


def measure(workload: Workload, rank: int) -> str:
    model = make_model(workload, "float32")
    parameters = list(model.parameters())
    tasks = TaskBatch(*batch(workload, "float32"))
    inner_loop = inner_loop_of(workload, model)

    def seconds() -> float:
        start = time.perf_counter()
        model.zero_grad()
        maml_loss(model, tasks, **inner_loop, engine="native").backward()
        return time.perf_counter() - start

    alone, together, adding = [], [], []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        if rank == 0:
            alone.append(seconds())
        dist.barrier()
        computing = seconds()
        dist.barrier()
        start = time.perf_counter()
        add_up_gradients(parameters, 0.5)
        adding.append(time.perf_counter() - start)
        together.append(computing + adding[-1])
    if rank > 0:
        return ""
    size = sum(parameter.numel() for parameter in parameters)
    one, two, sum_up = (1000 * statistics.median(samples[1:]) for samples in (alone, together, adding))
    return (
        f"| {workload.title} | {size:,} | {workload.tasks} | {one:.1f} | {two:.1f} | {two / one:.2f} | {sum_up:.2f} | "
        f"{4e-6 * size:.2f} |"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, (folder,), nprocs=2)
