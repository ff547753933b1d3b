"""What the numbers of a shift's specification may be: finite, whole, positive. Our design.

Values come as text from the command line and as plain data from files; every refusal names the
shift and its field.
"""

from __future__ import annotations

import math
from typing import Any

from rl_shift.errors import UserError


def number(
    value: Any, name: str, where: str, least: float = -math.inf, above: float = -math.inf
) -> float:
    """A finite number.

    Args:
        value: a number, or a text of one.
        name: of the field, for errors.
        where: named first in errors.
        least: the smallest number that means something.
        above: what it must exceed.

    Raises:
        UserError: no number, an infinite one, NaN, or one that is too small.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{where}: {name} must be a finite number, not {value!r}")
    if found < least:
        raise UserError(f"{where}: {name} must be at least {least:g}, not {value}")
    if found <= above:
        raise UserError(f"{where}: {name} must be more than {above:g}, not {value}")
    return found


def whole(value: Any, name: str, where: str, least: float = -math.inf) -> int:
    """A whole number; 1e5 and 3.0 are whole, 2.7 is not.

    Raises:
        UserError: what `number` raises, or a fraction.
    """
    found = number(value, name, where, least)
    if not found.is_integer():
        raise UserError(f"{where}: {name} must be a whole number, not {value!r}")
    return value if isinstance(value, int) else int(found)


def seed_of(value: Any, where: str) -> int:
    """A seed as `rl_shift.seeding` takes them: a whole number in [0, 2**64).

    Raises:
        UserError: anything else.
    """
    found = whole(value, "seed", where, least=0)
    if found >= 2**64:
        raise UserError(f"{where}: seed must be less than 2**64, not {value}")
    return found


def listed(value: Any) -> list[Any]:
    """A list as it is, a single value as a list of one."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]
