"""What a report is made of: results.json files, and files of `rl-shift evaluate --json`.

Nothing else is read, so a report can be made where the data and the checkpoints are not. What does
not fit together is never averaged: a run that does not belong is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_shift.errors import UserError
from rl_shift.runs import CONFIG, FORMAT, RESULTS

Floats = NDArray[np.float64]
KNOWN = {
    "format", "status", "agent", "agent_config", "tasks", "seeds", "evaluations", "last", "best",
    "updates", "env_steps", "wall_time_s", "updates_per_s", "compile", "precision", "threads",
    "device", "data_mode", "versions", "errors",
}  # fmt: skip
WRONG = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Episodes:
    """One evaluation of every seed of a run.

    Attributes:
        returns: (S, E) raw and undiscounted.
        task: index of the task they were played in.
        during: index of the task that was trained then.
        updates: gradient updates until then.
        env_steps: environment steps until then.
        seed: of the environments, where it was chosen.
    """

    returns: Floats
    task: int = 0
    during: int = 0
    updates: int = 0
    env_steps: int = 0
    seed: int | None = None


def shift_text(shift: str) -> str:
    """A leg's shift, which is JSON, as a reader wrote it."""
    return "no shift" if shift == "null" else shift.strip('"')


@dataclass(frozen=True)
class Leg:
    """A task as a run had it."""

    name: str
    env: str | None
    updates: int
    env_steps: int
    reward: str
    shift: str
    reference_scores: tuple[float, float] | None
    data: str | None  # id of the dataset
    origin: str | None
    sha256: str | None

    @property
    def title(self) -> str:
        """The task's name with its shift: two lives under different shifts are two tasks."""
        return self.name if self.shift == "null" else f"{self.name}, {shift_text(self.shift)}"


@dataclass(frozen=True)
class Run:
    """A results.json, checked.

    Attributes:
        folder: its folder.
        status: finished, running, stopped or failed.
        agent: as it was named.
        settings: what tells two variants of an agent apart.
        legs: its tasks.
        seeds: those with results.
        evaluations: in the order of training.
        final: the evaluation of the trained policy in a file of `rl-shift evaluate`.
        updates: that were made, of those that count.
        env_steps: that were made.
        cost: wall_time_s, updates_per_s, compile, precision, threads, device.
        data_mode: how episodes of the data are cut.
        versions: of the libraries.
        errors: of the processes that failed.
        extra: what else its results.json holds, for chapters about runs of a special kind.
    """

    folder: Path
    status: str
    agent: str
    settings: dict[str, Any]
    legs: tuple[Leg, ...]
    seeds: tuple[int, ...]
    evaluations: tuple[Episodes, ...]
    updates: int
    env_steps: int
    cost: dict[str, Any]
    data_mode: str
    versions: dict[str, str]
    errors: dict[str, str]
    extra: dict[str, Any] = field(default_factory=dict)
    final: Episodes | None = None

    @property
    def standing(self) -> str:
        """Its status, with how far it came if that is not the end."""
        if self.status == "finished":
            return "finished"
        steps = sum(leg.env_steps for leg in self.legs)
        if steps:
            return f"{self.status} at {self.env_steps:,} of {steps:,} env steps"
        total = sum(leg.updates for leg in self.legs)
        return f"{self.status} at {self.updates:,} of {total:,} updates"


@dataclass
class Gathered:
    """Runs, and what was left out.

    Attributes:
        runs: in the order of their folders.
        problems: files that were skipped, and why; they make the command fail.
        notes: what a reader must know.
    """

    runs: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# ---- run folders -------------------------------------------------------------------------------


def gather(paths: Iterable[str | Path]) -> Gathered:
    """The runs of run folders, and of folders that hold run folders.

    Raises:
        UserError: a path that is neither.
    """
    found = Gathered()
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        for folder in _run_folders(path):
            folders.setdefault(folder.resolve(), folder)
    for folder in folders.values():
        if not (folder / RESULTS).is_file():
            found.notes.append(f"{folder.name} has no {RESULTS} yet")
            continue
        try:
            found.runs.append(read(folder))
        except UserError as error:
            found.problems.append(str(error))
    return found


def _run_folders(path: Path) -> list[Path]:
    if path.name == RESULTS:
        path = path.parent
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give run folders, or a folder that holds some")
    if _is_run(path):
        return [path]
    inside = sorted(folder for folder in path.iterdir() if folder.is_dir() and _is_run(folder))
    if not inside:
        raise UserError(f"{path} is no run folder and holds none: there is no {RESULTS}")
    return inside


def _is_run(folder: Path) -> bool:
    return (folder / RESULTS).is_file() or (folder / CONFIG).is_file()


def read(folder: Path) -> Run:
    """The run of a folder.

    Raises:
        UserError: its results.json is corrupt; what is wrong is named.
    """
    try:
        return _run(folder, _document(folder / RESULTS))
    except WRONG as error:
        raise UserError(_corrupt(folder / RESULTS, error)) from error


def _document(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    return document


def _corrupt(path: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{path} cannot be read and was skipped: {error.strerror}"
    what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
    return f"{path} is corrupt and was skipped: {what[:120]}"


def _run(folder: Path, results: dict[str, Any]) -> Run:
    seeds = tuple(int(seed) for seed in results["seeds"])
    legs = tuple(_leg(task) for task in results["tasks"])
    if not legs or not seeds:
        raise ValueError("it names no task or no seed")
    numbers = ("wall_time_s", "updates_per_s")
    words = ("compile", "precision", "threads", "device")
    return Run(
        folder=folder,
        status=str(results["status"]),
        agent=str(results["agent"]),
        settings={k: _of_any_seed(v) for k, v in results["agent_config"].items()}
        | {"precision": str(results["precision"])},
        legs=legs,
        seeds=seeds,
        evaluations=tuple(_episodes(e, len(seeds), len(legs)) for e in results["evaluations"]),
        updates=int(results["updates"]),
        env_steps=int(results["env_steps"]),
        cost={k: float(results[k]) for k in numbers} | {k: str(results[k]) for k in words},
        data_mode=str(results["data_mode"]),
        versions={str(k): str(v) for k, v in results["versions"].items()},
        errors={str(k): str(v) for k, v in results.get("errors", {}).items()},
        extra={k: v for k, v in results.items() if k not in KNOWN},
    )


def _of_any_seed(value: Any) -> Any:
    """A setting without the seed in RUN_DIR#k: runs around the seeds of one run are seeds too."""
    if isinstance(value, str):
        return re.sub(r"#\d+$", "", value)
    return [_of_any_seed(part) for part in value] if isinstance(value, list) else value


def _leg(task: Mapping[str, Any]) -> Leg:
    data = task["dataset"] or {}
    scores = task["reference_scores"]
    low_high = None if scores is None else (float(scores[0]), float(scores[1]))
    if low_high is not None and not low_high[0] < low_high[1]:
        raise ValueError(f"its reference scores are {scores}")
    return Leg(
        name=str(task["name"]),
        env=task["env"],
        updates=int(task["updates"]),
        env_steps=int(task["env_steps"]),
        reward=str(task["reward"]),
        shift=json.dumps(task["shift"], sort_keys=True),
        reference_scores=low_high,
        data=data.get("id"),
        origin=data.get("origin"),
        sha256=data.get("sha256"),
    )


def _episodes(evaluation: Mapping[str, Any], seeds: int, tasks: int) -> Episodes:
    task, during = int(evaluation["task"]), int(evaluation["during"])
    if not 0 <= task <= during < tasks:
        raise ValueError(f"an evaluation is of task {task} during task {during}, of {tasks}")
    return Episodes(
        returns=_returns(evaluation["returns"], seeds),
        task=task,
        during=during,
        updates=int(evaluation["updates"]),
        env_steps=int(evaluation["env_steps"]),
    )


def _returns(rows: Any, seeds: int) -> Floats:
    returns = np.asarray(rows, dtype=np.float64)
    if returns.ndim != 2 or returns.shape[0] != seeds or not returns.shape[1]:
        raise ValueError(f"returns of shape {returns.shape} for {seeds} seeds")
    if not np.isfinite(returns).all():
        raise ValueError("a return is not finite")
    return returns


# ---- files of `rl-shift evaluate` --------------------------------------------------------------


def add_evaluations(found: Gathered, paths: Sequence[str | Path]) -> None:
    """Give runs the final evaluations that these files hold; the others are named."""
    parts: dict[Path, dict[int | None, Episodes]] = {}
    runs = {run.folder.resolve(): run for run in found.runs}
    for path in map(Path, paths):
        try:
            document = _document(path)
            name, _, seed = str(document["run"]).partition("#")
            run = _owner(name, runs)
            if run is None:
                found.notes.append(f"{path} was made from {name}, which is not in this report")
                continue
            own, index = parts.setdefault(run.folder.resolve(), {}), int(seed) if seed else None
            if index in own:
                found.problems.append(f"{path} was skipped: another file evaluates the same policy")
            else:
                own[index] = _final(document, run, 1 if seed else len(run.seeds))
        except WRONG as error:
            found.problems.append(_corrupt(path, error))
        except UserError as error:
            found.problems.append(f"{path} was skipped: {error}")
    for place, own in parts.items():
        if not own:
            continue
        run = runs[place]
        final = own[None] if None in own else _joined(own, run, found)
        runs[place] = replace(run, final=final)
    found.runs = list(runs.values())


def _owner(name: str, runs: Mapping[Path, Run]) -> Run | None:
    """The run that was evaluated: the same folder, else the only one of that name."""
    if Path(name).resolve() in runs:
        return runs[Path(name).resolve()]
    same = [run for run in runs.values() if run.folder.resolve().name == Path(name).name]
    return same[0] if len(same) == 1 else None


def _final(document: Mapping[str, Any], run: Run, seeds: int) -> Episodes:
    leg, *others = run.legs
    if others:
        raise UserError("final evaluations of several tasks are not used")
    made = [e for e in document["evaluations"] if not e["agent"] and e["task"] == leg.name]
    if len(made) != 1:
        raise UserError(f"it holds {len(made)} evaluations of {leg.name} with unchanged settings")
    scores = made[0]["reference_scores"]
    if made[0]["env"] != leg.env or leg.reference_scores != (scores and tuple(scores)):
        raise UserError(f"it was played in {made[0]['env']}, with reference scores {scores}")
    return Episodes(
        returns=_returns(made[0]["returns"], seeds),
        updates=run.updates,
        env_steps=run.env_steps,
        seed=int(document["seed"]),
    )


def _joined(own: Mapping[int | None, Episodes], run: Run, found: Gathered) -> Episodes | None:
    """Evaluations of single seeds, RUN_DIR#k, as one; None unless all of them are there."""
    parts = [own[k] for k in range(len(run.seeds)) if k in own]
    alike = len({(part.returns.shape, part.seed) for part in parts}) == 1
    if run.errors or len(parts) < len(run.seeds) or not alike:
        found.notes.append(
            f"the evaluations of single seeds of {run.folder.name} were not used: they must be of "
            "all seeds, with equal episodes"
        )
        return None
    return replace(parts[0], returns=np.concatenate([part.returns for part in parts]))
