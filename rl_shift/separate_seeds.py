"""Seeds that cannot share a process, or shall not: one process per seed or group of seeds.

The run folder holds config.yaml, one ordinary run folder per process (`seed3`, or `seeds0-4` for
seeds that are stacked inside) and a results.json that holds every seed, as that of a run whose
seeds share one process does. Two differences to such a run: noise is drawn from streams of their
own, and each process evaluates on the initial states of its own first seed.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rl_shift import agents, checkpoint, config
from rl_shift.agent import Agent, Wrapper
from rl_shift.config import RunConfig, Task
from rl_shift.errors import UserError
from rl_shift.launch_view import View
from rl_shift.launcher import ENDED, LOG, Job, Local, Report, has_checkpoint, wait

RESULTS = "results.json"


def apart(run: RunConfig) -> bool:
    """Whether the seeds of a run are divided over several processes."""
    return run.seeds > 1 and (not stacks(run) or (run.processes or 1) > 1)


def stacks(run: RunConfig) -> bool:
    """Whether one process can hold several seeds: offline tasks of a stackable agent."""
    offline = not any(task.env_steps for task in run.tasks)
    return offline and _stackable(agents.get(run.agent_name), vars(run.agent))


def _stackable(kind: type[Agent], settings: Mapping[str, Any]) -> bool:
    """What the class says; a wrapper needs a stackable base as well."""
    if issubclass(kind, Wrapper) and isinstance(settings.get("base"), str):
        inner = settings.get("base_config") or {}
        return kind.stackable and _stackable(agents.get(settings["base"]), inner)
    return kind.stackable


def groups(run: RunConfig) -> list[range]:
    """Indices of the seeds of each process; sizes differ by at most one."""
    count = min(run.processes or 1, run.seeds) if stacks(run) else run.seeds
    bounds = [run.seeds * k // count for k in range(count + 1)]
    return [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def jobs(run: RunConfig, folder: Path) -> list[Job]:
    """The processes of a run: itself, or one per group of its seeds."""
    if not apart(run):
        return [Job(folder.name, run, folder)]
    found = []
    for group in groups(run):
        first, last = run.seed + group.start, run.seed + group.stop - 1
        name = f"seed{first}" if first == last else f"seeds{first}-{last}"
        inner = folder / name
        own = replace(
            run, seed=first, seeds=len(group), processes=None, run_dir=str(inner), overwrite=False
        )
        found.append(Job(name, own, inner))
    return found


# ---- training ----------------------------------------------------------------------------------


def train_seeds(run: RunConfig, folder: Path, progress: bool = True) -> Path:
    """Train every seed from scratch in a prepared, empty folder.

    Raises:
        UserError: bad configuration, or seeds that failed (the others went on to the end).
        KeyboardInterrupt: stopped; every child has saved.
    """
    from rl_shift import runs

    runs.make_agent(replace(run, seeds=1, device="cpu"), runs.resolve(run), fresh=True)
    return _launch(run, folder, progress)


def resume_seeds(
    run: RunConfig,
    folder: Path,
    updates: int | None = None,
    env_steps: int | None = None,
    progress: bool = True,
) -> Path:
    """Go on with every seed that is not finished; seeds without a checkpoint start anew."""
    from rl_shift import runs

    if updates is not None or env_steps is not None:
        run = runs.extended(run, updates, env_steps)
    return _launch(run, folder, progress)


def _launch(run: RunConfig, folder: Path, progress: bool) -> Path:
    from rl_shift import runs

    children = jobs(run, folder)
    with checkpoint.Lock(folder):
        runs.write(folder / runs.CONFIG, config.dump(run))
        view = View(folder.name, progress)
        try:
            with Local(run.processes) as launcher:
                for job in children:
                    if not finished(job):
                        launcher.submit(job)
                reports = wait(launcher, view, lambda _: write_merged(folder, children, []))
        finally:
            view.close()
        status = write_merged(folder, children, reports)
    if status == "stopped":
        raise KeyboardInterrupt
    failed = [report for report in reports if report.state == "failed"]
    if failed:
        _give_up(folder, children, failed)
    return folder


def _give_up(folder: Path, children: Sequence[Job], failed: Sequence[Report]) -> None:
    """Raise what went wrong; a mistake that no seed survived leaves nothing behind."""
    mistakes = all(report.code == 2 for report in failed) and len(failed) == len(children)
    if mistakes and not any(has_checkpoint(job.folder) for job in children):
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(failed[0].error)
    listed = "; ".join(f"{r.job.name}: {r.error} (see {r.job.folder / LOG})" for r in failed)
    raise UserError(
        f"{len(failed)} of {len(children)} processes failed: {listed}; try these again with: "
        f"rl-shift train --resume {folder}"
    )


def finished(job: Job) -> bool:
    """Whether a run has spent the budgets that its job gives it."""
    results = read_results(job.folder)
    if results is None or results["status"] != "finished":
        return False
    return len(results["tasks"]) == len(job.run.tasks) and all(
        before["updates"] >= task.updates and before["env_steps"] >= task.env_steps
        for before, task in zip(results["tasks"], job.run.tasks, strict=True)
    )


# ---- results -----------------------------------------------------------------------------------


def read_results(folder: Path) -> dict[str, Any] | None:
    """The results.json of a run folder; None where there is none."""
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / RESULTS}: {error}; delete it") from error
    return dict(results)


def write_merged(folder: Path, children: Sequence[Job], reports: Sequence[Report]) -> str:
    """Write the results.json of all children; returns its status: "running" without reports."""
    from rl_shift import runs

    states = {report.state for report in reports}
    if not states <= set(ENDED) or not reports and not all(finished(job) for job in children):
        status = "running"
    else:
        status = next((s for s in ("stopped", "failed") if s in states), "finished")
    results = merged(children, {r.job.folder.name: r.error for r in reports if r.state == "failed"})
    if results is not None:
        runs.write(folder / RESULTS, json.dumps({**results, "status": status}))
    return status


def merged(children: Sequence[Job], errors: Mapping[str, str]) -> dict[str, Any] | None:
    """One results.json out of those of the children; None as long as they have none.

    Seeds that failed, or have no results yet, are missing in "seeds" and in the rows of every
    evaluation. An evaluation is kept if all the others have it. "wall_time_s" adds up over the
    processes, "updates_per_s" is their mean.
    """
    from rl_shift import runs

    found = {job.folder.name: read_results(job.folder) for job in children}
    parts = {name: r for name, r in found.items() if r is not None and name not in errors}
    if not parts:
        return None
    every = list(parts.values())
    last_task = children[0].run.tasks[-1]
    tasks = [dict(task) for task in every[0]["tasks"]]
    tasks[-1] |= {"updates": last_task.updates, "env_steps": last_task.env_steps}
    evaluations = _aligned([results["evaluations"] for results in every])
    return {
        **every[0],
        "tasks": tasks,
        "seeds": [seed for results in every for seed in results["seeds"]],
        "evaluations": evaluations,
        "last": evaluations[-1] if evaluations else None,
        "best": max(evaluations, key=runs.merit) if evaluations else None,
        **({"lives": lives} if (lives := [x for r in every for x in r.get("lives", [])]) else {}),
        "updates": min(results["updates"] for results in every),
        "env_steps": min(results["env_steps"] for results in every),
        "wall_time_s": round(sum(results["wall_time_s"] for results in every), 1),
        "updates_per_s": round(sum(r["updates_per_s"] for r in every) / len(every), 1),
        "processes": {
            name: {k: results[k] for k in ("status", "seeds", "wall_time_s", "updates_per_s")}
            for name, results in parts.items()
        },
        "errors": dict(errors),
    }


def _aligned(parts: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Evaluations at the same point of the run, one row per seed."""
    rows: defaultdict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for part in parts:
        met: defaultdict[tuple[Any, ...], int] = defaultdict(int)
        for evaluation in part:
            point = tuple(evaluation[k] for k in ("task", "during", "updates", "env_steps"))
            rows[(*point, met[point])].append(evaluation)
            met[point] += 1  # a task may be evaluated before and after its end
    whole = [same for same in rows.values() if len(same) == len(parts)]
    return [
        {
            **same[0],
            "returns": [row for one in same for row in one["returns"]],
            "lengths": [row for one in same for row in one["lengths"]],
            "score": None
            if any(one["score"] is None for one in same)
            else [score for one in same for score in one["score"]],
        }
        for same in whole
    ]


# ---- loading -----------------------------------------------------------------------------------


def load_seeds(
    run: RunConfig, folder: Path, seed: str, overrides: Mapping[str, Any] | None = None
) -> tuple[Agent, RunConfig, list[Task]]:
    """The agent of `RUN_DIR#k`, or all seeds stacked where `seed` is "".

    k counts from 0, as in a run whose seeds share one process: #0 is the seed `run.seed`.

    Raises:
        UserError: no such seed, one without a checkpoint, or seeds that cannot be stacked.
    """
    if not seed:
        kind = agents.get(run.agent_name)
        if not _stackable(kind, vars(run.agent)):
            raise UserError(
                f"{folder} holds {run.seeds} seeds of an agent that cannot be stacked: name one, "
                f"{folder}#0 to {folder}#{run.seeds - 1}"
            )
        loaded = [_load(run, folder, k, overrides) for k in range(run.seeds)]
        return kind.stacked([agent for agent, _ in loaded]), run, loaded[0][1]
    if not (seed.isdecimal() and int(seed) < run.seeds):
        raise UserError(f"{folder}#{seed}: the run has seeds #0 to #{run.seeds - 1}")
    agent, tasks = _load(run, folder, int(seed), overrides)
    return agent, run, tasks


def _load(
    run: RunConfig, folder: Path, k: int, overrides: Mapping[str, Any] | None
) -> tuple[Agent, list[Task]]:
    from rl_shift import runs

    pairs = zip(groups(run), jobs(run, folder), strict=True)
    group, job = next((group, job) for group, job in pairs if k in group)
    if not has_checkpoint(job.folder):
        raise UserError(
            f"seed #{k} of {folder} has no checkpoint: train it with rl-shift train --resume "
            f"{folder}, or name another seed"
        )
    agent, _, tasks = runs.load_agent(f"{job.folder}#{k - group.start}", overrides)
    return agent, tasks
