"""The operator against a float64 search, on every kernel, and its properties."""

import functools
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import coordinate_descent, global_minimum, hard_blocks, objective

from proxsparse.operator.pattern import nm_mask
from proxsparse.operator.prox import prox_op, prox_op_, regularizer, survey_, top2_mask, top2_product_

ABSENT = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
TRITON = pytest.param("triton", marks=ABSENT)
SLOW_TRITON = pytest.param("triton", marks=[ABSENT, pytest.mark.slow])
KERNELS = ["cpu", "eager", TRITON]
# lambda * |w| from far below to far above the change of regime, which lies near one.
STRENGTHS = [1e-6, 1e-4, 1e-2, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.9, 3.1, 10.0, 1e3]


def run(kernel: str, blocks: np.ndarray, lam: float, **kwargs) -> np.ndarray:
    on_gpu = kernel == "triton" and torch.cuda.is_available()  # else it runs in Triton's interpreter
    weight = torch.tensor(blocks, dtype=torch.float32, device="cuda" if on_gpu else "cpu")
    prox_op_(weight, lam, kernel=kernel, **kwargs)
    return weight.cpu().numpy()


@functools.lru_cache(1)  # the kernels follow each other
def solved(lam):
    blocks = hard_blocks(2000).astype(np.float32)
    return blocks, global_minimum(blocks, lam)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lam", STRENGTHS)
def test_it_returns_a_global_minimiser(kernel, lam):
    blocks, best = solved(lam)
    gap = objective(run(kernel, blocks, lam), blocks, lam) - best
    # float32 rounding of the result costs this much; the search itself may be worse than the kernel.
    assert (gap <= 1e-6 * best + 1e-12).all(), (gap / best).max()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("lam", [0.05, 0.6, 1.1])
def test_it_is_homogeneous_so_that_scale_does_not_matter(kernel, scale, lam):
    blocks = hard_blocks(512).astype(np.float32)
    expected = run(kernel, blocks, lam)
    found = run(kernel, (blocks * scale).astype(np.float32), lam / scale) / np.float32(scale)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(blocks).max())


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has one thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype):
    weight, threads = torch.tensor(hard_blocks(20_000)).to(dtype), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            moved, codes = weight.clone(), torch.zeros(len(weight), dtype=torch.uint8)
            prox_op_(moved, 0.3, kernel="cpu", stochastic=dtype == torch.bfloat16, seed=5)
            survey_(moved, codes)
            found.append((moved, codes))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


FIRST_USE = {
    "operator": "prox_op_(torch.randn(64, 64), 0.1)",
    "compact": "CompactLinear(layer)(torch.randn(2, 64))",
    "expanded": "CompactLinear(layer).dense()",
}


@pytest.mark.slow  # processes of their own
@pytest.mark.parametrize("use", FIRST_USE.values(), ids=FIRST_USE)
def test_the_first_use_leaves_torch_its_number_of_threads(use):
    # In a new process: numba starts its threads once.
    script = f"""
import numba, torch
from proxsparse import prox_op_, top2_mask
from proxsparse.deploy.sparse import CompactLinear
layer = torch.nn.Linear(64, 64)
layer.weight.data *= top2_mask(layer.weight.data)
{use}
print(torch.get_num_threads(), numba.get_num_threads())
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_change_of_regime_is_exact_where_two_weights_are_fixed(kernel):
    # With w1 = w2 >> w3 a third weight survives exactly where lam * w1 * w2 < w3.
    blocks = np.array([[1000.0, 1000.0, 1.0, 0.0]], np.float32)
    assert run(kernel, blocks, 0.99e-6)[0, 2] > 0
    assert run(kernel, blocks, 1.01e-6)[0, 2] == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_beats_the_original_solver_where_that_one_is_stuck(kernel):
    blocks = np.ones((1, 4), np.float32)
    original = coordinate_descent(blocks.astype(np.float64), 1.0, np.zeros((1, 4)), 100)
    assert objective(original, blocks, 1.0)[0] == pytest.approx(1.0)
    assert objective(run(kernel, blocks, 1.0), blocks, 1.0)[0] == pytest.approx(0.955, abs=1e-3)


# Triton's interpreter takes 20 seconds; its kernels are compared with the others below.
@pytest.mark.parametrize("kernel", ["cpu", "eager", SLOW_TRITON])
@given(
    arrays(np.float32, (16, 4), elements=st.floats(-1e4, 1e4, width=32)),
    st.floats(0, 1e4, width=32),
)
@example(np.tile(np.float32([1, 0.25, 0.25, 0.25]), (16, 1)), 1.0)  # equal weights, slow to settle
@settings(max_examples=60, deadline=None)
def test_no_entry_grows_or_changes_sign_and_the_top_two_stay(kernel, blocks, lam):
    found = run(kernel, blocks, float(lam))
    assert (np.abs(found) <= np.abs(blocks)).all()
    assert (found * blocks >= 0).all()
    order = np.argsort(-np.abs(blocks), axis=1, kind="stable")
    ranked = np.abs(np.take_along_axis(found, order, 1))
    # Weights that float32 hardly tells apart may swap: where the minimiser changes its support, the objective is flat.
    sizes = np.take_along_axis(np.abs(blocks), order, 1)
    apart = sizes[:, :-1] - sizes[:, 1:] > 1e-5 * sizes[:, :1]
    assert (ranked[:, :-1] >= ranked[:, 1:] - np.where(apart, 0, 2e-5 * sizes[:, :1])).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("block", "lam"),
    [
        ((1.0, 0.8859013, 0.8859013, 0.8859013), 0.22524945),
        ((1.0, 0.7935471, 0.7935471, 0.7935471), 0.13699326),
        ((1.0, 1.0, 1.0, 1.0), 0.132835),
    ],
)
def test_sweeps_go_on_while_any_weight_moves(kernel, block, lam):
    """Blocks alone, whose third weight stands still between two sweeps as it turns round."""
    blocks = np.float32([block])
    expected = coordinate_descent(blocks.astype(np.float64), lam, blocks.astype(np.float64), 1000)
    np.testing.assert_allclose(run(kernel, blocks, lam), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_block_that_is_already_24_keeps_its_bits(kernel):
    blocks = np.array([[0.1, 0.0, -0.7, 0.0], [0, 0, 0, 0], [3, 0, 0, 0]], np.float32)
    assert np.array_equal(run(kernel, blocks, 5.0), blocks)


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_weights_that_survive_keep_their_bits(kernel):
    blocks = np.array([[4.0, 3.1, 2.0, -1.0]], np.float32)
    assert np.array_equal(run(kernel, blocks, 10.0), [[np.float32(4.0), np.float32(3.1), 0, 0]])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("blocks", [[1e-41, -3e-42, 2e-42, 1e-42], [3e38, 2e38, 1e38, -3e38]])
@pytest.mark.parametrize("lam", [1e-30, 1.0, 1e30])
def test_denormal_and_huge_weights_stay_finite(kernel, blocks, lam):
    blocks = np.array([blocks], np.float32)
    found = run(kernel, blocks, lam)
    assert np.isfinite(found).all()
    assert (np.abs(found) <= np.abs(blocks)).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kernel_rounds_every_dtype_it_takes_once(kernel, dtype):
    if kernel == "cpu" and dtype == torch.float16:
        pytest.skip("numba has no float16; the eager kernel serves")
    weight = torch.tensor(hard_blocks(256)).to(dtype)
    found = weight.clone()
    prox_op_(found, 0.4, kernel=kernel)
    expected = prox_op(weight.double(), 0.4)
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_gives_the_float32_result_rounded_once(dtype):
    weight = torch.tensor(hard_blocks(256)).to(dtype)
    expected = prox_op(weight.double(), 0.4).to(dtype)
    found = prox_op(weight, 0.4)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_agree(dtype):
    weight = torch.tensor(hard_blocks(4000)).to(dtype).view(40, 400)
    results = []
    for kernel in KERNELS[:2]:
        out = weight.clone()
        stats = prox_op_(out, 0.55, kernel=kernel)
        results.append((out.float(), stats.blocks_24))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], abs=2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(4,), (3, 8), (2, 5, 12), (64, 576)])
def test_any_number_of_dimensions(kernel, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = prox_op(weight.reshape(-1, 4), 0.5).view(shape)
    found = weight.clone()
    prox_op_(found, 0.5, kernel=kernel)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "view", [lambda w: w.T, lambda w: w[:, ::2], lambda w: w[3:9, 4:12], lambda w: w.movedim(0, 1)]
)
def test_it_writes_through_non_contiguous_views(kernel, view):
    whole = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    expected = prox_op(view(whole).contiguous(), 0.5)
    prox_op_(view(whole), 0.5, kernel=kernel)
    torch.testing.assert_close(view(whole), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["cpu", "eager", SLOW_TRITON])
def test_a_scale_means_acting_on_the_product_and_dividing_back(kernel):
    generator = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(32, 24, generator=generator), torch.rand(24, generator=generator) + 0.1
    expected = prox_op(weight * scale, 0.4) / scale
    found = weight.clone()
    prox_op_(found, 0.4, scale=scale, kernel=kernel)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_count_of_24_blocks_is_what_a_recount_finds(kernel):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    stats = prox_op_(weight, 0.7, kernel=kernel)
    assert stats.blocks == 64 * 64
    assert stats.blocks_24 == int((weight.view(-1, 4).count_nonzero(-1) <= 2).sum())
    assert 0 < stats.blocks_24 < stats.blocks


@pytest.mark.parametrize("kernel", KERNELS)
def test_stochastic_rounding_keeps_a_shrinkage_that_nearest_loses(kernel):
    # The exact operator shrinks the third weight by lam * w1 * w2, a tenth of its unit in the last place.
    block = torch.tensor([[1.0, 1.0, 0.5, 0.0]])
    lam = 0.1 * 2**-9
    weight = block.repeat(20000, 1).to(torch.bfloat16)
    nearest, noisy = weight.clone(), weight.clone()
    prox_op_(nearest, lam, kernel=kernel)
    prox_op_(noisy, lam, kernel=kernel, stochastic=True, seed=7)
    assert torch.equal(nearest, weight)
    assert (noisy[:, 2].double().mean() - 0.5).item() == pytest.approx(-lam, rel=0.2)
    assert set(noisy[:, 2].unique().tolist()) == {0.5, 0.5 - 2**-9}


def test_zero_strength_returns_the_input():
    weight = torch.randn(8, 8)
    assert torch.equal(prox_op(weight, 0.0), weight)


def test_out_of_place_leaves_the_input_alone():
    weight = torch.randn(8, 8)
    before = weight.clone()
    assert not torch.equal(prox_op(weight, 2.0), before)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused(kernel, strength, wrong):
    weight = torch.ones(4, 8)
    weight[1, 5] = wrong
    with pytest.raises(ValueError, match="NaN or infinite entries in 1 of its blocks"):
        prox_op_(weight, strength, kernel=kernel)


@pytest.mark.parametrize(
    ("weight", "lam", "kwargs", "message"),
    [
        (torch.ones(2, 6), 0.1, {}, "multiple of 4 for 2:4 blocks, got shape \\(2, 6\\)"),
        (torch.tensor(1.0), 0.1, {}, "multiple of 4"),
        (torch.ones(2, 4, dtype=torch.int32), 0.1, {}, "floating-point tensor, got torch.int32"),
        (torch.ones(2, 4), -0.1, {}, "lambda_ must be a finite number >= 0, got -0.1"),
        (torch.ones(2, 4), float("nan"), {}, "lambda_ must be a finite number"),
        (torch.ones(2, 4), 0.1, {"scale": torch.ones(2)}, "one entry per input, shape \\(4,\\), got \\(2,\\)"),
    ],
)
def test_bad_arguments_are_named(weight, lam, kwargs, message):
    with pytest.raises(ValueError, match=message):
        prox_op(weight, lam, **kwargs)


@given(arrays(np.float32, (32, 4), elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-40])))
def test_top2_mask_keeps_exactly_two_even_under_ties_and_zeros(blocks):
    mask = top2_mask(torch.tensor(blocks))
    assert (mask.sum(-1) == 2).all()
    kept = np.where(mask.numpy(), np.abs(blocks), np.inf).min(1)
    dropped = np.where(mask.numpy(), -np.inf, np.abs(blocks)).max(1)
    assert (kept >= dropped).all()


def test_ties_go_to_the_earlier_entry():
    assert top2_mask(torch.zeros(1, 8)).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


# Rows shorter and longer than the kernel's tile, and weights that end in the middle of one.
@pytest.mark.parametrize("shape", [(3, 4), (11, 20), (3, 516), (2, 4100)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_masked_product_and_the_survey_follow_the_mask(kernel, dtype, shape, scaled):
    generator = torch.Generator().manual_seed(0)
    base, learned = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    learned[0, :4] = 1.0  # ties
    scale = torch.rand(shape[1], generator=generator) + 0.1 if scaled else None
    scored = learned * scale if scaled else learned
    out, codes = torch.empty(shape, dtype=dtype), torch.zeros(learned.numel() // 4, dtype=torch.uint8)
    top2_product_(out, base, learned, scale, kernel)
    changed, penalty = survey_(learned, codes, scale, kernel).tolist()
    mask = top2_mask(scored)
    assert torch.equal(out, torch.where(mask, base, 0))
    assert torch.equal(codes, (mask.reshape(-1, 4) * torch.tensor([1, 2, 4, 8])).sum(1).to(torch.uint8))
    assert changed == learned.numel() // 2
    assert penalty == pytest.approx(regularizer(scored.double()).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the fused and the plain way
def test_a_survey_counts_changed_entries_and_the_penalty(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator, dtype=dtype)
    scale = torch.rand(32, generator=generator) + 0.1
    codes = torch.zeros(128, dtype=torch.uint8)
    assert survey_(weight, codes, scale)[0] == 256  # against zeros, every kept entry counts
    other = weight + 0.5 * torch.randn(16, 32, generator=generator, dtype=dtype)
    changed, penalty = survey_(other, codes, scale).tolist()
    assert changed == int((top2_mask(other * scale) != top2_mask(weight * scale)).sum()) > 0
    assert penalty == pytest.approx(regularizer(other * scale).item(), rel=1e-4)
    assert survey_(other, codes, scale)[0] == 0


def test_nm_mask_counts_and_refuses():
    assert (nm_mask(torch.randn(5, 16), 4, 8).view(5, 2, 8).sum(-1) == 4).all()
    with pytest.raises(ValueError, match="multiple of 8 for 4:8 blocks"):
        nm_mask(torch.ones(2, 12), 4, 8)
    with pytest.raises(ValueError, match="n must be between 1 and 4"):
        nm_mask(torch.ones(2, 12), 5, 4)


def test_the_regularizer_is_its_definition_and_differentiable():
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    assert regularizer(weight).item() == pytest.approx(1 * 2 * 3 + 2 * 3 * 4 + 3 * 4 * 1 + 4 * 1 * 2)
    assert torch.autograd.gradcheck(regularizer, (weight,))


def test_the_regularizer_is_zero_exactly_on_24_blocks():
    assert regularizer(torch.tensor([[0.0, 5.0, -3.0, 0.0]])).item() == 0
    assert regularizer(torch.tensor([[1e-3, 5.0, -3.0, 0.0]])).item() > 0
