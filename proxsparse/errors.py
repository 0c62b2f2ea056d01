"""The two errors a user of the commands can meet, and how a command ends on them."""

import functools
import logging
import sys
from collections.abc import Callable

import torch
from safetensors import SafetensorError

try:  # the Hub's client brings the one or the other, by its version
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef]

UNREACHABLE = (httpx.HTTPError,)  # what it raises where it gets no answer; this is no OSError


class UsageError(ValueError):
    """An argument is wrong: exit code 2. The message names the argument, what was found and what is accepted."""


class RunError(RuntimeError):
    """The work failed for a reason outside the arguments: exit code 1. The message says what to do."""


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Make ``main`` end with one sentence and the right exit code where a user's mistake would give a traceback."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("proxsparse").setLevel(logging.INFO)
        try:
            return main(*args, **kwargs) or 0
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except OSError as error:
            print(f"error: {describe_os_error(error)}", file=sys.stderr)
            return 1
        except SafetensorError as error:
            full = "No space left" in str(error) or "os error 28" in str(error)
            what = (
                describe_os_error(OSError(28, "")) if full else f"A safetensors file is damaged or unreadable: {error}"
            )
            print(f"error: {what}", file=sys.stderr)
            return 1
        except torch.OutOfMemoryError:
            print(
                "error: The device's memory is used up: lower --batch_size or --ctx_len, use --dtype bfloat16, or "
                "--activation_checkpointing true where you learn.",
                file=sys.stderr,
            )
            return 1
        except KeyboardInterrupt:
            print("interrupted. Learning goes on from its last checkpoint when started again.", file=sys.stderr)
            return 130

    return wrapped


def describe_os_error(error: OSError) -> str:
    """One sentence for a full disk, a missing right, or another refusal by the operating system."""
    where = f" ({error.filename})" if error.filename else ""
    match type(error).__name__, error.errno:
        case _, 28:
            return f"The disk is full{where}: free some space or choose another output folder, then start again."
        case "PermissionError", _:
            return f"No right to read or write{where}: choose another folder or change its permissions."
        case _, 30:
            return f"The file system is read-only{where}: choose another output folder."
    return f"{error.strerror or error}{where}."
