"""How commands end: one sentence for anything that was raised, with the flags of the parser that the user called."""

import argparse
import errno
import importlib
import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from proxsparse.__main__ import main as console
from proxsparse.commands.cli import Parser, command, describe_os_error, with_flags
from proxsparse.errors import RunError, UsageError, doing, settings_at_fault


class Panic(BaseException):
    """What a library in Rust raises."""


RAISED = [
    ImportError("No module named 'flash_attn'", name="flash_attn"),
    ModuleNotFoundError("No module named 'tiktoken.load'", name="tiktoken.load"),
    ValueError("bad\nvalue"),
    StopIteration(),
    IndexError("list index out of range"),
    OverflowError("math range error"),
    AttributeError("'X' object has no attribute 'y'"),
    KeyError("layers"),
    TypeError("unsupported"),
    RuntimeError("size mismatch"),
    AssertionError(),
    ZeroDivisionError("division by zero"),
    NotImplementedError("flash"),
    RecursionError("maximum recursion depth exceeded"),
    MemoryError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    json.JSONDecodeError("Expecting value", "{", 1),
    EOFError(),
    SafetensorError("header too large"),
    SafetensorError("I/O error: No space left on device (os error 28)"),
    PermissionError(errno.EACCES, "Permission denied", "/some/file"),
    OSError(errno.EROFS, "Read-only file system", "/some/file"),
    ConnectionError("refused"),
    TimeoutError("timed out"),
    torch.OutOfMemoryError("CUDA out of memory"),
    pickle.UnpicklingError("invalid load key"),
    zipfile.BadZipFile("not a zip file"),
    Exception(),
    Panic("called `Option::unwrap()` on a `None` value"),
    SystemExit("a library wants to leave"),
    GeneratorExit(),
]
PLACES = {
    "loading": "proxsparse.model.loading.AutoModelForCausalLM.from_pretrained",
    "reading": "proxsparse.commands.learn.calibration_windows",
    "learning": "proxsparse.learning.losses._Distillation.forward",
    "saving": "proxsparse.learning.folder.save_mask",
}


def small_parser():
    parser = Parser()
    parser.add_argument("--nsamples", dest="samples", type=int)
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--dtype")
    return parser


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_anything_that_is_raised_is_one_sentence(error, capsys):
    vars(error).pop("__proxsparse_task__", None)  # of another test

    @command(small_parser)
    def program(args):
        with doing("loading the model X"):
            raise error

    assert program([]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert "Traceback" not in printed
    assert "while loading the model X" in printed


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", RAISED[:6] + RAISED[-3:-1], ids=lambda error: type(error).__name__)
def test_nothing_escapes_from_the_inside_of_learning(place, error, checkpoint, corpus, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(PLACES[place], fail)
    flags = ["--model", checkpoint, "--dataset", corpus, "--ctx_len", "32", "--samples", "2", "--use_cpu", "true"]
    assert console(["learn", *flags, "--bf16", "false", "--output_dir", str(tmp_path / "run")]) == 1
    sentences = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    assert not (tmp_path / "run" / "mask.safetensors").exists()


def test_debug_shows_where(capsys):
    @command(small_parser)
    def program(args):
        raise ValueError("deep inside")

    assert program(["--debug"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert 'raise ValueError("deep inside")' in printed
    assert "error: ValueError: deep inside" in printed


def test_an_interruption_is_no_failure_of_the_program(capsys):
    @command(small_parser)
    def program(args):
        raise KeyboardInterrupt

    assert program([]) == 130
    assert capsys.readouterr().err.startswith("interrupted")


def test_settings_in_a_message_become_the_flags_of_the_parser_that_was_called():
    parser = small_parser()
    assert with_flags("`samples` must be at least 1", parser) == "--nsamples must be at least 1"
    assert with_flags("pass `trust_remote_code=True`", parser) == "pass --trust_remote_code"
    assert with_flags("use `dtype=bfloat16`", parser) == "use --dtype bfloat16"
    assert with_flags("lower `ctx_len`", parser) == "lower ctx_len"
    assert with_flags("give `train_only_pruned=True`", parser) == "give train_only_pruned true"
    assert with_flags("use `dtype=a b`", parser) == "use --dtype 'a b'"


@pytest.mark.parametrize(
    ("error", "shown", "code"),
    [
        (UsageError("There is no folder x.", "dtype"), "error: --dtype: there is no folder x.\n", 2),
        (UsageError("`dtype` must be small.", "dtype"), "error: --dtype must be small.\n", 2),
        (UsageError("There is no folder x.", "model"), "error: There is no folder x.\n", 2),
        (UsageError("A text."), "error: A text.\n", 2),
        (RunError("Lower `samples`."), "error: Lower --nsamples.\n", 1),
    ],
)
def test_errors_of_the_library_name_their_flag_once(error, shown, code, capsys):
    @command(small_parser)
    def program(args):
        raise error

    assert program([]) == code
    assert capsys.readouterr().err == shown


def test_a_baseline_without_samples_is_answered_with_its_own_flag(checkpoint, corpus, capsys):
    flags = ["--model", checkpoint, "--dataset", corpus, "--ctx_len", "32", "--prune_method", "wanda", "--save", "x"]
    assert console(["prune", *flags, "--nsamples", "100000"]) == 2
    assert "but --nsamples is 100000" in capsys.readouterr().err


def test_the_check_names_the_flag_whose_folder_is_not_there(checkpoint, capsys):
    assert console(["check", "--model", checkpoint, "--base", "/none"]) == 2
    assert capsys.readouterr().err.startswith("error: --base")


@pytest.mark.parametrize("name", [p.stem for p in (Path("proxsparse/commands")).glob("*.py")])
def test_help_fits_eighty_columns(name, monkeypatch, capsys):
    module = importlib.import_module(f"proxsparse.commands.{name}")
    if not hasattr(module, "main"):
        pytest.skip("no command")
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert not [line for line in shown.splitlines() if len(line) > 80]
    assert "default: None" not in shown
    assert "python " in shown


def test_a_python_caller_reads_a_sentence_without_flags():
    parser = argparse.ArgumentParser()
    assert "--" not in with_flags("`samples` must be at least 1", parser)


def test_a_path_from_home_is_one_where_the_shell_leaves_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    given = []

    @command(small_parser)
    def program(args):
        given.append(args.dtype)

    for words in (["--dtype=~/a b"], ["--dtype", "~/a b"], ["--dtype=a~/b"], ["--dtype", "~x"]):
        assert program(words) == 0
    for text in ("~/a:2,~/b", "/x:2,~/b", "wiki:2,~/b:1"):
        assert program(["--dtype", text]) == 0
    assert given == [
        f"{tmp_path}/a b", f"{tmp_path}/a b", "a~/b", "~x", f"{tmp_path}/a:2,{tmp_path}/b", f"/x:2,{tmp_path}/b",
        f"wiki:2,{tmp_path}/b:1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "inside"),
    [
        ("HF_HOME", "hub/models--a--b"),
        ("HF_DATASETS_CACHE", "x.arrow"),
        ("XDG_CACHE_HOME", "y"),
        ("NUMBA_CACHE_DIR", "z"),
    ],
)
def test_a_cache_that_can_not_be_written_to_is_named_with_its_variable(variable, inside, monkeypatch):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "/read-only/cache")
    found = describe_os_error(OSError(errno.EROFS, "Read-only file system", f"/read-only/cache/{inside}"))
    assert found.startswith(f"The cache can't be written (/read-only/cache/{inside}): set {variable}")


def test_a_folder_that_can_not_be_made_is_one_sentence():
    raised = FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/a")
    assert describe_os_error(raised).startswith("There is no such file or folder (/proc/a), or it can't be made")
    with pytest.raises(UsageError, match=r"^No such file or directory: '/proc/a'\.$"), settings_at_fault():
        raise raised


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_a_full_disk_under_the_output_is_one_sentence(words, monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    assert console(words) == 1
    assert capsys.readouterr().err.startswith("error: The disk is full")
