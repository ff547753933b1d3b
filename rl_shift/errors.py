"""Errors a user can cause and mend: the command line prints them in one line, exit code 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Says what was wrong, where, and what to do about it."""


class UnsupportedSpace(UserError):
    """An agent cannot act in this observation or action space."""


class TrainingDiverged(UserError):
    """A logged value turned NaN or infinite; the last good checkpoint was kept."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The phrase ", did you mean 'x'?" where something close is known, else nothing."""
    match = get_close_matches(word, list(known), n=1)
    return f", did you mean {match[0]!r}?" if match else ""
