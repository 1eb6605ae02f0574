"""The ops' CUDA kernels, emulated and on a GPU where there is one: the values and derivatives of their twins, as the
CPU's kernels (test_ops.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import grad, jvp, vmap

import emulated
import op_cases
from innerloop import _library, ops, reference
from op_cases import (
    CASES,
    FIRST_ORDER_CASES,
    LABELS,
    QUERY_LABELS,
    SMALL_CASES,
    UNROLLED_CASES,
    OpCase,
    Tensors,
    as_tuple,
    assert_agrees,
)

# What torch warns of in its own forward mode and opcheck; the category and the second warning depend on its version.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

# Sizes that need more than one block, or more than one tile, in every direction.
LARGE_CASES = [
    OpCase(
        "pairwise_distance-35x19x70",
        ((3, 35, 70), (3, 19, 70)),
        ops.pairwise_distance,
        reference.pairwise_distance,
    ),
    OpCase(
        "ridge_head-dual-of-100-samples",  # a system that is too large for shared memory
        ((1, 100, 120), (1, 3, 120)),
        lambda support, queries: ops.ridge_head(support, _classes(support), queries, 4),
        lambda support, queries: reference.ridge_head(support, _classes(support), queries, 4),
        1e-10,
    ),
    OpCase(
        "prototype_loss-300-queries",
        ((2, 30, 9), (2, 300, 9)),
        lambda s, q: ops.prototype_loss(s, _classes(s), q, _classes(q), 4, temperature=9.0),
        lambda s, q: reference.prototype_loss(s, _classes(s), q, _classes(q), 4, temperature=9.0),
    ),
]
EVERY_CASE = [*CASES, *FIRST_ORDER_CASES, *LARGE_CASES, *UNROLLED_CASES]


def _classes(embeddings: Tensor) -> Tensor:
    """A label of four classes for each sample."""
    tasks, samples, _ = embeddings.shape
    return (torch.arange(tasks * samples, device=embeddings.device) % 4).view(tasks, samples)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_values_are_the_twins(case: OpCase, dtype: torch.dtype, kernels: str) -> None:
    assert_agrees(case, dtype, kernels)


@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_gradients_are_the_twins(case: OpCase, kernels: str) -> None:
    def gradients(function: Callable[..., Tensor | Tensors]) -> Tensors:
        inputs = tuple(tensor.requires_grad_() for tensor in case.inputs(device=kernels))
        outputs = [out for out in as_tuple(function(*inputs)) if out.requires_grad]
        return torch.autograd.grad(sum(out.sin().sum() for out in outputs), inputs)

    for actual, wanted in zip(gradients(case.op), gradients(case.twin), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_derivatives(case: OpCase, kernels: str) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in case.inputs(device=kernels))
    assert torch.autograd.gradcheck(case.op, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(case.op, inputs)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_torch_func(case: OpCase, kernels: str) -> None:
    inputs = case.inputs(device=kernels)

    def results(function: Callable[..., Tensor | Tensors]) -> tuple[Any, ...]:
        def scalar(*tensors: Tensor) -> Tensor:
            return sum((out.sin() * out).sum() for out in as_tuple(function(*tensors)))

        along = tuple(t.cos() for t in inputs)
        batched = tuple(torch.stack([t, t.cos()]) for t in inputs)
        return jvp(grad(scalar), inputs, along), vmap(grad(scalar, tuple(range(len(inputs)))))(*batched)

    torch.testing.assert_close(results(case.op), results(case.twin))


@pytest.mark.parametrize("case", FIRST_ORDER_CASES, ids=str)
def test_first_derivatives(case: OpCase, kernels: str) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in case.inputs(device=kernels))
    assert torch.autograd.gradcheck(case.op, inputs, check_forward_ad=True, check_batched_grad=True)


WRITTEN_IN_PYTHON = {"svm_weights"}  # for every device


def ops_with_a_kernel(key: str) -> set[str]:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("innerloop::")}
    return {name.removeprefix("innerloop::") for name in names if has_kernel(name, key)}


def test_every_op_has_its_cuda_twin(emulation: None) -> None:
    assert set(emulated.operators()) == ops_with_a_kernel("CPU") - WRITTEN_IN_PYTHON
    assert ops_with_a_kernel("CUDA") >= WRITTEN_IN_PYTHON


@pytest.mark.skipif(_library.CUDA_LIBRARY is None, reason="built without nvcc")
def test_the_cuda_library_registers_every_op() -> None:
    """As nvcc made it, in a process of its own: torch's CPU build loads it too, and knows what it registers."""
    program = f"""
import sys, torch; sys.path[:0] = {sys.path}
import test_cuda_ops
if not test_cuda_ops._library.cuda_loaded: torch.ops.load_library({_library.CUDA_LIBRARY!r})
assert test_cuda_ops.ops_with_a_kernel("CUDA") == test_cuda_ops.ops_with_a_kernel("CPU")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", sorted(op_cases.raw_calls()))
def test_opcheck(name: str, kernels: str) -> None:
    torch.library.opcheck(getattr(torch.ops.innerloop, name).default, op_cases.raw_calls(kernels)[name])


# --- what the kernels promise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_identical_points_are_at_distance_zero_and_no_distance_is_negative(
    scale: float, dtype: torch.dtype, kernels: str
) -> None:
    x = (scale * torch.randn(2, 20, 50, dtype=dtype)).to(kernels)
    distances = ops.pairwise_distance(x, x)
    assert torch.equal(distances.diagonal(dim1=1, dim2=2), torch.zeros(2, 20, dtype=dtype, device=kernels))
    assert (distances >= 0).all()
    assert (ops.pairwise_distance(x, x * (1 + torch.finfo(dtype).eps)) >= 0).all()


def test_nearby_points_far_from_the_origin_keep_their_distance(kernels: str) -> None:
    q, p = (torch.randn(2, 9, 70) + 1e4).to(kernels), (torch.randn(2, 7, 70) + 1e4).to(kernels)
    exact = reference.pairwise_distance(q.double(), p.double())
    torch.testing.assert_close(ops.pairwise_distance(q, p).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_gram_matrix_is_exactly_symmetric(dtype: torch.dtype, kernels: str) -> None:
    rows = torch.randn(2, 37, 70, dtype=dtype).to(kernels)
    gram = torch.ops.innerloop.gram_matrix(rows)
    assert torch.equal(gram, gram.mT)


def test_the_same_bits_every_time(kernels: str) -> None:
    support, queries = torch.randn(2, 40, 33).to(kernels), torch.randn(2, 300, 33).to(kernels)
    lstm = [tensor.float() for tensor in UNROLLED_CASES[4].inputs(device=kernels)]

    def results() -> Tensors:
        upstream = torch.ones_like(lstm[0])
        backward = torch.ops.innerloop.coordinate_lstm_backward(upstream, None, *lstm, 0.5, True)
        return *torch.ops.innerloop.prototype_loss(
            support, _classes(support), queries, _classes(queries), 4, 1.0
        ), *backward

    for first, second in zip(results(), results(), strict=True):
        assert torch.equal(first, second)


SVM_SETTINGS = {
    # tasks, samples, classes, dim, C, share of the samples that is there
    "5-way 1-shot": (3, 5, 5, 64, 0.1, 1.0),  # in shared memory
    "5-way 5-shot": (3, 25, 5, 64, 0.1, 1.0),  # in global memory
    "samples left out": (4, 12, 3, 20, 1.0, 0.7),
    "no bound reached": (2, 10, 4, 20, 100.0, 1.0),
    "every bound reached": (2, 10, 4, 20, 1e-3, 1.0),
    "more elements than threads": (1, 60, 5, 64, 0.1, 1.0),
    "one class": (2, 4, 1, 8, 0.1, 1.0),
    "no samples": (2, 4, 3, 8, 0.1, 0.0),
    "no tasks": (0, 4, 3, 8, 0.1, 1.0),
}


@pytest.fixture(params=SVM_SETTINGS)
def machines(request: pytest.FixtureRequest) -> tuple[Tensors, tuple[Any, ...], Tensor, Tensors]:
    """Gram matrices and labels, the options of svm_solve, right sides for svm_kkt_solve, and what the CPU's kernels
    make of them: the four tensors of the one and the one of the other."""
    tasks, samples, classes, dim, c, share = SVM_SETTINGS[request.param]
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(tasks, samples, dim, generator=g, dtype=torch.float64)
    right = torch.randn(tasks, samples, classes, generator=g, dtype=torch.float64)
    labels = torch.arange(samples).remainder(classes).repeat(tasks, 1)
    labels[torch.rand(tasks, samples, generator=g) >= share] = -1
    gram, options = rows @ rows.mT, (classes, c, 50, 1e-10)
    solution = torch.ops.innerloop.svm_solve(gram, labels, *options)
    derivative = torch.ops.innerloop.svm_kkt_solve(right, gram, solution[1], labels)
    return (gram, labels), options, right, (*solution, derivative)


def test_a_support_vector_machine_is_that_of_the_cpu(
    machines: tuple[Tensors, tuple[Any, ...], Tensor, Tensors], kernels: str
) -> None:
    """So are the iterations that it takes, and the gap that it reports but for rounding."""
    problem, options, right, expected = machines  # which pytest makes before it emulates
    gram, labels = (tensor.to(kernels) for tensor in problem)
    dual, _, residuals, iterations = torch.ops.innerloop.svm_solve(gram, labels, *options)
    derivative = torch.ops.innerloop.svm_kkt_solve(right.to(kernels), gram, expected[1].to(kernels), labels)
    torch.testing.assert_close(dual.cpu(), expected[0], rtol=0, atol=1e-13 * options[1])
    torch.testing.assert_close(residuals.cpu(), expected[2], rtol=1e-3, atol=1e-12)
    assert torch.equal(iterations.cpu(), expected[3])
    torch.testing.assert_close(derivative.cpu(), expected[4], rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_more_tasks_than_blocks(kernels: str) -> None:
    """A grid has at most 65,535 blocks, which then take more than one tile each."""
    q, p = torch.randn(66_000, 1, 2).to(kernels), torch.randn(66_000, 1, 2).to(kernels)
    torch.testing.assert_close(ops.pairwise_distance(q, p), reference.pairwise_distance(q, p))


@pytest.fixture
def long_unroll() -> tuple[Tensors, Tensors]:
    """Arguments of coordinate_lstm_backward, and what the CPU's kernel makes of them. A range of 256 coordinates holds
    more than 128 MB of so many steps, and a launch of the CUDA kernel at most 256 MB."""
    tensors = op_cases.unrolled(3100, 260, 1).inputs()
    arguments = (tensors[0].cos(), tensors[1].cos(), *tensors)
    return arguments, torch.ops.innerloop.coordinate_lstm_backward(*arguments, 0.5, True)


@pytest.mark.slow
def test_steps_whose_memory_needs_more_than_one_launch(long_unroll: tuple[Tensors, Tensors], kernels: str) -> None:
    arguments, expected = long_unroll  # which pytest makes before it emulates
    found = torch.ops.innerloop.coordinate_lstm_backward(*(tensor.to(kernels) for tensor in arguments), 0.5, True)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-9, atol=1e-9)


def test_inner_update_of_more_tensors_than_a_launch_takes(kernels: str) -> None:
    """64 of a dtype at a time; of both dtypes here."""
    params = [torch.randn(3, 1 + i % 5, dtype=(torch.float32, torch.float64)[i % 2]).to(kernels) for i in range(200)]
    for updated, param in zip(ops.inner_update(params, params, 0.25), params, strict=True):
        assert torch.equal(updated, param * 0.75)


def test_a_label_out_of_range_is_of_no_class(kernels: str) -> None:
    """The CPU's raw ops raise instead; those of CUDA look at no label before they launch. The checked functions raise
    on every device."""
    support, queries = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)
    left_out, out_of_range = LABELS.clone(), LABELS.clone()
    left_out[0, 2], out_of_range[0, 2] = -1, 7
    query_labels = torch.where(QUERY_LABELS == 0, 9, QUERY_LABELS)
    no_query_labels = torch.where(QUERY_LABELS == 0, -1, QUERY_LABELS)

    def results(labels: Tensor, wanted: Tensor) -> Tensors:
        s, q, y, z = support.to(kernels), queries.to(kernels), labels.to(kernels), wanted.to(kernels)
        means, weights = torch.ops.innerloop.prototypes(s, y, 3)
        spread = torch.ops.innerloop.prototypes_backward(means, weights, y)
        sums = torch.ops.innerloop.class_logsumexp(q @ s.mT, y, 3)
        return means, weights, spread, sums, *torch.ops.innerloop.prototype_loss(s, y, q, z, 3, 1.0)

    for actual, wanted in zip(results(out_of_range, query_labels), results(left_out, no_query_labels), strict=True):
        assert torch.equal(actual, wanted)


def test_scores_without_end(kernels: str) -> None:
    """−∞ is a sample without weight, a class without another has −∞, and NaN stays."""
    scores = torch.tensor([[[1.0, -torch.inf, 2.0, -torch.inf, torch.nan]]], dtype=torch.float64)
    out = torch.ops.innerloop.class_logsumexp(scores.to(kernels), torch.tensor([[0, 0, 0, 1, 2]]).to(kernels), 4)
    expected = torch.tensor(
        [[[(torch.tensor(1.0).exp() + torch.tensor(2.0).exp()).log(), -torch.inf, torch.nan, -torch.inf]]]
    )
    torch.testing.assert_close(out.cpu(), expected.double(), equal_nan=True, rtol=1e-6, atol=0)


# --- captured in a CUDA graph ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(op_cases.raw_calls()))
def test_no_op_waits_for_the_device_while_a_graph_is_captured(
    name: str, emulation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it waited, or copied from the device or to it, that would be an error, as on a GPU."""
    arguments = op_cases.raw_calls()[name]
    op = getattr(torch.ops.innerloop, name)
    with torch.no_grad():
        expected = op(*arguments)
        monkeypatch.setenv("EMULATION_CAPTURES", "1")
        torch.testing.assert_close(op(*arguments), expected, rtol=0, atol=0)


def test_in_a_graph_a_system_without_a_solution_has_nan(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is an error outside of one; the other tasks have theirs."""
    matrix = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1)
    sides = torch.ones(2, 5, 3, dtype=torch.float64)
    labels, options = LABELS[[0, 0]], (3, 0.3, 50, 1e-10)
    solutions = torch.ops.innerloop.solve_positive_definite(matrix, sides)
    dual = torch.ops.innerloop.svm_solve(matrix, labels, *options)[0]
    derivative = torch.ops.innerloop.svm_kkt_solve(sides, matrix, sides, labels)
    monkeypatch.setenv("EMULATION_CAPTURES", "1")
    matrix[1, 2, 2] = torch.nan
    found = (
        torch.ops.innerloop.solve_positive_definite(matrix, sides),
        torch.ops.innerloop.svm_solve(matrix, labels, *options)[0],
        torch.ops.innerloop.svm_kkt_solve(sides, matrix, sides, labels),
    )
    for actual, wanted in zip(found, (solutions, dual, derivative), strict=True):
        assert torch.equal(actual[0], wanted[0])
        assert actual[1].isnan().all()


# --- empty tensors --------------------------------------------------------------------------------------------------

EMPTY: dict[str, tuple[str, Callable[[str], tuple[Any, ...]]]] = {
    f"{op} {name}": (op, call)
    for op, calls in {
        "prototypes": {
            "no tasks": lambda d: (torch.ones(0, 5, 3, device=d), LABELS[:0].to(d), 3),
            "no dimensions": lambda d: (torch.ones(2, 5, 0, device=d), LABELS.to(d), 3),
            "no samples": lambda d: (torch.ones(2, 0, 3, device=d), LABELS[:, :0].to(d), 3),
            "no classes": lambda d: (torch.ones(2, 0, 3, device=d), LABELS[:, :0].to(d), 0),
        },
        "squared_distances": {
            "no tasks": lambda d: (torch.ones(0, 3, 4, device=d), torch.ones(0, 2, 4, device=d)),
            "no queries": lambda d: (torch.ones(2, 0, 4, device=d), torch.ones(2, 2, 4, device=d)),
            "no points": lambda d: (torch.ones(2, 3, 4, device=d), torch.ones(2, 0, 4, device=d)),
            "no dimensions": lambda d: (torch.ones(2, 3, 0, device=d), torch.ones(2, 2, 0, device=d)),
        },
        "prototype_loss": {
            "no tasks": lambda d: (
                *(torch.ones(0, 5, 3, device=d), LABELS[:0].to(d)),
                *(torch.ones(0, 3, 3, device=d), QUERY_LABELS[:0].to(d), 3, 1.0),
            ),
        },
        "class_logsumexp": {"no samples": lambda d: (torch.ones(2, 3, 0, device=d), LABELS[:, :0].to(d), 3)},
        "combine_rows": {"no rows": lambda d: (torch.ones(2, 3, 0, device=d), torch.ones(2, 0, 4, device=d))},
        "gram_matrix": {"no rows": lambda d: (torch.ones(2, 0, 4, device=d),)},
        "solve_positive_definite": {
            "no tasks": lambda d: (torch.ones(0, 2, 2, device=d).double(), torch.ones(0, 2, 1, device=d).double()),
            "no rows": lambda d: (torch.ones(2, 0, 0, device=d).double(), torch.ones(2, 0, 1, device=d).double()),
            "no columns": lambda d: (torch.eye(2, device=d).double()[None], torch.ones(1, 2, 0, device=d).double()),
        },
        "coordinate_lstm": {
            "no steps": lambda d: (*(x.to(d) for x in op_cases.unrolled(0, 3, 2).inputs()), 0.5),
            "no coordinates": lambda d: (*(x.to(d) for x in op_cases.unrolled(2, 0, 2).inputs()), 0.5),
        },
    }.items()
    for name, call in calls.items()
}


@pytest.fixture(params=EMPTY)
def empty(request: pytest.FixtureRequest) -> tuple[str, Callable[[str], tuple[Any, ...]], Tensors]:
    """An op, its arguments, and what the CPU's kernel makes of them."""
    op, arguments = EMPTY[request.param]
    return op, arguments, as_tuple(getattr(torch.ops.innerloop, op)(*arguments("cpu")))


def test_empty(empty: tuple[str, Callable[[str], tuple[Any, ...]], Tensors], kernels: str) -> None:
    op, arguments, expected = empty  # which pytest makes before it emulates
    for actual, wanted in zip(as_tuple(getattr(torch.ops.innerloop, op)(*arguments(kernels))), expected, strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, equal_nan=True)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 100])
def test_a_matrix_that_is_not_positive_definite(size: int, kernels: str) -> None:
    matrix = torch.eye(size, dtype=torch.float64).repeat(3, 1, 1)
    matrix[1, -1, -1] = -1
    matrix[2, 0, 0] = torch.nan
    wanted = (
        f"the {size} × {size} matrix of task 1 is not positive definite in float64 .row {size - 1}.*Raise regulariz"
    )
    with pytest.raises(RuntimeError, match=wanted):
        torch.ops.innerloop.solve_positive_definite(matrix.to(kernels), torch.ones(3, size, 1).double().to(kernels))


def test_a_machine_that_has_not_converged(kernels: str) -> None:
    gram = torch.eye(5, dtype=torch.float64).repeat(3, 1, 1).to(kernels)
    labels = LABELS[[0, 0, 0]].to(kernels)
    with pytest.raises(RuntimeError, match="task 0 has not converged: after 1 of at most 1 iterations its duality gap"):
        torch.ops.innerloop.svm_solve(gram, labels, 3, 0.3, 1, 1e-10)
    gram[1, 2, 2] = torch.nan
    with pytest.raises(RuntimeError, match="the embeddings of task 1 are not finite"):
        torch.ops.innerloop.svm_solve(gram, labels, 3, 0.3, 50, 1e-10)
    curvature = torch.ones(3, 5, 3, dtype=torch.float64, device=kernels)
    with pytest.raises(RuntimeError, match="the KKT system of task 1 is singular or not finite"):
        torch.ops.innerloop.svm_kkt_solve(curvature, gram, curvature, labels)


@pytest.mark.parametrize("wrong", [key for key in op_cases.RAW_ERRORS if key not in op_cases.OF_LABEL_VALUES])
def test_a_direct_call_of_an_op_checks_before_it_reads(wrong: str, kernels: str) -> None:
    name, arguments, message = op_cases.RAW_ERRORS[wrong]
    moved = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.to(kernels), arguments)
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.innerloop, name)(*moved)


def test_tensors_on_two_devices(cuda: torch.device) -> None:
    with pytest.raises(RuntimeError, match="points must be a CUDA tensor"):
        torch.ops.innerloop.squared_distances(torch.ones(1, 2, 3, device=cuda), torch.ones(1, 2, 3))


@pytest.mark.parametrize("name", sorted(set(op_cases.raw_calls()) - WRITTEN_IN_PYTHON))
def test_every_launch_is_checked(name: str, emulation: None) -> None:
    op, arguments = getattr(torch.ops.innerloop, name), op_cases.raw_calls()[name]
    with torch.no_grad():
        assert emulated.failing_launches(name, lambda: op(*arguments)) > 0


@pytest.mark.skipif(_library.cuda_loaded, reason="the CUDA library is here")
def test_an_op_without_a_cuda_kernel_says_so() -> None:
    message = "support is on cuda:0, but this installation has no CUDA kernel of svm_solve: move it to the CPU"
    with FakeTensorMode(), pytest.raises(ValueError, match=message):  # tensors that say they are on CUDA, anywhere
        ops.svm_solve(torch.ones(2, 5, 3, device="cuda"), LABELS, 3)
