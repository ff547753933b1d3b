"""When a shift acts: pure functions of a step count and a seed. Our design, after ns-gym's words.

A schedule maps the step t of a lane's life to alpha in [0, 1]: 0 is the environment as it is, 1 the
shifted one. Nothing is accumulated, so `alpha(t)` may be asked in any order and resumes exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_shift.envs.values import number, seed_of, whole
from rl_shift.errors import UserError, nearest
from rl_shift.seeding import numpy_generator

BLOCK = 4096  # steps of a random walk that are computed together


@dataclass(frozen=True)
class Constant:
    """The shift acts all the time."""

    def alpha(self, t: int) -> float:
        """1 at every step."""
        return 1.0


@dataclass(frozen=True)
class Once:
    """From step `start` on, for good."""

    start: int = 0

    def alpha(self, t: int) -> float:
        """0 before `start`, then 1."""
        return float(t >= self.start)


@dataclass(frozen=True)
class Step:
    """Off and on in turn, `period` steps each, off first."""

    period: int

    def alpha(self, t: int) -> float:
        """floor(t / period) mod 2."""
        return float((t // self.period) % 2)


@dataclass(frozen=True)
class Triangle:
    """There and back without a jump: alpha reaches 1 at `period` and 0 at twice that."""

    period: int

    def alpha(self, t: int) -> float:
        """Linear up, then linear down."""
        s = t % (2 * self.period)
        return s / self.period if s < self.period else 2 - s / self.period


@dataclass(frozen=True)
class Ramp:
    """Linear from 0 at `start` to 1 at `end`."""

    start: int
    end: int

    def alpha(self, t: int) -> float:
        """Exactly 0 up to `start`, exactly 1 from `end` on."""
        return min(max((t - self.start) / (self.end - self.start), 0.0), 1.0)


@dataclass(frozen=True)
class Sine:
    """(1 - cos(2 pi t / period)) / 2."""

    period: int

    def alpha(self, t: int) -> float:
        """0 at multiples of `period`, 1 half-way."""
        return 0.5 * (1 - math.cos(2 * math.pi * (t % self.period) / self.period))


@dataclass(frozen=True)
class RandomWalk:
    """A Gaussian walk from 0 with steps of `sigma`, reflected into [0, 1].

    The walk's increments come from one generator per block of steps, so any t can be asked.
    """

    sigma: float
    seed: int = 0

    def __post_init__(self) -> None:
        """An empty cache of block sums."""
        object.__setattr__(self, "_walks", {})
        object.__setattr__(self, "_starts", [0.0])

    def alpha(self, t: int) -> float:
        """The reflected walk after t steps; 0 at t = 0."""
        block, offset = divmod(t, BLOCK)
        starts: list[float] = self.__dict__["_starts"]
        while len(starts) <= block:
            starts.append(starts[-1] + float(self._block(len(starts) - 1)[-1]))
        x = starts[block] + (float(self._block(block)[offset - 1]) if offset else 0.0)
        x = x % 2.0
        return x if x <= 1 else 2 - x

    def _block(self, block: int) -> NDArray[np.float64]:
        walks: dict[int, NDArray[np.float64]] = self.__dict__["_walks"]
        if block not in walks:
            if len(walks) > 1:  # a life moves forward: the last two blocks are enough
                walks.pop(min(walks))
            steps = numpy_generator(self.seed, "random_walk", block).normal(size=BLOCK)
            walks[block] = self.sigma * steps.cumsum()
        return walks[block]


@dataclass(frozen=True)
class List:
    """Pairs (first step, alpha), each valid up to the next one; 0 before the first."""

    points: tuple[tuple[int, float], ...]

    def alpha(self, t: int) -> float:
        """The alpha of the last point that was reached."""
        return next((a for start, a in reversed(self.points) if t >= start), 0.0)


Schedule = Constant | Once | Step | Triangle | Ramp | Sine | RandomWalk | List
KINDS: dict[str, type[Schedule]] = {
    "constant": Constant, "once": Once, "step": Step, "triangle": Triangle, "ramp": Ramp,
    "sine": Sine, "random_walk": RandomWalk, "list": List,
}  # fmt: skip

IMPLIED = {
    "period": "step", "end": "ramp", "start": "once", "sigma": "random_walk", "points": "list"
}  # fmt: skip


def make_schedule(spec: Mapping[str, Any], where: str, seed: int = 0) -> Schedule:
    """A schedule from plain data such as `{"type": "step", "period": 100000}`.

    Args:
        spec: `type` and the kind's own fields. Without a type the fields decide: `period` means
            step, `start` and `end` ramp, `start` once, `sigma` random_walk, `points` list, none
            constant.
        where: named in errors.
        seed: of a random walk, unless `spec` has one.

    Raises:
        UserError: an unknown kind or field, a missing one, a number that is not finite, a fraction
            of a step, a period that is not positive, ...
    """
    values = dict(spec)
    implied = next((kind for field, kind in IMPLIED.items() if field in values), "constant")
    kind = str(values.pop("type", implied))
    if kind not in KINDS:
        raise UserError(
            f"{where}: unknown schedule {kind!r}{nearest(kind, KINDS)}; the schedules are "
            f"{', '.join(KINDS)}"
        )
    fields = dataclasses.fields(KINDS[kind])
    names = [f.name for f in fields]
    for name in values:
        if name not in names:
            raise UserError(
                f"{where}: the schedule {kind} has no field {name!r}{nearest(name, names)}; it "
                f"has {', '.join(names) or 'none'}"
            )
    for f in fields:
        if f.default is dataclasses.MISSING and f.name not in values:
            raise UserError(f"{where}: the schedule {kind} needs {f.name}")
    if kind == "random_walk":
        values.setdefault("seed", seed)
    if kind == "list":
        values["points"] = _points(values["points"], where)
    else:
        values = {name: _read(name, value, where) for name, value in values.items()}
    schedule: Schedule = KINDS[kind](**values)  # pyright: ignore[reportArgumentType]
    _check(schedule, where)
    return schedule


def _read(name: str, value: Any, where: str) -> float:
    """A field's number: steps are whole, a walk's deviation need not be."""
    if name == "sigma":
        return number(value, name, where)
    return seed_of(value, where) if name == "seed" else whole(value, name, where)


def _points(given: Any, where: str) -> tuple[tuple[int, float], ...]:
    try:
        pairs = [(t, a) for t, a in given]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: points is a list of pairs [step, alpha], such as [[0, 1], [500, 0]], not "
            f"{given!r}"
        ) from error
    return tuple((whole(t, "a step", where), number(a, "an alpha", where)) for t, a in pairs)


def _check(schedule: Schedule, where: str) -> None:
    if isinstance(schedule, Step | Triangle | Sine) and schedule.period <= 0:
        raise UserError(f"{where}: the period must be positive, not {schedule.period}")
    if isinstance(schedule, Ramp) and schedule.end <= schedule.start:
        raise UserError(f"{where}: a ramp ends after it starts, got {schedule}")
    if isinstance(schedule, Once) and schedule.start < 0:
        raise UserError(f"{where}: start must not be negative, got {schedule.start}")
    if isinstance(schedule, RandomWalk) and schedule.sigma <= 0:
        raise UserError(f"{where}: sigma must be positive, got {schedule.sigma}")
    if isinstance(schedule, List):
        starts = [start for start, _ in schedule.points]
        if not starts or sorted(set(starts)) != starts:
            raise UserError(f"{where}: the points of a list need growing steps, got {starts}")
        if any(not 0 <= a <= 1 for _, a in schedule.points):
            raise UserError(f"{where}: the alphas of a list lie in [0, 1], got {schedule.points}")
