"""Metrics of a life whose environment shifts, on extrinsic reward. Our design.

A life is a series of points: mean reward per environment step over `steps` steps each. Phases are
the stretches between two shifts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rl_shift.life import phases

Floats = NDArray[np.float64]
WINDOW = 1000  # env steps of the moving average that decides about recovery


@dataclass(frozen=True)
class Recovery:
    """What one shift did.

    Attributes:
        start: environment step of the shift.
        before: mean reward over the last tenth of the phase before (at least 1,000 steps).
        drop: `before` minus the mean over the first tenth of the new phase.
        steps: until the moving average over 1,000 steps reaches the mark, which lies wholly inside
            the new phase; the phase's length where it never does.
        censored: it never did.
        rule: "90%" of `before`, or "reference" + 90 % of the distance to it where `before` is not
            positive.
    """

    start: int
    before: float
    drop: float
    steps: int
    censored: bool
    rule: str


def lifetime(reward: ArrayLike) -> float:
    """Mean extrinsic reward per environment step over the whole life."""
    return float(np.mean(np.asarray(reward, np.float64)))


def moving_average(reward: ArrayLike, steps: int, window: int) -> Floats:
    """Mean over the last `window` environment steps at every point, (T,) -> (T,).

    The first points, before a whole window, average what there is.
    """
    values = np.asarray(reward, np.float64)
    width = max(round(window / steps), 1)
    total = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return np.asarray((total[ends] - total[starts]) / (ends - starts))


def phase_means(reward: ArrayLike, regime: ArrayLike) -> Floats:
    """Mean reward of every phase, in order."""
    values = np.asarray(reward, np.float64)
    return np.array([values[a:b].mean() for a, b in phases(np.asarray(regime, np.int64))])


def recoveries(
    reward: ArrayLike,
    regime: ArrayLike,
    steps: int,
    reference: Callable[[int], float] = lambda regime: 0.0,
) -> list[Recovery]:
    """One entry per shift.

    Args:
        reward: (T,) mean rewards of the points.
        regime: (T,) regimes of the points.
        steps: environment steps per point.
        reference: regime -> mean reward of a random policy in it; asked after phases that earned
            nothing.
    """
    values, found = np.asarray(reward, np.float64), []
    regimes = np.asarray(regime, np.int64)
    spans = phases(regimes)
    least = max(round(WINDOW / steps), 1)
    for (a, b), (c, d) in zip(spans[:-1], spans[1:], strict=True):
        before = float(values[max(b - max((b - a) // 10, least), a) : b].mean())
        early = float(values[c : c + max((d - c) // 10, 1)].mean())
        positive = before > 0
        floor = 0.0 if positive else reference(int(regimes[c]))
        mark = floor + 0.9 * (before - floor)
        inside = moving_average(values[c:d], steps, WINDOW)[least - 1 :]
        reached = np.flatnonzero(inside >= mark)
        censored = len(reached) == 0
        after = (d - c) if censored else int(reached[0]) + least
        found.append(
            Recovery(
                start=c * steps,
                before=before,
                drop=before - early,
                steps=after * steps,
                censored=censored,
                rule="90%" if positive else "reference",
            )
        )
    return found
