"""The ops' CUDA kernels, emulated and on a GPU where there is one: the values and derivatives of their twins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode

import op_cases
from innerloop import ops
from op_cases import CASES, LABELS, OpCase, assert_agrees

# What torch warns of in its own forward mode and opcheck; the category and the second warning depend on its version.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

CUDA_CASES = [case for case in CASES if case.name.startswith("inner_update")]

each_case = pytest.mark.parametrize("case", CUDA_CASES, ids=str)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_case
def test_values_are_the_twins(case: OpCase, dtype: torch.dtype, kernels: str) -> None:
    assert_agrees(case, dtype, kernels)


@each_case
def test_derivatives(case: OpCase, kernels: str) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in case.inputs(device=kernels))
    assert torch.autograd.gradcheck(case.op, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(case.op, inputs)


def test_opcheck(kernels: str) -> None:
    torch.library.opcheck(torch.ops.innerloop.inner_update.default, op_cases.raw_calls(kernels)["inner_update"])


WITHOUT_CUDA_KERNEL: dict[str, Callable[[], object]] = {
    "prototypes": lambda: ops.prototypes(torch.ones(2, 5, 3, device="cuda"), LABELS, 3),
    "squared_distances": lambda: ops.pairwise_distance(*torch.ones(2, 2, 3, 4, device="cuda")),
}


@pytest.mark.parametrize("op", WITHOUT_CUDA_KERNEL)
def test_an_op_without_a_cuda_kernel_says_so(op: str) -> None:
    with (
        FakeTensorMode(),  # tensors that say they are on CUDA, on any machine
        pytest.raises(ValueError, match=f"is on cuda:0, but this installation has no CUDA kernel of {op}"),
    ):
        WITHOUT_CUDA_KERNEL[op]()
