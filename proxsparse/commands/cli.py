"""What all commands share: how they parse, how they end, and groups of arguments.

A command is two functions: ``arguments()`` builds its parser, and ``main``, wrapped by ``command``, does the work:

    @command(arguments)
    def main(args: argparse.Namespace) -> None: ...
"""

import argparse
import errno
import functools
import io
import json
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from proxsparse.errors import RunError, UsageError, task_of

DEBUG = "--debug"
DEBUG_HELP = f"{DEBUG} after any command shows the traceback of an error."
SETTING = re.compile(r"`(\w+)(?:=([^`]*))?`")  # in the library's messages
SPOKEN = {"True": "true", "False": "false"}


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs to the terminal's width, and keeps indented ones, which are commands to copy, as they are."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=30, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [p.strip("\n") for p in text.split("\n\n")]
        return "\n\n".join(p if p.startswith(" ") else textwrap.fill(p, width) for p in paragraphs if p)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """argparse, but examples in the description keep their line breaks, and ``command`` shows the errors.

    The dest of a flag is the name of the library's argument, so that messages of the library can name the flag.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, epilog=DEBUG_HELP, **kwargs)

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")

    def parse(self, argv: Sequence[str] | None) -> Any:
        """What the command's main function is given."""
        return self.parse_args(argv)


def command(arguments: Callable[[], Any]) -> Callable[[Callable[[Any], int | None]], Callable[..., int]]:
    """Make a program of a function: it parses, runs, and ends with an exit code.

    Whatever is raised becomes one sentence on stderr. Exit codes are 0: done; 1: the work failed; 2: an argument is
    wrong; 130: interrupted.

    Args:
        arguments: makes the parser.
    """

    def decorate(main: Callable[[Any], int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def program(argv: Sequence[str] | None = None) -> int:
            logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
            logging.getLogger("proxsparse").setLevel(logging.INFO)
            for stream in (sys.stdout, sys.stderr):  # a terminal that knows no such letter shows another
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(errors="replace")
            words, debug = _without_debug([_from_home(word) for word in (sys.argv[1:] if argv is None else argv)])
            parser = None
            try:
                parser = arguments()
                args = parser.parse(words)
            except SystemExit:  # --help has been shown
                raise
            except BaseException as error:
                return end(error, parser, debug)
            try:
                return main(args) or 0
            except BaseException as error:
                return end(error, parser, debug)

        program.arguments = arguments  # type: ignore[attr-defined]
        return program

    return decorate


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """Take a bare --debug out; with a value after it, it is a flag of transformers' TrainingArguments."""
    for i, word in enumerate(words):
        if word == DEBUG and (i + 1 == len(words) or words[i + 1].startswith("-")):
            return words[:i] + words[i + 1 :], True
    return words, False


def _from_home(word: str) -> str:
    """Paths from ~, in full: shells leave them as they are in --to=~/pruned and wiki:2,~/mine:1."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + ",".join(os.path.expanduser(p) if p.startswith("~/") else p for p in value.split(","))


def end(error: BaseException, parser: argparse.ArgumentParser | None = None, debug: bool = False) -> int:
    """Print one sentence for an error, the traceback before it with --debug, and give the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):  # whoever read the output has enough of it, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    if isinstance(error, KeyboardInterrupt):
        print("interrupted. The same command again goes on where it can.", file=sys.stderr)
        return 130
    print(f"error: {with_flags(sentence(error, parser), parser)}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def sentence(error: BaseException, parser: argparse.ArgumentParser | None = None) -> str:
    """One sentence for anything that was raised; settings in backquotes, see ``with_flags``.

    A message that does not name its argument gets the flag in front, where the parser has one.
    """
    text = " ".join(str(error).split())
    if isinstance(error, UsageError):
        argument = error.argument
        if argument is None or f"`{argument}" in text or (parser is not None and _action(parser, argument) is None):
            return text
        return f"`{argument}`: {text[:1].lower() if text[1:2].islower() else text[:1]}{text[1:]}"
    if isinstance(error, RunError):
        return text
    task = task_of(error)
    return _reason(error) + (f" This happened while {task}." if task else "")


def _reason(error: BaseException) -> str:
    """What an error of another library or of the operating system means."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    full = "No space left" in text or "os error 28" in text
    if isinstance(error, OSError) or full:
        return describe_os_error(OSError(errno.ENOSPC, "") if full and not isinstance(error, OSError) else error)  # type: ignore[arg-type]
    if kind == "SafetensorError":
        return f"A safetensors file is damaged or unreadable: {text}."
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return (
            "The memory is used up: lower `batch_size` or `ctx_len`, or use `dtype=bfloat16`. Where you learn, "
            "`activation_checkpointing=True`, `keep_base=checkpoint`, `optim_in_backward=True` and "
            "`offload_learned=True` save memory too; proxsparse plan computes how much."
        )
    if isinstance(error, ImportError):
        package = error.name.partition(".")[0] if error.name else None
        named = f"The package {package} is needed and can't be imported here" if package else "A package is missing"
        return f"{named} ({_first(text, 200) or kind}): install it, for example with pip."
    if isinstance(error, RuntimeError) and re.search(r"same (scalar |d)type|BFloat16", text):
        return f"The model's code mixes precisions ({_first(text, 200)}): try `bf16=False`, or `dtype=float32`."
    return f"{kind}: {_first(text, 300) or 'without a message'} (`debug=True` shows where)."


def _first(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


def describe_os_error(error: OSError) -> str:
    """One sentence for a full disk, a missing right, or another refusal by the operating system."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and (cache := _cache_of(str(error.filename or ""))):
        return f"The cache can't be written{where}: set {cache} to a folder that you can write to."
    match type(error).__name__, error.errno:
        case _, errno.ENOSPC:
            return f"The disk is full{where}: free some space or choose another output folder, then start again."
        case "PermissionError", _:
            return f"No permission to read or write{where}: choose another folder or change its permissions."
        case _, errno.EROFS:
            return f"The file system is read-only{where}: choose another output folder."
        case _, errno.ENOENT if where:
            return f"There is no such file or folder{where}, or it can't be made: choose another one."
    return f"{' '.join(str(error.strerror or error).split()).rstrip('.') or type(error).__name__}{where}."


def _cache_of(path: str) -> str | None:
    """The variable that says where the cache lies to which a path belongs; None: it belongs to none."""
    home = os.path.expanduser("~/.cache")
    caches = {
        "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR"),
        "HF_HOME": os.environ.get("HF_HOME") or os.path.join(home, "huggingface"),
        "HF_DATASETS_CACHE": os.environ.get("HF_DATASETS_CACHE"),
        "HF_HUB_CACHE": os.environ.get("HF_HUB_CACHE"),
        "XDG_CACHE_HOME (and HF_HOME)": os.environ.get("XDG_CACHE_HOME") or home,
    }
    return next((name for name, folder in caches.items() if folder and path.startswith(folder)), None)


def with_flags(message: str, parser: argparse.ArgumentParser | None) -> str:
    """A message of the library with the settings in backquotes as flags of the parser that the user called."""

    def flag(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        action = _action(parser, name)
        option = DEBUG if name == "debug" else action and max(action.option_strings, key=_named_as(name))
        if not option:
            return name if value is None else f"{name} {SPOKEN.get(value, value)}"
        if value is None or name == "debug" or (action is not None and action.nargs == 0):
            return option
        value = SPOKEN.get(value, value)
        return f"{option} '{value}'" if re.search(r"[^\w./:,-]", value) else f"{option} {value}"

    return SETTING.sub(flag, message)


def _action(parser: argparse.ArgumentParser | None, name: str) -> argparse.Action | None:
    found = [] if parser is None else [a for a in parser._actions if a.dest == name and a.option_strings]
    return found[0] if found else None


def _named_as(name: str) -> Callable[[str], tuple[bool, bool]]:
    """Of several spellings of a flag: the one with the argument's name, else the first long one."""
    return lambda option: (option == f"--{name}", option.startswith("--"))


def print_json(record: dict[str, Any]) -> None:
    """The machine-readable last line of a command."""
    print(json.dumps(record), flush=True)


def positive_int(text: str) -> int:
    """An integer >= 1, for argparse."""
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return value


def file_to_write(text: str) -> str:
    """The name of a file that can be written or replaced, for argparse: said before the work, not after it."""
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"is the name of a file, and {text} is a folder: name a file")
    return text


def seed(text: str) -> int:
    """An integer that every generator takes as its seed, for argparse."""
    value = int(text) if text.isdigit() else -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer between 0 and 4294967295, got {text!r}")
    return value


def batch_size(text: str) -> int | None:
    """An integer >= 1, or None for 'auto', for argparse."""
    return None if text == "auto" else positive_int(text)
