"""The chapter of a report about sequences of tasks: metrics, task matrices and curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_shift import continual_metrics as metrics
from rl_shift import plotting
from rl_shift import report_pictures as draw
from rl_shift.loggers import clock_text
from rl_shift.metrics import mean_interval
from rl_shift.report_cells import Chain, scored
from rl_shift.report_document import Block, Heading, Paragraph, Picture, Table
from rl_shift.report_runs import Gathered
from rl_shift.report_sections import chains

WINDOW = 10  # evaluations, of windowed forgetting and plasticity


def chapter(found: Gathered, pictures: Path | None) -> list[Block]:
    """Everything about agents that learnt tasks in turn; sequences of equal tasks stand together.

    Args:
        found: what was gathered.
        pictures: the folder for them, None without matplotlib.
    """
    groups: defaultdict[tuple[str, ...], list[Chain]] = defaultdict(list)
    for chain in chains(Gathered(found.runs)):
        if not chain.refused and all(run.evaluations for run in chain.runs):
            groups[tuple(leg.name for leg in chain.runs[0].legs)].append(chain)
    blocks: list[Block] = []
    for number, (names, same) in enumerate(sorted(groups.items())):
        blocks.append(Heading(f"Continual learning: {', '.join(names)}"))
        blocks += [_table(same), Paragraph(_MEANINGS, small=True)]
        if pictures is None:
            continue
        for name, picture, text in (
            ("task-matrix", task_matrices, "Task matrices: score in a task after each task"),
            ("task-curves", task_curves, "Every task over the whole sequence; band: all seeds"),
        ):
            path = pictures / f"{name}{f'-{number + 1}' if number else ''}.png"
            picture(same, path)
            blocks.append(Picture(path, text))
        points = {chain.label: razor_points(chain) for chain in same}
        if sum(map(len, points.values())) > 2:
            path = pictures / f"razor{f'-{number + 1}' if number else ''}.png"
            razor(points, path)
            blocks.append(Picture(path, "RL's Razor: policy shift against forgetting, per run"))
    return blocks


_MEANINGS = (
    "PER: mean over all tasks after the last. BWT: change of old tasks since their own training, "
    "without the last task. Forgetting (Continual World): mean drop over all tasks, last included. "
    "min-ACC: mean over old tasks of the lowest score after their training; WC-ACC weighs it with "
    "the current task. WF and WP: largest drop and gain within a window of evaluations."
)


def rows_of(chain: Chain) -> list[metrics.Row]:
    """The evaluations of all runs as long-form rows; scores where every task has some."""
    rows = []
    for run in chain.runs:
        for e in run.evaluations:
            numbers = scored(run.legs[e.task], e.returns) if chain.normalised else e.returns
            rows += [
                metrics.Row(e.updates + e.env_steps, e.during, e.task, seed, float(score))
                for seed, score in zip(run.seeds, numbers.mean(axis=1), strict=True)
            ]
    return rows


def razor_points(chain: Chain) -> list[tuple[float, float]]:
    """(mean policy shift, -BWT) of every run of one seed that logged its shifts."""
    found = []
    for run in chain.runs:
        logged = run.extra.get("resources", {})
        shifts = [v for k, v in logged.items() if k.startswith("policy_shift_")][1:]
        rows = [row for row in rows_of(chain) if row.seed in run.seeds]
        if shifts and len(run.seeds) == 1:
            lost = -float(metrics.backward_transfer(metrics.task_matrix(rows))[0])
            found.append((float(np.mean(shifts)), lost))
    return found


def razor(points: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """A scatter: how far old heads moved on new tasks' states, and what old tasks lost."""
    figure = plotting.figure(5.5, 3.6)
    axes: Any = figure.subplots()
    colours = draw.colours_of(list(points))
    drawn = {
        label: axes.scatter(*zip(*pairs, strict=True), color=colours[label], s=24)
        for label, pairs in points.items()
        if pairs
    }
    axes.axhline(0, color="#777777", lw=0.8, ls=":")
    draw.plain_axes(axes, "policy shift on new tasks, mean squared", "forgetting (-BWT)")
    plotting.legend(figure, drawn)
    plotting.save(figure, path)


def _table(same: Sequence[Chain]) -> Table:
    """One row of metrics per agent."""
    found = [metrics.summary(rows_of(chain), WINDOW) for chain in same]
    names = list(dict.fromkeys(name for summary in found for name in summary))
    resources = ("parameters", "memory_rows", "memory_bytes")
    rows = []
    for chain, summary in zip(same, found, strict=True):
        texts = [chain.label, f"{sum(len(run.seeds) for run in chain.runs)}"]
        texts += [mean_interval(summary[name]).text() if name in summary else "" for name in names]
        for key in resources:
            values = [run.extra.get("resources", {}).get(key) for run in chain.runs]
            texts.append(f"{max(values):,.0f}" if all(v is not None for v in values) else "")
        texts.append(clock_text(sum(run.cost["wall_time_s"] for run in chain.runs)))
        rows.append(texts)
    unit = "D4RL-normalised scores" if all(chain.normalised for chain in same) else "returns"
    head = ["agent", "seeds", *names, *(key.replace("_", " ") for key in resources), "wall time"]
    caption = f"Continual metrics from {unit}, mean over the seeds ± half a 95 % t interval."
    return Table(caption, head, rows, told=True)


def task_matrices(same: Sequence[Chain], path: Path) -> None:
    """One panel per agent: rows are what was trained last, columns what was played."""
    names = [leg.name for leg in same[0].runs[0].legs]
    matrices = [metrics.task_matrix(rows_of(chain)).mean(axis=0) for chain in same]
    low = min(float(np.nanmin(matrix)) for matrix in matrices)
    high = max(float(np.nanmax(matrix)) for matrix in matrices)
    size = len(names)
    columns = min(draw.COLUMNS, len(same))
    lines = -(-len(same) // columns)
    figure = plotting.figure((1.0 + 0.75 * size) * columns + 1.2, (0.9 + 0.6 * size) * lines + 0.4)
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    short = _short(names)
    for axes, chain, matrix in zip(grid.flat, same, matrices, strict=False):
        axes.set_axis_on()
        image = axes.imshow(matrix, cmap="viridis", vmin=low, vmax=high)
        for i, j in np.argwhere(np.isfinite(matrix)):
            light = matrix[i, j] < low + 0.6 * (high - low)
            colour = "white" if light else "black"
            text = f"{matrix[i, j]:.0f}" if high - low >= 10 else f"{matrix[i, j]:.2f}"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(size), short, fontsize=8, rotation=30, ha="right")
        axes.set_yticks(range(size), [f"after {name}" for name in short], fontsize=8)
        axes.set_title(chain.label, fontsize=10)
        figure.colorbar(image, ax=axes, fraction=0.046)
    plotting.save(figure, path)


def task_curves(same: Sequence[Chain], path: Path) -> None:
    """One panel per task over all updates of the sequence; dotted lines where a task ends."""
    legs = same[0].runs[0].legs
    colours = draw.colours_of([chain.label for chain in same])
    columns = min(draw.COLUMNS, len(legs))
    lines = -(-len(legs) // columns)
    figure = plotting.figure(max(4.2 * columns, 5.5), 3.0 * lines + 0.2)
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(legs) :]:
        axes.set_axis_off()
    ends = np.cumsum([leg.updates or leg.env_steps for leg in legs])
    drawn: dict[str, Any] = {}
    for task, (axes, leg) in enumerate(zip(grid.flat, legs, strict=False)):
        for chain in same:
            points: defaultdict[int, dict[int, float]] = defaultdict(dict)
            for row in rows_of(chain):
                if row.eval_task == task:
                    points[row.step][row.seed] = row.score
            where = sorted(points)
            scores = [list(points[step].values()) for step in where]
            colour = colours[chain.label]
            middle = [float(np.mean(found)) for found in scores]
            line = axes.plot(where, middle, color=colour, marker=".", label=chain.label)[0]
            lowest, highest = [min(found) for found in scores], [max(found) for found in scores]
            axes.fill_between(where, lowest, highest, color=colour, alpha=0.15, lw=0)
            drawn[chain.label] = line
        for end in ends[:-1]:
            axes.axvline(end, ls=":", color="#777777", lw=1)
        axes.set_title(leg.name, fontsize=10)
        axes.set_xlim(0, ends[-1] * 1.02)
        unit = "score" if all(chain.normalised for chain in same) else "return"
        draw.plain_axes(axes, "environment steps" if leg.env_steps else "updates", unit)
    plotting.legend(figure, drawn)
    plotting.save(figure, path)


def _short(names: Sequence[str]) -> list[str]:
    """Names without what all of them begin and end with."""
    parts = [name.split("-") for name in names]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return ["-".join(p) for p in parts]
