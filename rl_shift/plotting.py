"""Pictures as PNG files, and the learning curve of a run; needs matplotlib (extra `report`)."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_shift import atomic
from rl_shift.errors import UserError

DPI = 130  # of a report's pictures; a page shows them at 96 per inch
LETTER, LINE, HANDLE = 0.085, 0.22, 0.7  # inches of a letter, a line and a legend's sign


def figure(width: float, height: float, dpi: float = DPI) -> Any:
    """An empty figure without a window, in inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('a picture needs matplotlib: pip install "rl_shift[report]"') from error
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def legend(figure: Any, drawn: Mapping[str, Any]) -> None:
    """On top of a figure that grows by it, in as many columns as fit; longer labels are broken."""
    inches = figure.get_figwidth() - 0.3
    labels = [textwrap.fill(label, int((inches - HANDLE) / LETTER)) for label in drawn]
    longest = max(len(line) for label in labels for line in label.splitlines())
    columns = min(max(1, int(inches / (longest * LETTER + HANDLE))), len(labels))
    lines = max(label.count("\n") + 1 for label in labels) * -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.1 + LINE * lines)
    where = "outside upper center"
    figure.legend(list(drawn.values()), labels, loc=where, ncols=columns, frameon=False)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG in one step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    with atomic.replacing(path) as partial, partial.open("wb") as file:
        canvas.print_png(file)


def learning_curve(run_dir: Path, data_return: float | None = None) -> Path:
    """Draws mean return over updates (or env steps), one line per task, bands over the seeds.

    Args:
        run_dir: a run folder with results.json.
        data_return: mean return of the dataset, drawn as a dashed line.

    Returns:
        The picture's path, `learning_curve.png` in the run folder.
    """
    picture = figure(6, 4, dpi=100)
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    axes: Any = picture.add_subplot()
    unit = "env_steps" if any(e["env_steps"] for e in results["evaluations"]) else "updates"
    for number, task in enumerate(results["tasks"]):
        rows = [e for e in results["evaluations"] if e["task"] == number]
        where = [row[unit] for row in rows]
        means = [[sum(seed) / len(seed) for seed in row["returns"]] for row in rows]
        line = axes.plot(where, [sum(m) / len(m) for m in means], label=task["name"])[0]
        low, high = [min(m) for m in means], [max(m) for m in means]
        axes.fill_between(where, low, high, alpha=0.2, color=line.get_color())
    if data_return is not None:
        axes.axhline(data_return, linestyle="--", color="grey", label="mean of the data")
    axes.set_xlabel(unit.replace("env_steps", "environment steps"))
    axes.set_ylabel("return of an episode")
    axes.legend()
    path = run_dir / "learning_curve.png"
    save(picture, path)
    return path
