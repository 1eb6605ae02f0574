"""MetaOptNet's SVM head as its authors wrote it (MetaOptNetHead_SVM_CS of their models/classification_heads.py): the
Crammer-Singer dual as one dense quadratic program for qpth's batched solver, at most 15 iterations, C = 0.1.

    PYTHONPATH=benchmarks .cache/peers/qpth/bin/python benchmarks/rivals/svm_qpth.py

prints how far its dual objective, in float32, is from innerloop's on the benchmark's embeddings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from qpth.qp import QPFunction
from torch import Tensor

from head_workloads import HEAD_WORKLOADS, HeadWorkload
from innerloop.bench.rivals import Step
from rivals.head_parts import embeddings, step_of

C = 0.1


def make(workload: HeadWorkload, dtype: str) -> Step:
    support, labels, queries, query_labels = embeddings(workload, dtype)

    def loss_of():
        compatibility = support @ queries.mT  # [T, S, Q]
        scores = (dual(support, labels, workload.ways)[:, :, None] * compatibility[..., None]).sum(1)
        return F.cross_entropy(scores.flatten(0, 1), query_labels.flatten())

    return step_of(loss_of, support, queries)


def dual(support: Tensor, labels: Tensor, ways: int) -> Tensor:
    """α [T, S, N]."""
    tasks, samples, _ = support.shape

    def unit(size: int) -> Tensor:
        return torch.eye(size, dtype=support.dtype).expand(tasks, size, size)

    program = kronecker(support @ support.mT, unit(ways)) + 1.0 * unit(samples * ways)
    target = F.one_hot(labels, ways).to(support.dtype).flatten(1)
    sums = kronecker(unit(samples), support.new_ones(tasks, 1, ways))
    solve = QPFunction(verbose=False, maxIter=15)
    solution = solve(
        program, -target, unit(samples * ways).contiguous(), C * target, sums, support.new_zeros(tasks, samples)
    )
    return solution.view(tasks, samples, ways)


def kronecker(a: Tensor, b: Tensor) -> Tensor:
    product = a[:, :, None, :, None] * b[:, None, :, None, :]
    return product.reshape(len(a), a.shape[1] * b.shape[1], a.shape[2] * b.shape[2])


def main() -> None:
    from innerloop import ops, reference

    workload = HEAD_WORKLOADS["svm-5way"]
    support, labels, *_ = embeddings(workload, "float32")
    with torch.no_grad():
        gram = reference.svm_gram(support.double(), 1.0)
        ours = ops.svm_solve(support, labels, workload.ways, C=C, diagonal=1.0).dual
        theirs = dual(support, labels, workload.ways).double()
    values = [reference.svm_objectives(gram, labels, alpha, C)[1] for alpha in (ours, theirs)]
    print(f"largest relative difference of the objectives: {float((values[1] / values[0] - 1).abs().max()):.1e}")


if __name__ == "__main__":
    main()
