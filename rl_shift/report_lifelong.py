"""The chapter of a report about lives: what was earned before and after every shift."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from rl_shift.lifelong_metrics import (
    Recovery,
    lifetime,
    moving_average,
    over_seeds,
    phase_means,
    recoveries,
)
from rl_shift.loggers import read_metrics
from rl_shift.metrics import Interval
from rl_shift.report_document import Block, Heading, Paragraph, Picture, Table
from rl_shift.report_runs import Gathered, Run
from rl_shift.report_sections import labels

SIGNALS = ("state_error", "reward_error", "shift_score")  # the last part of a logged name
Life = dict[str, Any]


def chapter(found: Gathered, pictures: Path | None) -> list[Block]:
    """One table and one picture per environment and shift; nothing without lives."""
    groups: defaultdict[tuple[str, str], dict[str, list[tuple[Run, Life]]]] = defaultdict(dict)
    label = labels(found.runs)
    for run in found.runs:
        for life in run.extra.get("lives", []):
            leg = run.legs[life["task"]]
            if life["reward"]:
                place = groups[leg.env or leg.name, leg.shift.strip('"')]
                place.setdefault(label(run), []).append((run, life))
    blocks: list[Block] = [Heading("Lives under shifts")] if groups else []
    if groups:
        blocks.append(
            Paragraph(
                "Extrinsic reward per environment step, mean over seeds ± half the width of its "
                "95 % t interval. Recovery: steps after a shift until the mean of the last 1,000 "
                "is back at 90 % of the last tenth before it; lives that do not get there within "
                "the phase count with its length and are named as censored.",
                small=True,
            )
        )
    for number, ((env, shift), agents) in enumerate(groups.items()):
        blocks.append(_table(env, shift, agents))
        if pictures is not None:
            path = pictures / f"life-{number + 1}.png"
            draw(agents, f"{env}, {shift or 'no shift'}", path)
            blocks.append(Picture(path, f"{env}: reward over the life, shifts marked"))
    return blocks


def _table(env: str, shift: str, agents: dict[str, list[tuple[Run, Life]]]) -> Table:
    rows = []
    for name, lives in agents.items():
        every = [_recoveries(life) for _, life in lives]
        shifts = [r for one in every for r in one]
        censored = sum(r.censored for r in shifts)
        recovery = [float(np.mean([r.steps for r in one])) for one in every if one]
        drops = [float(np.mean([r.drop for r in one])) for one in every if one]
        last = [float(phase_means(x["reward"], x["regime"])[-1]) for _, x in lives]
        rows.append(
            [
                name,
                str(len(lives)),
                _shown(over_seeds([lifetime(x["reward"]) for _, x in lives]), 4),
                _shown(over_seeds(last), 4),
                _shown(over_seeds(drops), 4) if drops else "–",
                _shown(over_seeds(recovery), 0) if recovery else "–",
                f"{censored} of {len(shifts)}" if shifts else "–",
            ]
        )
    head = [
        "agent",
        "lives",
        "lifetime reward",
        "last phase",
        "drop",
        "recovery, steps",
        "censored",
    ]
    return Table(f"{env}, {shift or 'no shift'}", head, rows, told=True)


def _recoveries(life: Life) -> list[Recovery]:
    return recoveries(life["reward"], life["regime"], life["steps"])


def _shown(interval: Interval, digits: int) -> str:
    half = (interval.high - interval.low) / 2
    middle = f"{interval.value:,.{digits}f}"
    return middle if not np.isfinite(half) else f"{middle} ± {half:,.{digits}f}"


def signals(run: Run) -> dict[str, tuple[list[int], list[float]]]:
    """Logged errors of an agent's models and its detector: env steps and values by name."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for path in sorted(run.folder.rglob("metrics.jsonl")):
        for entry in read_metrics(path):
            for key, value in entry.items():
                name = key.rpartition("/")[2]
                if name in SIGNALS and isinstance(value, int | float):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(int(entry["env_steps"]))
                    values.append(float(value))
        if found:
            break  # one seed is shown
    return found


def draw(agents: dict[str, list[tuple[Run, Life]]], title: str, path: Path) -> None:
    """Reward of every agent (mean and range over seeds), then each signal of one seed."""
    from matplotlib.figure import Figure

    from rl_shift.report_pictures import COLOURS

    told = {name: signals(lives[0][0]) for name, lives in agents.items()}
    names = [name for name in SIGNALS if any(name in one for one in told.values())]
    figure = Figure(figsize=(9, 3 + 1.5 * len(names)), layout="constrained")
    grid: Any = figure.subplots(
        1 + len(names), 1, sharex=True, squeeze=False, height_ratios=[2] + [1] * len(names)
    )[:, 0]
    for (name, lives), colour in zip(agents.items(), COLOURS, strict=False):
        length = min(len(life["reward"]) for _, life in lives)
        steps = lives[0][1]["steps"]
        curves = np.array(
            [moving_average(life["reward"][:length], steps, 1000) for _, life in lives]
        )
        at = steps * np.arange(1, length + 1)
        grid[0].plot(at, curves.mean(0), color=colour, label=name, linewidth=1.2)
        grid[0].fill_between(
            at, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0
        )
        for axes, signal in zip(grid[1:], names, strict=True):
            if signal in told[name]:
                axes.plot(*told[name][signal], color=colour, linewidth=1.0)
    first = next(iter(agents.values()))[0][1]
    for shift in _recoveries(first):
        for axes in grid:
            axes.axvline(shift.start, color="#5b6475", linestyle=":", linewidth=1.0)
    grid[0].set_ylabel("reward per step,\nlast 1,000")
    grid[0].set_title(title, loc="left")
    grid[0].legend(frameon=False, loc="lower right")
    for axes, signal in zip(grid[1:], names, strict=True):
        axes.set_ylabel(signal.replace("_", " "))
    grid[-1].set_xlabel("environment steps")
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
