"""Patterns other than 2:4: the mask of any N:M, learned, ordered, extracted, and refused where it has no meaning."""

import json
from itertools import combinations

import pytest
import torch
from conftest import slow, tiny_llama

from proxsparse import apply_mask, learn_mask, load_mask
from proxsparse.__main__ import main as console
from proxsparse.errors import UsageError
from proxsparse.model.ordering import arrange, kept, order_channels
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.masked import code_bytes, learned_mask, masked_product_, survey_mask_
from proxsparse.operator.pattern import Pattern

PATTERNS = [Pattern.parse(text) for text in ("1:4", "2:4", "3:6", "4:8", "8:16", "20:40")]


def best(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """By the definition: of equal scores the earlier one is kept."""
    rows = scores.abs().reshape(-1, pattern.m).tolist()
    order = [sorted(range(pattern.m), key=lambda k: (-row[k], k))[: pattern.n] for row in rows]
    mask = torch.zeros(len(rows), pattern.m, dtype=torch.bool)
    for block, places in enumerate(order):
        mask[block, places] = True
    return mask.view(scores.shape)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_keeps_the_largest_scores_and_the_earlier_of_equal_ones(pattern, dtype):
    torch.manual_seed(0)
    learned = torch.randn(2, 3, 240).round(decimals=1).to(dtype)  # with many ties
    base, scale = torch.randn(2, 3, 240).to(dtype), torch.tensor([0.5, 1.0, 2.0]).repeat(2, 80)
    mask = best(learned.float() * scale[:, None], pattern)
    assert torch.equal(learned_mask(learned, pattern, scale), mask)
    across = learned.movedim(-1, 0).contiguous().movedim(0, -1)  # as the rows of a Conv1D lie
    assert torch.equal(learned_mask(across, pattern, scale), mask)
    out = torch.empty_like(base)
    masked_product_(out, base, learned, pattern, scale)
    assert torch.equal(out, torch.where(mask, base, 0))
    masked_product_(base, base, learned, pattern, scale)  # in place
    assert torch.equal(base, out)
    codes = torch.zeros(code_bytes(learned.numel(), pattern), dtype=torch.uint8)
    survey_mask_(learned, codes, pattern, scale)
    other = learned.flip(1)
    changed, _ = survey_mask_(other, codes, pattern, scale).tolist()
    assert changed == int((best(other.float() * scale[:, None], pattern) != mask).sum()) > 0


@pytest.mark.parametrize("text", ["1:2", "1:4", "2:8"])
def test_channels_are_arranged_for_the_pattern(text):
    pattern, generator = Pattern.parse(text), torch.Generator().manual_seed(0)
    scores = torch.rand(5, 2 * pattern.m, generator=generator) ** 3
    ways = [
        list(c) + [k for k in range(2 * pattern.m) if k not in c] for c in combinations(range(2 * pattern.m), pattern.m)
    ]
    optimum, found = (
        max(kept(scores[:, way], pattern) for way in ways),
        kept(scores[:, arrange(scores, pattern)], pattern),
    )
    assert kept(scores, pattern) < found <= optimum + 1e-6
    assert found > 0.95 * optimum  # one assignment at a time does not reach it


def test_ordered_channels_of_another_pattern_keep_more(tokenizer):
    model, pattern = tiny_llama(), Pattern.parse("2:8")
    before = sum(kept(t.rows(t.weight.detach()).abs(), pattern) for t in find_prunable(model))
    order = order_channels(model, None, pattern=pattern)
    assert order
    assert sum(kept(t.rows(t.weight.detach()).abs(), pattern) for t in find_prunable(model)) > before


@pytest.mark.parametrize("text", [slow("1:4"), "4:8", slow("8:16")])
def test_a_pattern_is_learned_and_lowers_the_loss_of_its_magnitude_mask(text, tokenizer):
    model, pattern = tiny_llama(), Pattern.parse(text)
    windows = torch.randint(1, 257, (24, 16), generator=torch.Generator().manual_seed(0))
    magnitude = {t.name: pattern.mask(t.weight.detach().abs()) for t in find_prunable(model)}
    mask = learn_mask(model, tokenizer, windows, pattern=text, score="weight", bf16=False, num_train_epochs=4.0)
    assert mask.pattern == pattern
    for name, found in mask.tensors.items():
        pattern.check(found, name)

    def distance(tensors) -> float:
        pruned = tiny_llama()
        with torch.no_grad():
            dense = pruned(input_ids=windows).logits.log_softmax(-1)
            for target in find_prunable(pruned):
                target.weight.mul_(tensors[target.name])
            ours = pruned(input_ids=windows).logits.log_softmax(-1)
            return float((dense.exp() * (dense - ours)).sum(-1).mean())

    assert distance(mask.tensors) < distance(magnitude)


def test_a_run_of_another_pattern_goes_through_every_command(checkpoint, corpus, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--model", checkpoint, "--dataset", corpus, "--ctx_len", "32", "--samples", "12", "--bf16", "false"]
    words += ["--pattern", "4:8", "--permute", "auto", "--output_dir", str(run)]
    assert console(["plan", *words]) == 0
    assert "pruned to 4:8" in capsys.readouterr().out
    assert console(["learn", *words]) == 0
    history = json.loads((run / "history.json").read_text())
    assert any("mask_churn" in entry for entry in history)
    assert not any("share_24" in entry for entry in history)
    learned = load_mask(run)
    assert str(learned.pattern) == "4:8"
    assert learned.density() == 0.5
    assert console(["extract", "--run", str(run)]) == 0
    assert all(torch.equal(load_mask(run).tensors[name], kept) for name, kept in learned.tensors.items())
    assert console(["prune", "--run", str(run), "--prune_method", "magnitude"]) == 0
    assert str(load_mask(run / "magnitude").pattern) == "4:8"
    assert console(["apply", "--run", str(run), "--max_windows", "2", "--ctx_len", "16"]) == 0
    assert console(["report", "--run", str(run)]) == 0
    assert "makes every block 4:8" in (run / "report.html").read_text()
    capsys.readouterr()
    assert console(["learn", *words[:-6], "--pattern", "2:8", "--output_dir", str(run)]) == 2
    assert "holds a run with" in capsys.readouterr().err


def test_a_stopped_run_of_another_pattern_ends_with_the_same_mask(tokenizer, tmp_path):
    windows = torch.randint(1, 257, (8, 16), generator=torch.Generator().manual_seed(0))
    settings = {"pattern": "4:8", "bf16": False, "save_steps": 4}
    whole = learn_mask(tiny_llama(), tokenizer, windows, output_dir=tmp_path / "run", **settings)
    for name in ("mask.safetensors", "history.json"):
        (tmp_path / "run" / name).unlink()
    for name in ("checkpoint-8",):
        (tmp_path / "run" / name / "complete.json").unlink()
    again = learn_mask(tiny_llama(), tokenizer, windows, output_dir=tmp_path / "run", **settings)
    assert all(torch.equal(whole.tensors[name], kept) for name, kept in again.tensors.items())
    model = tiny_llama()
    apply_mask(model, again)
    assert all((t.weight != 0).float().mean() <= 0.5 for t in find_prunable(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "4:8", "lambda_value": 0.1}, "`lambda_value=0.1` is the strength of the operator of 2:4 blocks"),
        ({"pattern": "4:8", "lambda_value": "auto"}, "`lambda_value=auto` is the strength of the operator"),
        ({"pattern": "4:8", "method": "paper"}, "`pattern=4:8` is learned under the mask"),
        ({"pattern": "8:4"}, "`pattern` must be N:M"),
        ({"pattern": "unstructured"}, "`pattern` must be N:M with N < M, as 2:4 or 4:8; got 'unstructured'"),
        ({"pattern": "mixed N:8"}, "`pattern` must be N:M"),
        ({"pattern": "3:7"}, "not a multiple of 7"),
    ],
)
def test_what_a_pattern_can_not_be(settings, message, tokenizer):
    with pytest.raises(UsageError, match=message):
        learn_mask(tiny_llama(), tokenizer, torch.ones(2, 8, dtype=torch.long), **settings)


def test_check_counts_the_blocks_of_the_pattern(checkpoint, corpus, tmp_path, capsys):
    save = ["--save", str(tmp_path / "mask"), "--save_model", str(tmp_path / "pruned")]
    assert (
        console(["prune", "--model", checkpoint, "--prune_method", "magnitude", "--sparsity_type", "4:8", *save]) == 0
    )
    check = ["check", "--model", str(tmp_path / "pruned"), "--base", checkpoint]
    assert console([*check, "--pattern", "4:8"]) == 0
    assert " 0 not 4:8" in capsys.readouterr().out
    assert console(check) == 1
    printed = capsys.readouterr()
    assert "blocks are not 2:4" in printed.out
    assert "It was exported as 4:8: --pattern 4:8 checks that" in printed.err
    assert console([*check, "--pattern", "unstructured"]) == 2
    assert "--pattern must be N:M with N < M, as 2:4 or 4:8" in capsys.readouterr().err
