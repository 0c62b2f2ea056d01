"""The shell scripts, on tiny models of the right architecture and local text."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import slow, tiny_llama
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from proxsparse.__main__ import main
from proxsparse.recipes import RECIPES, RELEASED

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "learn_mask_smollm2_135m_prox.sh"
SCRIPTS = sorted({p.name for p in (ROOT / "script").glob("learn_mask_*.sh")} - {EMBEDDED})
# From the release's scripts: model, lambda1, learning rate, context, lambda2, epsilon.
PUBLISHED = {
    "learn_mask_llama2_7b_prox.sh": ("meta-llama/Llama-2-7b-hf", 0.25, 1e-4, 4096, 0, None),
    "learn_mask_llama2_13b_prox.sh": ("meta-llama/Llama-2-13b-hf", 0.5, 1e-4, 4096, 0, None),
    "learn_mask_llama2_13b_full.sh": ("meta-llama/Llama-2-13b-hf", 0.5, 1e-4, 4096, 0.25, 0.5),
    "learn_mask_llama3.1_8b_prox.sh": ("meta-llama/Llama-3.1-8B", 0.85, 5e-5, 4096, 0, None),
    "learn_mask_llama3.1_8b_full.sh": ("meta-llama/Llama-3.1-8B", 0.85, 5e-5, 4096, 1.0, 0.1),
    "learn_mask_mistral_v0.1_7b_prox.sh": ("mistralai/Mistral-7B-v0.1", 20.0, 5e-5, 4096, 0, None),
    "learn_mask_mistral_v0.3_7b_prox.sh": ("mistralai/Mistral-7B-v0.3", 25.0, 5e-5, 4096, 0, None),
    "learn_mask_openllama_v2_7b_prox.sh": ("openlm-research/open_llama_7b_v2", 1.0, 1e-4, 2048, 0, None),
    "learn_mask_qwen_2.5_14b_prox.sh": ("Qwen/Qwen2.5-14B", 0.2, 1e-4, 4096, 0, None),
}


@pytest.fixture(scope="module")
def shell(python):
    """Function that runs a script, and returns the finished process."""

    def run(script, *arguments, cwd, **environment):
        given = os.environ | {k: str(v) for k, v in environment.items()} | {"python": python}
        command = ["bash", str(ROOT / "script" / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=280, env=given)

    return run


def flags_of(line):
    return dict(re.findall(r"--(\w+) (\S+)", line))


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """A tiny checkpoint of each architecture, in a folder whose name a careless script would break on."""
    folder = tmp_path_factory.mktemp("models with spaces & 'quotes'")
    sizes = tiny_llama().config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "max_position_embeddings", "initializer_range", "eos_token_id", "pad_token_id")
    sizes = {k: sizes[k] for k in kept}
    made = {
        "Llama": tiny_llama(),
        "Mistral": MistralForCausalLM(MistralConfig(**sizes, sliding_window=None, bos_token_id=None)),
        "Qwen": Qwen2ForCausalLM(Qwen2Config(**sizes, bos_token_id=None)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in made}


def test_every_published_recipe_has_a_script_that_names_it():
    named = {name: re.findall(r"^recipe=(\S+)$", (ROOT / "script" / name).read_text(), re.M) for name in SCRIPTS}
    assert set(named) == set(PUBLISHED)
    assert sorted(recipe for found in named.values() for recipe in found) == sorted(
        set(RECIPES) - {"smollm2-135m-prox"}
    )
    for name, (recipe,) in named.items():
        assert RECIPES[recipe].model == PUBLISHED[name][0]


@pytest.mark.parametrize("script", [*SCRIPTS[:3], *map(slow, SCRIPTS[3:])])
def test_a_recipe_holds_the_published_settings(script, capsys):
    model, lambda1, learning_rate, ctx_len, lambda2, epsilon = PUBLISHED[script]
    (recipe,) = re.findall(r"^recipe=(\S+)$", (ROOT / "script" / script).read_text(), re.M)
    assert main(["learn", "--recipe", recipe, "--dry_run"]) == 0
    flags = flags_of(capsys.readouterr().out)
    assert (flags["model"], float(flags["lambda_value"]), float(flags["learning_rate"]), int(flags["ctx_len"])) == (
        model, lambda1, learning_rate, ctx_len
    )  # fmt: skip
    assert (flags["method"], flags["samples"], flags["batch_size"], flags["seed"]) == ("paper", "400", "1", "42")
    assert float(flags.get("lambda2_value", 0)) == lambda2
    assert (float(flags["epsilon"]) if "epsilon" in flags else None) == epsilon


@pytest.mark.slow  # processes of its own
def test_the_published_method_runs_on_the_embedded_model_with_relative_settings(tmp_path, shell):
    done = shell(EMBEDDED, "--dry-run", cwd=tmp_path, samples=7)
    assert done.returncode == 0, done.stderr
    flags = flags_of(next(line for line in done.stdout.splitlines() if "end-to-end/main.py" in line))
    assert (flags["model"], flags["dataset"], flags["ctx_len"], flags["samples"]) == (
        "smollm2-135m",
        "wiki",
        "512",
        "7",
    )
    assert (flags["method"], flags["relative"], flags["lambda_ramp"]) == ("paper", "true", "0.5")
    assert (float(flags["lambda_value"]), float(flags["learning_rate"])) == (0.02, 0.005)
    assert "--dataset wiki news" in done.stdout
    assert "learn_mask_smollm2" not in str(list(tmp_path.iterdir()))


@pytest.mark.slow  # processes of its own
def test_a_dry_run_shows_the_plan_and_the_commands_and_runs_nothing(tmp_path, shell):
    done = shell("learn_mask_llama2_13b_full.sh", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "memory per device, computed" in done.stdout
    assert flags_of(next(line for line in done.stdout.splitlines() if "end-to-end/main.py" in line))["epsilon"] == "0.5"
    measured = [line for line in done.stdout.splitlines() if "eval/" in line and "report" not in line]
    assert all("--dataset wikitext2 c4 " in line for line in measured)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_second_start_skips_what_is_done_and_any_model_works(models, corpus, tmp_path, shell):
    setting = {"dataset": corpus, "samples": 12, "ctx_len": 32, "split": "heldout", "evaluation": corpus}
    setting |= {"output_dir": tmp_path / "run", "device": "cpu", "max_windows": 4}
    first = shell("learn_mask.sh", models["Qwen"], "--bf16", "false", cwd=tmp_path, **setting)
    assert first.returncode == 0, first.stdout + first.stderr
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["method"], settings["lambda_value"]) == ("masked", 0.002)
    mask = (tmp_path / "run" / "mask.safetensors").stat().st_mtime_ns
    again = shell("learn_mask.sh", models["Qwen"], "--bf16", "false", cwd=tmp_path, **setting)
    assert again.returncode == 0
    assert again.stdout.count("done already") == 4
    assert (tmp_path / "run" / "mask.safetensors").stat().st_mtime_ns == mask


@pytest.mark.parametrize("script", ["learn_mask.sh", *sorted(p.name for p in (ROOT / "script").glob("baseline_*.sh"))])
def test_a_script_without_a_model_says_so(script, tmp_path):
    done = subprocess.run(["bash", str(ROOT / "script" / script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert f"error: give a model first: bash script/{script} MODEL" in done.stderr


@pytest.mark.slow
def test_a_baseline_script_prunes(models, corpus, tmp_path, shell):
    flags = ["--dataset", corpus, "--nsamples", 4, "--ctx_len", 32, "--save", tmp_path / "mask"]
    done = shell("baseline_wanda.sh", models["Mistral"], *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mask" / "mask.safetensors").is_file()


@pytest.mark.slow
def test_released_models_are_measured_where_they_are(models, corpus, tmp_path, shell):
    shutil.copytree(models["Llama"], tmp_path / "models" / RELEASED["llama2-7b"][0])
    (tmp_path / "models" / RELEASED["llama2-7b"][0] / ".downloaded").touch()
    setting = {"models": tmp_path / "models", "evaluation": corpus, "ctx_len": 32, "device": "cpu"}
    done = shell("eval_pruned_prox_model.sh", "llama2-7b", cwd=tmp_path, **setting)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "models" / "llama2-7b.json").read_text())["perplexity"][corpus]["windows"] > 0
    again = shell("eval_pruned_prox_model.sh", "llama2-7b", cwd=tmp_path, **setting)
    assert "measured already" in again.stdout


@pytest.mark.slow  # a process of its own
def test_a_dry_run_of_the_evaluation_lists_every_released_model(tmp_path, shell):
    done = shell("eval_pruned_prox_model.sh", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if "eval/ppl.py" in line]
    assert len(commands) == 7
    assert sum("--ctx_len 2048" in line for line in commands) == 1
    assert shell("eval_pruned_prox_model.sh", "nonsense", cwd=tmp_path).returncode == 2
