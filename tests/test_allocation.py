"""OWL and AlphaPruning: shares that average to the target, and where they are refused."""

import math

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from proxsparse.baselines import METHODS, Pattern
from proxsparse.baselines.allocation import (
    allocate,
    alpha_shares,
    outlier_ratios,
    owl_shares,
    tail_exponent,
    tail_exponents,
    whole_numbers,
)
from proxsparse.baselines.layerwise import prune_layerwise
from proxsparse.errors import UsageError
from proxsparse.mask import load_mask, save_mask
from proxsparse.model.prunable import find_prunable


def windows():
    return torch.randint(1, 257, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def uneven():
    """Four blocks whose weights differ in their tails."""
    model = tiny_llama(num_hidden_layers=4)
    with torch.no_grad():
        for target in find_prunable(model):
            target.weight.copy_(target.weight.sign() * target.weight.abs() ** (1 + target.block))
    return model


measures = st.lists(st.floats(0.1, 10), min_size=2, max_size=12)


@given(measures, st.floats(0.3, 0.8))
def test_owl_and_alpha_average_to_the_target_and_keep_their_order(values, share):
    ratios = torch.tensor(values, dtype=torch.float64)
    sizes = torch.arange(1, len(values) + 1, dtype=torch.float64)
    owl, alpha = owl_shares(ratios, sizes, share, 0.08), alpha_shares(ratios, sizes, share, 0.1)
    for shares in (owl, alpha):
        assert float((shares * sizes).sum() / sizes.sum()) == pytest.approx(share, abs=1e-6)
    assert owl.max() - owl.min() <= 0.16 + 1e-6
    if ratios.max() > 1.001 * ratios.min():
        assert owl[ratios.argmax()] < owl[ratios.argmin()]  # more outliers: less removed
        assert alpha[ratios.argmax()] > alpha[ratios.argmin()]  # lighter tail: more removed


@given(st.lists(st.floats(0.2, 0.8), min_size=2, max_size=12))
def test_whole_numbers_average_to_the_pattern(values):
    shares = torch.tensor(values, dtype=torch.float64)
    shares += 0.5 - shares.mean()
    kept = whole_numbers(shares, torch.ones(len(shares), dtype=torch.float64), Pattern.parse("4:8"))
    assert sum(kept) == 4 * len(kept)
    assert all(1 <= n <= 8 for n in kept)


def test_outliers_are_counted_among_wanda_scores():
    model = tiny_llama(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, 0] *= 50
    found = outlier_ratios(model, find_prunable(model), windows(), 5.0)
    assert found[1] > found[0]


def test_the_tail_exponent_recovers_a_power_law():
    generator = torch.Generator().manual_seed(0)
    for alpha in (2.0, 3.5):
        values = torch.rand(20000, generator=generator, dtype=torch.float64) ** (-1 / (alpha - 1))
        assert tail_exponent(values) == pytest.approx(alpha, rel=0.05)
    assert math.isinf(tail_exponent(torch.tensor([1.0, 2.0])))


def test_tail_exponents_are_one_a_block(uneven):
    assert tail_exponents(find_prunable(uneven)).shape == (4,)
    assert tail_exponents(find_prunable(uneven)).isfinite().all()


@pytest.mark.parametrize("allocation", ["owl", "alphapruning"])
@pytest.mark.parametrize("kind", ["unstructured", "4:8"])
def test_layers_and_weights_that_are_left_out_have_no_share(allocation, kind, uneven):
    some = {"exclude": r"layers\.1\.|q_proj"}
    patterns = allocate(uneven, Pattern.parse(kind), allocation, windows(), spread=0.5, **some)
    assert sorted(patterns) == [0, 2, 3]
    mask = prune_layerwise(uneven, windows(), METHODS["wanda"](), patterns, **some)
    assert not [name for name in mask.tensors if "layers.1." in name or "q_proj" in name]
    assert mask.density() == pytest.approx(0.5, abs=0.02)
    # The others share as they do in a model that has no more layers.
    fewer = tiny_llama(num_hidden_layers=3)
    with torch.no_grad():
        for i, place in enumerate((0, 2, 3)):
            fewer.model.layers[i].load_state_dict(tiny_llama(num_hidden_layers=4).model.layers[place].state_dict())
        for target in find_prunable(fewer):
            target.weight.copy_(target.weight.sign() * target.weight.abs() ** (1 + (0, 2, 3)[target.block]))
    if allocation == "alphapruning":  # which reads no inputs, and so no layer that is left out
        alone = allocate(fewer, Pattern.parse(kind), allocation, windows(), spread=0.5, exclude="q_proj")
        assert [str(p) + str(p.ratio) for p in alone.values()] == [str(p) + str(p.ratio) for p in patterns.values()]


def test_a_pattern_that_all_layers_share_is_no_mixed_one(uneven):
    patterns = {block: Pattern.parse(text) for block, text in enumerate(("2:8", "4:8", "4:8", "2:8"))}
    mask = prune_layerwise(uneven, windows(), METHODS["wanda"](), patterns, exclude=r"layers\.[03]\.")
    assert str(mask.pattern) == "4:8"
    assert "layers.0." not in "".join(mask.tensors)


@pytest.mark.parametrize("allocation", ["owl", "alphapruning"])
@pytest.mark.parametrize(("kind", "ratio"), [("unstructured", 0.6), ("4:8", 0.5)])
def test_blocks_get_shares_of_their_own_that_average_to_the_target(allocation, kind, ratio, uneven, tmp_path):
    pattern = Pattern.parse(kind, ratio)
    patterns = allocate(uneven, pattern, allocation, windows(), spread=1.0 if kind == "4:8" else None)
    assert len({str(p) + str(p.ratio) for p in patterns.values()}) > 1
    mask = prune_layerwise(uneven, windows(), METHODS["wanda"](), patterns)
    assert 1 - mask.density() == pytest.approx(ratio, abs=0.02)
    assert str(mask.pattern) == ("unstructured" if kind == "unstructured" else "mixed N:8")
    save_mask(mask, tmp_path / "mask.safetensors")
    assert str(load_mask(tmp_path).pattern) == str(mask.pattern)


def test_at_24_there_is_no_freedom(model):
    with pytest.raises(UsageError, match="`allocation=owl` gives layers different shares, and 2:4 fixes"):
        allocate(model, Pattern.parse("2:4"), "owl", windows())
    with pytest.raises(UsageError, match="`allocation` must be one of uniform, owl, alphapruning; got 'even'"):
        allocate(model, Pattern.parse("4:8"), "even", windows())


class OnAccelerator:
    """Singular values where nothing works but to bring them to the CPU: GPUs have no histograms, mps no float64."""

    def __init__(self, values):
        self.values = values

    def cpu(self):
        return self.values


def test_spectra_leave_the_accelerator_before_anything_is_computed_of_them(monkeypatch):
    plain, expected = torch.linalg.svdvals, tail_exponents(find_prunable(tiny_llama()))
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: OnAccelerator(plain(matrix)))
    assert torch.equal(tail_exponents(find_prunable(tiny_llama())), expected)
