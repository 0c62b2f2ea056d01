"""Adafactor's passes: every kernel takes the step that torch operations take, to the last bit."""

import pytest
import torch
from test_prox_op import KERNELS

from proxsparse.learning.rounded import Adafactor

SHAPES = [(5, 8), (70, 130), (3, 33, 12), (2, 300)]


def stepped(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, decay: float = 0.0) -> list[torch.Tensor]:
    """A weight after three steps, and its states."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    optimizer = Adafactor([weight], 0.05, weight_decay=decay, seed=0x80000003, kernel=kernel)
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator)
        weight.grad = gradient.to(dtype)
        optimizer.step()
    state = optimizer.state[weight]
    return [weight.detach(), state["row"], state["column"]]


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_kernel_takes_the_step_of_torch_operations_to_the_last_bit(kernel, dtype, shape, decay):
    for found, expected in zip(
        stepped(kernel, shape, dtype, decay), stepped("eager", shape, dtype, decay), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_weight_of_any_strides_is_moved(kernel):
    generator = torch.Generator().manual_seed(0)
    values, gradient = (torch.randn(12, 8, generator=generator) for _ in range(2))
    plain, transposed = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.T.contiguous().T)
    for weight in (plain, transposed):
        weight.grad = gradient.clone()
        Adafactor([weight], 0.05, kernel=kernel).step()
    assert torch.equal(plain, transposed)
    assert not torch.equal(plain, values)
