"""The two errors that a user can meet, and what was being done when something else went wrong.

Messages are written for Python callers and name settings in backquotes: `samples`, or `train_only_pruned=True` with the
value to give. The command line turns them into the flags of the parser that the user called: --samples, or --nsamples.
"""

import contextlib
from collections.abc import Iterator


class UsageError(ValueError):
    """An argument is wrong: exit code 2. The message says what was found and what is accepted.

    Attributes:
        argument: name of the argument in Python, or None where the message names the ones that matter.
    """

    def __init__(self, message: str, argument: str | None = None):
        super().__init__(message)
        self.argument = argument


class RunError(RuntimeError):
    """The work failed for a reason outside the arguments: exit code 1. The message says what to do."""


def check_switches(**settings: object) -> None:
    """Refuse what is neither True nor False; "no" counts as true in Python.

    Raises:
        UsageError: names the setting.
    """
    for name, value in settings.items():
        if value not in (True, False):
            raise UsageError(f"`{name}` must be True or False; got {value!r}.")


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what is being done inside the block, as 'loading the model X', for whoever catches what is raised there."""
    try:
        yield
    except BaseException as error:
        if task_of(error) is None:  # the innermost task says most
            error.__proxsparse_task__ = what  # type: ignore[attr-defined]
        raise


def task_of(error: BaseException) -> str | None:
    """What was being done when this was raised, or None."""
    return getattr(error, "__proxsparse_task__", None)


@contextlib.contextmanager
def settings_at_fault() -> Iterator[None]:
    """What transformers and TRL raise while they read the settings of a run is an argument's fault.

    Raises:
        UsageError: with the beginning of theirs.
    """
    try:
        yield
    except (UsageError, RunError):
        raise
    except (ValueError, TypeError, KeyError, ImportError, FileNotFoundError) as error:
        said = " ".join(str(error).split()) or type(error).__name__  # the reason may follow in other lines
        if isinstance(error, OSError) and error.filename:
            said = f"{error.strerror}: {error.filename!r}"
        said = said if len(said) <= 300 else said[:300].rsplit(" ", 1)[0] + " ..."
        raise UsageError(f"{said.rstrip('.')}.") from error
