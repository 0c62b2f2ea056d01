"""Learning in Python and by command: one mask, one folder, one record of where it comes from."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_llama

import proxsparse
from proxsparse.__main__ import main as console
from proxsparse.errors import UsageError
from proxsparse.learning.folder import Run
from proxsparse.mask import load_mask
from proxsparse.operator.kernels import cache
from proxsparse.recipes import RECIPES, RELEASED

PLAIN = {"bf16": False, "save_steps": 4}


def learn_flags(checkpoint, corpus, out, *more):
    flags = ["--model", checkpoint, "--dataset", corpus, "--ctx_len", "32", "--samples", "8", "--bf16", "false"]
    return ["learn", *flags, "--save_steps", "4", "--use_cpu", "true", "--output_dir", str(out), *map(str, more)]


def same(ours, theirs):
    return ours.tensors.keys() == theirs.tensors.keys() and all(
        torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors
    )


@pytest.fixture(scope="module")
def run(checkpoint, corpus, tmp_path_factory):
    """A finished run of the command."""
    out = tmp_path_factory.mktemp("learn") / "run"
    assert console(learn_flags(checkpoint, corpus, out)) == 0
    return out


@pytest.fixture
def loaded(checkpoint, corpus):
    model, tokenizer = proxsparse.load_model(checkpoint), proxsparse.load_tokenizer(checkpoint)
    return model, tokenizer, proxsparse.calibration_windows(corpus, tokenizer, 32, 8, seed=42)


@pytest.mark.parametrize("method", ["masked", "paper"])
def test_the_function_learns_the_mask_of_the_command_and_leaves_the_model_alone(
    method, loaded, checkpoint, corpus, tmp_path
):
    model, tokenizer, windows = loaded
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forward, training = vars(model).get("forward"), model.training
    mask = proxsparse.learn_mask(model, tokenizer, windows, method, **PLAIN)
    assert console(learn_flags(checkpoint, corpus, tmp_path / "run", "--method", method)) == 0
    assert same(mask, load_mask(tmp_path / "run"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert (vars(model).get("forward"), model.training) == (forward, training)
    proxsparse.apply_mask(model, mask)
    assert model.generate(windows[:1, :4], max_new_tokens=2).shape == (1, 6)


def test_the_same_call_reads_the_mask_and_another_text_is_refused(loaded, tmp_path):
    model, tokenizer, windows = loaded
    mask = proxsparse.learn_mask(model, tokenizer, windows, output_dir=tmp_path / "run", **PLAIN)
    written = (tmp_path / "run" / "mask.safetensors").stat().st_mtime_ns
    assert same(mask, proxsparse.learn_mask(model, tokenizer, windows, output_dir=tmp_path / "run", **PLAIN))
    assert (tmp_path / "run" / "mask.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="holds a run with another `text`"):
        proxsparse.learn_mask(model, tokenizer, windows.flip(0), output_dir=tmp_path / "run", **PLAIN)
    with pytest.raises(UsageError, match="holds a run with `learning_rate=0.01`, now it is 0.02"):
        proxsparse.learn_mask(model, tokenizer, windows, output_dir=tmp_path / "run", learning_rate=0.02, **PLAIN)


def test_a_python_caller_is_told_of_settings_and_not_of_flags(loaded):
    model, tokenizer, windows = loaded
    with pytest.raises(UsageError) as refused:
        proxsparse.learn_mask(model, tokenizer, windows, score="luck")
    assert "--" not in str(refused.value)
    assert "`score` must be one of" in str(refused.value)
    with pytest.raises(UsageError, match=r"token ids of shape \(N, T\)"):
        proxsparse.learn_mask(model, tokenizer, windows[0])


def test_a_finished_run_is_not_learned_again(run, checkpoint, corpus, capsys):
    assert console(learn_flags(checkpoint, corpus, run)) == 0
    assert "done already" in capsys.readouterr().out
    assert console([*learn_flags(checkpoint, corpus, run), "--score", "weight"]) == 2
    assert "mask.safetensors was made by another command" in capsys.readouterr().err


def test_the_same_model_by_another_spelling_goes_on(run, checkpoint, corpus):
    assert console(learn_flags(checkpoint + "/", corpus, run)) == 0


def test_learning_and_extraction_say_the_same_of_where_a_mask_comes_from(run, tmp_path):
    learned = load_mask(run)
    assert console(["extract", "--run", str(run), "--output", str(tmp_path / "again.safetensors")]) == 0
    again = load_mask(tmp_path / "again.safetensors")
    assert same(learned, again)
    assert (learned.info, learned.base_model, learned.pattern) == (again.info, again.base_model, again.pattern)
    assert learned.info["method"] == "masked"


def test_a_run_knows_model_text_and_context(run, checkpoint, corpus, capsys, tmp_path):
    assert console(["extract", "--run", str(run)]) == 0
    assert console(["prune", "--run", str(run), "--prune_method", "wanda"]) == 0
    assert console(["apply", "--run", str(run), "--baseline", "wanda", "--max_windows", "2"]) == 0
    assert console(["eval", "--run", str(run), "--max_windows", "2"]) == 0
    assert console(["apply", "--run", str(run), "--max_windows", "2"]) == 0
    assert console(["check", "--model", str(run / "pruned"), "--base", checkpoint]) == 0
    assert console(["export", "--run", str(run), "--to", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert console(["report", "--run", str(run)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"dense", "Wanda 2:4", "ProxSparse 2:4"} <= set(printed)
    record = json.loads((run / "pruned.json").read_text())
    assert (record["model"], list(record["perplexity"])) == (checkpoint, [corpus])
    assert record["perplexity"][corpus]["ctx_len"] == 32
    assert console(["apply", "--run", str(run), "--max_windows", "2"]) == 0
    assert "done already" in capsys.readouterr().out
    assert console(["apply", "--run", str(run), "--max_windows", "1"]) == 0
    assert "done already" not in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path, capsys):
    for command in ("apply", "eval", "export", "report", "prune"):
        flags = {"export": ["--to", "x"], "prune": ["--prune_method", "wanda"]}.get(command, [])
        assert console([command, "--run", str(tmp_path), *flags]) == 2
        assert "holds no finished run" in capsys.readouterr().err


def test_a_recipe_gives_settings_and_flags_win(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert console(["learn", "--recipe", "llama2-13b-full", "--samples", "7", "--where"]) == 0
    assert "Llama-2-13b-hf-c4_paper_7_lr0.0001_len4096_batch1_lambda0.5_lambdatwo0.25_eps0.5" in capsys.readouterr().out
    assert console(["learn", "--recipe", "gpt5"]) == 2
    assert "--recipe must be one of llama2-7b-prox" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_recipe_and_release_is_there():
    assert len(RECIPES) == 9
    assert len(RELEASED) == 7
    assert RELEASED["openllama-v2-7b"][1] == 2048


def test_the_trainers_batch_size_is_ours(checkpoint, corpus, tmp_path, capsys):
    flags = learn_flags(checkpoint, corpus, tmp_path / "run", "--per_device_train_batch_size", 4)
    assert console(flags) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (record["batch_size"], record["per_device_train_batch_size"]) == (4, 4)
    assert json.loads((tmp_path / "run" / "history.json").read_text())[-1]["step"] == 2
    assert console([*flags, "--batch_size", "2"]) == 2
    assert "are the same setting" in capsys.readouterr().err


def test_a_wrong_text_is_said_before_the_model_is_loaded(checkpoint, tmp_path, monkeypatch, capsys):
    def load(*args, **kwargs):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("proxsparse.model.loading.AutoModelForCausalLM.from_pretrained", load)
    flags = ["--model", checkpoint, "--dataset", "/none.txt", "--ctx_len", "32"]
    for command, more in (("learn", []), ("eval", []), ("prune", ["--prune_method", "wanda", "--save", str(tmp_path)])):
        assert console([command, *flags, *more]) == 2
        assert "--dataset must be one of" in capsys.readouterr().err


def test_numba_gets_a_cache_of_its_own_where_it_can_write_to_no_other(monkeypatch):
    monkeypatch.setattr(cache, "writable", lambda folder: False)
    monkeypatch.setattr(cache.numba.config, "CACHE_DIR", "")
    cache.choose_cache()
    first = cache.numba.config.CACHE_DIR
    assert "proxsparse-numba-" in first
    monkeypatch.setattr(cache.numba.config, "CACHE_DIR", "")
    cache.choose_cache()
    assert first != cache.numba.config.CACHE_DIR


def test_the_operator_imports_without_transformers():
    code = (
        "import sys, proxsparse; assert not {'transformers', 'trl', 'datasets'} & set(sys.modules); proxsparse.prox_op"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_a_run_without_a_folder_is_empty(tmp_path):
    run = Run(tmp_path / "none")
    assert (run.settings, run.is_finished, run.share_24(), run.last_checkpoint()) == ({}, False, None, None)


def test_a_model_in_another_dtype_is_learned_in_python(tokenizer):
    model = tiny_llama().to(torch.bfloat16)
    windows = torch.randint(1, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    mask = proxsparse.learn_mask(model, tokenizer, windows, bf16=False)
    assert mask.density() == 0.5
    assert model.dtype == torch.bfloat16
