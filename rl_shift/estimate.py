"""What a sweep will cost: updates and their speed, measured or taken from runs that were made.

A speed is that of the update loop; evaluation is added as whole episodes at the speed of the bare
environment, an upper bound where episodes may end early.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl_shift import config
from rl_shift.agent import Agent
from rl_shift.config import RunConfig, Task
from rl_shift.errors import UserError
from rl_shift.launch_view import Standing
from rl_shift.launcher import Job, Local, wait
from rl_shift.loggers import METRICS, clock_text, read_metrics

PROBE_UPDATES, PROBE_EVERY, PROBE_S = 300, 50, 30.0
COMPILED_UPDATES, COMPILED_S = 600, 240.0  # a compilation comes first, and takes a minute or more
START_S = 5.0  # a process's start: imports, data, the first checkpoint
HORIZON = 1000  # steps of an episode that the environment does not limit


@dataclass(frozen=True)
class Work:
    """A job's size.

    Attributes:
        job: the job.
        updates: that are left, preparatory stages included.
        env_steps: that are left.
        episodes: of the evaluations that are left.
        env_id: where they are played.
    """

    job: Job
    updates: float
    env_steps: float
    episodes: float
    env_id: str | None

    @property
    def key(self) -> tuple[Any, ...]:
        """Jobs with equal keys run at about the same speed."""
        run = self.job.run
        sizes = (run.seeds, run.threads, run.compile, run.precision, run.device, run.lanes)
        return (run.agent_name, repr(run.agent), self.env_id, *sizes)


@dataclass(frozen=True)
class Measured:
    """A speed in updates/s, and seconds that are spent once before it is reached."""

    speed: float
    once: float = 0.0


def work(job: Job, agent: Agent, tasks: Sequence[Task]) -> Work:
    """Read a job's size off its agent's stages."""
    run, updates, env_steps, counted = job.run, 0.0, 0.0, 0.0
    for task in tasks:
        for stage in agent.stages(task):
            warmup = agent.warmup_steps if task.dataset is None else 0
            rounds = max(0, stage.env_steps - warmup) / (agent.collect_every * run.lanes)
            here = stage.updates + rounds * agent.updates_per_collect
            updates += here
            counted += here if stage.counted else 0.0
            env_steps += stage.env_steps
    standing = Standing.of(job.folder)
    left = 1 - min(1.0, standing.updates / max(counted, 1.0))
    axis = env_steps or counted
    evaluations = 1 + (axis // run.eval_every if run.eval_every else 0)
    episodes = evaluations * run.eval_episodes * run.seeds * left
    return Work(job, updates * left, env_steps * left, episodes, tasks[0].env)


def known_speed(folder: Path, least: int = 1) -> float | None:
    """Median updates/s of a run that has logged at least so many intervals."""
    with suppress(OSError):
        speeds = sorted(_speeds(folder))
        return speeds[len(speeds) // 2] if len(speeds) >= least else None
    return None


def _speeds(folder: Path) -> list[float]:
    """Updates/s of every interval of a run's log, warm-up without updates left out."""
    entries = read_metrics(folder / METRICS)
    return [float(x) for entry in entries if (x := entry.get("time/updates_per_s"))]


def past_speeds(folders: Iterable[Path]) -> Callable[[Work], float | None]:
    """Speeds of runs of the same kind that these folders hold."""
    made: list[tuple[RunConfig, float]] = []
    for folder in folders:
        speed = known_speed(folder, least=3)  # the first intervals may hold a warm-up
        if speed is not None:
            with suppress(UserError):
                made.append((config.load(folder / "config.yaml"), speed))

    def find(work: Work) -> float | None:
        run = work.job.run
        same = [speed for old, speed in made if _alike(old, run)]
        return sum(same) / len(same) if same else None

    return find


def _alike(old: RunConfig, run: RunConfig) -> bool:
    names = ("agent_name", "agent", "seeds", "threads", "compile", "precision", "device", "lanes")
    return [task.env for task in old.tasks] == [task.env for task in run.tasks] and all(
        getattr(old, name) == getattr(run, name) for name in names
    )


def measure(work: Work) -> Measured | None:
    """Speed over a few hundred updates of the real command; None where it failed.

    The first interval holds whatever is done once, a compilation above all: it is told apart, so
    the speed is that of a later interval, and the probe goes on until there is one.
    """
    run = work.job.run
    compiled = run.compile != "off"
    tasks = tuple(
        _short(task, COMPILED_UPDATES if compiled else PROBE_UPDATES) for task in run.tasks
    )
    given: dict[str, Any] = {"log_every": PROBE_EVERY, "eval_every": 0, "save_every": 0}
    with tempfile.TemporaryDirectory(prefix="rl_shift-probe-") as name:
        folder = Path(name, "run")
        short = replace(run, tasks=tasks[:1], run_dir=str(folder), eval_episodes=1, **given)
        with Local(1) as pool:
            pool.submit(Job("probe", short, folder))
            began = time.monotonic()
            stopped = False

            def limit(reports: Sequence[object]) -> None:
                nonlocal stopped
                spent = time.monotonic() - began
                known = known_speed(folder, least=2) is not None
                if not stopped and (spent > PROBE_S and known or spent > COMPILED_S):
                    stopped = True
                    pool.cancel()

            wait(pool, limit)
        return _measured(_speeds(folder))


def _measured(speeds: Sequence[float]) -> Measured | None:
    """Updates/s after the first interval, and the time that the first took beyond its updates."""
    if not speeds:
        return None
    rest = sorted(speeds[1:] or speeds)
    speed = rest[len(rest) // 2]
    return Measured(speed, max(0.0, PROBE_EVERY / speeds[0] - PROBE_EVERY / speed))


def _short(task: Task, most: int) -> Task:
    updates = min(task.updates, most)
    return replace(task, updates=updates, env_steps=task.env_steps if not updates else 0)


def step_seconds(env_id: str) -> tuple[float, int]:
    """Seconds of one step of an environment with random actions, and its longest episode."""
    from rl_shift.envs import make_env

    env = make_env(env_id)
    env.action_space.seed(0)
    env.reset(seed=0)
    began, steps = time.perf_counter(), 0
    while steps < 200:
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        steps += 1
        if terminated or truncated:
            env.reset()
    seconds = (time.perf_counter() - began) / steps
    limit = env.spec.max_episode_steps if env.spec is not None else None
    env.close()
    return seconds, limit or HORIZON


@dataclass(frozen=True)
class Cost:
    """What one job takes, in seconds of one process."""

    work: Work
    speed: float | None
    updating: float
    evaluating: float
    once: float = 0.0  # a compilation

    @property
    def seconds(self) -> float:
        """All of it."""
        return START_S + self.once + self.updating + self.evaluating


def costs(
    works: Sequence[Work],
    past: Callable[[Work], float | None],
    probe: bool,
    say: Callable[[str], object] = lambda text: None,
) -> list[Cost]:
    """Every job's cost; speeds that no finished run tells are measured if `probe`."""
    speeds: dict[tuple[Any, ...], Measured | None] = {}
    unknown = []
    for item in works:
        if item.key not in speeds:
            known = past(item)
            speeds[item.key] = None if known is None else Measured(known)
            unknown += [item] if known is None else []
    for number, item in enumerate(unknown if probe else [], 1):
        say(f"measuring the speed of {item.job.name}, {number} of {len(unknown)}")
        speeds[item.key] = measure(item)
    steps: dict[str, tuple[float, int]] = {}
    found = []
    for item in works:
        if item.env_id is not None and item.env_id not in steps:
            steps[item.env_id] = step_seconds(item.env_id)
        second, horizon = steps[item.env_id] if item.env_id is not None else (0.0, 0)
        measured = speeds[item.key]
        speed, once = (measured.speed, measured.once) if measured else (None, 0.0)
        updating = item.updates / speed + item.env_steps * second if speed else 0.0
        found.append(Cost(item, speed, updating, item.episodes * horizon * second, once))
    return found


def table(costs: Sequence[Cost], processes: int) -> list[str]:
    """Lines for people: one per agent, then the sum and the time it takes on `processes`."""
    lines = [f"{'agent':20}{'jobs':>6}{'updates':>14}{'updates/s':>16}{'core-hours':>12}"]
    for agent in dict.fromkeys(cost.work.job.run.agent_name for cost in costs):
        mine = [cost for cost in costs if cost.work.job.run.agent_name == agent]
        speeds = sorted({round(cost.speed) for cost in mine if cost.speed})
        text = "unknown" if not speeds else f"{speeds[0]}"
        text += f"-{speeds[-1]}" if len(speeds) > 1 else ""
        updates = sum(cost.work.updates for cost in mine)
        lines.append(f"{agent:20}{len(mine):>6}{updates:>14,.0f}{text:>16}{_hours(mine):>12.2f}")
    longest = max((cost.seconds for cost in costs), default=0.0)
    wall = max(longest, sum(cost.seconds for cost in costs) / processes)
    lines.append(
        f"estimate: {_hours(costs):.2f} core-hours, about {clock_text(wall)} on {processes} "
        f"processes; evaluation is at most {_share(costs):.0f} % of it"
    )
    if any(cost.speed is None for cost in costs):
        lines.append("some speeds are unknown, so the estimate is too low")
    return lines


def _hours(costs: Sequence[Cost]) -> float:
    return sum(cost.seconds * cost.work.job.run.threads for cost in costs) / 3600


def _share(costs: Sequence[Cost]) -> float:
    total = sum(cost.seconds for cost in costs)
    return 100 * sum(cost.evaluating for cost in costs) / total if total else 0.0
