"""The closed-form heads beside what test_ops.py asks of every op: their solutions against their definitions, what they
do where a problem is degenerate, and that they say so where there is no answer."""

from __future__ import annotations

from collections.abc import Callable

import cvxpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from innerloop import ops, reference
from op_cases import FIRST_ORDER_CASES, LABELS, MASK, OpCase, Tensors, assert_agrees

# What torch warns of in its own forward mode; the category and the second warning depend on its version.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

each_case = pytest.mark.parametrize("case", FIRST_ORDER_CASES, ids=str)
few = settings(max_examples=40, deadline=None)


def leaves(case: OpCase) -> Tensors:
    return tuple(tensor.requires_grad_() for tensor in case.inputs())


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: function(*tensors).sin().sum()


def embeddings(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- the support vector machine -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_case
def test_values_are_the_twins(case: OpCase, dtype: torch.dtype) -> None:
    assert_agrees(case, dtype)


@each_case
def test_first_derivatives(case: OpCase) -> None:
    assert torch.autograd.gradcheck(
        case.op, leaves(case), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    gradients = [torch.autograd.grad(scalar(f)(*x), x) for f in (case.op, case.twin) for x in (leaves(case),)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


FIRST_ORDER_TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Tensors], object]] = {
    "grad": lambda f, x: grad(f, (0, 1))(*x),
    "jvp": lambda f, x: jvp(f, x, tuple(t.cos() for t in x)),
    "jacrev": lambda f, x: jacrev(f, (0, 1))(*x),
    "jacfwd": lambda f, x: jacfwd(f, (0, 1))(*x),
    "vmap": lambda f, x: vmap(f)(*(torch.stack([t, t.cos()]) for t in x)),
    "vmap over the first alone": lambda f, x: vmap(f, (0, None))(torch.stack([x[0], 2 * x[0]]), x[1]),
    "vmap of grad": lambda f, x: vmap(grad(f, (0, 1)))(*(torch.stack([t, t.cos()]) for t in x)),
}


@pytest.mark.parametrize("transform", FIRST_ORDER_TRANSFORMS)
@each_case
def test_torch_func(case: OpCase, transform: str) -> None:
    apply = FIRST_ORDER_TRANSFORMS[transform]
    actual, expected = (apply(scalar(function), case.inputs()) for function in (case.op, case.twin))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


# Under a transform the twin is traced, all its iterations: nearly a minute.
@pytest.mark.parametrize(
    "transform", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("grad", "vmap"))]
)
def test_compiles_whole(transform: str | None) -> None:
    torch._dynamo.reset()
    case = FIRST_ORDER_CASES[0]
    apply = FIRST_ORDER_TRANSFORMS[transform] if transform else lambda f, x: f(*x)
    compiled = torch.compile(lambda *x: apply(scalar(case.op), x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*case.inputs()), apply(scalar(case.twin), case.inputs()), rtol=1e-6, atol=1e-9)


def test_compiled_gradient() -> None:
    torch._dynamo.reset()
    case = FIRST_ORDER_CASES[0]
    compiled = torch.compile(scalar(case.op), backend="aot_eager", fullgraph=True)
    x, y = leaves(case), leaves(case)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*x), x), torch.autograd.grad(scalar(case.twin)(*y), y), rtol=1e-6, atol=1e-9
    )


SECOND_ORDER: dict[str, Callable[[Callable[..., Tensor], Tensors], object]] = {
    "grad of grad": lambda f, x: grad(lambda *y: grad(f)(*y).square().sum())(*x),
    "jvp of grad": lambda f, x: jvp(grad(f), x, tuple(t.cos() for t in x)),
    "grad of jvp": lambda f, x: grad(lambda *y: jvp(f, y, tuple(t.cos() for t in y))[1])(*x),
    "hessian": lambda f, x: hessian(f)(*x),
    "autograd": lambda f, x: torch.autograd.grad(
        torch.autograd.grad(f(x[0].requires_grad_(), x[1]), x[0], create_graph=True)[0].sum(), x[0]
    ),
}


@pytest.mark.parametrize("derivative", SECOND_ORDER)
def test_a_second_derivative_raises(derivative: str) -> None:
    case = FIRST_ORDER_CASES[1]
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again .* use ridge_head"):
        SECOND_ORDER[derivative](scalar(case.op), case.inputs())


@few
@given(
    tasks=st.integers(1, 3),
    classes=st.integers(1, 7),
    samples=st.integers(0, 12),
    dim=st.integers(0, 20),
    c=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    data=st.data(),
)
def test_the_solution_is_feasible_and_its_duality_gap_closed(
    tasks: int, classes: int, samples: int, dim: int, c: float, scale: float, data: st.DataObject
) -> None:
    drawn = st.lists(st.integers(0, classes - 1), min_size=samples, max_size=samples)
    labels = torch.tensor([data.draw(drawn) for _ in range(tasks)], dtype=torch.int64).reshape(tasks, samples)
    x = scale * embeddings(tasks, samples, dim, seed=data.draw(st.integers(0, 99)))
    weights, dual, residual, _ = ops.svm_solve(x, labels, classes, C=c)
    target = reference.one_hot(labels, classes, x.dtype)
    assert (dual <= c * target + 1e-12 * c).all()
    torch.testing.assert_close(dual.sum(2), torch.zeros(tasks, samples, dtype=x.dtype), rtol=0, atol=1e-14 * c)
    torch.testing.assert_close(weights, dual.mT @ x)
    gram = x @ x.mT
    primal, below = reference.svm_objectives(gram, labels, dual, c)
    gap, reported = primal - below, residual * primal
    allowed = 1e-12 * c * samples + rounding_of_gap(gram, c * target - dual, dual)
    assert ((reported - gap).abs() <= 1e-3 * gap.abs() + allowed).all()
    assert (gap <= 1e-9 * primal + allowed).all()


def rounding_of_gap(gram: Tensor, slack: Tensor, dual: Tensor) -> Tensor:
    """[T]: what float64 makes of a gap of 0, a sum of slacks times differences of scores: where the solver may stop."""
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()[..., None]
    scores = lengths * (lengths * dual.abs()).sum(1, keepdim=True)
    return 4 * torch.finfo(gram.dtype).eps * (slack * (1 + scores)).sum((1, 2))


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("samples", [4, 12])
def test_a_singular_gram_matrix_leaves_the_solution_feasible(samples: int, scale: float) -> None:
    # Fewer dimensions than samples, a sample twice, and a C at which no bound is active: the Newton systems' condition
    # is that of their ridge.
    x = scale * embeddings(50, samples, 2, seed=0)
    x[:, 1] = x[:, 0]
    labels = torch.arange(samples).remainder(3).expand(50, samples)
    dual = ops.svm_solve(x, labels, 3, C=100.0)[1]
    torch.testing.assert_close(dual.sum(2), torch.zeros(50, samples, dtype=x.dtype), rtol=0, atol=1e-12)


def test_masked_samples_count_nowhere() -> None:
    x, queries = embeddings(2, 5, 4), embeddings(2, 3, 4, seed=1)
    padded = torch.where(MASK[..., None], x, torch.nan).requires_grad_()
    for head in (ops.svm_head, ops.ridge_head):
        scores = head(padded, torch.where(MASK, LABELS, 99), queries, 3, mask=MASK)
        for task in range(2):
            there = MASK[task]
            alone = head(x[task : task + 1, there], LABELS[task : task + 1, there], queries[task : task + 1], 3)
            torch.testing.assert_close(scores[task : task + 1].detach(), alone)
        (gradient,) = torch.autograd.grad(scores.sin().sum(), padded)
        assert (gradient[~MASK] == 0).all()
        assert (gradient[MASK] != 0).any()


def test_the_number_of_threads_changes_no_bit() -> None:
    labels = (torch.arange(25) % 5).expand(5, 25)

    def results() -> list[Tensor]:
        support, queries = (embeddings(5, n, 640, dtype=torch.float32).requires_grad_() for n in (25, 75))
        scores = [head(support, labels, queries, 5) for head in (ops.svm_head, ops.ridge_head)]
        return [*scores, *torch.autograd.grad(sum(s.sin().sum() for s in scores), (support, queries))]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, results(), strict=True))
    finally:
        torch.set_num_threads(threads)


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "support of one task": (
        lambda: ops.ridge_head(embeddings(5, 3), LABELS, embeddings(2, 2, 3), 3),
        ValueError,
        r"support has shape \(5, 3\), expected \[T, S, D\]",
    ),
    "queries of other dimensions": (
        lambda: ops.svm_head(embeddings(2, 5, 3), LABELS, embeddings(2, 2, 4), 3),
        ValueError,
        r"support has shape \(2, 5, 3\), expected \[T, S, D\] with T = 2 and D = 4",
    ),
    "label too large": (
        lambda: ops.svm_head(embeddings(2, 5, 3), LABELS, embeddings(2, 2, 3), 2),
        ValueError,
        "labels holds 2 in task 0, expected 0 … 1",
    ),
    "targets of another shape": (
        lambda: ops.ridge_head(embeddings(2, 5, 3), embeddings(2, 5, 2), embeddings(2, 2, 3), 3),
        ValueError,
        r"targets \[T, S, N\] = \(2, 5, 3\) in support's torch.float64",
    ),
    "regularization of zero": (
        lambda: ops.ridge_head(embeddings(2, 5, 3), LABELS, embeddings(2, 2, 3), 3, regularization=0.0),
        ValueError,
        "regularization is 0.0, expected a positive number",
    ),
    "regularization of many": (
        lambda: ops.ridge_head(embeddings(2, 5, 3), LABELS, embeddings(2, 2, 3), 3, regularization=torch.ones(2)),
        ValueError,
        "regularization is torch.float32 of shape .2,., expected a number or a 0-d",
    ),
    "regularization below rounding": (
        lambda: ops.ridge_head(torch.ones(2, 5, 9), LABELS, torch.ones(2, 2, 9), 3, regularization=1e-15),
        RuntimeError,
        "the 5 × 5 matrix of task 0 is not positive definite .* Raise regularization",
    ),
    "embeddings that are not finite, ridge": (
        lambda: ops.ridge_head(torch.tensor([1.0, torch.nan]).reshape(2, 1, 1), LABELS[:, :1], torch.ones(2, 2, 1), 3),
        RuntimeError,
        "the 1 × 1 matrix of task 1 is not positive definite",
    ),
    "embeddings that are not finite, svm": (
        lambda: ops.svm_head(torch.tensor([1.0, torch.nan]).reshape(2, 1, 1), LABELS[:, :1], torch.ones(2, 2, 1), 3),
        RuntimeError,
        "the embeddings of task 1 are not finite",
    ),
    "too few iterations": (
        lambda: ops.svm_head(embeddings(2, 5, 3), LABELS, embeddings(2, 2, 3), 3, max_iterations=1),
        RuntimeError,
        "task 0 has not converged: after 1 of at most 1 iterations its duality gap is .* Raise max_iterations",
    ),
    "C of zero": (
        lambda: ops.svm_head(embeddings(2, 5, 3), LABELS, embeddings(2, 2, 3), 3, C=0),
        ValueError,
        "C is 0, expected a positive number",
    ),
    "diagonal negative": (
        lambda: ops.svm_head(embeddings(2, 5, 3), LABELS, embeddings(2, 2, 3), 3, diagonal=-1),
        ValueError,
        "diagonal is -1, expected at least 0",
    ),
    "raw: gram in float32": (
        lambda: torch.ops.innerloop.svm_solve(torch.ones(2, 5, 5), LABELS, 3, 0.1, 50, 1e-10),
        RuntimeError,
        "gram must be float64",
    ),
    "raw: gram not square": (
        lambda: torch.ops.innerloop.svm_solve(embeddings(2, 5, 4), LABELS, 3, 0.1, 50, 1e-10),
        RuntimeError,
        "gram has size 4 in dimension 2, expected 5",
    ),
    "raw: right-hand side too small": (
        lambda: torch.ops.innerloop.solve_positive_definite(embeddings(2, 5, 5), embeddings(2, 4, 3)),
        RuntimeError,
        "right has size 4 in dimension 1, expected 5",
    ),
    "raw: coefficients of fewer rows": (
        lambda: torch.ops.innerloop.combine_rows(embeddings(2, 3, 4), embeddings(2, 5, 3)),
        RuntimeError,
        "coefficients has size 4 in dimension 2, expected 5",
    ),
    "raw: rows of another dtype": (
        lambda: torch.ops.innerloop.inner_products(embeddings(2, 3, 4), torch.ones(2, 5, 4), True),
        RuntimeError,
        "b must have the other arguments' dtype",
    ),
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_errors_say_what_was_wrong(wrong: str) -> None:
    call, error, message = ERRORS[wrong]
    with pytest.raises(error, match=message):
        call()


# --- ridge regression -----------------------------------------------------------------------------------------------


@few
@given(
    tasks=st.integers(1, 3),
    samples=st.integers(1, 12),
    queries=st.integers(0, 7),
    dim=st.integers(1, 40),
    classes=st.integers(1, 6),
    double=st.booleans(),
    data=st.data(),
)
def test_ridge_of_any_shape(
    tasks: int, samples: int, queries: int, dim: int, classes: int, double: bool, data: st.DataObject
) -> None:
    drawn = st.lists(st.integers(0, classes - 1), min_size=samples, max_size=samples)
    labels = torch.tensor([data.draw(drawn) for _ in range(tasks)])
    case = OpCase(
        "drawn",
        ((tasks, samples, dim), (tasks, queries, dim)),
        lambda x, q: ops.ridge_head(x, labels, q, classes),
        lambda x, q: reference.ridge_head(x, labels, q, classes),
        1e-10,
    )
    assert_agrees(case, torch.float64 if double else torch.float32)
    a, b = leaves(case), leaves(case)
    torch.testing.assert_close(
        torch.autograd.grad(scalar(case.op)(*a), a), torch.autograd.grad(scalar(case.twin)(*b), b)
    )


# --- other solvers on the same problem ------------------------------------------------------------------------------


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """20 samples of 4 classes in 6 dimensions, not separable; and 7 queries."""
    labels = torch.arange(20) % 4
    return embeddings(20, 6) + 0.7 * embeddings(4, 6, seed=1)[labels], labels, embeddings(7, 6, seed=2)


@pytest.mark.parametrize("C", [0.01, 0.1, 1.0])
def test_svm_is_that_of_scikit_learn(C: float) -> None:
    x, labels, queries = problem()
    machine = LinearSVC(multi_class="crammer_singer", C=C, fit_intercept=False, tol=1e-10, max_iter=10**6)
    machine.fit(x.numpy(), labels.numpy())
    scores = ops.svm_head(x[None], labels[None], queries[None], 4, C=C)[0]
    torch.testing.assert_close(
        scores, torch.from_numpy(machine.decision_function(queries.numpy())), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("C", [0.01, 0.1, 1.0])
def test_svm_is_that_of_cvxpy(C: float) -> None:
    x, labels, _ = problem()
    target = reference.one_hot(labels, 4, x.dtype).numpy()
    weights, slack = cvxpy.Variable((4, 6)), cvxpy.Variable((20, 1))
    scores = x.numpy() @ weights.T
    own = cvxpy.sum(cvxpy.multiply(scores, target), axis=1, keepdims=True)
    margins = [own - scores[:, k : k + 1] >= 1 - target[:, k : k + 1] - slack for k in range(4)]
    program = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(weights) / 2 + C * cvxpy.sum(slack)), margins)
    program.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    solution = ops.svm_solve(x[None], labels[None], 4, C=C)
    primal, dual = reference.svm_objectives(reference.svm_gram(x[None]), labels[None], solution.dual, C)
    assert primal.item() == pytest.approx(program.value, rel=1e-8)
    assert dual.item() == pytest.approx(program.value, rel=1e-8)
    torch.testing.assert_close(solution.weights[0], torch.from_numpy(weights.value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples", [4, 20], ids=["dual", "primal"])
@pytest.mark.parametrize("rate", [1e-3, 1.0, 50.0])
def test_ridge_is_that_of_scikit_learn_and_cvxpy(samples: int, rate: float) -> None:
    x, labels, queries = problem()
    x, labels = x[:samples], labels[:samples]
    targets = reference.one_hot(labels, 4, x.dtype).numpy()
    scores = ops.ridge_head(x[None], labels[None], queries[None], 4, regularization=rate)[0]
    fitted = Ridge(alpha=rate, fit_intercept=False, solver="cholesky").fit(x.numpy(), targets)
    torch.testing.assert_close(scores, torch.from_numpy(fitted.predict(queries.numpy())), rtol=1e-9, atol=1e-10)
    weights = cvxpy.Variable((6, 4))
    loss = cvxpy.sum_squares(x.numpy() @ weights - targets) + rate * cvxpy.sum_squares(weights)
    cvxpy.Problem(cvxpy.Minimize(loss)).solve(
        solver=cvxpy.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
    )
    torch.testing.assert_close(scores, queries @ torch.from_numpy(weights.value), rtol=1e-4, atol=1e-5)


# --- degenerate problems --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [0.1, 10.0])
def test_the_gradient_of_duplicate_samples_is_that_of_moving_them_together(C: float) -> None:
    """α of duplicates is not unique; scores are, and so is their change when the duplicates move as one."""
    x, labels, queries = problem()
    x, labels = x[:12], labels[:12]

    def scores(x: Tensor) -> Tensor:
        both = torch.cat([x, x])[None]
        return ops.svm_head(both, torch.cat([labels, labels])[None], queries[None], 4, C=C, tolerance=1e-13)

    twice = ops.svm_head(x[None], labels[None], queries[None], 4, C=2 * C, tolerance=1e-13)
    torch.testing.assert_close(scores(x), twice, rtol=1e-7, atol=1e-7)
    moved = x.requires_grad_()
    gradients = [
        torch.autograd.grad(out.sin().sum(), moved)[0]
        for out in (scores(moved), ops.svm_head(moved[None], labels[None], queries[None], 4, C=2 * C, tolerance=1e-13))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shots", [1, 3])
def test_identical_embeddings_have_a_finite_gradient(shots: int) -> None:
    """An untrained or collapsed encoder: a Gram matrix of rank one, or zero, and every margin a tie."""
    labels = torch.arange(5 * shots)[None] % 5
    for x in (torch.ones(1, 5 * shots, 8), torch.zeros(1, 5 * shots, 8)):
        for head in (ops.svm_head, ops.ridge_head):
            leaf = x.clone().requires_grad_()
            scores = head(leaf, labels, torch.ones(1, 3, 8), 5)
            torch.testing.assert_close(scores.detach(), scores.detach().mean(2, keepdim=True).expand_as(scores))
            (gradient,) = torch.autograd.grad(scores.square().sum() + scores[..., 0].sum(), leaf)
            assert gradient.isfinite().all()


@pytest.mark.parametrize("rate", [1.0, 1e-2, 1e-4, 1e-6])
def test_float32_scores_of_duplicates_with_other_labels(rate: float) -> None:
    """The worst conditioning there is: coefficients of size 1/λ that cancel."""
    x = embeddings(1, 6, 40, dtype=torch.float32)
    x = torch.cat([x, x], 1)
    labels, queries = torch.arange(12)[None] % 5, embeddings(1, 9, 40, seed=1, dtype=torch.float32)
    actual = ops.ridge_head(x, labels, queries, 5, regularization=rate)
    expected = reference.ridge_head(x.double(), labels, queries.double(), 5, rate)
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
