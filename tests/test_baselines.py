"""One-shot baselines against direct solutions, and the calibration walk against a plain forward pass."""

import pytest
import torch
from conftest import tiny_llama
from test_prunable import FAMILIES, build

from proxsparse.baselines import METHODS, ONE_SHOT, Pattern, Wanted
from proxsparse.baselines.admm import ADMM
from proxsparse.baselines.layerwise import prune_layerwise
from proxsparse.baselines.sampling import one_shot_prior
from proxsparse.baselines.sparsegpt import SparseGPT
from proxsparse.errors import RunError, UsageError
from proxsparse.model.gram import GramStatistic, invert
from proxsparse.model.inputs import NormStatistic, input_norms, listen
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.prox import expand_scale

TWO_FOUR = Pattern.parse("2:4")


def windows(count=4, length=24, vocabulary=64):
    return torch.randint(1, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


def correlated_inputs(tokens=512, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) + 2 * torch.eye(width)
    return torch.randn(tokens, width, generator=generator) @ mix


def gram_of(inputs):
    target = find_prunable(tiny_llama())[0]
    statistic = GramStatistic(target)
    statistic.add(None, inputs)
    return statistic


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ONE_SHOT)
def test_every_method_gives_24_masks_on_every_architecture(family, method):
    model = build(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = prune_layerwise(model, windows(), ONE_SHOT[method](), TWO_FOUR)
    targets = find_prunable(model)
    assert set(mask.tensors) == {t.name for t in targets}
    for target in targets:
        rows, kept = target.rows(target.weight.detach()), mask.tensors[target.name]
        assert (kept.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
        assert (rows[~kept] == 0).all()
        assert rows.isfinite().all()
        if not ONE_SHOT[method].updates_weights:
            assert torch.equal(rows[kept], target.rows(before[target.name])[kept])
    pruned = {t.name for t in targets}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n not in pruned)


@pytest.mark.parametrize("in_sequence", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_with_dense_inputs_weights_are_scored_by_what_the_dense_model_gives_them(family, in_sequence, monkeypatch):
    model, data = build(family), windows()
    targets = find_prunable(model)
    norms = input_norms(model, targets, data)
    scores = {t.name: t.rows(t.weight.detach()).abs() * expand_scale(norms[t.name], t.rows(t.weight)) for t in targets}
    if not in_sequence:
        monkeypatch.setattr("proxsparse.model.walk.in_sequence", lambda *_: False)
    mask = prune_layerwise(model, data, ONE_SHOT["wanda"](), TWO_FOUR, dense_inputs=True)
    for name, found in scores.items():
        kept = mask.tensors[name]
        worst = found.masked_fill(~kept, float("inf")).unflatten(-1, (-1, 4)).amin(-1)
        best = found.masked_fill(kept, 0.0).unflatten(-1, (-1, 4)).amax(-1)
        assert (worst >= best * (1 - 1e-5)).all()  # batches sum in another order


@pytest.mark.parametrize("method", ["magnitude", "maskllm", "roi"])
def test_dense_inputs_are_refused_where_no_inputs_are_scored(method):
    METHODS[method]().check(Wanted())
    with pytest.raises(UsageError, match="`inputs` belongs to the"):
        METHODS[method]().check(Wanted(inputs="dense"))


def test_other_inputs_than_those_two_are_refused():
    with pytest.raises(UsageError, match="`inputs` must be one of pruned, dense; got 'sparse'"):
        Wanted(inputs="sparse")


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "gpt_neox", "phi3", "mixtral"])
def test_each_block_sees_what_the_pruned_blocks_before_it_produce(family, monkeypatch):
    model, data = build(family), windows()
    seen = {}

    class Watch(ONE_SHOT["wanda"]):
        def prune(self, rows, statistic, pattern):
            seen[id(statistic)] = statistic.norm()
            return super().prune(rows, statistic, pattern)

        def statistic(self, target):
            made = super().statistic(target)
            names[target.name] = id(made)
            kept.append(made)
            return made

    names, kept = {}, []
    prune_layerwise(model, data, Watch(), TWO_FOUR)
    # A plain forward of a model whose first block alone is pruned.
    plain = build(family)
    for target, pruned in zip(find_prunable(plain), find_prunable(model), strict=True):
        if target.block == 0:
            target.weight.data.copy_(pruned.weight)
    last = [t for t in find_prunable(plain) if t.block == 1]
    statistics = {t.name: NormStatistic(t) for t in last}
    plain.eval()
    with torch.no_grad(), listen(last, lambda t, expert, inputs: statistics[t.name].add(expert, inputs)):
        plain(input_ids=data)
    for target in last:
        torch.testing.assert_close(seen[names[target.name]], statistics[target.name].norm(), rtol=1e-4, atol=1e-5)


def test_experts_are_measured_on_the_tokens_routed_to_them():
    model = build("mixtral")
    experts = [t for t in find_prunable(model) if t.weight.dim() == 3]
    statistics = {t.name: NormStatistic(t) for t in experts}
    inputs = {}
    block = model.model.layers[0].mlp.experts

    def remember(module, arguments, keywords):
        inputs.setdefault("x", (*arguments, *keywords.values()))

    handle = block.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad(), listen(experts, lambda t, expert, x: statistics[t.name].add(expert, x)):
        model(input_ids=windows())
    handle.remove()
    hidden, chosen = inputs["x"][:2]
    for expert in range(4):
        tokens = hidden.reshape(-1, 32)[(chosen == expert).any(-1)]
        if len(tokens):
            norm = statistics["model.layers.0.mlp.experts.gate_up_proj"].norm()[expert]
            torch.testing.assert_close(norm, tokens.square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)
            gate, up = (tokens @ block.gate_up_proj[expert].T).chunk(2, -1)
            middle = (torch.nn.functional.silu(gate) * up).square().mean(0).sqrt()
            found = statistics["model.layers.0.mlp.experts.down_proj"].norm()[expert]
            torch.testing.assert_close(found, middle.maximum(1e-3 * middle.mean()), rtol=1e-4, atol=1e-5)


def test_wanda_is_score_and_keep():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 8, generator=generator), torch.randn(50, 8, generator=generator)
    target = find_prunable(tiny_llama())[0]
    statistic = NormStatistic(target)
    statistic.squares, statistic.tokens = inputs.square().sum(0), torch.tensor(50.0)
    mask, update = ONE_SHOT["wanda"]().prune(weight, statistic, TWO_FOUR)
    assert update is None
    for row in range(6):
        for group in range(2):
            entries = range(4 * group, 4 * group + 4)
            score = {j: abs(weight[row, j].item()) * inputs[:, j].norm().item() for j in entries}
            kept = {j for j in entries if mask[row, j]}
            assert kept == set(sorted(score, key=score.get)[2:])


def test_sparsegpt_with_a_diagonal_hessian_keeps_the_largest_w2h_and_changes_nothing_else():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(0.5, 3, 32)
    statistic = gram_of(torch.diag(scale))
    mask, update = SparseGPT(damping=1e-6).prune(weight, statistic, TWO_FOUR)
    assert torch.equal(mask, TWO_FOUR.mask(weight.square() * scale.square()))
    torch.testing.assert_close(update, weight * mask, rtol=1e-3, atol=1e-4)


def test_sparsegpt_matches_a_direct_optimal_brain_surgeon_column_by_column():
    generator = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(5, 32, generator=generator), correlated_inputs()
    statistic = gram_of(inputs)
    mask, update = SparseGPT().prune(weight, statistic, TWO_FOUR)
    _, inverse = invert(statistic.gram(None), 0.01, "w")
    direct, inverse = weight.double(), inverse.double()
    for j in range(32):  # remove column j where the mask says so, update the columns after it, then forget column j
        error = torch.where(mask[:, j], 0.0, direct[:, j]) / inverse[j, j]
        direct = direct - error[:, None] * torch.where(torch.arange(32) >= j, inverse[j], 0.0)
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0
    torch.testing.assert_close(update.double(), direct * mask, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("block_size", [8, 16, 32, 128])
def test_sparsegpt_does_not_depend_on_its_block_size(block_size):
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    statistic = gram_of(correlated_inputs())
    first = SparseGPT().prune(weight, statistic, TWO_FOUR)
    second = SparseGPT(block_size=block_size).prune(weight, statistic, TWO_FOUR)
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[1], second[1], rtol=1e-3, atol=1e-4)


def output_error(weight, pruned, inputs):
    return (inputs @ (weight - pruned).T).square().sum().item()


def test_weight_updates_lower_the_output_error_of_correlated_inputs():
    weight, inputs = torch.randn(64, 32, generator=torch.Generator().manual_seed(3)), correlated_inputs(2048)
    statistic = gram_of(inputs)
    wanda = TWO_FOUR.mask(weight.abs() * inputs.norm(dim=0))
    _, sparsegpt = SparseGPT().prune(weight, statistic, TWO_FOUR)
    mask, admm = ADMM().prune(weight, statistic, TWO_FOUR)
    errors = {
        "wanda": output_error(weight, weight * wanda, inputs),
        "sparsegpt": output_error(weight, sparsegpt, inputs),
        "admm": output_error(weight, admm, inputs),
    }
    assert errors["sparsegpt"] < errors["wanda"]
    assert errors["admm"] < errors["wanda"]
    # Least squares on ADMM's own mask is the best any weights can do there.
    gram, best = statistic.gram(None), torch.zeros_like(weight)
    for row in range(64):
        kept = mask[row]
        best[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight[row])
    assert errors["admm"] <= 1.1 * output_error(weight, best, inputs)


def test_more_admm_iterations_do_not_raise_the_error():
    weight, inputs = torch.randn(32, 32, generator=torch.Generator().manual_seed(4)), correlated_inputs()
    statistic = gram_of(inputs)
    errors = [
        output_error(weight, ADMM(iterations=n).prune(weight, statistic, TWO_FOUR)[1], inputs) for n in (16, 20, 60)
    ]
    assert errors[1] <= 1.01 * errors[0]
    assert errors[2] <= 1.01 * errors[1]


@pytest.mark.parametrize("method", ONE_SHOT)
@pytest.mark.parametrize(("text", "ratio"), [("4:8", 0.5), ("1:4", 0.5), ("3:4", 0.5), ("unstructured", 0.6)])
def test_other_patterns(method, text, ratio):
    pattern = Pattern.parse(text, ratio)
    model = tiny_llama()
    mask = prune_layerwise(model, windows(vocabulary=257), ONE_SHOT[method](), pattern)
    for kept in mask.tensors.values():
        if pattern.structured:
            assert (kept.unflatten(-1, (-1, pattern.m)).sum(-1) == pattern.n).all()
        assert kept.float().mean().item() == pytest.approx(1 - pattern.ratio, abs=0.02)


def test_dead_inputs_and_non_finite_tokens_are_survived_and_counted():
    inputs = correlated_inputs()
    inputs[:, 5] = 0
    inputs[7, 3] = float("nan")
    statistic = gram_of(inputs)
    assert statistic.skipped == 1
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    for method in (SparseGPT(), ADMM()):
        mask, update = method.prune(weight, statistic, TWO_FOUR)
        assert update.isfinite().all()
        assert (mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_a_singular_gram_matrix_climbs_the_damping_ladder():
    gram = torch.ones(16, 16) - 1e-2 * torch.eye(16)  # slightly indefinite, as rounding leaves a rank-one matrix
    damped, inverse = invert(gram, 1e-3, "w")  # 1e-3 and 1e-2 are not enough
    torch.testing.assert_close(damped.diagonal(), torch.full((16,), 1.09 - 0.001), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(damped @ inverse, torch.eye(16), rtol=1e-2, atol=1e-3)
    with pytest.raises(RunError, match="The inputs of layer.w have no positive definite Gram matrix"):
        invert(-gram, 0.01, "layer.w")


def test_patterns_and_ratios_that_disagree_are_refused():
    with pytest.raises(UsageError, match=r"`sparsity_ratio=0.7` contradicts `sparsity_type=2:4`, which removes 0.5"):
        Pattern.parse("2:4", 0.7)
    with pytest.raises(UsageError, match="must be between 0 and 1 for an unstructured pattern; got 1.5"):
        Pattern.parse("unstructured", 1.5)


def test_weights_that_are_not_finite_are_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match=r"layers.1.mlp.up_proj.weight has NaN or infinite entries"):
        prune_layerwise(model, windows(vocabulary=257), ONE_SHOT["magnitude"](), TWO_FOUR)


def test_a_schedule_longer_than_the_iterations_still_reaches_the_pattern():
    model = tiny_llama()
    mask = prune_layerwise(model, torch.randint(1, 257, (2, 16)), ADMM(iterations=10), Pattern(2, 4))
    for name, kept in mask.tensors.items():
        assert (kept.unflatten(-1, (-1, 4)).sum(-1) == 2).all(), name


def test_sparsegpt_prunes_blocks_longer_than_it_updates_at_once():
    model = tiny_llama(hidden_size=256, intermediate_size=256)
    mask = prune_layerwise(model, torch.randint(1, 257, (2, 16)), SparseGPT(), Pattern(128, 256))
    assert all((kept.unflatten(-1, (-1, 256)).sum(-1) == 128).all() for kept in mask.tensors.values())


def test_a_prior_that_fails_leaves_the_weights_as_they_were():
    model = tiny_llama(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(RunError):
        one_shot_prior(model, torch.randint(1, 257, (2, 16)), SparseGPT())
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, equal_nan=True)
