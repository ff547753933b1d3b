"""Statistics over runs and episodes: vectorised NumPy functions.

Scores of several runs on several tasks are arrays (..., runs, tasks), so one call also serves a
whole stack of bootstrap resamples. The aggregates are those of Agarwal et al., "Deep Reinforcement
Learning at the Edge of the Statistical Precipice" (NeurIPS 2021) and equal those of its library
`rliable`; risk measures look at the LOWER tail of returns: larger is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
_RESAMPLED_NUMBERS = 2**22  # numbers held at a time while resampling: 32 MiB


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float

    def text(self, form: str = ".1f") -> str:
        """The value ± half the width; the value alone where the interval is unknown."""
        value, half = format(self.value, form), (self.high - self.low) / 2
        return f"{value} ± {half:{form}}" if math.isfinite(half) else value


# ---- aggregates over (..., runs, tasks) ------------------------------------------------------


def mean(scores: ArrayLike) -> Floats:
    """Mean over runs and tasks, (..., runs, tasks) -> (...)."""
    return np.asarray(np.mean(np.asarray(scores, float), axis=(-2, -1)))


def median(scores: ArrayLike) -> Floats:
    """Median over the tasks' means over runs, (..., runs, tasks) -> (...)."""
    return np.asarray(np.median(np.mean(np.asarray(scores, float), axis=-2), axis=-1))


def iqm(scores: ArrayLike) -> Floats:
    """Interquartile mean over runs and tasks together, (..., runs, tasks) -> (...).

    floor(n / 4) numbers are cut at either end, as `scipy.stats.trim_mean` and rliable do.
    """
    numbers = np.asarray(scores, float)
    numbers = numbers.reshape(*numbers.shape[:-2], -1)
    cut = numbers.shape[-1] // 4
    ranked = np.partition(numbers, [cut, numbers.shape[-1] - cut - 1], axis=-1)
    return np.asarray(ranked[..., cut : numbers.shape[-1] - cut].mean(axis=-1))


def optimality_gap(scores: ArrayLike, target: float = 100.0) -> Floats:
    """Mean shortfall from `target` (100 for D4RL scores), (..., runs, tasks) -> (...)."""
    return np.asarray(target - np.minimum(np.asarray(scores, float), target).mean(axis=(-2, -1)))


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> Floats:
    """Share of runs above each threshold, (..., runs, tasks), (K,) -> (..., K)."""
    numbers = np.asarray(scores, float)
    levels = np.asarray(thresholds, float)
    return np.asarray((numbers[..., None] > levels).mean(axis=(-3, -2)))


def probability_of_improvement(first: ArrayLike, second: ArrayLike) -> Floats:
    """P(a run of `first` beats a run of `second`) on a task drawn at random; ties count half.

    The Mann-Whitney statistic per task, averaged over tasks:
    (..., runs, tasks), (..., other runs, tasks) -> (...).
    """
    x, y = np.asarray(first, float)[..., :, None, :], np.asarray(second, float)[..., None, :, :]
    return np.asarray(((x > y) + 0.5 * (x == y)).mean(axis=(-3, -2, -1)))


# ---- risk over episode returns ---------------------------------------------------------------


def value_at_risk(returns: ArrayLike, fraction: float) -> Floats:
    """The `fraction`-quantile of the returns, (..., episodes) -> (...).

    NumPy's "inverted_cdf": the smallest return at or below which at least that share lies.
    """
    _check_fraction(fraction)
    numbers = np.asarray(returns, float)
    return np.asarray(np.quantile(numbers, fraction, axis=-1, method="inverted_cdf"))


def conditional_value_at_risk(returns: ArrayLike, fraction: float) -> Floats:
    """Mean of the ceil(fraction * episodes) worst returns, (..., episodes) -> (...).

    Rockafellar and Uryasev, "Optimization of Conditional Value-at-Risk" (2000), for equally likely
    outcomes and the lower tail.
    """
    _check_fraction(fraction)
    numbers = np.asarray(returns, float)
    # 0.1 * 30 is a little above 3
    worst = math.ceil(round(fraction * numbers.shape[-1], 9))
    return np.asarray(np.partition(numbers, worst - 1, axis=-1)[..., :worst].mean(axis=-1))


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"a fraction of the episodes lies in (0, 1], got {fraction}")


# ---- intervals -------------------------------------------------------------------------------


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean with Student's t interval; the numbers, (n,), are taken as independent.

    A single number has no interval: low and high are NaN.
    """
    numbers = np.asarray(values, float).ravel()
    centre = float(numbers.mean())
    if len(numbers) < 2:
        return Interval(centre, math.nan, math.nan)
    quantile = float(stdtrit(len(numbers) - 1, (1 + confidence) / 2))
    half = quantile * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Interval(centre, centre - half, centre + half)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Statistic,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap (Efron, 1979) over the entries of `values`, (n,).

    Args:
        values: independent numbers.
        statistic: maps (..., n) to (...), such as `partial(conditional_value_at_risk, ...)`.
        confidence: of the interval.
        resamples: draws of n numbers with replacement.
        seed: of the draws.
    """
    numbers = np.asarray(values, float).ravel()[:, None]  # n runs of one task

    def of_runs(scores: Floats) -> Floats:
        return statistic(scores[..., 0])

    return stratified_bootstrap_interval(numbers, of_runs, confidence, resamples, seed)


def paired_bootstrap_interval(
    first: ArrayLike,
    second: ArrayLike,
    statistic: Statistic,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of statistic(first) - statistic(second), pairs redrawn together.

    Args:
        first: numbers, (n,).
        second: their partners, (n,), such as returns from the same initial states.
        statistic: maps (..., n) to (...).
        confidence: of the interval.
        resamples: draws of n pairs with replacement.
        seed: of the draws.

    Raises:
        ValueError: for unequal shapes.
    """
    x, y = np.asarray(first, float), np.asarray(second, float)
    if x.shape != y.shape:
        raise ValueError(f"pairs need equal shapes, got {x.shape} and {y.shape}")

    def difference(rows: Floats) -> Floats:
        chosen = rows.astype(np.int64)
        return np.asarray(statistic(x[chosen]) - statistic(y[chosen]))

    return bootstrap_interval(np.arange(len(x)), difference, confidence, resamples, seed)


def stratified_bootstrap_interval(
    scores: ArrayLike,
    statistic: Statistic,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap that redraws the runs of every task by itself, (runs, tasks).

    The tasks are the benchmark and stay fixed; only runs are random (Agarwal et al., 2021).

    Args:
        scores: one column per task.
        statistic: maps (..., runs, tasks) to (...), such as `iqm`.
        confidence: of the interval.
        resamples: draws of a whole table.
        seed: of the draws.
    """
    table = np.asarray(scores, float)
    runs, tasks = table.shape
    generator = np.random.default_rng(seed)
    found = []
    block = max(1, _RESAMPLED_NUMBERS // table.size)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        rows = generator.integers(runs, size=(count, runs, tasks))
        found.append(statistic(np.take_along_axis(table[None], rows, axis=1)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(float(statistic(table)), float(low), float(high))
