"""Every flag of every command: a wrong value gives one sentence that names it, and exit code 2."""

import argparse
import dataclasses
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from proxsparse.__main__ import COMMANDS
from proxsparse.__main__ import main as console
from proxsparse.commands.learn import LearnArguments
from proxsparse.learning.config import ProxSparseConfig

ROOT = Path(__file__).resolve().parent.parent
# Flags that take any text, and outputs, which are written to wherever they name.
FREE = {
    "revision", "base_revision", "include", "exclude", "output", "save", "save_model", "record", "draw", "to",
    "output_dir", "block", "run_name", "hub_token", "project", "push_to_hub",
}  # fmt: skip
# Texts with a meaning: a value that is wrong for each.
WRONG_TEXT = {
    "model": "/none", "mask": "/none", "dataset": "/none", "device": "tpu9", "dtype": "int3", "tasks": "/none.yaml",
    "sparsity_type": "4:2", "rows": "no-equals-sign", "only": "gpt5", "eval_zero_shot": "/none.yaml", "score": "luck",
    "rounding": "up", "lambda_value": "big", "method": "magic", "checkpoint": "/none", "run": "/none",
    "compare": "no-equals-sign", "base": "/none", "results": "/none",
    "baseline": "nothing", "adapter": "/none", "lr_scheduler_type": "zigzag", "keep_base": "disk", "permute": "often",
    "pattern": "4:2",
}  # fmt: skip


def parser_of(command):
    """The parser that a command builds."""
    return importlib.import_module(f"proxsparse.commands.{COMMANDS[command][0]}").main.arguments()


def own_flags():
    return {f.name for f in dataclasses.fields(LearnArguments)} | set(ProxSparseConfig.__annotations__)


def wrong_value(action):
    """A value the flag can't take, or None where it takes any text."""
    if action.dest in WRONG_TEXT:
        return WRONG_TEXT[action.dest]
    if action.dest in FREE or isinstance(action, (argparse._StoreTrueAction, argparse._HelpAction)):
        return None
    assert action.choices or action.type not in (None, str), f"give a wrong value for --{action.dest}"
    return "no-such-value"


def adapter(folder):
    """A folder that passes for an adapter until it is read."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("")
    return str(folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_value_for_any_flag_is_one_sentence(command, checkpoint, mask, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    learning = command in ("learn", "plan")
    module = importlib.import_module(f"proxsparse.commands.{COMMANDS[command][0]}")
    parser = parser_of(command)
    known = {option.lstrip("-") for a in parser._actions for option in a.option_strings}
    given = {"model": checkpoint, "dataset": corpus, "ctx_len": "32"} if command != "report" else {}
    given |= {"prune_method": "wanda", "save": "out", "nsamples": "2"} if command == "prune" else {}
    given |= {"mask": str(mask)} if command in ("apply", "export", "recover") else {}
    given |= {"to": "out"} if command in ("export", "merge", "recover") else {}
    given |= {"samples": "2"} if command in ("recover", "export") else {}
    if command == "export":  # the form that takes every flag
        pytest.importorskip("compressed_tensors", reason="an extra: pip install 'proxsparse[quantize]'")
        given |= {"quantize": "int4"}
    given |= {"adapter": adapter(tmp_path)} if command == "merge" else {}
    given |= {"output_dir": "out", "bf16": "false", "use_cpu": "true", "samples": "2"} if learning else {}
    given |= {"run": str(tmp_path)} if command == "report" else {}
    given = {name: value for name, value in given.items() if name in known}
    tried = 0
    for action in parser._actions:
        mine = not learning or action.dest in own_flags() or action.type in (int, float)
        wrong = wrong_value(action) if mine and action.option_strings else None
        if wrong is None or (command == "plan" and action.dest in ("dataset", "device")):
            continue
        flags = [w for n, v in given.items() if n != action.dest for w in (f"--{n}", v)]
        if action.dest == "eval_zero_shot":
            pytest.importorskip("lm_eval", reason="an extra: pip install 'proxsparse[zero-shot]'")
        code = module.main([*flags, action.option_strings[0], wrong])
        error = capsys.readouterr().err
        assert code == 2, (action.dest, wrong, error)
        sentences = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1, (action.dest, error)
        assert action.dest in sentences[0] or wrong in sentences[0], (action.dest, sentences)
        assert "Traceback" not in error
        tried += 1
    assert tried >= 1


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_and_abbreviations_are_refused(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag in ("--nonsense", "--mode"):
        assert importlib.import_module(f"proxsparse.commands.{COMMANDS[command][0]}").main([flag, "1"]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_the_console_program_lists_its_commands(capsys):
    assert console([]) == 2
    assert console(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert console(["--version"]) == 0
    assert capsys.readouterr().out.startswith("proxsparse ")
    assert console(["prun"]) == 2
    assert "there is no command 'prun'; the commands are learn, " in capsys.readouterr().err


@pytest.mark.slow  # a process of its own
def test_the_console_program_is_installed_and_forwards():
    program = Path(sys.executable).with_name("proxsparse")
    done = subprocess.run([program, "operator", "4", "3", "2", "1"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert '"prox": [4.0, 3.0, 0.0, 0.0]' in done.stdout


@pytest.mark.slow  # two processes
def test_a_terminal_that_knows_ascii_only_and_a_reader_that_has_enough_get_no_traceback(tmp_path):
    flags = [sys.executable, "-m", "proxsparse", "plan", "--model", "meta-llama/Llama-2-7b-hf", "--gpus", "1"]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(flags, capture_output=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    command = " ".join(map(shlex.quote, flags)) + " | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, cwd=tmp_path, env=env)
    assert b"Traceback" not in done.stderr
    assert b"pipe" not in done.stderr.lower()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--report_to", "wandb", "tensorboard"], "'tensorboard' belongs to no flag: a flag takes one value"),
        (["--load_best_model_at_end", "true"], "Evaluation strategy: IntervalStrategy.NO"),
    ],
)
def test_what_transformers_refuses_is_told_to_its_end(flags, sentence, checkpoint, corpus, tmp_path, capsys):
    common = ["--model", checkpoint, "--dataset", corpus, "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    assert console(["learn", *common, *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999", "1.5", "0x1"])
def test_a_seed_that_generators_do_not_take_is_refused(seed, checkpoint, corpus, capsys):
    flags = ["--model", checkpoint, "--dataset", corpus, "--prune_method", "wanda", "--save", "out", "--seed", seed]
    assert console(["prune", *flags]) == 2
    assert "--seed: must be an integer between 0 and 4294967295, got" in capsys.readouterr().err
