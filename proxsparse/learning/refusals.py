"""What a setting can't be combined with: a table next to what the setting does, read before a run starts."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from proxsparse.errors import UsageError


class Refusal(NamedTuple):
    """One combination that can't work.

    Attributes:
        when: asked of the settings, or of whatever the table is about.
        sentence: what is wrong and what to do; {0.name} stands for an attribute of the same.
    """

    when: Callable[[Any], Any]
    sentence: str


def refuse(table: Iterable[Refusal], subject: Any) -> None:
    """Raises:
    UsageError: the first sentence of the table that applies.
    """
    for refusal in table:
        if refusal.when(subject):
            raise UsageError(refusal.sentence.format(subject))
