"""Learning and the commands as GPUs run them, on a pretended one: the masks of the CPU, and no waiting in vain."""

import contextlib
import functools
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, slow, tiny_llama
from datasets import Dataset
from pretended import Card, OnCard
from safetensors.torch import load_file
from transformers import TrainerCallback

from proxsparse.__main__ import main
from proxsparse.baselines import METHODS
from proxsparse.commands.export import FORMS, MASKS
from proxsparse.deploy.sparse import use_dense, use_semi_structured
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.learn import defaults_on
from proxsparse.learning.recover import SCOPES
from proxsparse.learning.trainer import ProxSparseTrainer
from proxsparse.learning.transfers import pinned_bytes, pinned_rooms
from proxsparse.mask import MASK_FILE, load_mask
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.prox import top2_mask

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the real thing runs")

STEPS = 3
FEW = r"q_proj|down_proj"  # weights; a kernel in Triton's interpreter takes a tenth of a second
OFFLOADED = {"offload_learned": True, "keep_base": "cpu"}
ADAMW = {"optim": "adamw_torch_fused"}
PAPER = {"method": "paper"}
# What is learned -> the settings that place it elsewhere, which must not change the mask.
SETTINGS = {
    "masked": ({}, [{}, {"keep_base": "cpu"}, {"keep_base": "checkpoint"}, OFFLOADED]),
    "in backward": ({"optim_in_backward": True}, [{"offload_learned": True, "keep_base": "checkpoint"}]),
    "accumulated": ({"gradient_accumulation_steps": 3, "distill": 0.5}, [OFFLOADED]),
    "auto": ({"lambda_value": "auto", "score": "weight"}, [{}]),
    "AdamW": (ADAMW, [{}]),
    "paper": (PAPER, [{}]),
    "paper, in backward": (PAPER | {"optim": "adafactor", "optim_in_backward": True}, [{}]),
    "paper, lambda2": (PAPER | {"project_lambda2": 1, "lambda2_value": 0.25}, [{}, {"keep_base": "cpu"}]),
}
CASES = [(name, places) for name, (_, variants) in SETTINGS.items() for places in variants]
FAST = CASES[:1]
COSTLY = [case if case in FAST else slow(*case) for case in CASES]


def small_model(**changes):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_llama(**({"num_hidden_layers": 1, "attn_implementation": "eager"} | sizes | changes))


@functools.cache
def tokens():
    return torch.randint(1, 257, (STEPS, 16), generator=torch.Generator().manual_seed(0)).tolist()


def trainer(folder, device, model=None, callbacks=(), **changes):
    settings = {
        "output_dir": str(folder), "bf16": False, "save_strategy": "no", "logging_steps": 2, "max_length": 16,
        "disable_tqdm": True, "report_to": "none", "include": FEW, "max_steps": 2,
    }  # fmt: skip
    settings |= {"use_cpu": True} if device == "cpu" else {}
    return ProxSparseTrainer(
        (model or small_model()).to(device), ProxSparseConfig(**(settings | changes)), callbacks=list(callbacks),
        train_dataset=Dataset.from_dict({"input_ids": tokens()}),
        eval_dataset=Dataset.from_dict({"input_ids": tokens()}),
        processing_class=byte_tokenizer(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """Name of a setting -> the mask that it learns on the CPU."""

    @functools.cache
    def learned(name):
        runs = trainer(tmp_path_factory.mktemp("cpu"), "cpu", **SETTINGS[name][0])
        runs.train()
        return runs.mask().tensors

    return learned


@pytest.mark.parametrize(
    ("name", "places"), COSTLY, ids=lambda value: str(value) if isinstance(value, str) else "-".join(value)
)
def test_a_gpu_learns_the_mask_of_the_cpu(tmp_path, on_cpu, saved, name, places):
    want = on_cpu(name)
    model = small_model()
    model.config._name_or_path = saved
    with Card() as card:
        runs = trainer(tmp_path, "cuda", model, **(SETTINGS[name][0] | places))
        runs.train()
        found = runs.mask().tensors
        assert {type(parameter) for parameter in runs.model.parameters()} == {OnCard}
    assert not card.count.faults
    assert found.keys() == want.keys()
    assert all(torch.equal(found[weight], want[weight]) for weight in want)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, ADAMW, PAPER, OFFLOADED, {"eval_strategy": "steps", "eval_steps": 2}], ids=str)
def test_bfloat16_weights_learn_on_a_gpu(tmp_path, changes):
    with Card() as card:
        runs = trainer(tmp_path, "cuda", small_model().to(torch.bfloat16), bf16=True, **changes)
        runs.train()
        assert len(runs.mask().tensors) == 2
    assert not card.count.faults


def test_a_gpu_that_only_emulates_bfloat16_does_without_it_by_default():
    for native, defaults in ((True, {}), (False, {"bf16": False})):
        with Card(native_bf16=native):
            assert defaults_on("cuda") == defaults


class Counting(TrainerCallback):
    """What the second optimizer step asks of the card, from its beginning to its end."""

    def __init__(self, card):
        self.card = card

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.found = self.card.fresh()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.card.fresh()


def counts_of_a_step(folder, layers=1, model=None, **changes):
    with Card() as card:
        counting = Counting(card)
        settings = {"logging_steps": 100, "max_steps": 2} | changes
        trainer(folder, "cuda", model or small_model(num_hidden_layers=layers), [counting], **settings).train()
    return counting.found


def of_the_learning(counter):
    """Without what the kernels ask themselves."""
    return {key: times for key, times in counter.items() if not key[1].startswith("operator/")}


@pytest.mark.slow
def test_the_host_waits_for_the_device_a_few_times_per_step_however_many_weights_there_are(tmp_path):
    small, large = (of_the_learning(counts_of_a_step(tmp_path / str(n), layers=n).waits) for n in (1, 2))
    assert sum(small.values()) == sum(large.values()) <= 10, (small, large)


@pytest.mark.slow
def test_nothing_is_copied_to_the_device_that_was_there(tmp_path):
    counts = counts_of_a_step(tmp_path)
    moved = {place: size for (way, place), size in counts.bytes.items() if way == "to_card" and place != "elsewhere"}
    assert sum(moved.values()) <= 64, moved  # no weight and no norm


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["at once", "in backward"])
@pytest.mark.parametrize(("layer_rate", "turns"), [(0.0, 1), (2.0, 2)])
def test_an_offloaded_weight_crosses_once_per_direction_and_turn_and_nobody_waits_for_it(
    tmp_path, fused, layer_rate, turns
):
    model = small_model()
    sizes = [parameter.nbytes for name, parameter in model.named_parameters() if re.search(FEW, name)]
    counts = counts_of_a_step(tmp_path, model=model, optim_in_backward=fused, layer_rate=layer_rate, **OFFLOADED)
    moved = Counter()
    for (way, place), size in counts.bytes.items():
        moved[way] += size * place.startswith("learning/")
    once = turns * sum(sizes)
    assert once <= moved["to_host"] <= once + 64  # what was learned
    assert 2 * once <= moved["to_card"] <= 2 * once + 64  # W0, and what was learned
    waits = of_the_learning(counts.waits)
    assert sum(waits.values()) <= 10, waits


@pytest.mark.slow
def test_the_whole_logits_never_exist_where_the_head_is_plain(tmp_path, monkeypatch):
    monkeypatch.setattr("proxsparse.learning.losses.HEAD_POSITIONS", 4)
    logits = 16 * 2048 * 4
    plain = counts_of_a_step(tmp_path / "plain", model=small_model(vocab_size=2048)).largest
    monkeypatch.setattr("proxsparse.learning.trainer.plain_head", lambda model: None)
    whole = counts_of_a_step(tmp_path / "whole", model=small_model(vocab_size=2048)).largest
    assert plain <= logits / 4 < logits <= whole


def command(capsys, device, *words):
    """What a command prints last, on a device."""
    with Card() if device == "cuda" else contextlib.nullcontext() as card:
        code = main([*map(str, words), "--device", device])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert not card or (card.count.launches and not card.count.faults)
    return json.loads(printed.out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_baseline_gives_the_mask_of_the_cpu_on_a_gpu(method, checkpoint, corpus, tmp_path, capsys):
    text = ["--dataset", corpus, "--ctx_len", 32, "--nsamples", 2, "--bf16", "false", "--mask_only"]
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        prune = ["prune", "--model", checkpoint, "--prune_method", method, *text, "--save", folder]
        command(capsys, device, *prune)
    want, found = (load_mask(tmp_path / device / MASK_FILE).tensors for device in ("cpu", "cuda"))
    assert found.keys() == want.keys()
    assert all(torch.equal(found[weight], want[weight]) for weight in want)


def test_a_pruned_checkpoint_is_measured_and_written_on_a_gpu_as_on_the_cpu(checkpoint, corpus, mask, tmp_path, capsys):
    text, found = ["--dataset", corpus, "--ctx_len", 32, "--max_windows", 3], {}
    for device in ("cpu", "cuda"):
        saved = tmp_path / device
        apply = ["apply", "--model", checkpoint, "--mask", mask, *text, "--save", saved]
        printed = command(capsys, device, *apply) | command(capsys, device, "eval", "--model", saved, *text)
        found[device] = {name: value for name, value in printed.items() if isinstance(value, float)}
    assert corpus in found["cpu"]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-6)  # sums in another order
    written = [(tmp_path / device / "model.safetensors").read_bytes() for device in ("cpu", "cuda")]
    assert written[0] == written[1]


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
def test_weights_are_recovered_on_a_gpu_as_on_the_cpu(scope, checkpoint, mask, corpus, tmp_path, capsys):
    text = ["--dataset", corpus, "--ctx_len", 24, "--samples", 2, "--model", checkpoint, "--mask", mask]
    text += ["--bf16", "false"]  # some CPUs have it by default
    for device in ("cpu", "cuda"):
        command(capsys, device, "recover", *text, "--scope", scope, "--to", tmp_path / device)
    want, found = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    dense = load_file(f"{checkpoint}/model.safetensors")
    assert any(not torch.equal(found[name][found[name] != 0], dense[name][found[name] != 0]) for name in dense)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", [*FORMS, *MASKS])
def test_exports_are_the_same_where_there_is_a_gpu(form, checkpoint, mask, tmp_path):
    written = []
    for folder, machine in ((tmp_path / "cpu", contextlib.nullcontext()), (tmp_path / "cuda", Card())):
        with machine:
            words = ["export", "--model", checkpoint, "--mask", str(mask), "--form", form, "--to", str(folder)]
            assert main(words) == 0
        read = {".safetensors": load_file, ".npz": lambda path: {k: torch.tensor(v) for k, v in np.load(path).items()}}
        files = {path.name: read[path.suffix](path) for path in folder.iterdir() if path.suffix in read}
        written.append({(name, key): tensor for name, found in files.items() for key, tensor in found.items()})
    assert written[0].keys() == written[1].keys() != set()
    assert all(torch.equal(written[0][key], written[1][key]) for key in written[0])


def test_weights_that_wait_on_the_host_take_hardly_more_than_their_size():
    width, inner, layers = 5120, 13824, 40  # of Llama-2-13B; a block per weight would take 40 GiB for 24
    sizes = layers * (4 * [2 * width * width] + 3 * [2 * width * inner])
    assert sum(sizes) <= pinned_bytes(sizes) <= 1.1 * sum(sizes)
    tensors = {str(n): torch.empty(n, 8, dtype=torch.bfloat16) for n in range(1, 40)}
    with Card():
        rooms = pinned_rooms(tensors)
        assert all(room.is_pinned() for room in rooms.values())
    for n, room in enumerate(rooms.values()):
        room.fill_(n)
    assert all((room == n).all() for n, room in enumerate(rooms.values()))  # none lies in another


@pytest.fixture
def pruned_in_halves():
    model = small_model(hidden_size=64, intermediate_size=128).to(torch.bfloat16).eval()
    for target in find_prunable(model):
        target.weight.data.mul_(top2_mask(target.weight))
    return model


def test_sparse_weights_compute_what_dense_ones_do_and_each_use_decides_anew(pruned_in_halves, monkeypatch):
    monkeypatch.setattr("proxsparse.deploy.sparse.WORTHWHILE", 0.0)  # convert whatever its gain
    ids = torch.arange(1, 17)[None]
    with Card() as card, torch.no_grad():
        model = pruned_in_halves.to("cuda")
        ids, count = ids.to("cuda"), len(find_prunable(model))
        dense = model(input_ids=ids).logits.cpu()
        for tokens in (1, 16):
            converted = use_semi_structured(model, tokens)
            assert converted["sparse"] > 0
            assert sum(converted.values()) == count
            assert torch.allclose(model(input_ids=ids).logits.cpu(), dense, atol=0.02)
    assert not card.count.faults


def test_products_that_come_column_by_column_are_made_rows(pruned_in_halves, monkeypatch):
    monkeypatch.setattr("proxsparse.deploy.sparse.WORTHWHILE", 0.0)
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: linear(*args).mT.contiguous().mT)
    with Card(), torch.no_grad():
        model = pruned_in_halves.to("cuda")
        layer, x = model.model.layers[0].mlp.up_proj, torch.ones(1, 16, 64, dtype=torch.bfloat16, device="cuda")
        assert not layer(x).is_contiguous()
        use_semi_structured(model)
        assert layer(x).is_contiguous()
        use_dense(model)
        assert not layer(x).is_contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("graph", [[], ["--graph"]], ids=["calls", "graph"])
def test_bench_measures_prefill_and_decoding_each_with_its_own_sparse_layers(
    pruned_in_halves, tmp_path, capsys, monkeypatch, graph
):
    recordings = []

    def recorded(module):  # a graph can't be recorded here: its work is done again and again instead
        return lambda work: recordings.append(module) or work

    modules = ("proxsparse.commands.bench", "proxsparse.deploy.timing")
    for module in modules:
        monkeypatch.setattr(f"{module}.recorded", recorded(module))
    pruned_in_halves.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with Card() as card:
        argv = ["bench", "--model", str(tmp_path), "--prompt", "8", "--tokens", "2", "--repeat", "1", *graph]
        assert main(argv) == 0
    shown = capsys.readouterr().out
    assert shown.count("prefill: ") == shown.count("decode: ") == 1
    assert not card.count.faults
    fitting = len({t.weight.shape for t in find_prunable(pruned_in_halves) if t.weight.shape[1] % 64 == 0})
    # Both parts, dense and sparse; in each part every shape, dense and sparse.
    assert [recordings.count(module) for module in modules] == ([4, 4 * fitting] if graph else [0, 0])


@pytest.mark.parametrize("where", ["proxsparse.commands.bench", "proxsparse.deploy.timing"])
def test_a_model_that_can_not_be_recorded_is_said(pruned_in_halves, tmp_path, capsys, monkeypatch, where):
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA_LAUNCH_BLOCKING=1")

    for module in ("proxsparse.commands.bench", "proxsparse.deploy.timing"):
        monkeypatch.setattr(f"{module}.recorded", refuse if module == where else lambda work: work)
    pruned_in_halves.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with Card():
        assert main(["bench", "--model", str(tmp_path), "--graph", "--prompt", "8", "--tokens", "2"]) == 1
    said = capsys.readouterr().err
    assert "LlamaForCausalLM can't run as CUDA graphs, so leave --graph out: operation not permitted" in said
    assert "LAUNCH_BLOCKING" not in said
