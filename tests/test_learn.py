"""Learning in Python and by command: one mask, one folder, one record of where it comes from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama

import proxsparse
from proxsparse.__main__ import main as console
from proxsparse.baselines import METHODS
from proxsparse.commands import apply as apply_command
from proxsparse.commands import eval as eval_command
from proxsparse.commands.flags import LearnParser, option
from proxsparse.errors import UsageError
from proxsparse.learning.folder import Run
from proxsparse.learning.trainer import ProxSparseTrainer
from proxsparse.mask import load_mask
from proxsparse.model.loading import EMBEDDED, load_model
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
    with pytest.raises(UsageError, match="holds a run with `learning_rate=0.005`, now it is 0.02"):
        proxsparse.learn_mask(model, tokenizer, windows, output_dir=tmp_path / "run", learning_rate=0.02, **PLAIN)


def test_another_model_of_the_same_name_is_refused(loaded, tmp_path):
    _, tokenizer, windows = loaded
    ours, theirs = tiny_llama(seed=0), tiny_llama(seed=1)
    mask = proxsparse.learn_mask(ours, tokenizer, windows, output_dir=tmp_path / "run", **PLAIN)
    assert same(mask, proxsparse.learn_mask(ours, tokenizer, windows, output_dir=tmp_path / "run", **PLAIN))
    with pytest.raises(UsageError, match="holds a run with `weights="):
        proxsparse.learn_mask(theirs, tokenizer, windows, output_dir=tmp_path / "run", **PLAIN)


@pytest.mark.parametrize("setting", [{"data_seed": 7}, {"neftune_noise_alpha": 5.0}, {"dataloader_drop_last": True}])
def test_what_orders_and_changes_the_text_decides_the_mask(setting, loaded, run, tmp_path):
    model, tokenizer, windows = loaded
    proxsparse.learn_mask(model, tokenizer, windows, output_dir=tmp_path / "run", **PLAIN)
    with pytest.raises(UsageError, match=f"holds a run with `{next(iter(setting))}="):
        proxsparse.learn_mask(model, tokenizer, windows, output_dir=tmp_path / "run", **PLAIN, **setting)


def test_channels_are_reordered_where_a_weight_is_left_out(loaded):
    _, tokenizer, windows = loaded
    model = tiny_llama(intermediate_size=62)
    mask = proxsparse.learn_mask(model, tokenizer, windows, exclude="down_proj", permute="auto", **PLAIN)
    assert mask.order
    assert not any("down_proj" in name for name in mask.tensors)


def test_a_python_caller_is_told_of_settings_and_not_of_flags(loaded):
    model, tokenizer, windows = loaded
    with pytest.raises(UsageError) as refused:
        proxsparse.learn_mask(model, tokenizer, windows, score="luck")
    assert "--" not in str(refused.value)
    assert "`score` must be one of" in str(refused.value)
    with pytest.raises(UsageError, match=r"token ids of shape \(N, T >= 2\)"):
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


def test_a_run_does_not_begin_in_the_folder_of_a_model(checkpoint, corpus, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    before = sorted(model.iterdir())
    assert console(learn_flags(str(model), corpus, model, "--permute", "auto")) == 2
    assert "holds a model, and no run: give another --output_dir" in capsys.readouterr().err
    assert sorted(model.iterdir()) == before


def test_weights_that_a_run_leaves_out_are_left_out_by_what_follows(checkpoint, corpus, tmp_path, capsys):
    run = tmp_path / "run"
    assert console([*learn_flags(checkpoint, corpus, run), "--exclude", "down_proj|k_proj"]) == 0
    assert "left dense: self_attn.k_proj, mlp.down_proj (excluded)" in capsys.readouterr().out
    for method in METHODS:
        flags = ["--prune_method", method, "--mask_only", "--bf16", "false"]
        assert console(["prune", "--run", str(run), *flags]) == 0
        assert load_mask(Run(run).baseline_folder(method)).tensors.keys() == load_mask(run).tensors.keys()
    assert "left dense: self_attn.k_proj, mlp.down_proj (excluded)" in capsys.readouterr().out
    assert console(["apply", "--run", str(run), "--max_windows", "1"]) == 0
    assert "left dense: self_attn.k_proj, mlp.down_proj (excluded)" in capsys.readouterr().out
    for form in ("dense", "compact"):
        out = str(tmp_path / form)
        assert console(["export", "--run", str(run), "--form", form, "--to", out]) == 0
        assert console(["check", "--model", out, "--base", checkpoint]) == 0
        assert "left dense: self_attn.k_proj, mlp.down_proj (excluded)" in capsys.readouterr().out
    model = load_model(str(tmp_path / "dense"))
    model.save_pretrained(tmp_path / "trained")  # which notes nothing
    check = ["check", "--model", str(tmp_path / "trained")]
    assert console(check) == 1
    assert console([*check, "--exclude", "down_proj"]) == 1
    assert console([*check, "--exclude", "down_proj|k_proj"]) == 0


def test_what_was_measured_of_a_mask_goes_when_the_mask_is_replaced(run, tmp_path, capsys):
    for words in ("prune", "--prune_method", "wanda"), ("apply", "--baseline", "wanda", "--max_windows", "2"):
        assert console([words[0], "--run", str(run), *words[1:]]) == 0
    assert (run / "wanda.json").is_file()
    other = ["prune", "--run", str(run), "--prune_method", "wanda", "--nsamples", "1", "--seed", "7"]
    assert console([*other, "--save", str(tmp_path / "elsewhere")]) == 0
    assert (run / "wanda.json").is_file()  # the run's own mask is the same
    assert console(other) == 0
    assert not (run / "wanda.json").exists()


def test_a_report_refuses_rows_of_other_context_lengths(run, tmp_path, capsys):
    for name, length in ("dense", "16"), ("other", "32"):
        words = ["eval", "--run", str(run), "--max_windows", "1", "--ctx_len", length]
        assert console([*words, "--output", str(tmp_path / f"{name}.json")]) == 0
    rows = [f"{name}={tmp_path / name}.json" for name in ("dense", "other")]
    capsys.readouterr()
    assert console(["report", "--run", str(run), "--rows", *rows]) == 2
    assert "other.json) has windows of 32 tokens, not 16. Measure it again" in capsys.readouterr().err


@pytest.mark.parametrize("command", [apply_command, eval_command])
def test_only_the_model_of_the_run_is_measured_as_its_own(command, run, checkpoint):
    parse = lambda *words: command.arguments().parse(["--run", str(run), *words])  # noqa: E731
    for own in parse(), parse("--model", checkpoint):
        assert own.model == checkpoint
        assert Path(own.output).parent == run
    other = parse("--model", EMBEDDED)  # which is the default where there is no run
    assert (other.model, other.output) == (EMBEDDED, None)


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
    assert len(RECIPES) == 10
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


def test_the_length_of_windows_has_one_value(checkpoint, corpus, tmp_path, capsys):
    flags = ["learn", "--model", checkpoint, "--dataset", corpus, "--use_cpu", "true", "--max_length", "16", "--where"]
    assert console(flags) == 0
    assert "_len16_" in capsys.readouterr().out
    assert console([*flags, "--ctx_len", "32"]) == 2
    assert "--ctx_len and --max_length are the same setting; got 32 and 16" in capsys.readouterr().err


def test_checkpoints_of_the_model_alone_are_not_gone_on_from(checkpoint, corpus, tmp_path, caplog):
    flags = learn_flags(checkpoint, corpus, tmp_path / "run", "--save_only_model", "true")
    assert console(flags) == 0
    assert "once stopped, begins again" in caplog.text
    whole = (tmp_path / "run" / "mask.safetensors").read_bytes()
    (tmp_path / "run" / "mask.safetensors").unlink()
    assert console(["extract", "--run", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "mask.safetensors").read_bytes() == whole
    (tmp_path / "run" / "mask.safetensors").unlink()
    assert console(flags) == 0
    assert "holds the model without the optimizer's state" in caplog.text
    assert (tmp_path / "run" / "mask.safetensors").read_bytes() == whole


def test_a_checkpoint_that_can_not_be_obeyed_leaves_no_run_behind(checkpoint, corpus, tmp_path):
    assert console(learn_flags(checkpoint, corpus, tmp_path / "run", "--resume_from_checkpoint", "/none")) == 2
    assert not (tmp_path / "run" / "run.json").exists()


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


def test_looking_at_a_run_is_no_mistake_next_to_several_gpus(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for way in ("--where", "--dry_run"):
        assert console(["learn", "--model", "smollm2-135m", "--dataset", "wiki", way]) == 0
    assert "runs/smollm2-135m-wiki_masked_400" in capsys.readouterr().out
    assert (
        console(
            [
                "learn",
                "--dataset",
                "wiki",
                "--use_cpu",
                "false",
                "--bf16",
                "false",
                "--output_dir",
                str(tmp_path / "run"),
            ]
        )
        == 2
    )
    assert "There are 2 GPUs and one process" in capsys.readouterr().err


def test_python_learns_neither_in_float16_nor_on_shards_nor_on_several_gpus_at_once(tokenizer, monkeypatch):
    model, windows = tiny_llama(), torch.ones(2, 32, dtype=torch.long)
    with pytest.raises(UsageError, match="load the model in bfloat16"):
        proxsparse.learn_mask(tiny_llama().half(), tokenizer, windows)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(UsageError, match="FSDP's shards"):
            proxsparse.learn_mask(model, tokenizer, windows)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with pytest.raises(UsageError, match="one GPU per process"):
        proxsparse.learn_mask(model, tokenizer, windows)


def test_python_gets_its_configurations_back(loaded):
    model, tokenizer, windows = loaded
    model.generation_config.temperature = 0.5  # without do_sample: what can't be saved is cleaned for the run only
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    proxsparse.learn_mask(model, tokenizer, windows, **PLAIN)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)


def test_the_mask_of_a_run_is_not_replaced_by_that_of_one_checkpoint(run, tmp_path, capsys):
    before = (run / "mask.safetensors").read_bytes()
    assert console(["extract", "--checkpoint", str(run / "checkpoint-4")]) == 2
    assert "is the mask of the whole run: give --output FILE" in capsys.readouterr().err
    assert console(["extract", "--run", str(run), "--include", "q_proj"]) == 2
    assert (run / "mask.safetensors").read_bytes() == before


def test_saving_without_measuring_writes_no_result(checkpoint, corpus, tmp_path):
    out = tmp_path / "run"
    assert console(learn_flags(checkpoint, corpus, out)) == 0
    assert console(["apply", "--run", str(out), "--no_eval"]) == 0
    assert (out / "pruned" / "config.json").is_file()
    assert not (out / "pruned.json").exists()


def test_a_run_of_relative_paths_is_measured_from_every_folder(checkpoint, corpus, tmp_path, monkeypatch, capsys):
    shutil.copytree(checkpoint, tmp_path / "model")
    shutil.copytree(corpus, tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    assert console(learn_flags("model", "text", "run")) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert console(["eval", "--run", "../run", "--max_windows", "1"]) == 0
    shutil.rmtree(tmp_path / "text")
    capsys.readouterr()
    assert console(["eval", "--run", "../run", "--max_windows", "1"]) == 2
    assert "is not here any more: give --dataset" in capsys.readouterr().err


def test_another_baseline_mask_in_the_folder_is_made_again(run, capsys):
    wanda = ["prune", "--run", str(run), "--prune_method", "wanda"]
    assert console(wanda) == console(wanda) == 0
    assert "done already" in capsys.readouterr().out
    for change in (["--nsamples", "3"], ["--sparsity_type", "4:8"]):
        assert console([*wanda, *change]) == 0
        assert "done already" not in capsys.readouterr().out


def test_a_pruned_checkpoint_that_something_else_took_the_place_of_is_written_again(run, tmp_path, capsys):
    apply = ["apply", "--run", str(run), "--max_windows", "1"]
    assert console(apply) == console(apply) == 0
    assert "done already" in capsys.readouterr().out
    wanda = ["prune", "--run", str(run), "--prune_method", "wanda", "--save", str(tmp_path / "wanda")]
    assert console(wanda) == 0
    written = {path: path.read_bytes() for path in (run / "pruned").glob("*.safetensors")}
    assert written
    other = ["apply", "--run", str(run), "--mask", str(tmp_path / "wanda"), "--save", str(run / "pruned"), "--no_eval"]
    assert console(other) == 0
    assert all(path.read_bytes() != before for path, before in written.items())
    capsys.readouterr()
    assert console(apply) == 0
    assert "done already" not in capsys.readouterr().out
    assert all(path.read_bytes() == before for path, before in written.items())


@pytest.mark.parametrize("perplexities", [{}, [], 7, {"wiki": 7}, {"wiki": {"perplexity": "x"}}, {"wiki": {}}])
def test_a_report_names_a_damaged_result(perplexities, run, tmp_path, capsys):
    path = tmp_path / "dense.json"
    path.write_text(json.dumps({"perplexity": perplexities}))
    assert console(["report", "--run", str(run), "--rows", f"dense={path}"]) == 1
    assert f"error: {path} is damaged: it has no perplexity" in capsys.readouterr().err


def test_a_result_of_another_mask_is_not_the_runs(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("proxsparse.commands.zero_shot.zero_shot", lambda *args, **options: {"task": {"acc": 0.5}})
    zero_shot = ["zero-shot", "--run", str(run), "--tasks", "task"]
    assert console([*zero_shot, "--mask", str(run)]) == 0
    assert not (run / "zero_shot.json").exists()
    assert console(zero_shot) == 0
    assert json.loads((run / "zero_shot.json").read_text())["tasks"] == {"task": {"acc": 0.5}}


def test_the_last_of_two_equal_flags_counts_and_defaults_never_win():
    words = ["--samples", "8", "--output_dir=a", "--samples=9"]
    assert (option(words, "samples"), option(words, "output_dir"), option(words, "seed")) == ("9", "a", None)
    given = LearnParser().parse(["--recipe", "llama2-7b-prox", "--samples", "3", "--samples", "7", "--seed=1"])
    assert (given.run.samples, given.config.seed, given.run.model) == (7, 1, "meta-llama/Llama-2-7b-hf")


def test_extraction_keeps_to_the_best_checkpoint_where_the_run_does(checkpoint, corpus, tmp_path, monkeypatch):
    losses, evaluate = iter([1.0, 2.0]), ProxSparseTrainer.evaluate

    def known(*args, **options):
        return evaluate(*args, **options) | {"eval_loss": next(losses)}

    monkeypatch.setattr(ProxSparseTrainer, "evaluate", known)
    best = ["--load_best_model_at_end", "true", "--eval_samples", "2", "--eval_strategy", "steps", "--eval_steps", "4"]
    out = tmp_path / "run"
    assert console(learn_flags(checkpoint, corpus, out, *best, "--learning_rate", "0.1")) == 0
    learned, last = load_mask(out), tmp_path / "last.safetensors"
    assert console(["extract", "--run", str(out)]) == 0
    assert same(learned, load_mask(out))
    assert console(["extract", "--checkpoint", str(out / "checkpoint-8"), "--output", str(last)]) == 0
    assert not same(learned, load_mask(last))


def test_a_run_learns_from_a_mixture_with_the_models_own_text(checkpoint, corpus, tmp_path, monkeypatch, capsys):
    shutil.copytree(corpus, tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    flags = learn_flags(checkpoint, "text:1,self:1", tmp_path / "run")
    assert console(flags) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["dataset"] == f"{tmp_path}/text:1,self:1"
    assert console(["eval", "--run", "run", "--max_windows", "1"]) == 0
    assert f"{tmp_path}/text: perplexity" in capsys.readouterr().out
    assert console(["prune", "--run", "run", "--prune_method", "wanda"]) == 0
    pure = ["prune", "--run", "run", "--prune_method", "wanda", "--dataset", "self", "--save", "own"]
    assert console(pure) == 0
    assert load_mask(tmp_path / "own").info["dataset"] == "self"


def test_what_a_python_caller_mixes_up_is_told_before_anything_is_computed(loaded):
    model, tokenizer, windows = loaded
    for change, sentence in (
        ({"model": "tiny-llama"}, "`model` must be a model, as load_model returns it; got str"),
        ({"tokenizer": None}, "`tokenizer` must be a tokenizer, as load_tokenizer returns it; got NoneType"),
        (
            {"windows": windows.tolist()},
            "`windows` must be an int64 tensor of token ids of shape .N, T >= 2.; got list",
        ),
        ({"windows": windows.float()}, "got torch.float32 of shape"),
        ({"windows": windows[:0]}, "got torch.int64 of shape .0, 32."),
        ({"windows": windows - 1000}, "`windows` must hold token ids of at least 0"),
        ({"windows": windows + 1000}, "the model has embeddings for 257 tokens"),
        ({"eval_windows": [1, 2]}, "`eval_windows` must be an int64 tensor of token ids"),
        ({"output_dir": __file__}, "`output_dir` must be a folder; .*test_learn.py is none"),
    ):
        with pytest.raises(UsageError, match=sentence):
            proxsparse.learn_mask(**{"model": model, "tokenizer": tokenizer, "windows": windows, **PLAIN, **change})
