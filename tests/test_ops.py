"""The native ops: the values of their twins in reference.py, exact derivatives of any order by every way torch offers
to ask for them, and errors that name the argument."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import op_cases
from innerloop import ops, reference
from op_cases import (
    CASES,
    LABELS,
    MASK,
    QUERY_LABELS,
    QUERY_MASK,
    SMALL_CASES,
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

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_small_case = pytest.mark.parametrize("case", SMALL_CASES, ids=str)
few = settings(max_examples=40, deadline=None)


def leaves(case: OpCase) -> Tensors:
    return tuple(tensor.requires_grad_() for tensor in case.inputs())


def scalar(function: Callable[..., Tensor | Tensors]) -> Callable[..., Tensor]:
    """A nonlinear number of the function's outputs, so that no derivative of it vanishes."""
    return lambda *tensors: sum((out.sin() * out).sum() for out in as_tuple(function(*tensors)))


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_case
def test_values_are_the_twins(case: OpCase, dtype: torch.dtype) -> None:
    assert_agrees(case, dtype)


@each_case
def test_strided_inputs(case: OpCase) -> None:
    inputs = case.inputs()
    strided = [x.movedim(0, -1).contiguous().movedim(-1, 0) if x.dim() > 1 else x for x in inputs]
    assert not all(x.is_contiguous() for x in strided) or max(x.numel() for x in inputs) <= 2
    for actual, expected in zip(as_tuple(case.op(*strided)), as_tuple(case.op(*inputs)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("queries", "points"),
    [((0, 3, 4), (0, 2, 4)), ((2, 0, 4), (2, 2, 4)), ((2, 3, 4), (2, 0, 4)), ((2, 3, 0), (2, 2, 0))],
)
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine", "dot"])
def test_empty_distances(queries: tuple[int, ...], points: tuple[int, ...], metric: Any) -> None:
    q, p = torch.ones(queries, requires_grad=True), torch.ones(points, requires_grad=True)
    out = ops.pairwise_distance(q, p, metric=metric)
    assert out.shape == (queries[0], queries[1], points[1])
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0)])
def test_empty_prototypes(shape: tuple[int, int, int]) -> None:
    x = torch.ones(shape, requires_grad=True)
    out = ops.prototypes(x, LABELS[: shape[0]], 3)
    assert out.shape == (shape[0], 3, shape[2])
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_empty_update() -> None:
    assert ops.inner_update([], [], 0.1) == []
    (out,) = ops.inner_update([torch.ones(0, 3)], [torch.ones(0, 3)], 0.1)
    assert out.shape == (0, 3)


def test_update_takes_numbers_and_tensors_as_rates() -> None:
    params, grads = [torch.randn(2, 3), torch.randn(2, 1)], [torch.randn(2, 3), torch.randn(2, 1)]
    first = ops.inner_update(params, grads, 0.5)
    for rates in (torch.tensor(0.5), [0.5, torch.tensor(0.5)], [torch.full((3,), 0.5), torch.full((2, 1), 0.5)]):
        for actual, expected in zip(ops.inner_update(params, grads, rates), first, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


sizes = st.integers(1, 40)


@few
@given(tasks=st.integers(1, 4), queries=sizes, points=sizes, dim=st.integers(1, 90), double=st.booleans())
def test_distances_of_any_shape(tasks: int, queries: int, points: int, dim: int, double: bool) -> None:
    shapes = ((tasks, queries, dim), (tasks, points, dim))
    case = OpCase("drawn", shapes, ops.pairwise_distance, reference.pairwise_distance)
    assert_agrees(case, torch.float64 if double else torch.float32)
    a, b = leaves(case), leaves(case)
    gradients = torch.autograd.grad(scalar(case.op)(*a), a)
    expected = torch.autograd.grad(scalar(case.twin)(*b), b)
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@few
@given(
    tasks=st.integers(1, 4), classes=st.integers(1, 6), extra=st.integers(0, 9), dim=st.integers(1, 40), data=st.data()
)
def test_prototypes_of_any_shape(tasks: int, classes: int, extra: int, dim: int, data: st.DataObject) -> None:
    more = st.lists(st.integers(0, classes - 1), min_size=extra, max_size=extra)
    labels = torch.tensor([data.draw(st.permutations([*range(classes), *data.draw(more)])) for _ in range(tasks)])
    case = OpCase(
        "drawn",
        ((tasks, classes + extra, dim),),
        lambda x: ops.prototypes(x, labels, classes),
        lambda x: reference.prototypes(x, labels, classes),
    )
    assert_agrees(case, torch.float64)
    (a,), (b,) = leaves(case), leaves(case)
    torch.testing.assert_close(
        *torch.autograd.grad(scalar(case.op)(a), a), *torch.autograd.grad(scalar(case.twin)(b), b)
    )


@few
@given(shapes=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), max_size=4), double=st.booleans())
def test_update_of_any_shapes(shapes: list[list[int]], double: bool) -> None:
    case = OpCase(
        "drawn",
        tuple(tuple(shape) for shape in shapes) * 3,
        op_cases.updates(ops.inner_update),
        op_cases.updates(reference.inner_update),
    )
    assert_agrees(case, torch.float64 if double else torch.float32)


@few
@given(points=sizes, dim=st.integers(1, 90), scale=st.sampled_from([1e-6, 1.0, 1e6]), double=st.booleans())
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_identical_points_are_at_distance_zero_and_no_distance_is_negative(
    metric: Any, points: int, dim: int, scale: float, double: bool
) -> None:
    x = scale * torch.randn(2, points, dim, dtype=torch.float64 if double else torch.float32)
    nearly = x * (1 + torch.finfo(x.dtype).eps)
    distances = ops.pairwise_distance(x, x, metric)
    assert torch.equal(distances.diagonal(dim1=1, dim2=2), torch.zeros(2, points, dtype=x.dtype))
    assert (distances >= 0).all()
    assert (ops.pairwise_distance(x, nearly, metric) >= 0).all()


def test_nearby_points_far_from_the_origin_keep_their_distance() -> None:
    """Where the norms are 10,000 times the distances, ‖q‖² − 2 q·p + ‖p‖² in float32 has no digit left."""
    offset, q, p = 1e4 * torch.ones(70), torch.randn(2, 9, 70), torch.randn(2, 7, 70)
    q, p = q + offset, p + offset
    torch.testing.assert_close(
        ops.pairwise_distance(q, p).double(), reference.pairwise_distance(q.double(), p.double()), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("metric", "points"), [("euclidean", ([1.0, 2.0], [1.0, 2.0])), ("cosine", ([0.0, 0.0], [1.0, 2.0]))]
)
def test_where_a_metric_has_no_slope_its_derivatives_are_zero(metric: Any, points: tuple[list[float], ...]) -> None:
    q, p = (torch.tensor([[x]], dtype=torch.float64, requires_grad=True) for x in points)
    out = ops.pairwise_distance(q, p, metric)
    assert out.item() == (0 if metric == "euclidean" else 1)
    for tensor in (q, p):
        (gradient,) = torch.autograd.grad(out, tensor, create_graph=True)
        for value in (gradient, *torch.autograd.grad(gradient.sum(), (q, p), create_graph=True)):
            torch.testing.assert_close(value.detach(), torch.zeros(1, 1, 2, dtype=value.dtype), rtol=0, atol=1e-15)


def test_masked_samples_count_nowhere() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    padded = torch.where(MASK[..., None], x, torch.nan).requires_grad_()
    labels = torch.where(MASK, LABELS, 99)
    out = ops.prototypes(padded, labels, 3, mask=MASK)
    torch.testing.assert_close(out.detach(), ops.prototypes(x, LABELS, 3, mask=MASK))
    out.sum().backward()
    assert padded.grad is not None
    assert (padded.grad[~MASK] == 0).all()


@pytest.mark.parametrize("name", ["prototype_logits", "prototype_loss", "attention_classify"])
def test_masked_samples_may_hold_anything(name: str) -> None:
    case = op_cases.classifying(name, mask=MASK)
    support, queries = case.inputs()
    padded = torch.where(MASK[..., None], support, torch.nan).requires_grad_()
    out = case.op(padded, queries)
    torch.testing.assert_close(out.detach(), case.op(support, queries))
    out.sum().backward()
    assert padded.grad is not None
    assert (padded.grad[~MASK] == 0).all()
    assert padded.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_prototype_loss_returns_its_logits(dtype: torch.dtype) -> None:
    support, queries = torch.randn(2, 5, 3, dtype=dtype, requires_grad=True), torch.randn(2, 3, 3, dtype=dtype)
    losses, logits = ops.prototype_loss(support, LABELS, queries, QUERY_LABELS, 3, temperature=0.7)
    assert not logits.requires_grad
    expected = ops.prototype_logits(support.detach(), LABELS, queries, 3, temperature=0.7)
    torch.testing.assert_close(logits, expected)
    each = [torch.nn.functional.cross_entropy(*task) for task in zip(expected, QUERY_LABELS, strict=True)]
    torch.testing.assert_close(losses.detach(), torch.stack(each))


def test_a_masked_query_is_not_read() -> None:
    support, queries = (torch.randn(2, 5, 3), torch.randn(2, 3, 3))
    padded = torch.where(QUERY_MASK[..., None], queries, torch.nan).requires_grad_()
    labels = torch.where(QUERY_MASK, QUERY_LABELS, 99)
    losses, _ = ops.prototype_loss(support, LABELS, padded, labels, 3, query_mask=QUERY_MASK)
    expected, _ = ops.prototype_loss(support, LABELS, queries, QUERY_LABELS, 3, query_mask=QUERY_MASK)
    torch.testing.assert_close(losses.detach(), expected)
    losses.sum().backward()
    assert padded.grad is not None
    assert (padded.grad[~QUERY_MASK] == 0).all()
    assert padded.grad.isfinite().all()


def test_attention_has_a_logarithm_however_little_a_class_receives() -> None:
    support = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    queries = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    out = ops.attention_classify(queries, support, torch.tensor([[0, 1, 1, 2]]), 3, temperature=1e-3)
    torch.testing.assert_close(out[0, 0], torch.tensor([0.0, -1000.0, -1000.0]))
    torch.testing.assert_close(out[0, 1].exp(), torch.tensor([0.25, 0.5, 0.25]))
    out.sum().backward()
    for tensor in (support, queries):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@few
@given(
    tasks=st.integers(1, 3),
    classes=st.integers(1, 20),
    extra=st.integers(0, 9),
    queries=sizes,
    dim=st.integers(1, 90),
    double=st.booleans(),
    data=st.data(),
)
@pytest.mark.parametrize("name", ["prototype_logits", "prototype_loss", "attention_classify"])
def test_classification_of_any_shape(
    name: str, tasks: int, classes: int, extra: int, queries: int, dim: int, double: bool, data: st.DataObject
) -> None:
    more = st.lists(st.integers(0, classes - 1), min_size=extra, max_size=extra)
    labels = torch.tensor([data.draw(st.permutations([*range(classes), *data.draw(more)])) for _ in range(tasks)])
    wanted = torch.arange(tasks * queries).view(tasks, queries) % classes

    def bound(module: Any) -> Callable[[Tensor, Tensor], Tensor | Tensors]:
        function = getattr(module, name)
        if name == "prototype_loss":
            return lambda s, q: function(s, labels, q, wanted, classes, temperature=float(dim))
        if name == "attention_classify":
            return lambda s, q: function(q, s, labels, classes)
        return lambda s, q: function(s, labels, q, classes, temperature=float(dim))

    case = OpCase("drawn", ((tasks, classes + extra, dim), (tasks, queries, dim)), bound(ops), bound(reference))
    assert_agrees(case, torch.float64 if double else torch.float32)
    a, b = leaves(case), leaves(case)
    gradients = torch.autograd.grad(scalar(case.op)(*a), a)
    expected = torch.autograd.grad(scalar(case.twin)(*b), b)
    for actual, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-9, atol=1e-12 + 1e-9 * float(right.abs().max()))


def test_the_number_of_threads_changes_no_bit() -> None:
    x, y = torch.randn(4, 300, 96), torch.randn(4, 70, 96, requires_grad=True)
    labels = torch.arange(300).expand(4, 300) % 20

    def results() -> Tensors:
        distances = ops.pairwise_distance(x, y)
        (gradient,) = torch.autograd.grad(distances.sum(), y)
        (updated,) = ops.inner_update([x], [x.sin()], 0.3)
        losses, logits = ops.prototype_loss(x, labels, y, labels[:, :70], 20)
        (of_loss,) = torch.autograd.grad(losses.sum(), y)
        attention = ops.attention_classify(y, x, labels, 20)
        return distances, gradient, updated, losses, logits, of_loss, attention, ops.prototypes(x, labels, 20)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, results(), strict=True))
    finally:
        torch.set_num_threads(threads)


def large_gradients(queries: Tensor, points: Tensor) -> list[Tensor]:
    """Of ops whose gradients are written past the caches where they exceed them."""
    labels = torch.arange(points.shape[1]).expand(points.shape[:2])
    wanted = torch.arange(queries.shape[1]).expand(queries.shape[:2]) % points.shape[1]
    losses, _ = ops.prototype_loss(points, labels, queries, wanted, points.shape[1])
    scores = ops.ridge_head(points, labels, queries, points.shape[1])
    distances = ops.pairwise_distance(queries, points)
    outputs = (losses.sum(), scores.square().sum(), distances.square().sum())
    return [gradient for output in outputs for gradient in torch.autograd.grad(output, (queries, points))]


@pytest.mark.parametrize("dim", [1600, 1601])
def test_a_gradient_that_exceeds_the_caches_is_that_of_each_task_alone(dim: int) -> None:
    queries, points = torch.randn(4, 700, dim) / 40, torch.randn(4, 5, dim) / 40
    assert 4 * queries.numel() > 16 << 20
    together = large_gradients(queries.requires_grad_(), points.requires_grad_())
    for task in range(4):
        alone = large_gradients(queries[task : task + 1], points[task : task + 1])
        assert all(torch.equal(a[task : task + 1], b) for a, b in zip(together, alone, strict=True))


ISAS = {"baseline": "baseline", "v3": "x86-64-v3 (AVX2)", "v4": "x86-64-v4 (AVX-512)"}


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_of_this_cpu(isa: str) -> None:
    in_use = list(ISAS.values()).index(torch.ops.innerloop.instruction_set())
    if list(ISAS).index(isa) > in_use:
        pytest.skip(f"not on this CPU, or this run is limited to {ISAS['baseline']}")
    program = [sys.executable, "-W", "error", str(Path(op_cases.__file__))]
    done = subprocess.run(program, env={**os.environ, "INNERLOOP_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ISAS[isa]


def test_an_unknown_instruction_set_is_refused() -> None:
    program = [sys.executable, "-c", "import innerloop.ops"]
    done = subprocess.run(program, env={**os.environ, "INNERLOOP_ISA": "avx2"}, capture_output=True, text=True)
    assert (
        "ImportError: the environment variable INNERLOOP_ISA is 'avx2', expected one of baseline, v3, v4" in done.stderr
    )


# --- derivatives ----------------------------------------------------------------------------------------------------


@each_small_case
def test_first_derivatives(case: OpCase) -> None:
    assert torch.autograd.gradcheck(
        case.op, leaves(case), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@each_small_case
def test_second_derivatives(case: OpCase) -> None:
    assert torch.autograd.gradgradcheck(case.op, leaves(case), check_fwd_over_rev=True, check_rev_over_rev=True)


@each_small_case
def test_third_derivatives(case: OpCase) -> None:
    def third(function: Callable[..., Tensor | Tensors]) -> Tensors:
        inputs = leaves(case)
        value = scalar(function)(*inputs)
        for _ in range(2):
            gradients = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum((g.sin() * g).sum() for g in gradients)
        return torch.autograd.grad(value, inputs)

    for actual, expected in zip(third(case.op), third(case.twin), strict=True):
        torch.testing.assert_close(actual, expected)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Tensors], Any]] = {
    "grad": lambda f, x: grad(f, tuple(range(len(x))))(*x),
    "grad of grad": lambda f, x: grad(lambda *y: grad(f)(*y).square().sum(), tuple(range(len(x))))(*x),
    "jvp": lambda f, x: jvp(f, x, tuple(t.cos() for t in x)),
    "jvp along the first alone": lambda f, x: jvp(lambda first: f(first, *x[1:]), x[:1], (x[0].cos(),)),
    "jvp of grad": lambda f, x: jvp(grad(f), x, tuple(t.cos() for t in x)),
    "grad of jvp": lambda f, x: grad(lambda *y: jvp(f, y, tuple(t.cos() for t in x))[1])(*x),
    "jacrev": lambda f, x: jacrev(f, tuple(range(len(x))))(*x),
    "jacfwd": lambda f, x: jacfwd(f, tuple(range(len(x))))(*x),
    "hessian": lambda f, x: hessian(f, tuple(range(len(x))))(*x),
    "vmap": lambda f, x: vmap(f)(*batched(x)),
    "vmap in the last dimension": lambda f, x: vmap(f, -1)(*(t.movedim(0, -1) for t in batched(x))),
    "vmap over the first alone": lambda f, x: vmap(f, (0, *[None] * (len(x) - 1)))(batched(x)[0], *x[1:]),
    "vmap over the last alone": lambda f, x: vmap(f, (*[None] * (len(x) - 1), 0))(*x[:-1], batched(x)[-1]),
    "vmap of vmap": lambda f, x: vmap(vmap(f))(*(torch.stack([t, t.sin()]) for t in batched(x))),
    "vmap of grad": lambda f, x: vmap(grad(f, tuple(range(len(x)))))(*batched(x)),
    "vmap of grad of grad": lambda f, x: vmap(grad(lambda *y: grad(f)(*y).square().sum()))(*batched(x)),
    "vmap of hessian": lambda f, x: vmap(hessian(f))(*batched(x)),
    "grad of vmap": lambda f, x: grad(lambda *y: vmap(f)(*(torch.stack([t, 2 * t]) for t in y)).sum())(*x),
}


def batched(tensors: Tensors) -> Tensors:
    return tuple(torch.stack([t, t.cos(), 2 * t]) for t in tensors)


@pytest.mark.parametrize("transform", TRANSFORMS)
@each_small_case
def test_torch_func(case: OpCase, transform: str) -> None:
    apply = TRANSFORMS[transform]
    actual, expected = (apply(scalar(function), case.inputs()) for function in (case.op, case.twin))
    torch.testing.assert_close(actual, expected)


@each_small_case
def test_forward_mode(case: OpCase) -> None:
    inputs = case.inputs()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x.cos()) for x in inputs]
        tangents = [[forward_ad.unpack_dual(out).tangent for out in as_tuple(f(*duals))] for f in (case.op, case.twin)]
    torch.testing.assert_close(*tangents)


TRACED_CASES = [
    "inner_update-rate_of_each_element",
    "prototypes",
    "pairwise_distance-sqeuclidean",
    "prototype_logits",
    "prototype_loss",
    "attention_classify",
]
TRACED = ["grad", "jvp", "vmap", "vmap of grad"]


@pytest.mark.parametrize("transform", TRACED)
@pytest.mark.parametrize("outside", [False, True], ids=["compiled whole", "of a compiled function"])
@pytest.mark.parametrize("case", [case for case in SMALL_CASES if case.name in TRACED_CASES], ids=str)
def test_torch_func_and_compile(case: OpCase, transform: str, outside: bool) -> None:
    torch._dynamo.reset()
    apply, inputs = TRANSFORMS[transform], case.inputs()
    if outside:
        actual = apply(torch.compile(scalar(case.op), backend="aot_eager"), inputs)
    else:
        whole = torch.compile(lambda *x: apply(scalar(case.op), x), backend="aot_eager", fullgraph=True)
        actual = whole(*inputs)
    torch.testing.assert_close(actual, apply(scalar(case.twin), inputs))


def test_update_of_one_task_under_vmap() -> None:
    """vmap over tasks leaves parameters that may have no dimension."""
    params, grads, rates = torch.randn(3, 4), torch.randn(3, 4), torch.rand(4)
    updated = vmap(vmap(lambda p, g, a: ops.inner_update([p], [g], [a])[0]), (0, 0, None))(params, grads, rates)
    torch.testing.assert_close(updated, params - rates * grads)


def test_prototypes_with_labels_of_every_batch_element() -> None:
    x, labels = torch.randn(3, 2, 5, 4), torch.stack([LABELS, LABELS.flip(1), LABELS.roll(1, 1)])
    actual = vmap(lambda x, y: ops.prototypes(x, y, 3))(x, labels)
    torch.testing.assert_close(
        actual, torch.stack([reference.prototypes(*pair, 3) for pair in zip(x, labels, strict=True)])
    )


def test_what_torch_hides_and_the_ops_rely_on() -> None:
    """Private names of torch by which an op tells a transform from an ordinary call, and a missing kernel."""
    from innerloop.ops._differentiable import transforms_active

    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(transforms_active())
        return x.sum()

    x = torch.ones(2)
    look(x)
    vmap(look)(x)
    grad(look)(x)
    jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(x)
    look(x)
    assert seen == [False, True, True, True, True, False]
    assert torch._C._dispatch_has_kernel_for_dispatch_key("innerloop::prototypes", "CPU")
    assert not torch._C._functorch.is_functorch_wrapped_tensor(x)
    vmap(lambda x: seen.append(torch._C._functorch.is_functorch_wrapped_tensor(x)) or x)(x)
    assert seen[-1] is True


# --- torch.compile and torch.library --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", op_cases.raw_calls())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.innerloop, name).default, op_cases.raw_calls()[name])


@each_small_case
def test_compiles_whole(case: OpCase) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(scalar(case.op), backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, scalar(case.twin)):
        inputs = leaves(case)
        value = function(*inputs)
        results.append((value, torch.autograd.grad(value, inputs)))
    torch.testing.assert_close(*results)


# --- errors ---------------------------------------------------------------------------------------------------------

X, Q, P = torch.ones(2, 5, 3), torch.ones(2, 3, 4), torch.ones(2, 2, 4)

ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "embeddings not a tensor": (
        lambda: ops.prototypes([1.0], LABELS, 3),  # type: ignore[arg-type]
        TypeError,
        "embeddings must be a torch.Tensor, got list",
    ),
    "embeddings of integers": (lambda: ops.prototypes(X.long(), LABELS, 3), TypeError, "embeddings has dtype"),
    "embeddings of one task": (lambda: ops.prototypes(X[0], LABELS, 3), ValueError, "embeddings has shape .5, 3."),
    "labels of another dtype": (
        lambda: ops.prototypes(X, LABELS.int(), 3),
        TypeError,
        "labels has dtype torch.int32, expected int64",
    ),
    "labels not a tensor": (
        lambda: ops.prototypes(X, [[0]], 3),  # type: ignore[arg-type]
        TypeError,
        "labels must be a torch.Tensor, got list",
    ),
    "labels of another shape": (
        lambda: ops.prototypes(X, LABELS[:, :3], 3),
        ValueError,
        r"labels has shape \(2, 3\), expected \[T, S\] = \(2, 5\)",
    ),
    "label too large": (lambda: ops.prototypes(X, LABELS, 2), ValueError, "labels holds 2 in task 0, expected 0 … 1"),
    "label negative": (lambda: ops.prototypes(X, LABELS - 1, 3), ValueError, "labels holds -1 in task 0"),
    "negative label under a mask": (
        lambda: ops.prototypes(X, LABELS - 1, 3, mask=torch.ones_like(MASK)),
        ValueError,
        "labels holds -1 in task 0",
    ),
    "class without a sample": (
        lambda: ops.prototypes(X, LABELS, 4),
        ValueError,
        "labels has no sample of class 3 in task 0",
    ),
    "class without a sample but masked ones": (
        lambda: ops.prototypes(X, LABELS, 3, mask=LABELS != 0),
        ValueError,
        "labels has no sample of class 0 in task 0",
    ),
    "mask of another dtype": (lambda: ops.prototypes(X, LABELS, 3, mask=MASK.float()), ValueError, "mask is"),
    "num_classes negative": (lambda: ops.prototypes(X, LABELS, -1), ValueError, "num_classes is -1"),
    "queries of one task": (lambda: ops.pairwise_distance(Q[0], P), ValueError, "queries has shape .3, 4."),
    "prototypes of other dimensions": (
        lambda: ops.pairwise_distance(Q, P[..., :3]),
        ValueError,
        r"prototypes has shape \(2, 2, 3\), expected \[T, N, D\] with T = 2 and D = 4",
    ),
    "prototypes of another dtype": (
        lambda: ops.pairwise_distance(Q, P.double()),
        TypeError,
        "prototypes has dtype torch.float64, expected queries's torch.float32",
    ),
    "queries in half precision": (lambda: ops.pairwise_distance(Q.half(), P.half()), TypeError, "queries has dtype"),
    "temperature zero": (lambda: ops.pairwise_distance(Q, P, temperature=0.0), ValueError, "temperature is 0.0, expec"),
    "support of another dtype than queries": (
        lambda: ops.prototype_logits(X.double(), LABELS, X, 3),
        TypeError,
        "support has dtype torch.float64, expected queries's torch.float32",
    ),
    "support of other dimensions than queries": (
        lambda: ops.attention_classify(Q, X, LABELS, 3),
        ValueError,
        r"support has shape \(2, 5, 3\), expected \[T, S, D\] with T = 2 and D = 4",
    ),
    "class that logits have no sample of": (
        lambda: ops.prototype_logits(X, LABELS, X, 4),
        ValueError,
        "labels has no sample of class 3 in task 0",
    ),
    "class that attention has no sample of": (
        lambda: ops.attention_classify(X, X, LABELS, 3, mask=LABELS != 1),
        ValueError,
        "labels has no sample of class 1 in task 0",
    ),
    "query labels of another shape": (
        lambda: ops.prototype_loss(X, LABELS, X, QUERY_LABELS, 3),
        ValueError,
        r"query_labels has shape \(2, 3\), expected \[T, Q\] = \(2, 5\)",
    ),
    "query label too large": (
        lambda: ops.prototype_loss(X, LABELS, X, LABELS + 1, 3),
        ValueError,
        "query_labels holds 3 in task 0, expected 0 … 2",
    ),
    "query mask of another shape": (
        lambda: ops.prototype_loss(X, LABELS, X, LABELS, 3, query_mask=MASK[:, :2]),
        ValueError,
        "query_mask is torch.bool of shape .2, 2., expected bool of shape .2, 5.",
    ),
    "task without a valid query": (
        lambda: ops.prototype_loss(X, LABELS, X, LABELS, 3, query_mask=torch.tensor([[True], [False]]).expand(2, 5)),
        ValueError,
        "query_mask leaves task 1 without a valid query",
    ),
    "metric misspelt": (
        lambda: ops.pairwise_distance(Q, P, metric="cosin"),  # type: ignore[arg-type]
        ValueError,
        "metric is 'cosin'.*cosine",
    ),
    "fewer gradients": (lambda: ops.inner_update([X, X], [X], 0.1), ValueError, "grads has 1 tensors, expected 2"),
    "gradient of another shape": (
        lambda: ops.inner_update([X], [X[0]], 0.1),
        ValueError,
        r"grads\[0\] has shape \(5, 3\), expected \(2, 5, 3\)",
    ),
    "gradient of another dtype": (lambda: ops.inner_update([X], [X.double()], 0.1), TypeError, r"grads\[0\] has dtype"),
    "parameter of integers": (lambda: ops.inner_update([X.long()], [X.long()], 0.1), TypeError, r"params\[0\] has"),
    "parameter not a tensor": (
        lambda: ops.inner_update([1.0], [X], 0.1),  # type: ignore[list-item]
        TypeError,
        r"params\[0\] must be a torch.Tensor, got float",
    ),
    "rates one too few": (lambda: ops.inner_update([X, X], [X, X], [0.1]), ValueError, "lr must be a number"),
    "rate that does not fit": (
        lambda: ops.inner_update([X], [X], [torch.ones(4)]),
        ValueError,
        r"lr\[0\] has shape \(4,\), expected one that broadcasts to \(2, 5, 3\)",
    ),
    "rate of another dtype": (
        lambda: ops.inner_update([X], [X], torch.tensor(0.1, dtype=torch.float64)),
        TypeError,
        r"lr\[0\] has dtype torch.float64",
    ),
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_errors_name_the_argument(wrong: str) -> None:
    call, error, message = ERRORS[wrong]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("wrong", op_cases.RAW_ERRORS)
def test_a_direct_call_of_an_op_checks_before_it_reads(wrong: str) -> None:
    name, arguments, message = op_cases.RAW_ERRORS[wrong]
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.innerloop, name)(*arguments)
