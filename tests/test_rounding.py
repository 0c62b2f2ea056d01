"""Stochastic rounding: one hash of an entry's place, the same bits on every kernel and for every part of a weight."""

import pytest
import torch
from conftest import tiny_llama
from oracle import hard_blocks
from test_prox_op import KERNELS

from proxsparse.learning.rounded import Adafactor
from proxsparse.operator.prox import prox_counted_, prox_op_
from proxsparse.operator.rounding import CHUNK, Noise, noise_seed, round_stochastically

SEEDS = [5, 0x80000005, 0xFFFFFFFF]


def lowbias32(x: int) -> int:
    """The published hash, in Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", [0, 7, 2**31 - 3, 2**32 - 5, 2**40 + 1])
def test_noise_is_the_published_hash_of_the_place(seed, first):
    expected = [lowbias32((first + i & 0xFFFFFFFF) ^ seed) & 0xFFFF for i in range(64)]
    assert Noise(seed, first).values(64, torch.device("cpu")).tolist() == expected


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_kernel_rounds_with_the_published_hash(kernel, seed):
    # Of these blocks the third weight alone is shrunk, to 0.5 - 2^-12: an eighth of a unit in its last place.
    weight = torch.tensor([[1.0, 1.0, 0.5, 0.0]]).repeat(512, 1).to(torch.bfloat16)
    prox_op_(weight, 2**-12, kernel=kernel, stochastic=True, seed=seed)
    bits = int(torch.tensor(0.5 - 2**-12).view(torch.int32))
    up = [bits + (lowbias32(4 * i + 2 ^ seed) & 0xFFFF) >= 0x3F000000 for i in range(512)]
    assert (weight[:, 2] == 0.5).tolist() == up


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_kernels_agree_in_every_bit_of_bfloat16(seed, scaled):
    pytest.importorskip("triton")
    weight = torch.tensor(hard_blocks(2064)).view(24, 344).to(torch.bfloat16)
    scale = torch.rand(344, generator=torch.Generator().manual_seed(1)) + 0.1 if scaled else None
    found = []
    for kernel in ("cpu", "eager", "triton"):
        out = weight.clone()
        prox_op_(out, 2e-2, scale=scale, kernel=kernel, stochastic=True, seed=seed)
        found.append(out)
    # Sums in another order move a float32 result by a unit in the last place, which one noise in 65,536 notices.
    for other in found[1:]:
        assert int((found[0] != other).sum()) <= 1
    other_seed = weight.clone()
    prox_op_(other_seed, 2e-2, scale=scale, kernel="cpu", stochastic=True, seed=seed ^ 0x80000000)
    assert int((found[0] != other_seed).sum()) > 100


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_part_of_a_weight_is_rounded_as_in_the_whole(kernel):
    weight, counts = torch.randn(6, 64).to(torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    whole = weight.clone()
    prox_counted_(whole, 0.01, counts, noise=Noise(9), kernel=kernel)
    parts = weight.clone()
    for first, rows in ((0, parts[:2]), (2, parts[2:])):
        prox_counted_(rows, 0.01, counts, noise=Noise(9, 64 * first), kernel=kernel)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("kernel", KERNELS)
def test_stacked_experts_are_one_weight(kernel):
    weight, scale = torch.randn(3, 8, 64).to(torch.bfloat16), torch.rand(3, 64) + 0.1
    stacked, counts = weight.clone(), torch.zeros(2, dtype=torch.int32)
    prox_counted_(stacked, 0.05, counts, scale=scale, noise=Noise(9), kernel=kernel)
    own, own_counts = weight.clone(), torch.zeros(2, dtype=torch.int32)
    for i in range(3):
        prox_counted_(own[i], 0.05, own_counts, scale=scale[i], noise=Noise(9, 512 * i), kernel=kernel)
    assert torch.equal(stacked, own)
    assert torch.equal(counts, own_counts)


def test_rounding_is_unbiased_and_leaves_bfloat16_values_alone():
    values = torch.full((100_000,), 1.0 + 2**-10)
    rounded = round_stochastically(values, Noise(0)).double()
    assert rounded.mean().item() == pytest.approx(1.0 + 2**-10, abs=1e-4)
    exact = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(round_stochastically(exact.float(), Noise(0)), exact)


def test_what_is_rounded_in_chunks_is_what_is_rounded_at_once():
    values = torch.randn(CHUNK + 100)
    rounded = round_stochastically(values, Noise(3))
    assert torch.equal(rounded[-200:], round_stochastically(values[-200:], Noise(3, len(values) - 200)))


def test_the_optimizer_rounds_with_the_hash_of_the_place():
    parameter = torch.nn.Parameter(tiny_llama().lm_head.weight.detach().to(torch.bfloat16))
    exact = torch.nn.Parameter(parameter.detach().float())
    optimizers = Adafactor([parameter], 1e-4, seed=2), Adafactor([exact], 1e-4, seed=2)
    gradient = torch.randn_like(parameter)
    for weight, optimizer in zip((parameter, exact), optimizers, strict=True):
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    seed = noise_seed(2, step=1, place=1)
    bits = exact.detach().view(torch.int32).flatten()[:500].tolist()
    expected = [(b & 0xFFFFFFFF) + (lowbias32(i ^ seed) & 0xFFFF) & 0xFFFF0000 for i, b in enumerate(bits)]
    found = parameter.detach().float().view(torch.int32).flatten()[:500].tolist()
    assert [bits & 0xFFFFFFFF for bits in found] == expected
