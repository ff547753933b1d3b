"""What a sequence of tasks is judged by; every number comes from long-form evaluation rows.

`a[i, j]` is the score in task j after training task i. Arrays are (..., K, K) with leading axes for
seeds, so that one call serves all seeds and bootstrap resamples. Names that several papers use
differently carry their variant. Sources: Lopez-Paz and Ranzato, "Gradient Episodic Memory" (2017);
Wolczyk et al., "Continual World" (2021); De Lange et al., "Continual evaluation for lifelong
learning" (2023), whose reference code misses the largest plasticity gains: here both searches keep
a running extreme.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from rl_shift.metrics import Floats, Interval


class Row(NamedTuple):
    """One evaluation of one seed: `score` in `eval_task` after `step` updates of the whole run."""

    step: int
    train_task: int
    eval_task: int
    seed: int
    score: float


# ---- the task matrix ---------------------------------------------------------------------------


def task_matrix(rows: Iterable[Row], average: int = 1) -> Floats:
    """a[s, i, j], (seeds, K, K): the mean of the last `average` evaluations; NaN where none was.

    Continual World takes the mean of the last 5 evaluations of a stage.
    """
    series: dict[tuple[int, int, int], list[tuple[int, float]]] = {}
    for row in rows:
        key = (row.seed, row.train_task, row.eval_task)
        points = series.setdefault(key, [])
        if points and points[-1][0] == row.step:
            points.pop()  # evaluated again at the same step: what counts is the later one
        points.append((row.step, row.score))
    seeds = sorted({seed for seed, _, _ in series})
    size = 1 + max((max(i, j) for _, i, j in series), default=-1)
    matrix = np.full((len(seeds), size, size), np.nan)
    for (seed, i, j), points in series.items():
        matrix[seeds.index(seed), i, j] = np.mean([score for _, score in points[-average:]])
    return matrix


def average_performance(matrix: ArrayLike) -> Floats:
    """PER: mean over all tasks after the last one, (..., K, K) -> (...)."""
    return np.asarray(np.asarray(matrix, float)[..., -1, :].mean(axis=-1))


def backward_transfer(matrix: ArrayLike) -> Floats:
    """BWT: mean over all tasks but the last of a[K, j] - a[j, j]; negative means forgetting."""
    a = np.asarray(matrix, float)
    own = np.diagonal(a, axis1=-2, axis2=-1)
    if a.shape[-1] < 2:
        return np.zeros(a.shape[:-2])
    return np.asarray((a[..., -1, :-1] - own[..., :-1]).mean(axis=-1))


def forgetting_continual_world(matrix: ArrayLike) -> Floats:
    """Mean over ALL tasks of a[j, j] - a[K, j]: -(K - 1) / K times BWT."""
    a = np.asarray(matrix, float)
    return np.asarray((np.diagonal(a, axis1=-2, axis2=-1) - a[..., -1, :]).mean(axis=-1))


def forward_transfer_zero_shot(matrix: ArrayLike, initial: ArrayLike) -> Floats:
    """Mean over tasks but the first of a[i - 1, i] - initial[i]: what earlier tasks taught.

    Args:
        matrix: (..., K, K) with the entries above the diagonal.
        initial: (..., K) scores before any training.
    """
    a, start = np.asarray(matrix, float), np.asarray(initial, float)
    before = np.diagonal(a, offset=1, axis1=-2, axis2=-1)
    return np.asarray((before - start[..., 1:]).mean(axis=-1))


def forward_transfer_continual_world(
    areas: ArrayLike, reference_areas: ArrayLike, best: float = 1.0
) -> Floats:
    """Mean over tasks of (AUC - AUC_b) / (best - AUC_b); AUC is a mean score over a task's time.

    Args:
        areas: (..., K), see `areas_under_curves`; Continual World passes means over the seeds.
        reference_areas: likewise, of runs that learn each task alone from scratch.
        best: the score of full success: 1 for success rates, 100 for normalised scores.
    """
    own, alone = np.asarray(areas, float), np.asarray(reference_areas, float)
    return np.asarray(((own - alone) / (best - alone)).mean(axis=-1))


def areas_under_curves(rows: Iterable[Row]) -> Floats:
    """(seeds, K) mean score of every task over its own training."""
    return _own_scores(rows, lambda scores: float(np.mean(scores)))


def learning_curve_area(rows: Iterable[Row], first: int) -> Floats:
    """LCA: (seeds, K) mean score over the first evaluations of each task's own training."""
    return _own_scores(rows, lambda scores: float(np.mean(scores[:first])))


def _own_scores(rows: Iterable[Row], reduce: Callable[[list[float]], float]) -> Floats:
    found: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row.train_task == row.eval_task:
            found.setdefault((row.seed, row.eval_task), []).append(row.score)
    seeds, tasks = sorted({s for s, _ in found}), sorted({j for _, j in found})
    return np.array([[reduce(found[s, j]) for j in tasks] for s in seeds])


# ---- the stability gap -------------------------------------------------------------------------


def min_acc(rows: Sequence[Row], smoothed: bool = False) -> Floats:
    """min-ACC: (seeds,) mean over old tasks of the lowest score since their training ended.

    Args:
        rows: of a whole run; the task of the last row is the current one.
        smoothed: take the minimum of medians of 3 evaluations: a minimum over noisy points mostly
            measures noise.
    """
    return _over_seeds(rows, lambda own: _min_acc(own, smoothed))


def wc_acc(rows: Sequence[Row], smoothed: bool = False) -> Floats:
    """WC-ACC: (seeds,) a[k, k] / k + (1 - 1 / k) min-ACC, at the last evaluation."""

    def one(own: Sequence[Row]) -> float:
        tasks = own[-1].train_task + 1
        current = _series(own, tasks - 1)[-1].score
        if tasks == 1:
            return current
        return current / tasks + (1 - 1 / tasks) * _min_acc(own, smoothed)

    return _over_seeds(rows, one)


def _min_acc(rows: Sequence[Row], smoothed: bool) -> float:
    lowest = []
    for task in range(rows[-1].train_task):
        later = [row.score for row in _series(rows, task) if row.train_task > task]
        if smoothed and len(later) >= 3:
            later = [float(np.median(later[k : k + 3])) for k in range(len(later) - 2)]
        lowest.append(min(later, default=np.nan))
    return float(np.mean(lowest)) if lowest else float("nan")


def windowed_gain(scores: Iterable[float], window: int) -> float:
    """Largest a[n] - a[m], m < n, both inside `window` consecutive evaluations; O(n).

    -inf where there is no pair.
    """
    queue: deque[tuple[int, float]] = deque()  # candidates for m, values increasing
    best = float("-inf")
    for n, score in enumerate(scores):
        while queue and queue[0][0] <= n - window:
            queue.popleft()
        if queue:
            best = max(best, score - queue[0][1])
        while queue and queue[-1][1] >= score:
            queue.pop()
        queue.append((n, score))
    return best


def windowed_plasticity(rows: Sequence[Row], window: int) -> Floats:
    """WP^w: (seeds,) mean over tasks of the largest gain within `window` evaluations."""
    return _over_seeds(rows, lambda own: _windowed(own, window, 1.0))


def windowed_forgetting(rows: Sequence[Row], window: int) -> Floats:
    """WF^w: (seeds,) mean over tasks of the largest drop within `window` evaluations."""
    return _over_seeds(rows, lambda own: _windowed(own, window, -1.0))


def _windowed(rows: Sequence[Row], window: int, sign: float) -> float:
    tasks = sorted({row.eval_task for row in rows})
    gains = [windowed_gain((sign * r.score for r in _series(rows, j)), window) for j in tasks]
    found = [gain for gain in gains if np.isfinite(gain)]
    return float(np.mean(found)) if found else float("nan")


def _series(rows: Sequence[Row], task: int) -> list[Row]:
    """Evaluations of one task in order; one that repeats a step takes the place of the earlier."""
    series: list[Row] = []
    for row in rows:
        if row.eval_task == task:
            if series and series[-1][:2] == row[:2]:
                series.pop()
            series.append(row)
    return series


def _over_seeds(rows: Sequence[Row], one: Callable[[Sequence[Row]], float]) -> Floats:
    seeds = sorted({row.seed for row in rows})
    return np.array([one([row for row in rows if row.seed == seed]) for seed in seeds])


# ---- intervals and tables ----------------------------------------------------------------------


def seed_interval(
    values: ArrayLike,
    statistic: Callable[[Floats], Floats] = lambda a: np.asarray(a.mean(axis=0)),
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over seeds, which stay whole: (seeds, ...) -> an interval.

    Args:
        values: one entry per seed: a metric, a task matrix or a row of areas.
        statistic: (seeds, ...) -> (), such as forward transfer on means over the seeds.
        confidence: of the interval; Continual World prints 0.90.
        resamples: draws of all seeds with replacement.
        seed: of the draws.
    """
    numbers = np.asarray(values, float)
    draws = np.random.default_rng(seed).integers(len(numbers), size=(resamples, len(numbers)))
    found = [float(statistic(numbers[draw])) for draw in draws]
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(float(statistic(numbers)), float(low), float(high))


def summary(rows: Sequence[Row], window: int = 10) -> dict[str, Floats]:
    """(seeds,) of every metric that the rows of one run allow, by the name of its variant."""
    matrix = task_matrix(rows)
    found = {
        "PER": average_performance(matrix),
        "BWT": backward_transfer(matrix),
        "forgetting (Continual World)": forgetting_continual_world(matrix),
    }
    if matrix.shape[-1] > 1:
        found |= {
            "min-ACC": min_acc(rows),
            "min-ACC (3-point medians)": min_acc(rows, smoothed=True),
            "WC-ACC": wc_acc(rows),
            f"WF^{window}": windowed_forgetting(rows, window),
            f"WP^{window}": windowed_plasticity(rows, window),
        }
    return found
