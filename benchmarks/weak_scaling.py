"""What a second process costs a training step: the same number of tasks for each process, alone and together.

    .venv/bin/python benchmarks/weak_scaling.py

In one pair of processes, a thread each, in turns: a step of the first process while the other waits, and a step of both
with their gradients added up. Wall clock, medians; of use on idle cores only.
"""

from __future__ import annotations

import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from innerloop import TaskBatch, maml_loss
from innerloop.distributed import add_up_gradients
from rivals.innerloop_step import inner_loop_of
from rivals.torch_parts import batch
from workloads import WORKLOADS, make_model

#: Workload → tasks of a process.
TASKS = {"mlp784-k5": 32, "omniglot-k1": 4, "miniimagenet-k5": 1, "resnet12-k1": 1}
ROUNDS = 9


def measure(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    if rank == 0:
        print("| model | parameters | tasks a process | alone, ms | two processes, ms | × | adding up, ms | sent, MB |")
        print("|---|---|---|---|---|---|---|---|")
    for name, count in TASKS.items():
        workload = WORKLOADS[name]
        model = make_model(workload, "float32")
        parameters = list(model.parameters())
        tasks = TaskBatch(*batch(workload, "float32"))[:count]
        inner_loop = inner_loop_of(workload, model)

        def step() -> None:
            model.zero_grad()
            maml_loss(model, tasks, **inner_loop, engine="native").backward()

        alone, together, adding = [], [], []
        for _ in range(ROUNDS + 1):
            dist.barrier()
            start = time.perf_counter()
            if rank == 0:
                step()
            alone.append(time.perf_counter() - start)
            dist.barrier()
            start = time.perf_counter()
            step()
            computed = time.perf_counter()
            dist.barrier()
            ready = time.perf_counter()
            add_up_gradients(parameters, 0.5)
            adding.append(time.perf_counter() - ready)
            together.append(computed - start + adding[-1])
        if rank == 0:
            size = sum(parameter.numel() for parameter in parameters)
            times = [1000 * statistics.median(samples[1:]) for samples in (alone, together, adding)]
            print(
                f"| {workload.title} | {size:,} | {count} | {times[0]:.1f} | {times[1]:.1f} | "
                f"{times[1] / times[0]:.2f} | {times[2]:.2f} | {4e-6 * size:.2f} |",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (folder,), nprocs=2)
