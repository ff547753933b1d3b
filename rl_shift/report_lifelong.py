"""The chapter of a report about lives: what was earned before and after every shift."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rl_shift import plotting, seeding
from rl_shift.life import phases
from rl_shift.lifelong_metrics import (
    Recovery,
    lifetime,
    moving_average,
    phase_means,
    recoveries,
)
from rl_shift.loggers import read_metrics
from rl_shift.metrics import mean_interval
from rl_shift.report_document import Block, Heading, Paragraph, Picture, Table
from rl_shift.report_pictures import colours_of
from rl_shift.report_runs import Gathered, Run, shift_text
from rl_shift.report_sections import labels

SIGNALS = ("state_error", "reward_error", "shift_score")  # the last part of a logged name
WINDOWS = (100, 1_000, 10_000)  # env steps of the moving averages
MOST_PHASES = 20  # columns of the table of lives
Life = dict[str, Any]


def chapter(found: Gathered, pictures: Path | None) -> list[Block]:
    """Two tables and one picture per environment and shift; nothing without lives."""
    groups: defaultdict[tuple[str, str], dict[str, list[tuple[Run, Life]]]] = defaultdict(dict)
    label = labels(found.runs)
    for run in found.runs:
        for life in run.extra.get("lives", []):
            leg = run.legs[life["task"]]
            if life["reward"]:
                groups[leg.env or leg.name, leg.shift].setdefault(label(run), []).append(
                    (run, life)
                )
    blocks: list[Block] = [Heading("Lives under shifts")] if groups else []
    if groups:
        blocks.append(
            Paragraph(
                "Extrinsic reward per environment step, mean over seeds ± half the width of its "
                "95 % t interval. Recovery: steps after a shift until the mean of the last 1,000 "
                "is back at 90 % of the last tenth before it (where that earned nothing: of the "
                "way up to it from a random policy); lives that do not get there within the phase "
                "count with its length and are named as censored. Shifts without a jump have "
                "neither drop nor recovery.",
                small=True,
            )
        )
    for number, ((env, shift), agents) in enumerate(groups.items()):
        title = f"{env}, {shift_text(shift)}"
        measured = {
            name: [shifts_of(life, env, shift) for _, life in lives]
            for name, lives in agents.items()
        }
        blocks += [_table(title, agents, measured), _phases(title, agents)]
        if pictures is not None:
            path = pictures / f"life-{number + 1}.png"
            draw(agents, title, path)
            blocks.append(Picture(path, f"{env}: reward over the life, shifts marked"))
    return blocks


def _table(
    title: str,
    agents: dict[str, list[tuple[Run, Life]]],
    measured: dict[str, list[list[Recovery]]],
) -> Table:
    rows = []
    for name, lives in agents.items():
        every = measured[name]
        shifts = [r for one in every for r in one]
        censored = sum(r.censored for r in shifts)
        recovery = [float(np.mean([r.steps for r in one])) for one in every if one]
        drops = [float(np.mean([r.drop for r in one])) for one in every if one]
        last = [float(phase_means(x["reward"], x["regime"])[-1]) for _, x in lives]
        rows.append(
            [
                name,
                str(len(lives)),
                mean_interval([lifetime(x["reward"]) for _, x in lives]).text(",.4f"),
                mean_interval(last).text(",.4f"),
                mean_interval(drops).text(",.4f") if drops else "–",
                mean_interval(recovery).text(",.0f") if recovery else "–",
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
    return Table(title, head, rows, told=True)


def _phases(title: str, agents: dict[str, list[tuple[Run, Life]]]) -> Table:
    """Every life by itself: moving averages at its end, mean of each of its phases."""
    rows: list[list[str]] = []
    count = 0
    for name, lives in agents.items():
        for _, life in lives:
            ends = [
                # a window shorter than a recorded point is not known
                f"{moving_average(life['reward'], life['steps'], window)[-1]:.4f}"
                if window >= life["steps"]
                else "–"
                for window in WINDOWS
            ]
            means = [f"{mean:.4f}" for mean in phase_means(life["reward"], life["regime"])]
            count = max(count, len(means))
            rows.append([name, str(life["seed"]), *ends, *means])
    head = ["agent", "seed", *(f"last {window:,}" for window in WINDOWS)]
    head += [f"phase {k}" for k in range(min(count, MOST_PHASES))]
    rows = [(row + ["–"] * len(head))[: len(head)] for row in rows]
    return Table(f"{title}: every life", head, rows, folded=True)


def shifts_of(life: Life, env: str, shift: str) -> list[Recovery]:
    """Drop and recovery at every shift; none for schedules without a jump.

    Args:
        life: a row of "lives".
        env: the environment's id.
        shift: its specification as JSON.
    """
    if not _abrupt(shift):
        return []
    return recoveries(
        life["reward"],
        life["regime"],
        life["steps"],
        lambda regime: random_reward(env, shift, regime),
    )


def _abrupt(shift: str) -> bool:
    from rl_shift.envs.schedules import Ramp, RandomWalk, Sine, Triangle
    from rl_shift.envs.shift import parse

    spec = json.loads(shift)
    plan = parse(spec).shifts if spec is not None else []
    return not any(isinstance(s.schedule, Triangle | Ramp | Sine | RandomWalk) for s in plan)


@cache
def random_reward(env_id: str, shift: str, regime: int, steps: int = 4000) -> float:
    """Mean reward per step of uniform actions while the shifts are as `regime` says.

    Args:
        env_id: the environment's id.
        shift: its specification as JSON.
        regime: bit i: shift i acts.
        steps: how many are averaged.
    """
    from rl_shift.envs import ShiftWrapper, make_env
    from rl_shift.envs.schedules import List

    env = make_env(env_id, shift=json.loads(shift))
    if isinstance(env, ShiftWrapper):
        for i, one in enumerate(env.shifts):
            one.schedule = List(((0, float(regime >> i & 1)),))
    env.reset(seed=seeding.child(0, "reference"))
    env.action_space.seed(seeding.child(0, "reference", "action"))
    total = 0.0
    for _ in range(steps):
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        total += float(reward)
        if terminated or truncated:
            env.reset()
    env.close()
    return total / steps


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
    told = {name: signals(lives[0][0]) for name, lives in agents.items()}
    names = [name for name in SIGNALS if any(name in one for one in told.values())]
    figure = plotting.figure(9, 3 + 1.5 * len(names))
    grid: Any = figure.subplots(
        1 + len(names), 1, sharex=True, squeeze=False, height_ratios=[2] + [1] * len(names)
    )[:, 0]
    colours = colours_of(list(agents))
    for name, lives in agents.items():
        colour = colours[name]
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
    for begin, _ in phases(np.asarray(first["regime"]))[1:]:
        for axes in grid:
            axes.axvline(begin * first["steps"], color="#5b6475", linestyle=":", linewidth=1.0)
    grid[0].set_ylabel("reward per step,\nlast 1,000")
    grid[0].set_title(title, loc="left")
    grid[0].legend(frameon=False, loc="lower right")
    for axes, signal in zip(grid[1:], names, strict=True):
        axes.set_ylabel(signal.replace("_", " "))
    grid[-1].set_xlabel("environment steps")
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    plotting.save(figure, path)
