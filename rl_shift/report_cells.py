"""What a report averages: runs of one agent on one dataset, or on one sequence of tasks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rl_shift.evaluation import normalized_score
from rl_shift.metrics import Interval, conditional_value_at_risk, mean_interval
from rl_shift.report_runs import Episodes, Floats, Leg, Run

CVAR = 0.1  # share of the worst episodes


@dataclass(frozen=True)
class Cell:
    """All runs of one agent on one dataset.

    Attributes:
        label: the agent, with the settings that set it apart from other variants of it.
        row: title of the dataset's row.
        runs: one or several, with seeds of their own.
        refused: why the runs are not averaged; "" if they are.
    """

    label: str
    row: str
    runs: tuple[Run, ...]
    refused: str = ""

    @property
    def leg(self) -> Leg:
        """The task."""
        return self.runs[0].legs[0]

    @property
    def finished(self) -> bool:
        """Whether every run has spent its budget and no seed is missing."""
        return all(run.status == "finished" and not run.errors for run in self.runs)

    @property
    def standing(self) -> str:
        """How far the runs are."""
        return "; ".join(dict.fromkeys(run.standing for run in self.runs))

    @property
    def counts(self) -> bool:
        """Whether it goes into aggregates."""
        return self.finished and not self.refused

    @property
    def seeds(self) -> list[int]:
        """Of all runs."""
        return [seed for run in self.runs for seed in run.seeds]

    @property
    def last(self) -> list[Episodes]:
        """Per run the evaluation of the policy as it was left."""
        return [last_of(run) for run in self.runs]

    def scores(self) -> Floats:
        """(S, E) scores of the episodes of the last policies."""
        return np.concatenate([scored(self.leg, e.returns) for e in self.last])

    def per_seed(self) -> Floats:
        """(S,) mean scores of the last policies."""
        return np.asarray(self.scores().mean(axis=1))

    def risk(self) -> Floats:
        """(S,) mean scores of the worst episodes."""
        return conditional_value_at_risk(self.scores(), CVAR)

    def interval(self) -> Interval:
        """Mean over the seeds with Student's t interval."""
        return mean_interval(self.per_seed())

    def curve(self) -> tuple[list[int], Floats]:
        """Where all runs were evaluated while they trained, and (P, S) mean scores there."""
        runs = [{_moment(e): e for e in run.evaluations} for run in self.runs]
        points = [p for p in runs[0] if all(p in run for run in runs)]
        axis = int(any(steps for _, steps in points))
        rows = [
            np.concatenate([scored(self.leg, run[p].returns).mean(axis=1) for run in runs])
            for p in points
        ]
        return [p[axis] for p in points], np.array(rows).reshape(len(points), len(self.seeds))

    def best(self) -> float | None:
        """The highest mean over the seeds of all evaluations while training."""
        _, scores = self.curve()
        return float(scores.mean(axis=1).max()) if len(scores) else None


@dataclass(frozen=True)
class Chain:
    """All runs of one agent on one sequence of tasks.

    Attributes:
        label: the agent.
        runs: one or several, with seeds of their own.
        refused: why the runs are not averaged; "" if they are.
    """

    label: str
    runs: tuple[Run, ...]
    refused: str = ""

    @property
    def normalised(self) -> bool:
        """Whether every task has a score, not only a return."""
        return all(leg.reference_scores is not None for leg in self.runs[0].legs)

    def matrix(self) -> Floats:
        """(K, K, S): after training task i, the mean score in task j; NaN where not evaluated."""
        legs = self.runs[0].legs
        parts = []
        for run in self.runs:
            part = np.full((len(legs), len(legs), len(run.seeds)), np.nan)
            for e in run.evaluations:  # later evaluations take the place of earlier ones
                numbers = scored(legs[e.task], e.returns) if self.normalised else e.returns
                part[e.during, e.task] = numbers.mean(axis=1)
            parts.append(part)
        return np.concatenate(parts, axis=-1)


@dataclass
class Section:
    """Cells whose scores mean the same: data of one origin, on one scale.

    Attributes:
        origin: of the data.
        unit: of the scores.
        cells: by row and label.
        data: the score of each row's data, where it is known.
    """

    origin: str
    unit: str
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    data: dict[str, float] = field(default_factory=dict)

    @property
    def regenerated(self) -> bool:
        """Whether the data may look like D4RL's and are not; its own are of origin "D4RL (id)"."""
        return "D4RL" in self.origin and not self.origin.startswith("D4RL (")

    @property
    def rows(self) -> list[str]:
        """Titles of the datasets."""
        return sorted({row for row, _ in self.cells})

    @property
    def labels(self) -> list[str]:
        """The agents."""
        return sorted({label for _, label in self.cells})

    def leg(self, row: str) -> Leg:
        """The task of a row."""
        return next(cell.leg for cell in self.cells.values() if cell.row == row)


def last_of(run: Run) -> Episodes:
    """The final evaluation where there is one, else the last one of training."""
    return run.final or run.evaluations[-1]


def _moment(episodes: Episodes) -> tuple[int, int]:
    return episodes.updates, episodes.env_steps


def scored(leg: Leg, returns: Floats) -> Floats:
    """D4RL-normalised scores, x100; the returns themselves where no reference is known."""
    if leg.reference_scores is None:
        return returns
    return np.asarray(normalized_score(returns, *leg.reference_scores))
