"""Lambda by feedback: it lands in its band whatever the weights' scale and the length of the run."""

import pytest
import torch
from conftest import TEXT, byte_tokenizer, slow, tiny_llama
from datasets import Dataset

from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.feedback import RANGE, ShareController
from proxsparse.learning.trainer import ProxSparseTrainer

BAND = (0.9, 0.985)


def share_after(tmp_path, model, steps, **settings):
    """Share of 2:4 blocks that a run ends with."""
    tokenizer = byte_tokenizer()
    ids = torch.tensor(tokenizer(TEXT * 60).input_ids)[: steps * 32].view(-1, 32)
    settings = {"method": "paper", "logging_steps": 1, "save_strategy": "no"} | settings
    config = ProxSparseConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False, max_length=32, **settings
    )
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    trainer = ProxSparseTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return [log for log in trainer.state.log_history if "share_24" in log][-1]["share_24"]


def rescaled(factor):
    """The same function with weights of another scale: up_proj times the factor, down_proj divided by it."""
    model = tiny_llama()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight.mul_(factor)
            block.mlp.down_proj.weight.div_(factor)
    return model


@pytest.mark.parametrize("steps", [20, slow(100)])
@pytest.mark.parametrize("factor", [1, 30])
@pytest.mark.parametrize("method", ["paper", "masked"])
def test_auto_lands_in_the_band(method, factor, steps, tmp_path):
    share = share_after(tmp_path, rescaled(factor), steps, method=method, lambda_value="auto")
    assert BAND[0] <= share <= BAND[1]


@pytest.mark.slow
def test_a_fixed_lambda_does_not(tmp_path):
    fixed = {"lambda_value": 0.25}
    shares = [
        share_after(tmp_path / str(i), rescaled(factor), steps, **fixed)
        for i, (factor, steps) in enumerate([(1, 20), (30, 100), (1, 300)])
    ]
    assert not any(BAND[0] <= share <= BAND[1] for share in shares), shares


def test_another_target_is_reached(tmp_path):
    share = share_after(tmp_path, tiny_llama(), 60, lambda_value="auto", target_share=0.5)
    assert share == pytest.approx(0.5, abs=0.07)


def test_the_strength_stays_within_its_range_and_comes_back():
    controller = ShareController(0.95)
    for step in range(1, 200):
        controller.observe(0.0, step, 200)
    assert controller.strength() == RANGE[1]
    wound = controller.integral
    controller.observe(0.0, 199, 200)
    assert controller.integral == wound  # no winding up
    for _ in range(40):
        controller.observe(1.0, 199, 200)
    assert controller.strength() < RANGE[1]


def test_its_state_survives_a_checkpoint():
    first, second = ShareController(0.9), ShareController(0.9)
    first.observe(0.3, 50, 100)
    second.restore(first.state())
    assert second == first
    assert second.strength() == first.strength()
