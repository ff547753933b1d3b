"""The pictures of a report as PNG files; they need matplotlib (extra `report`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_shift import plotting
from rl_shift.metrics import iqm, mean, median, optimality_gap
from rl_shift.report_cells import Section
from rl_shift.report_statistics import Aggregate, bootstrapped, profile

if TYPE_CHECKING:
    from rl_shift.bandit import Curve

COLUMNS = 3  # panels side by side
COLOURS = (
    "#0b5cad", "#d1495b", "#2e8b57", "#e0a100", "#7b4fa3",
    "#1aa6b7", "#8c564b", "#5b6475", "#b5c334", "#e377c2",
)  # fmt: skip
STATISTICS = {
    "mean": mean, "median": median, "IQM": iqm, "optimality gap (lower is better)": optimality_gap,
}  # fmt: skip


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def learning_curves(section: Section, path: Path) -> bool:
    """One panel per dataset, one line per agent, a band from the lowest to the highest seed.

    Args:
        section: its cells; those that are not averaged are left out.
        path: of the picture.

    Returns:
        Whether there was anything to draw.
    """
    colours = colours_of(section.labels)
    shown = {key: cell.curve() for key, cell in section.cells.items() if not cell.refused}
    rows = [row for row in section.rows if any(shown.get((row, n), ([], 0))[0] for n in colours)]
    if not rows:
        return False
    columns = min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    figure = plotting.figure(max(4.2 * columns, 5.5), 3.1 * lines + 0.2)
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    drawn: dict[str, Any] = {}
    data: Any = None
    for axes in grid.flat[len(rows) :]:
        axes.set_axis_off()
    for axes, row in zip(grid.flat, rows, strict=False):
        for label, colour in colours.items():
            points, scores = shown.get((row, label), ([], np.empty((0, 0))))
            if not points:
                continue
            marker = "o" if len(points) == 1 else None
            middle = scores.mean(axis=1)
            drawn[label] = axes.plot(points, middle, color=colour, marker=marker, label=label)[0]
            axes.fill_between(
                points, scores.min(axis=1), scores.max(axis=1), color=colour, alpha=0.15, lw=0
            )
        if row in section.data:
            level = section.data[row]
            data = axes.axhline(level, ls="--", color="#333333", lw=1.2)
        axes.set_title(row, fontsize=10)
        steps = any(cell.leg.env_steps for (of, _), cell in section.cells.items() if of == row)
        plain_axes(axes, "environment steps" if steps else "updates", section.unit)
    if data is not None:
        drawn["mean of the data"] = data
    plotting.legend(figure, drawn)
    plotting.save(figure, path)
    return True


def performance_profiles(found: Aggregate, labels: Sequence[str], unit: str, path: Path) -> bool:
    """Share of runs above every score, with pointwise 95 % bands.

    Args:
        found: scores over the common datasets.
        labels: all agents of the section, for their colours.
        unit: of the scores.
        path: of the picture.
    """
    every = np.concatenate([table.ravel() for table in found.scores.values()])
    thresholds = np.linspace(min(0.0, every.min()), max(100.0, every.max()), 201)
    figure = plotting.figure(7.5, 4.2)
    axes: Any = figure.subplots()
    for label, colour in colours_of(labels).items():
        if label in found.scores:
            share, low, high = profile(found.scores[label], thresholds)
            axes.step(thresholds, share, where="post", color=colour, label=label)
            axes.fill_between(thresholds, low, high, step="post", color=colour, alpha=0.15, lw=0)
    axes.set_ylim(-0.02, 1.02)
    plain_axes(axes, f"{unit} τ", "share of runs with score > τ")
    axes.legend(frameon=False)
    plotting.save(figure, path)
    return True


def aggregates(found: Aggregate, labels: Sequence[str], unit: str, path: Path) -> bool:
    """The aggregate statistics with their intervals, one panel each; arguments as above."""
    colours = {label: c for label, c in colours_of(labels).items() if label in found.scores}
    figure = plotting.figure(11, 1.1 + 0.42 * len(colours))
    panels: Any = figure.subplots(1, len(STATISTICS), sharey=True)
    for axes, (name, statistic) in zip(panels, STATISTICS.items(), strict=True):
        for height, (label, colour) in enumerate(colours.items()):
            value, low, high = bootstrapped(found.scores[label], statistic)
            if np.isfinite(low):
                axes.barh(height, high - low, 0.55, low, color=colour, alpha=0.35)
            axes.plot([value, value], [height - 0.275, height + 0.275], color=colour, lw=2.5)
        axes.use_sticky_edges = False  # else the first interval touches the frame
        axes.set_title(name, fontsize=10)
        plain_axes(axes, unit, "")
    panels[0].set_yticks(range(len(colours)), colours)
    panels[0].invert_yaxis()
    plotting.save(figure, path)
    return True


def choices(curves: Mapping[str, Curve], path: Path) -> bool:
    """One panel per task: the chosen policy's true mean by online episodes, with 95 % bands."""
    columns = min(COLUMNS, len(curves))
    lines = -(-len(curves) // columns)
    figure = plotting.figure(max(4.2 * columns, 5.5), 3.1 * lines)
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    for axes, (name, curve) in zip(grid.flat, curves.items(), strict=False):
        seen = np.arange(len(curve.mean))
        axes.plot(seen, curve.mean, color=COLOURS[0])
        axes.fill_between(seen, curve.low, curve.high, color=COLOURS[0], alpha=0.15, lw=0)
        title, _, unit = name.partition(" (")
        axes.set_title(title, fontsize=10)
        plain_axes(axes, "online episodes seen", unit.rstrip(")"))
    plotting.save(figure, path)
    return True


def colours_of(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each agent."""
    return {label: COLOURS[k % len(COLOURS)] for k, label in enumerate(labels)}


def plain_axes(axes: Any, below: str, beside: str) -> None:
    """Names of both axes, a light grid, no frame above and to the right."""
    axes.set_xlabel(below, fontsize=9)
    axes.set_ylabel(beside, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if below in ("updates", "environment steps"):
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
