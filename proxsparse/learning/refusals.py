"""What a setting can't be combined with: a table next to what the setting does, read before a run starts."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from proxsparse.errors import UsageError


class Refusal(NamedTuple):
    """One combination that can't work.

    Attributes:
        when: called with the settings (or another subject of the table); true where the refusal applies.
        sentence: what is wrong and what to do; {0.name} stands for an attribute of the subject.
    """

    when: Callable[[Any], Any]
    sentence: str


def refuse(table: Iterable[Refusal], subject: Any) -> None:
    """Raise the first refusal of the table that applies to the subject.

    Raises:
        UsageError: its sentence.
    """
    for refusal in table:
        if refusal.when(subject):
            raise UsageError(refusal.sentence.format(subject))
