"""The LSTM of a learned optimizer: its twin's values and exact first derivatives, the same in torch's own LSTM cells;
what cannot be had natively is exact by the twin, or raises."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vmap

import op_cases
from innerloop import ops, reference
from innerloop.ops.coordinate_lstm import coordinate_lstm_weight_gradients
from op_cases import UNROLLED_CASES, OpCase, Tensors, assert_agrees

# What torch warns of in its own forward mode; the category and the second warning depend on its version.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

each_case = pytest.mark.parametrize("case", UNROLLED_CASES, ids=str)
each_small_case = pytest.mark.parametrize("case", UNROLLED_CASES[:2], ids=str)
few = settings(max_examples=40, deadline=None)


def leaves(case: OpCase) -> Tensors:
    return tuple(tensor.requires_grad_() for tensor in case.inputs())


def scalar(function: Callable[..., Tensors]) -> Callable[..., Tensor]:
    return lambda *tensors: sum(out.sin().sum() for out in function(*tensors))


def assert_gradients_agree(case: OpCase) -> None:
    gradients = [torch.autograd.grad(scalar(f)(*x), x) for f in (case.op, case.twin) for x in (leaves(case),)]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12 * (1 + float(expected.abs().sum())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_case
def test_values_are_the_twins(case: OpCase, dtype: torch.dtype) -> None:
    assert_agrees(case, dtype)


@each_case
def test_gradients_are_the_twins(case: OpCase) -> None:
    assert_gradients_agree(case)


@each_small_case
def test_first_derivatives(case: OpCase) -> None:
    assert torch.autograd.gradcheck(case.op, leaves(case))


@few
@given(
    steps=st.integers(0, 6), coordinates=st.integers(0, 70), hidden=st.integers(1, 23), double=st.booleans(),
    p=st.sampled_from([0.5, 10.0]),
)  # fmt: skip
def test_any_shape(steps: int, coordinates: int, hidden: int, double: bool, p: float) -> None:
    case = op_cases.unrolled(steps, coordinates, hidden, p)
    assert_agrees(case, torch.float64 if double else torch.float32)
    if steps:  # without one, the twin has no graph
        assert_gradients_agree(case)


@pytest.mark.parametrize("part", ["updates", "state"])
def test_a_gradient_of_one_output_alone(part: str) -> None:
    case, place = UNROLLED_CASES[0], ("updates", "state").index(part)
    gradients = [
        torch.autograd.grad(f(*x)[place].sin().sum(), x, allow_unused=True)
        for f in (case.op, case.twin)
        for x in (leaves(case),)
    ]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, torch.zeros_like(actual) if expected is None else expected)


def test_it_is_torchs_lstm_cell() -> None:
    hidden, coordinates, steps = 7, 11, 4
    cells = nn.LSTMCell(2, hidden).double(), nn.LSTMCell(hidden, hidden).double()
    head = nn.Linear(hidden, 1).double()
    gradients = torch.randn(steps, coordinates, dtype=torch.float64) * 10.0 ** -torch.arange(0.0, 11.0).double()
    states = [torch.zeros(coordinates, hidden, dtype=torch.float64)] * 4
    expected = []
    for gradient in gradients:
        x = [
            [math.log(abs(g)) / 10, math.copysign(1, g)] if abs(g) >= math.exp(-10) else [-1, math.exp(10) * g]
            for g in gradient.tolist()
        ]
        states[:2] = cells[0](torch.tensor(x, dtype=torch.float64), tuple(states[:2]))
        states[2:] = cells[1](states[0], tuple(states[2:]))
        expected.append(head(states[2])[:, 0])
    weights = [torch.cat((c.weight_ih, c.weight_hh, (c.bias_ih + c.bias_hh)[:, None]), 1) for c in cells]
    output = torch.cat((head.weight[0], head.bias))
    zeros = torch.zeros(4, hidden, coordinates, dtype=torch.float64)
    updates, state = ops.coordinate_lstm(gradients, zeros, *weights, output)
    torch.testing.assert_close(updates, torch.stack(expected))
    torch.testing.assert_close(state, torch.stack([tensor.mT for tensor in states]))


def test_steps_may_be_taken_one_by_one() -> None:
    gradients, state, *weights = UNROLLED_CASES[2].inputs()
    together, last = ops.coordinate_lstm(gradients, state, *weights)
    single = []
    for gradient in gradients:
        update, state = ops.coordinate_lstm(gradient[None], state, *weights)
        single.append(update)
    assert torch.equal(together, torch.cat(single))
    assert torch.equal(last, state)


def test_coordinates_know_nothing_of_one_another() -> None:
    gradients, state, *weights = UNROLLED_CASES[2].inputs(torch.float32)
    updates, _ = ops.coordinate_lstm(gradients, state, *weights)
    alone, _ = ops.coordinate_lstm(gradients[:, 33:34], state[..., 33:34], *weights)
    assert torch.equal(updates[:, 33:34], alone)


def test_averaged_units_know_of_their_own_task() -> None:
    gradients, state, *weights = UNROLLED_CASES[2].inputs()
    gradients, state = gradients[:, :6], state[..., :6]
    together, _ = ops.coordinate_lstm(gradients, state, *weights, averaged=5, tasks=2)
    alone, _ = ops.coordinate_lstm(gradients[:, :3], state[..., :3], *weights, averaged=5)
    torch.testing.assert_close(together[:, :3], alone)
    moved, _ = ops.coordinate_lstm(gradients[:, :3] + torch.eye(3)[0], state[..., :3], *weights, averaged=5)
    assert (moved[:, 1:] != alone[:, 1:]).any()


@pytest.mark.parametrize("averaging", [{}, {"averaged": 2, "tasks": 2}], ids=["native", "averaged"])
def test_weight_gradients_alone(averaging: dict[str, int]) -> None:
    gradients, state, *weights = (tensor.detach() for tensor in op_cases.unrolled(4, 38, 5).inputs())
    upstream = gradients.cos()
    tensors = [weight.requires_grad_() for weight in weights]
    updates, _ = reference.coordinate_lstm(gradients, state, *tensors, **averaging)
    expected = torch.autograd.grad(updates, tensors, upstream)
    actual = coordinate_lstm_weight_gradients(upstream, gradients, state, tuple(weights), **averaging)
    torch.testing.assert_close(actual, list(expected))


def test_the_number_of_threads_changes_no_bit() -> None:
    case = UNROLLED_CASES[4]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            x = tuple(tensor.requires_grad_() for tensor in case.inputs(torch.float32))
            out = case.op(*x)
            results.append((*out, *torch.autograd.grad(sum(part.sin().sum() for part in out), x)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Tensors], object]] = {
    "grad": lambda f, x: grad(f, (0, 1, 2, 3, 4))(*x),
    "jvp": lambda f, x: jvp(f, x, tuple(t.cos() for t in x)),
    "jacrev": lambda f, x: jacrev(f, (0, 2))(*x),
    "hessian": lambda f, x: hessian(f, 4)(*x),
    "grad of grad": lambda f, x: grad(lambda *y: grad(f, 2)(*y).square().sum(), 2)(*x),
    "vmap": lambda f, x: vmap(f)(*(torch.stack([t, t.cos()]) for t in x)),
    "vmap of grad": lambda f, x: vmap(grad(f))(*(torch.stack([t, t.cos()]) for t in x)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@each_small_case
def test_torch_func(case: OpCase, transform: str) -> None:
    apply = TRANSFORMS[transform]
    actual, expected = (apply(scalar(function), case.inputs()) for function in (case.op, case.twin))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("place", range(5), ids=["gradients", "state", "first", "second", "output"])
def test_a_second_derivative_raises(place: int) -> None:
    x = leaves(UNROLLED_CASES[0])
    gradients = torch.autograd.grad(scalar(UNROLLED_CASES[0].op)(*x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(gradients[place].square().sum(), x)


def test_second_derivatives_of_averaged_units() -> None:
    assert torch.autograd.gradgradcheck(UNROLLED_CASES[-1].op, leaves(UNROLLED_CASES[-1]))


def test_compiled_gradient() -> None:
    torch._dynamo.reset()
    case = UNROLLED_CASES[0]
    compiled = torch.compile(scalar(case.op), backend="aot_eager", fullgraph=True)
    x, y = leaves(case), leaves(case)
    torch.testing.assert_close(torch.autograd.grad(compiled(*x), x), torch.autograd.grad(scalar(case.twin)(*y), y))


# --- errors ---------------------------------------------------------------------------------------------------------

GIVEN = dict(zip(("gradients", "state", "first", "second", "output"), UNROLLED_CASES[0].inputs(), strict=True))

ERRORS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "gradients not a tensor": ({"gradients": [1.0]}, TypeError, "gradients must be a torch.Tensor, got list"),
    "gradients of integers": ({"gradients": torch.ones(3, 2).long()}, TypeError, "gradients has dtype torch.int64"),
    "gradients of one step": ({"gradients": torch.ones(2)}, ValueError, r"gradients has shape \(2,\), expected \[K, C"),
    "state of other coordinates": (
        {"state": torch.ones(4, 2, 3).double()},
        ValueError,
        r"state has shape \(4, 2, 3\), expected \[4, H, C\] = \(4, 2, 2\) for 2 hidden units",
    ),
    "state of one layer": ({"state": torch.ones(2, 2, 2).double()}, ValueError, r"state has shape \(2, 2, 2\)"),
    "state of no unit": ({"state": torch.ones(4, 0, 2).double()}, ValueError, "at least one hidden unit"),
    "state of another dtype": (
        {"state": torch.ones(4, 2, 2)},
        TypeError,
        "state has dtype torch.float32, expected gra",
    ),
    "first layer too narrow": ({"first": torch.ones(8, 4).double()}, ValueError, r"first has shape \(8, 4\), expected"),
    "second layer too short": ({"second": torch.ones(6, 5).double()}, ValueError, r"second has shape \(6, 5\), expec"),
    "output without a bias": ({"output": torch.ones(2).double()}, ValueError, r"output has shape \(2,\), expected"),
    "p zero": ({"p": 0.0}, ValueError, "p is 0.0, expected a positive number"),
    "averaged too many": ({"averaged": 3}, ValueError, "averaged is 3, expected 0 … 2"),
    "tasks that do not divide": ({"averaged": 1, "tasks": 3}, ValueError, "tasks is 3, expected a divisor of the 2"),
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_errors_name_the_argument(wrong: str) -> None:
    given, error, message = ERRORS[wrong]
    with pytest.raises(error, match=message):
        ops.coordinate_lstm(**{**GIVEN, **given})


RAW_ERRORS: dict[str, tuple[dict[str, object], str]] = {
    "state of other coordinates": ({"state": torch.ones(4, 2, 3).double()}, "state has size 3 in dimension 2"),
    "first too narrow": ({"first": torch.ones(8, 4).double()}, "first has size 4 in dimension 1, expected 5"),
    "second too short": ({"second": torch.ones(6, 5).double()}, "second has size 6 in dimension 0, expected 8"),
    "output of another dtype": ({"output": torch.ones(3)}, "output must have the other arguments' dtype"),
    "p not a number": ({"p": math.nan}, "p must be positive"),
}


@pytest.mark.parametrize("wrong", RAW_ERRORS)
def test_a_direct_call_of_an_op_checks_before_it_reads(wrong: str) -> None:
    given, message = RAW_ERRORS[wrong]
    arguments = {**GIVEN, "p": 0.5, **given}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.innerloop.coordinate_lstm(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.innerloop.coordinate_lstm_backward(GIVEN["gradients"], None, **arguments, of_inputs=True)


@pytest.mark.parametrize("updates", [(3, 1), (2, 2), (3,)])
def test_upstream_gradients_of_another_shape(updates: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"grad_updates (has|must have)"):
        torch.ops.innerloop.coordinate_lstm_backward(torch.ones(updates).double(), None, **GIVEN, p=1.0, of_inputs=True)
