"""Errors a user can cause and mend: the command line prints them in one line, exit code 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Says what was wrong, where, and what to do about it."""


class UnsupportedSpace(UserError):
    """An agent cannot act in this observation or action space."""


class TrainingDiverged(UserError):
    """A logged value turned NaN or infinite; the last good checkpoint was kept."""


def check_fields(config: object, *rules: tuple[str, bool, str]) -> None:
    """Refuse settings of an agent whose range depends on others; fixed ranges: `Agent.limits`.

    Args:
        config: the agent's Config.
        rules: name of a field, whether its value fits, and what would.

    Raises:
        UserError: naming the first field that does not fit.
    """
    for name, fits, wanted in rules:
        if not fits:
            raise UserError(f"agent.{name} {getattr(config, name)}: give {wanted}")


def nearest(word: str, known: Iterable[str]) -> str:
    """The phrase ", did you mean 'x'?" where something close is known, else nothing."""
    match = get_close_matches(word, list(known), n=1)
    return f", did you mean {match[0]!r}?" if match else ""
