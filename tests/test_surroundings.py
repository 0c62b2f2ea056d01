"""Learning with models, tokenizers and checkpoints as they come."""

import errno
import json
import os
import pwd
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import TEXT, byte_tokenizer, tiny_llama
from test_trainer import STEPS, config, data, trainer
from transformers import GenerationConfig

from proxsparse.__main__ import main as console
from proxsparse.baselines import METHODS, Wanted
from proxsparse.errors import RunError, UsageError, task_of
from proxsparse.learning.copies import TakingTurns
from proxsparse.learning.optim import scale_learning_rates
from proxsparse.learning.trainer import ProxSparseTrainer
from proxsparse.mask import load_mask, save_mask
from proxsparse.model import source
from proxsparse.model.loading import load_model
from proxsparse.operator.kernels import cache
from proxsparse.operator.prox import kernel_for

SIZES = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Of these TRL's fused loss can't be had: no number of experts by its name, other shapes of router logits, or a decoder
# that is the whole model.
MIXTURES = {
    "GraniteMoe": lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**SIZES, **EXPERTS)),
    "PhiMoE": lambda: hf.PhimoeForCausalLM(hf.PhimoeConfig(**SIZES, **EXPERTS)),
    "Doge": lambda: hf.DogeForCausalLM(hf.DogeConfig(**SIZES)),
    "Llama 4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(**SIZES, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1, head_dim=8)
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_paper_method_learns_where_the_fused_loss_does_not_work(name, tmp_path, tokenizer):
    torch.manual_seed(0)
    model = MIXTURES[name]()
    rows = data(1)
    ids = torch.tensor(rows["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    runs = ProxSparseTrainer(
        model, config(tmp_path, method="paper"), train_dataset=rows, processing_class=tokenizer, eval_dataset=rows
    )
    assert runs.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)
    runs.train()
    assert runs.state.log_history[-2]["lm_loss"] == pytest.approx(expected, rel=1e-3)


def bare_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize("method", ["paper", "masked"])
def test_a_tokenizer_without_padding_and_end_tokens_gives_the_same_mask(tmp_path, tokenizer, method):
    masks = []
    for i, given in enumerate((tokenizer, bare_tokenizer())):
        runs = trainer(tmp_path / str(i), given, method=method)
        runs.train()
        masks.append(runs.mask().tensors)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_a_generation_config_that_can_not_be_saved_does_not_stop_a_run(tmp_path, tokenizer):
    model = tiny_llama()
    model.generation_config = GenerationConfig(temperature=0.9, top_p=0.6, pad_token_id=5, eos_token_id=7)
    trainer(tmp_path, tokenizer, model, save_strategy="steps", save_steps=3).train()
    saved = json.loads((tmp_path / "checkpoint-3" / "generation_config.json").read_text())
    assert not {"temperature", "top_p", "do_sample"} & {name for name, value in saved.items() if value is not None}
    assert 7 in saved["eos_token_id"]  # what the model ends with stays


def test_sampling_settings_stay_where_they_are_used(tmp_path, tokenizer):
    model = tiny_llama()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7)
    trainer(tmp_path, tokenizer, model, save_strategy="steps", save_steps=3).train()
    saved = json.loads((tmp_path / "checkpoint-3" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.7


@pytest.mark.parametrize("method", ["paper", "masked"])
def test_a_run_resumed_with_another_text_is_refused(tmp_path, tokenizer, method):
    settings = config(tmp_path, method=method, save_strategy="steps", save_steps=3, norm_samples=1)
    given = {"args": settings, "processing_class": tokenizer}
    ProxSparseTrainer(tiny_llama(), train_dataset=data(STEPS), **given).train()
    rows = data(STEPS)["input_ids"][:]
    rows[-1] = rows[-1][::-1]  # not among those that norms are measured on
    other = ProxSparseTrainer(tiny_llama(), train_dataset=data(0).from_dict({"input_ids": rows}), **given)
    with pytest.raises(UsageError, match="checkpoint-3 was learned from another text than the one given now"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_best_checkpoint_is_kept_and_gives_the_mask(tmp_path, tokenizer):
    losses = iter([3.0, 1.0, 2.0])

    class Known(ProxSparseTrainer):
        def evaluate(self, *args, **kwargs):
            found = super().evaluate(*args, **kwargs) | {"eval_loss": next(losses)}
            return found

    settings = config(
        tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, save_total_limit=1,
        load_best_model_at_end=True,
    )  # fmt: skip
    given = {"train_dataset": data(), "eval_dataset": data(2, seed=1), "processing_class": tokenizer}
    runs = Known(tiny_llama(), settings, **given)
    runs.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    best = load_model(str(tmp_path / "checkpoint-4"))
    for target in runs.targets:
        assert torch.equal(target.weight, best.get_parameter(target.name))


def test_an_error_says_in_which_step_it_happened(tmp_path, tokenizer):
    runs = trainer(tmp_path, tokenizer)

    def fail(*args):
        if runs.state.global_step == 2:
            raise IndexError("something")
        return plain(*args)

    plain, runs.objective.loss = runs.objective.loss, fail
    with pytest.raises(IndexError) as found:
        runs.train()
    assert task_of(found.value) == "step 3 of learning"


def test_an_error_while_a_checkpoint_is_written_says_so(tmp_path, tokenizer, monkeypatch):
    runs = trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=2)

    def fail(folder):
        raise OSError("no")

    monkeypatch.setattr(runs.proximal, "save", fail)
    with pytest.raises(OSError, match="no") as found:
        runs.train()
    assert task_of(found.value) == f"completing the checkpoint {tmp_path / 'checkpoint-2'}"


def test_a_learning_rate_without_its_weight_is_an_error():
    kept, replaced = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = torch.optim.SGD([kept], lr=0.1)
    with pytest.raises(RunError, match="lacks 1 of 2 weights"):
        scale_learning_rates(optimizer, {id(kept): 0.5, id(replaced): 0.5})
    scale_learning_rates(optimizer, {id(kept): 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [0.05]


def test_offloaded_shards_are_overwritten_only_when_the_device_is_through(tmp_path, tokenizer, monkeypatch):
    runs, waits = trainer(tmp_path, tokenizer), []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    runs.train()
    assert not waits  # the CPU computes what it stores
    monkeypatch.setattr("proxsparse.learning.copies.computed_on", lambda weight: "cuda")
    turns: TakingTurns = runs.objective.turns
    with turns.away():
        for done, put in enumerate((turns.put_original, turns.put_masked, turns.put_learned), 1):
            put()
            assert len(waits) == done


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [byte_tokenizer, bare_tokenizer])
def test_every_baseline_prunes_by_one_call_and_leaves_nothing(tmp_path, method, given):
    model, ids = tiny_llama(), torch.tensor(data(4)["input_ids"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.generation_config = GenerationConfig(temperature=0.9)
    made, wanted = METHODS[method](), Wanted(update=False, bf16=False, folder=tmp_path / "learning")
    made.check(wanted)
    mask = made.prune_model(model, given(), ids, wanted)
    made.forget(wanted)
    assert not list(tmp_path.iterdir())
    assert model.generation_config.temperature == 0.9
    save_mask(mask, tmp_path / "mask.safetensors")  # checks the pattern
    for name, kept in load_mask(tmp_path / "mask.safetensors").tensors.items():
        assert torch.equal(model.get_parameter(name), before[name] * kept)


def test_a_device_without_a_kernel_of_its_own_computes_in_torch():
    assert kernel_for(torch.empty(4, device="meta")) == "eager"


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], ["-m", "not slow"]),
        (["--all"], []),
        (["-k", "a b"], ["-m", "not slow", "-k", "a b"]),
        (["-x", "--all", "-k", "a"], ["-x", "-k", "a"]),
        (["-m", "slow"], ["-m", "slow"]),
    ],
)
def test_the_script_runs_slow_tests_where_they_are_asked_for(given, passed, tmp_path):
    (tmp_path / "script").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(Path(__file__).parent.parent / "script" / "test.sh", tmp_path / "script")
    (tmp_path / "script" / "setup.sh").write_text("")
    stand_in = tmp_path / ".venv" / "bin" / "python"
    stand_in.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    stand_in.chmod(0o755)
    done = subprocess.run(["bash", tmp_path / "script" / "test.sh", *given], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[8:] == passed


def test_what_was_made_of_a_text_that_has_changed_is_made_again_or_refused(checkpoint, tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(16):
        (text / f"{i:02}.txt").write_text(f"Document {i}. " + TEXT * 3)
    out = str(tmp_path / "run")
    learn = ["learn", "--model", checkpoint, "--dataset", str(text), "--ctx_len", "32", "--samples", "2", "--bf16",
             "false", "--use_cpu", "true", "--output_dir", out]  # fmt: skip
    prune = ["prune", "--run", out, "--prune_method", "wanda"]
    commands = (learn, prune, ["eval", "--run", out], ["apply", "--run", out])
    for command in commands:
        assert console(command) == 0
    masks = {name: load_mask(f"{out}/{name}").tensors for name in (".", "wanda")}

    def said(command, code=0):
        capsys.readouterr()
        assert console(command) == code
        shown = capsys.readouterr()
        return shown.out + shown.err

    (text / "03.txt").touch()  # the same text, newer
    assert all("done already" in said(command) for command in (learn, prune))
    for command in commands:
        said(command)
        assert "done already" in said(command)
    for path in text.iterdir():
        path.write_text(path.read_text().replace("dog", "cat").upper())
    refused = said(learn, code=2)
    assert "was learned from another text: the files of" in refused
    assert "--output_dir" in refused
    for command in commands[1:3]:
        assert "done already" not in said(command)
        assert "done already" in said(command)
    assert all(torch.equal(load_mask(out).tensors[name], kept) for name, kept in masks["."].items())
    assert any(not torch.equal(load_mask(f"{out}/wanda").tensors[name], kept) for name, kept in masks["wanda"].items())


@pytest.mark.parametrize("home", [None, "/proc/none"])
def test_without_a_cache_the_embedded_model_is_converted_for_the_process(home, monkeypatch, tmp_path, caplog):
    def nobody(*_):
        raise KeyError("uid not found")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    if home:
        monkeypatch.setenv("HOME", home)
    gguf = tmp_path / source.EMBEDDED_FILE
    gguf.write_bytes(b"GGUF")
    made = []
    monkeypatch.setattr(source, "package_file", lambda *_: gguf)
    monkeypatch.setattr(source, "read_gguf", lambda *_: made.append(1) or tiny_llama())
    monkeypatch.setattr(source.AutoTokenizer, "from_pretrained", lambda *_, **__: byte_tokenizer())
    monkeypatch.chdir(tmp_path)
    source._temporary.cache_clear()
    folder = source.embedded_checkpoint()
    assert source.embedded_checkpoint() == folder
    assert made == [1]
    assert (folder / "model.safetensors").is_file()
    assert "set XDG_CACHE_HOME to keep it" in caplog.text
    assert "/proc/none/.cache can't be written" in caplog.text or home is None
    cache.choose_cache()
    assert [path.name for path in tmp_path.iterdir()] == [gguf.name]  # no folder named ~
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert source.embedded_checkpoint().is_relative_to(tmp_path / "mine")


def test_the_embedded_model_is_converted_once_whoever_asks_at_the_same_time(monkeypatch, tmp_path):
    gguf = tmp_path / source.EMBEDDED_FILE
    gguf.write_bytes(b"GGUF")
    made, model, together = [], tiny_llama(), threading.Barrier(4)

    def read(*_):
        made.append(1)
        time.sleep(0.2)  # the others have found no model by now
        return model

    def ask(_):
        together.wait()
        folder = source.embedded_checkpoint()
        return load_model(str(folder)).config.hidden_size

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "package_file", lambda *_: gguf)
    monkeypatch.setattr(source, "read_gguf", read)
    monkeypatch.setattr(source.AutoTokenizer, "from_pretrained", lambda *_, **__: byte_tokenizer())
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(4))) == {model.config.hidden_size}
    assert made == [1]


@pytest.mark.slow  # a process of its own, in which nothing is imported yet
def test_commands_work_where_the_home_folder_can_not_be_written_to(checkpoint, corpus, tmp_path):
    out, model, text = tmp_path / "run", ["--model", checkpoint], ["--dataset", corpus, "--ctx_len", "32"]
    run = ["--run", str(out)]
    commands = [
        ["download", "--list"],
        ["learn", *model, *text, "--samples", "2", "--bf16", "false", "--use_cpu", "true", "--output_dir", str(out)],
        ["prune", *run, "--prune_method", "wanda"],
        ["apply", *run],
        ["export", *run, "--to", str(tmp_path / "out")],
        ["report", *run],
    ]
    code = f"from proxsparse.__main__ import main\nassert not any([main(words) for words in {commands!r}])"
    here = Path(__file__).parent.parent
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(here), "HOME": "/proc/none", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").is_file()


@pytest.mark.parametrize(
    ("damage", "command", "code", "sentence"),
    [
        ({"run.json": "{"}, ["eval"], 1, "run.json is damaged (Expecting"),
        ({"run.json": '{"settings": 5}'}, ["eval"], 1, "run.json is damaged: delete it"),
        ({"history.json": "{"}, ["report"], 1, "history.json is damaged (Expecting"),
        ({"history.json": "{}"}, ["report"], 1, "history.json holds something else than a result of these commands"),
        ({"dense.json": "[]"}, ["report"], 1, "dense.json holds something else than a result of these commands"),
        ({"dense.json": "{"}, ["eval", "--max_windows", "1"], 0, ""),  # made again
    ],
)
def test_a_damaged_file_of_a_run_is_named_or_made_again(
    damage, command, code, sentence, checkpoint, corpus, mask, tmp_path, capsys
):
    settings = {"model": checkpoint, "dataset": corpus, "ctx_len": 32, "method": "masked", "samples": 2, "seed": 0}
    files = {"run.json": json.dumps({"settings": settings}), "history.json": "[]"} | damage
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    shutil.copy(mask / "mask.safetensors", tmp_path)
    assert console([*command, "--run", str(tmp_path)]) == code
    assert sentence in capsys.readouterr().err
    if code == 0:
        assert json.loads((tmp_path / "dense.json").read_text())["perplexity"]


def test_a_cache_folder_for_compiled_loops_that_can_not_be_written_to_is_named(monkeypatch, caplog):
    monkeypatch.setattr(cache.numba.config, "CACHE_DIR", "/proc/none")
    cache.choose_cache()
    assert "NUMBA_CACHE_DIR is /proc/none, which can't be written to" in caplog.text
    assert "proxsparse-numba-" in cache.numba.config.CACHE_DIR


OWN_CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Config(PreTrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=257, **rest):
        self.vocab_size = vocab_size
        super().__init__(**rest)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.embedding, self.head = nn.Embedding(config.vocab_size, 32), nn.Linear(32, config.vocab_size)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids=None, **rest):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
"""


def test_a_model_of_code_of_its_own_goes_from_learning_to_the_checkpoint(corpus, tmp_path, capsys):
    code: dict = {"__name__": "own"}
    exec(OWN_CODE, code)
    torch.manual_seed(0)
    folder = tmp_path / "own"
    code["Model"](code["Config"]()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(OWN_CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(settings))
    run = tmp_path / "run"
    learn = ["learn", "--model", str(folder), "--trust_remote_code", "true", "--ctx_len", "32", "--samples", "2",
             "--use_cpu", "true", "--bf16", "false", "--output_dir", str(run), "--dataset"]  # fmt: skip
    assert console([*learn, "self"]) == 2
    assert "Model can't write text by itself: give another text than self" in capsys.readouterr().err
    assert console([*learn, corpus]) == 0
    assert console(["apply", "--run", str(run), "--max_windows", "1"]) == 0
    assert console(["check", "--model", str(run / "pruned"), "--base", str(folder), "--trust_remote_code"]) == 0
    assert {name.split(".", 2)[2] for name in load_mask(run).tensors} == {"up.weight", "down.weight"}
    (folder / "own.py").write_text("import flash_attn_of_mars")
    assert console(["eval", "--model", str(folder), "--trust_remote_code", "--ctx_len", "32"]) == 1
    assert "needs the package flash_attn_of_mars" in capsys.readouterr().err


def test_a_folder_for_model_code_that_can_not_be_written_to_is_named(monkeypatch, checkpoint, capsys):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", "/read-only/huggingface/modules")

    monkeypatch.setenv("HF_HOME", "/read-only/huggingface")
    monkeypatch.setattr("proxsparse.model.loading.AutoConfig.from_pretrained", refuse)
    assert console(["eval", "--model", checkpoint, "--dataset", "wiki"]) == 1
    assert "The cache can't be written (/read-only/huggingface/modules): set HF_HOME to" in capsys.readouterr().err
