"""Statistics of a report over the common datasets of several agents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rl_shift.metrics import (
    Interval,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap_interval,
)
from rl_shift.report_cells import Section
from rl_shift.report_runs import Floats

RESAMPLES = 2000
_RESAMPLED_NUMBERS = 2**22  # numbers held at a time while resampling: 32 MiB


@dataclass(frozen=True)
class Aggregate:
    """What the agents of a section have in common.

    Attributes:
        rows: the datasets that all labels were trained on.
        scores: per label (seeds, datasets).
        risks: likewise, of the worst episodes.
        notes: what was left out.
    """

    rows: list[str]
    scores: dict[str, Floats]
    risks: dict[str, Floats]
    notes: list[str]


def aggregate(section: Section) -> Aggregate | None:
    """Finished cells over common datasets; None without any or without a common scale.

    Agents are left out, those that share the fewest datasets first, as long as the rest has more
    cells in common for it: one agent that was run on a single dataset does not narrow the
    comparison of the others to that one. Two agents at least are kept where two share a dataset.
    """
    if section.unit == "return":
        return None
    rows = {
        label: {row for (row, other), c in section.cells.items() if other == label and c.counts}
        for label in section.labels
    }
    kept, left_out = _most_cells(rows)
    if not kept:
        return None
    common = set.intersection(*(rows[label] for label in kept))
    notes = [
        f"{label} is left out of the aggregates: it shares {len(common & rows[label])} of the "
        f"{len(common)} datasets that the rest has in common"
        for label in left_out
    ]
    order = sorted(common)
    scores, risks = {}, {}
    for label in kept:
        cells = [section.cells[row, label] for row in order]
        count = min(len(cell.seeds) for cell in cells)
        if any(len(cell.seeds) > count for cell in cells):
            notes.append(f"{label}: the first {count} seeds of every dataset, so that all count")
        scores[label] = np.stack([cell.per_seed()[:count] for cell in cells], axis=1)
        risks[label] = np.stack([cell.risk()[:count] for cell in cells], axis=1)
    return Aggregate(order, scores, risks, notes)


def _most_cells(rows: dict[str, set[str]]) -> tuple[list[str], list[str]]:
    """Labels that hold the most cells over datasets they all have, and those left out for it."""
    rest = dict(rows)
    left_out: list[str] = []
    best: tuple[int, list[str], list[str]] = (0, [], list(rows))
    while rest:
        cells = len(rest) * len(set.intersection(*rest.values()))
        if cells > best[0] and not (len(rest) == 1 and best[0]):
            best = (cells, list(rest), list(left_out))
        least = min(rest, key=lambda n: sum(len(rest[n] & other) for other in rest.values()))
        del rest[least]
        left_out.append(least)
    return best[1], best[2]


def bootstrapped(table: Floats, statistic: Callable[[Floats], Floats]) -> Interval:
    """Stratified bootstrap interval of (runs, tasks); a single run has none."""
    if len(table) < 2:
        return Interval(float(statistic(table)), np.nan, np.nan)
    return stratified_bootstrap_interval(table, statistic, resamples=RESAMPLES)


def improvement(first: Floats, second: Floats) -> Interval:
    """Probability that a run of `first` beats one of `second`; both are redrawn, task by task.

    Args:
        first: (runs, tasks).
        second: (other runs, tasks).
    """
    value = float(probability_of_improvement(first, second))
    if min(len(first), len(second)) < 2:
        return Interval(value, np.nan, np.nan)
    generator = np.random.default_rng(0)
    block = max(1, _RESAMPLED_NUMBERS // (first.size * len(second)))
    found = []
    for start in range(0, RESAMPLES, block):
        count = min(block, RESAMPLES - start)
        drawn = [_redrawn(table, count, generator) for table in (first, second)]
        found.append(probability_of_improvement(*drawn))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return Interval(value, float(low), float(high))


def profile(table: Floats, thresholds: Floats) -> tuple[Floats, Floats, Floats]:
    """Share of runs above each threshold, with the band of pointwise 95 % intervals, all (K,)."""
    share = performance_profile(table, thresholds)
    if len(table) < 2:
        return share, share, share
    generator = np.random.default_rng(0)
    block = max(1, _RESAMPLED_NUMBERS // (table.size * len(thresholds)))
    found = []
    for start in range(0, RESAMPLES, block):
        count = min(block, RESAMPLES - start)
        found.append(performance_profile(_redrawn(table, count, generator), thresholds))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975], axis=0)
    return share, low, high


def _redrawn(table: Floats, count: int, generator: np.random.Generator) -> Floats:
    rows = generator.integers(len(table), size=(count, *table.shape))
    return np.take_along_axis(table[None], rows, axis=1)
