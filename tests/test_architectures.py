"""Kinds of models beyond Llama: experts of every layout, layers of every shape, states instead of attention."""

import subprocess
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import slow
from tiny_models import KINDS, byte_tokenizer, tiny_model
from torch import nn

from proxsparse.__main__ import main
from proxsparse.baselines import layerwise
from proxsparse.baselines.wanda import Wanda
from proxsparse.commands.bench import cache_of
from proxsparse.commands.eval import sparse_blocks
from proxsparse.deploy.sparse import CompactLinear, use_compact
from proxsparse.errors import UsageError
from proxsparse.mask import apply_mask, load_mask
from proxsparse.model import walk
from proxsparse.model.inputs import input_norms
from proxsparse.model.linears import expert_layout
from proxsparse.model.prunable import coverage, decoder_blocks, find_prunable
from proxsparse.operator.pattern import TWO_OF_FOUR

ROOT = Path(__file__).parent.parent
WINDOWS = torch.randint(1, 257, (2, 64), generator=torch.Generator().manual_seed(1))


def kinds(model) -> set[str]:
    return {target.kind for target in find_prunable(model)}


@pytest.fixture
def saved(tmp_path):
    """Function that saves a tiny model of a kind, and gives its folder."""

    def save(kind: str) -> str:
        folder = tmp_path / kind
        tiny_model(kind).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return str(folder)

    return save


# --- which weights


def test_routers_are_found_by_their_role_and_gates_are_ordinary_linears():
    assert not any("gate.wg" in kind for kind in kinds(tiny_model("hunyuan_v1_moe")))
    assert not any("router" in kind for kind in kinds(tiny_model("jetmoe")))
    assert any(kind.endswith("ffn.proj_up_gate") for kind in kinds(tiny_model("xlstm")))
    assert any(kind.endswith("output_gate") for kind in kinds(tiny_model("minimax")))
    assert any(kind.endswith("per_layer_input_gate") for kind in kinds(tiny_model("gemma4_text")))


@pytest.mark.parametrize(
    ("kind", "dims"),
    [
        ("llama4_text", {"gate_up_proj": 1, "down_proj": 1}),  # (E, in, out), no attribute says so
        ("gpt_oss", {"gate_up_proj": 1, "down_proj": 1}),
        ("mixtral", {"gate_up_proj": 2, "down_proj": 2}),
        ("inkling_text", {"gate_up_proj": 2, "down_proj": 2, "gate_proj": 2, "up_proj": 2}),
        ("jetmoe", {"weight": 2}),
        ("dbrx", {"w1": 1, "v1": 1, "w2": 0}),  # experts one under another, the last one transposed
    ],
)
def test_stacked_experts_are_pruned_along_their_inputs(kind, dims):
    model = tiny_model(kind)
    experts = [t for t in find_prunable(model) if t.weight.dim() == 3 or t.attribute in ("w1", "v1", "w2")]
    assert {t.attribute: t.in_dim for t in experts} == dims


def test_a_square_expert_is_read_off_the_code_that_multiplies_with_it():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 2
            self.up = nn.Parameter(torch.randn(2, 16, 16))
            self.down = nn.Parameter(torch.randn(2, 16, 16))

        def forward(self, x):
            return torch.bmm(torch.bmm(x, self.up), self.down)

    assert expert_layout(Experts()) == {"up": 1, "down": 1}


@pytest.mark.parametrize("kind", ["modernbert-decoder", "openai-gpt", "ctrl", "gpt_neox_japanese", "xlm"])
def test_layers_are_found_where_transformers_does_not_checkpoint_them(kind):
    model = tiny_model(kind)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | hf.pytorch_utils.Conv1D)]
    heads = {"lm_head", "lm_head.dense", "decoder", "embed_out", "pred_layer.proj"}
    assert {t.name.removesuffix(".weight") for t in find_prunable(model)} == {n for n in linears if n not in heads}


class _Version4(hf.PreTrainedModel):
    """A model as code on the Hub has it: layers are plain modules, and experts a list longer than the layers."""

    config_class = hf.LlamaConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(self.layer() for _ in range(2))
        self.post_init()

    @staticmethod
    def layer():
        layer = nn.Module()
        layer.mlp = nn.Module()
        layer.mlp.gate = nn.Linear(16, 12, bias=False)
        layer.mlp.experts = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(12))
        layer.output = nn.Linear(16, 16, bias=False)
        return layer

    def get_decoder(self):
        return self.model


def test_layers_of_code_written_for_version_4_are_the_decoders_list_and_not_the_longer_list_of_experts():
    model = _Version4(hf.LlamaConfig())
    assert decoder_blocks(model) == list(model.model.layers)
    assert kinds(model) == {f"mlp.experts.{i}" for i in range(12)} | {"output"}
    survey = str(coverage(model, find_prunable(model)))
    assert survey == "pruned: 94.5 % of the linear weights in 2 layers; left dense: mlp.gate (router)"


def test_the_survey_counts_the_weights_and_names_what_stays_dense_and_why():
    model = tiny_model("mixtral")
    attention, experts, router = 2 * 32 * 32 + 2 * 16 * 32, 4 * (3 * 64 * 32), 4 * 32
    survey = coverage(model, find_prunable(model))
    assert survey.share == (attention + experts) / (attention + experts + router)
    assert survey.dense == {"router": ["mlp.gate"]}
    assert str(survey).endswith("of the linear weights in 2 layers; left dense: mlp.gate (router)")
    some = coverage(model, find_prunable(model, exclude="q_proj"))
    assert some.dense == {"excluded": ["self_attn.q_proj"], "router": ["mlp.gate"]}


def test_no_matrix_of_a_layer_is_left_out_silently():
    model = tiny_model("xlnet")  # its attention is five parameters of three dimensions, multiplied by einsum
    survey = coverage(model, find_prunable(model))
    assert {f"rel_attn.{name}" for name in "qkvor"} <= set(survey.dense["no linear layer"])
    assert survey.share < 0.5


def test_a_weight_that_is_used_without_being_called_stays_dense():
    for kind, path in {"mamba": "mixer.dt_proj", "jamba": "mamba.dt_proj"}.items():
        model = tiny_model(kind)
        assert path not in kinds(model)
        assert coverage(model, find_prunable(model)).dense["its inputs are never seen"] == [path]


# --- what flows into them


def by_hand(model, module: nn.Module, see) -> list[torch.Tensor]:
    """Whatever ``see`` makes of the arguments of every call of a module, for the windows one by one."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(see(*args)))
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window[None], use_cache=False)
    handle.remove()
    return seen


def rms(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().square().mean(0).sqrt().float()


def test_llama_4_experts_are_scored_by_the_tokens_routed_to_them():
    model = tiny_model("llama4_text")
    targets = find_prunable(model)
    experts = next(m for n, m in model.named_modules() if n.endswith("1.feed_forward.experts"))
    name = "model.layers.1.feed_forward.experts"
    norms = input_norms(model, targets, WINDOWS)
    batches = by_hand(model, experts, lambda x: x.detach().view(4, -1, 32))
    for expert in range(4):
        routed = torch.cat([batch[expert] for batch in batches])
        routed = routed[routed.abs().sum(1) > 0]
        gate, up = (routed @ experts.gate_up_proj[expert].detach()).chunk(2, dim=1)
        middle = up * nn.functional.silu(gate)
        torch.testing.assert_close(norms[f"{name}.gate_up_proj"][expert], rms(routed))
        torch.testing.assert_close(norms[f"{name}.down_proj"][expert], rms(middle))


def test_jetmoe_experts_are_scored_by_the_tokens_handed_to_them():
    model = tiny_model("jetmoe")
    stack = model.model.layers[0].mlp.output_linear
    norms = input_norms(model, find_prunable(model), WINDOWS)["model.layers.0.mlp.output_linear.weight"]
    calls = by_hand(model, stack, lambda x, sizes: x.detach().split(sizes))
    for expert in range(4):
        torch.testing.assert_close(norms[expert], rms(torch.cat([call[expert] for call in calls])))


def test_dbrx_experts_last_projections_are_scored_each_by_its_own_inputs():
    model = tiny_model("dbrx")
    mlp = model.transformer.blocks[0].ffn.experts.mlp
    name = next(n for n, m in model.named_modules() if m is mlp)
    norms = input_norms(model, find_prunable(model), WINDOWS)[f"{name}.w2"].view(4, -1)
    width = norms.shape[1]

    def middle(x, w1, v1, _):
        expert = w1.storage_offset() // w1.numel()
        return expert, (nn.functional.silu(x @ w1.T) * (x @ v1.T)).detach()

    calls = by_hand(model, mlp, middle)
    tokens = sum(len(rows) for _, rows in calls)
    for expert in range(4):
        rows = torch.cat([rows for number, rows in calls if number == expert])
        assert rows.shape[1] == width
        # The mean is over the tokens of all experts: within a block of four, which is one expert's, nothing changes.
        torch.testing.assert_close(norms[expert], (rows.square().sum(0) / tokens).sqrt())


def test_what_is_never_seen_is_said(caplog):
    model = tiny_model("llama4_text")
    expert = find_prunable(model, include=r"layers\.1.*gate_up_proj")
    model.model.layers[1].feed_forward.experts.forward = lambda hidden: hidden  # nothing is multiplied
    with caplog.at_level("WARNING", logger="proxsparse"):
        input_norms(model, expert, WINDOWS)
    assert "no inputs were seen of 1 weights (feed_forward.experts.gate_up_proj)" in caplog.text


# --- one-shot methods


def test_layers_that_do_not_run_one_after_the_other_are_walked_by_running_the_whole_model(monkeypatch):
    """The slow walk gives the fast one's masks, and is taken where layers are shared or run several times."""
    fast = layerwise.prune_layerwise(tiny_model("llama"), WINDOWS, Wanda(), TWO_OF_FOUR)
    with monkeypatch.context() as patch:
        patch.setattr(walk, "in_sequence", lambda *_: False)
        slow = layerwise.prune_layerwise(tiny_model("llama"), WINDOWS, Wanda(), TWO_OF_FOUR)
    assert all(torch.equal(slow.tensors[name], mask) for name, mask in fast.tensors.items())
    walks = {}
    for kind in ("llama", "gpt2", "qwen3_moe", "hrm_text", "xlm"):
        model = tiny_model(kind)
        with torch.no_grad():
            walks[kind] = walk.in_sequence(model, decoder_blocks(model), WINDOWS)
    assert walks == {"llama": True, "gpt2": True, "qwen3_moe": True, "hrm_text": False, "xlm": False}


def test_a_model_whose_code_does_not_run_in_bfloat16_autocast_is_pruned_in_float32(caplog):
    assert walk.runs_in_bf16(tiny_model("llama"), WINDOWS)
    assert not walk.runs_in_bf16(tiny_model("dbrx"), WINDOWS)
    assert "does not run in bfloat16 autocast" in caplog.text


# --- commands


def test_eval_measures_a_model_that_has_nothing_to_prune():
    config = hf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=0)
    assert sparse_blocks(hf.LlamaForCausalLM(config)) == (TWO_OF_FOUR, {})


@pytest.mark.parametrize("kind", [slow("mamba"), "jamba", "rwkv"])
def test_bench_decodes_with_the_models_own_cache_and_keeps_dense_what_the_code_reads(kind, saved, tmp_path, capsys):
    base, mask, pruned = saved(kind), tmp_path / "mask", tmp_path / "pruned"
    assert main(["prune", "--model", base, "--prune_method", "magnitude", "--save", str(mask)]) == 0
    assert main(["export", "--model", base, "--mask", str(mask), "--to", str(pruned)]) == 0
    bench = ["bench", "--model", str(pruned), "--prompt", "1", "--tokens", "2", "--repeat", "1"]
    assert main(bench) == 0
    assert "linear layers are compact" in capsys.readouterr().out


def test_a_layer_whose_weight_the_code_reads_is_put_back_unchanged():
    model = tiny_model("llama")
    mask = layerwise.prune_layerwise(model, WINDOWS, Wanda(), TWO_OF_FOUR)
    assert mask.density() == 0.5
    attention = model.model.layers[0].self_attn
    wanted = model(input_ids=WINDOWS[:1]).logits.detach()
    weight, plain = attention.o_proj.weight.detach().clone(), type(attention).forward

    def forward(self, *args, **kwargs):  # reads the weight in a way that no search of the code would find
        getattr(self, "o_" + "proj").weight.sum()
        return plain(self, *args, **kwargs)

    attention.forward = forward.__get__(attention)
    assert use_compact(model) == 13
    assert type(attention.o_proj) is nn.Linear
    assert torch.equal(attention.o_proj.weight, weight)
    assert isinstance(attention.q_proj, CompactLinear)
    torch.testing.assert_close(model(input_ids=WINDOWS[:1]).logits, wanted, rtol=1e-4, atol=1e-5)


def test_decoding_of_a_model_without_a_cache_is_refused_in_a_sentence():
    model = tiny_model("xlm")
    with pytest.raises(UsageError, match="XLMWithLMHeadModel keeps no cache"):
        cache_of(model, model(input_ids=WINDOWS[:1]))


def test_masks_of_stacked_experts_apply_in_their_own_layout(saved, tmp_path):
    base, folder = saved("llama4_text"), tmp_path / "mask"
    assert main(["prune", "--model", base, "--prune_method", "magnitude", "--save", str(folder)]) == 0
    model = tiny_model("llama4_text")
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    before = model.get_parameter(name).detach().clone()
    apply_mask(model, load_mask(folder))
    blocks = before.transpose(1, 2).unflatten(-1, (-1, 4)).abs()  # (E, out, blocks, 4)
    kept = torch.zeros_like(blocks).scatter(-1, blocks.topk(2, dim=-1).indices, 1).flatten(-2).transpose(1, 2)
    assert torch.equal(model.get_parameter(name), before * kept)


@pytest.mark.slow
def test_reversible_layers_learn_though_their_inputs_are_frozen(saved, tmp_path):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    flags = ["--dataset", str(text), "--ctx_len", "128", "--samples", "2", "--bf16", "false", "--use_cpu", "true"]
    assert main(["learn", "--model", saved("reformer"), *flags, "--output_dir", str(run)]) == 0
    assert load_mask(run).density() == 0.5


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_random_tenth_of_all_architectures_has_no_fault(tmp_path, python):
    """Another tenth with another seed; benchmarks/architectures.py without --sample tries all of them."""
    assert len(KINDS) >= 150
    options = ["--sample", "0.1", "--seed", "1", "--results", f"{tmp_path}/r.json", "--page", f"{tmp_path}/p.md"]
    done = subprocess.run([python, "benchmarks/architectures.py", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
