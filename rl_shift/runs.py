"""Run folders: from a configuration to a trained, resumable, evaluable folder.

A run folder holds config.yaml, checkpoints/, tensorboard/, metrics.jsonl and results.json; a lock
keeps a second process out.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Space

from rl_shift import agents, atomic, checkpoint, config, datasets, envs, seeding, separate_seeds
from rl_shift.agent import Agent, Stage, Wrapper
from rl_shift.config import RunConfig, Task
from rl_shift.envs import termination
from rl_shift.errors import TrainingDiverged, UnsupportedSpace, UserError
from rl_shift.evaluation import normalized_score
from rl_shift.launcher import LOG
from rl_shift.loggers import Loggers, Progress
from rl_shift.trainer import Clock, Trainer

FORMAT = 1
CONFIG, RESULTS = "config.yaml", "results.json"


@dataclass(frozen=True)
class Moment:
    """What a run has just logged: an interval of training, or an evaluation.

    Attributes:
        updates: gradient updates until now, those of preparatory stages left out.
        env_steps: environment steps until now.
        values: what was logged, "critic/loss" or "eval/normalized_score" for instance.
        trainer: for a look at its agent, its buffer and its evaluations.
    """

    updates: int
    env_steps: int
    values: dict[str, float]
    trainer: Trainer


def train(run: RunConfig, progress: bool = True) -> Path:
    """Train from scratch and return the run folder.

    Raises:
        UserError: bad configuration, data or folder; nothing half-written is left behind.
        KeyboardInterrupt: stopped; a checkpoint was saved.
    """
    folder = config.run_folder(run)
    run = replace(run, run_dir=str(folder))
    if separate_seeds.apart(run):
        with _prepared(folder, run):
            return separate_seeds.train_seeds(run, folder, progress)
    for _ in moments(run, progress):
        pass
    return folder


def moments(run: RunConfig, progress: bool = False) -> Generator[Moment]:
    """`train` as an iterator over what is logged; leaving the loop saves, as Ctrl-C does.

    Raises:
        UserError: as `train`; or seeds that need processes of their own, which nobody can watch.
    """
    folder = config.run_folder(run)
    run = replace(run, run_dir=str(folder))
    if separate_seeds.apart(run):
        raise UserError(
            f"{run.seeds} seeds of {run.agent_name} train in processes of their own and cannot be "
            "watched from here: train one seed at a time, or leave the callbacks out"
        )
    _set_torch(run)
    tasks = resolve(run)
    agent = make_agent(run, tasks, fresh=True)
    with _prepared(folder, run), checkpoint.Lock(folder):
        yield from _run(agent, tasks, run, folder, progress)


def resume(
    run_dir: str | Path,
    updates: int | None = None,
    env_steps: int | None = None,
    progress: bool = True,
) -> Path:
    """Go on from the newest checkpoint, exactly as if the run had not stopped.

    Args:
        run_dir: the run folder.
        updates: a new, larger budget of the last task.
        env_steps: likewise.
        progress: show a bar.

    Raises:
        UserError: no usable checkpoint, changed data, or a budget that is spent already.
    """
    folder = Path(run_dir)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run folder: it has no {CONFIG}")
    run = replace(config.load(folder / CONFIG), run_dir=str(folder))
    if separate_seeds.apart(run):
        return separate_seeds.resume_seeds(run, folder, updates, env_steps, progress)
    if updates is not None or env_steps is not None:
        run = extended(run, updates, env_steps)
    _set_torch(run)
    with checkpoint.Lock(folder):
        path = checkpoint.latest(folder)
        state, _ = checkpoint.load(path)
        tasks = resolve(run)
        agent = make_agent(run, tasks)
        with _belonging(path):
            _check_data(tasks, state["data"], folder)
            _check_stages(agent, tasks, state)
        for _ in _run(agent, tasks, run, folder, progress, state, path):
            pass
    return folder


def load_agent(
    spec: str | Path, overrides: Mapping[str, Any] | None = None
) -> tuple[Agent, RunConfig, list[Task]]:
    """The trained agent of `RUN_DIR` or `RUN_DIR#k` (seed k alone), its configuration and tasks.

    Needs neither the dataset nor the environments of the run.

    Args:
        spec: the run folder.
        overrides: evaluation-time fields of the agent's Config.
    """
    path, _, seed = str(spec).partition("#")
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run folder: it has no {CONFIG}")
    run = replace(config.load(folder / CONFIG), run_dir=str(folder))
    if overrides:
        run = replace(run, agent=replace(run.agent, **overrides))
    if separate_seeds.apart(run):
        return separate_seeds.load_seeds(run, folder, seed, overrides)
    if seed and not (seed.isdecimal() and int(seed) < run.seeds):
        raise UserError(f"{spec}: the run has seeds #0 to #{run.seeds - 1}")
    newest = checkpoint.latest(folder)
    state, _ = checkpoint.load(newest)
    with _belonging(newest):
        tasks = [Task.from_plain(plain) for plain in state["tasks"]]
    agent = make_agent(run, tasks)
    with _belonging(newest):
        agent.load_state(state["agent"])
    return (agent.select(int(seed)) if seed else agent), run, tasks


def load_one(spec: str | Path) -> tuple[Agent, RunConfig, list[Task]]:
    """As `load_agent`, for one seed.

    Raises:
        UserError: if the run holds several seeds and `spec` names none.
    """
    agent, run, tasks = load_agent(spec)
    if agent.seeds > 1:
        raise UserError(f"{spec} holds {agent.seeds} seeds: name one, {spec}#0 and so on")
    return agent, run, tasks


# ---- from configuration to objects -------------------------------------------------------------


def resolve(run: RunConfig) -> list[Task]:
    """Fill in what the settings imply: data, environment, spaces, reference scores."""
    tasks = []
    for task in run.tasks:
        data = datasets.resolve(task.dataset) if task.dataset is not None else None
        env_id = task.env or (data.env_id if data is not None else None)
        scores = data.reference_scores if data is not None else None
        pad = data.obs_pad if data is not None else 0
        if env_id is not None:
            env = envs.make_env(env_id, shift=task.shift, obs_pad=pad)
            observation_space, action_space = env.observation_space, env.action_space
            env.close()
            if scores is None:
                scores = datasets.reference_scores_of(env_id)
        else:
            assert data is not None  # config refuses a task with neither
            observation_space, action_space = _spaces_of_data(data)
        tasks.append(
            replace(
                task,
                env=env_id,
                observation_space=observation_space,
                action_space=action_space,
                reference_scores=scores,
                termination=None if task.shift else termination.of(env_id),
                data=data,
                obs_pad=pad,
            )
        )
    return tasks


def _spaces_of_data(data: datasets.DatasetInfo) -> tuple[Space[Any], Space[Any]]:
    """Spaces of a dataset whose environment is unknown: a vector of numbers, actions in [-1, 1]."""
    arrays = datasets.load(data)
    obs, action = arrays["obs"].shape[1:], arrays["action"].shape[1:]
    return Box(-np.inf, np.inf, obs, np.float32), Box(-1.0, 1.0, action, np.float32)


def make_agent(run: RunConfig, tasks: Sequence[Task], fresh: bool = False) -> Agent:
    """The configured agent for the first task's spaces: S seeds stacked, on the device.

    A fresh one also takes what it shall reuse of other runs; else a checkpoint will bring it.
    """
    kind = agents.get(run.agent_name)
    observation_space, action_space = tasks[0].observation_space, tasks[0].action_space
    assert observation_space is not None and action_space is not None  # tasks are resolved
    made = []
    for s in range(run.seeds):
        with seeding.forked(seeding.child(run.seed + s, "init")):
            made.append(kind(observation_space, action_space, run.agent))
            if fresh:
                _reuse(made[-1], tasks)
    _check_spaces(made[0], tasks)
    return kind.stacked(made).place(_device(run))


def _reuse(agent: Agent, tasks: Sequence[Task]) -> None:
    """Take frozen bases and trained submodules out of the runs that the settings name."""
    for part in agent.contained():
        if part.frozen:
            continue
        if isinstance(part, Wrapper) and part.base.frozen:
            spec = part.config.base_run
            source = _trained(spec, type(part.base), part, tasks)
            with _fitting(spec):
                part.base.load_state(source.state())
        for field in part.reusable:
            spec = getattr(part.config, field)
            if isinstance(spec, tuple):
                _reuse_per_task(part, field, spec, tasks)
            elif spec:
                source = _trained(spec, type(part), part, tasks)
                with _fitting(spec):
                    part.reuse(field, source)


def _reuse_per_task(part: Agent, field: str, specs: tuple[str, ...], tasks: Sequence[Task]) -> None:
    """One finished run for every task, in their order; none at all is no mistake."""
    if specs and len(specs) != len(tasks):
        raise UserError(f"agent.{field} names {len(specs)} runs for {len(tasks)} tasks")
    for spec, task in zip(specs, tasks, strict=False):
        source = _trained(spec, Agent, task, [task])
        with _fitting(spec):
            part.reuse(field, source)


def _trained(spec: str, kind: type[Agent], target: Agent | Task, tasks: Sequence[Task]) -> Agent:
    """The agent of a run that another run builds on: one seed, same spaces, same data.

    Args:
        spec: `RUN_DIR[#k]`.
        kind: what the agent must be, or descend from; `Agent` itself takes any.
        target: whose spaces must be the agent's.
        tasks: whose data the run must have seen.
    """
    source, _, _ = load_one(spec)
    if kind is not Agent and not issubclass(kind, type(source)):
        raise UserError(f"{spec} is a run of {type(source).__name__}, not of {kind.__name__}")
    for name in ("observation_space", "action_space"):
        theirs, mine = getattr(source, name), getattr(target, name)
        if _shape(theirs) != _shape(mine):
            raise UserError(
                f"{spec} was trained with {name.replace('_', ' ')} {theirs}, this run has {mine}: "
                "choose a run on the same environment"
            )
    results = separate_seeds.read_results(Path(spec.partition("#")[0]))
    before = [task["dataset"] for task in (results or {"tasks": []})["tasks"] if task["dataset"]]
    for now in filter(None, map(_identity, tasks)):
        if before and now["sha256"] not in [data["sha256"] for data in before]:
            raise UserError(
                f"{spec} was trained on {', '.join(data['id'] for data in before)}, this run uses "
                f"{now['id']} (another sha256): choose a run on the same dataset"
            )
    return source


@contextmanager
def _fitting(spec: str) -> Iterator[None]:
    """What tensors of other shapes cause, as one line."""
    try:
        yield
    except (LookupError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"what {spec} holds does not fit this agent's settings ({reason}): give the settings "
            "of that run"
        ) from error


def _shape(space: Any) -> tuple[Any, Any]:
    """What networks depend on."""
    return getattr(space, "shape", None), getattr(space, "n", None)


def _check_spaces(agent: Agent, tasks: Sequence[Task]) -> None:
    """Later tasks fit the first one's networks, unless the agent builds some for each task."""
    if any(type(part).build is not Agent.build for part in agent.contained()):
        for task in tasks:
            assert task.observation_space is not None and task.action_space is not None
            reason = agent.supports(task.observation_space, task.action_space)
            if reason is not None:
                raise UnsupportedSpace(
                    f"{type(agent).__name__} cannot learn task {task.name!r}: {reason} "
                    f"(observations {task.observation_space}, actions {task.action_space})"
                )
        return
    shapes = [_shape(s) for task in tasks for s in (task.observation_space, task.action_space)]
    for k, task in enumerate(tasks):
        if shapes[2 * k : 2 * k + 2] != shapes[:2]:
            raise UserError(
                f"task {task.name!r} has observations {task.observation_space} and actions "
                f"{task.action_space}, the first task has others, and {type(agent).__name__} uses "
                "the same networks for all tasks: choose tasks of one shape, or another agent"
            )


def _device(run: RunConfig) -> str:
    available = torch.cuda.is_available()
    if run.device == "cuda" and not available:
        raise UserError("no CUDA device is available here: use --device cpu, or auto")
    return "cuda" if available and run.device != "cpu" else "cpu"


def _set_torch(run: RunConfig) -> None:
    torch.set_num_threads(run.threads)
    torch.set_float32_matmul_precision(run.precision)


# ---- the run folder ----------------------------------------------------------------------------


_STAYS = ("lock", LOG, checkpoint.ASIDE)
_OF_A_RUN = ("config.yaml", "results.json", "metrics.jsonl", "checkpoints", "seed0", LOG)


@contextmanager
def _prepared(folder: Path, run: RunConfig) -> Iterator[None]:
    """An empty run folder, whose old contents come back if the new run does not get going.

    Raises:
        UserError: it is not empty, or cannot be written.
    """
    fresh = not folder.exists()
    _empty(folder, run)
    aside = folder / checkpoint.ASIDE
    try:
        yield
    except BaseException as error:
        ended = isinstance(error, TrainingDiverged | KeyboardInterrupt | GeneratorExit)
        if not _has_checkpoints(folder):
            if aside.is_dir() and (not ended or _has_checkpoints(aside)):
                _clear(folder)
                for entry in aside.iterdir():
                    entry.rename(folder / entry.name)
            elif fresh and not ended and not _has_logs(folder):  # else they say how it went
                shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _has_checkpoints(folder: Path) -> bool:
    return any([*folder.glob("checkpoints/*"), *folder.glob("seed*/checkpoints/*")])


def _has_logs(folder: Path) -> bool:
    """Whether anything that was trained has been logged."""
    found = [*folder.glob("metrics.jsonl"), *folder.glob("seed*/metrics.jsonl")]
    return any(path.stat().st_size for path in found)


def _clear(folder: Path) -> None:
    """Remove what a run has written, but for what it set aside."""
    for entry in folder.iterdir():
        if entry.name not in _STAYS:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _empty(folder: Path, run: RunConfig) -> None:
    """Make the folder, or set its contents aside where they may be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --run-dir")
    try:
        if folder.is_dir() and any(folder.iterdir()):
            if not run.overwrite:
                begun = _has_checkpoints(folder)
                raise UserError(
                    f"the run folder {folder} is not empty: "
                    f"{'resume it with --resume, ' * begun}choose another --run-dir, or empty it "
                    "with --overwrite"
                )
            names = sorted(entry.name for entry in folder.iterdir() if entry.name != "lock")
            if names and not {*_OF_A_RUN, checkpoint.ASIDE} & {*names}:
                raise UserError(
                    f"--overwrite empties folders of runs, {folder} is none (it holds "
                    f"{', '.join(names[:3])}): choose another --run-dir"
                )
            with checkpoint.Lock(folder):
                aside = folder / checkpoint.ASIDE
                if aside.is_dir() and not _has_checkpoints(folder):  # left by a run that was killed
                    _clear(folder)
                else:
                    shutil.rmtree(aside, ignore_errors=True)
                    aside.mkdir()
                    for entry in folder.iterdir():
                        if entry.name not in _STAYS:
                            entry.rename(aside / entry.name)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {folder}: {error.strerror}; choose another --run-dir"
        ) from error


def _run(
    agent: Agent,
    tasks: list[Task],
    run: RunConfig,
    folder: Path,
    progress: bool,
    state: dict[str, Any] | None = None,
    path: Path | None = None,
) -> Generator[Moment]:
    """Train, with loggers, bar and checkpoints tied to the folder; gives what is logged.

    Args:
        agent: freshly made.
        tasks: resolved.
        run: the configuration, written to the folder.
        folder: locked by the caller.
        progress: show a bar.
        state: of the checkpoint at `path`, to go on from.
        path: where `state` came from.
    """
    device = _device(run)
    data = [_identity(task) for task in tasks]
    began, spent = time.monotonic(), 0.0
    bar = _Bar(progress)
    logged: list[Moment] = []

    def wall() -> float:
        return spent + time.monotonic() - began

    def log(clock: Clock, values: dict[str, float]) -> None:
        made = clock.counted_updates, clock.total_env_steps
        loggers.log(_position(clock), values, *made)
        logged.append(Moment(*made, values, trainer))

    def news() -> Iterator[Moment]:
        while logged:
            yield logged.pop(0)

    def save(clock: Clock, state: dict[str, Any]) -> None:
        loggers.flush()
        state["wall_s"] = wall()
        state["data"] = data
        state["tasks"] = [task.plain() for task in tasks]
        meta = {k: getattr(run, k) for k in ("precision", "compile", "threads")}
        meta["device"] = device
        checkpoint.save_step(
            folder, _position(clock), state, config.dump(run), meta, run.keep_checkpoints
        )
        shutil.rmtree(folder / checkpoint.ASIDE, ignore_errors=True)

    def results(status: str, errors: Mapping[str, str] | None = None) -> None:
        content = _results(run, tasks, data, trainer, wall(), device, status)
        write(folder / RESULTS, json.dumps(content | ({"errors": errors} if errors else {})))

    trainer = Trainer(agent, tasks, run, log, save, bar.tick, lambda _: results("running"))
    position = None
    if state is not None:
        assert path is not None
        with _belonging(path):  # refused before anything in the folder is touched
            trainer.load_state(state)
            spent, position = float(state["wall_s"]), _position(trainer.clock)
        trainer.warnings += _ended_schedules(agent, tasks, state)
    write(folder / CONFIG, config.dump(run))  # an extended run that stops keeps its new budget
    loggers = Loggers(folder, position)
    status, errors = "failed", {}
    try:
        with closing(trainer.steps()) as steps:
            for _ in steps:
                yield from news()
        status = "finished"
    except (KeyboardInterrupt, GeneratorExit):
        status = "stopped"
        raise
    except Exception as error:
        errors = {"training": " ".join(str(error).split()) or type(error).__name__}
        raise
    finally:
        bar.close()
        loggers.close()
        results(status, errors)
        for warning in trainer.warnings:
            print(f"note: {warning}")
    yield from news()


class _Bar:
    """One progress bar per stage."""

    def __init__(self, show: bool) -> None:
        self.show = show
        self.key: tuple[int, int] | None = None
        self.bar: Progress | None = None

    def tick(self, clock: Clock, stage: Stage, score: float | None) -> None:
        at = clock.env_steps if stage.env_steps else clock.updates
        if self.key != (clock.task, clock.stage):
            self.close()
            self.key = (clock.task, clock.stage)
            unit = "env steps" if stage.env_steps else "updates"
            total = stage.env_steps or stage.updates
            self.bar = Progress(total, stage.name, at, unit, show=self.show)
        assert self.bar is not None
        self.bar.advance(at - self.bar.done)
        if score is not None and score != self.bar.score:
            self.bar.set_score(score)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _position(clock: Clock) -> int:
    """One growing number per moment of a run: the axis of logs and checkpoints."""
    return clock.total_updates + clock.total_env_steps


def _identity(task: Task) -> dict[str, Any] | None:
    """What the dataset of a task was: id, origin, sha256."""
    if task.data is None:
        return None
    return {
        "id": task.data.id,
        "origin": task.data.origin,
        "sha256": datasets.sha256(task.data.path),
    }


@contextmanager
def _belonging(path: Path) -> Iterator[None]:
    """What a checkpoint of another agent or configuration causes, as one line."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the checkpoint {path} was not written by the run that {CONFIG} describes "
            f"({type(error).__name__}: {reason[:200]}): put back the file or the checkpoint that "
            "belongs there, or train anew"
        ) from error


def _check_stages(agent: Agent, tasks: list[Task], state: Mapping[str, Any]) -> None:
    """A larger budget must lie ahead: what a finished stage would have done is not made up for."""
    clock = Clock(**state["clock"])
    before = agent.stages(Task.from_plain(state["tasks"][clock.task]))
    after = agent.stages(tasks[clock.task])
    passed, now = before[: clock.stage], before[clock.stage]
    if after[: clock.stage] != passed or after[clock.stage].name != now.name:
        how = "extend --env-steps instead" if now.env_steps else "train anew with a larger budget"
        raise UserError(
            f"the run is in its stage {now.name!r} and cannot be given a longer earlier one: {how}"
        )


def _ended_schedules(agent: Agent, tasks: list[Task], state: Mapping[str, Any]) -> list[str]:
    """What a longer run should know: a schedule keeps its first length, and then its last value."""
    if all(
        (task.updates, task.env_steps) == (before["updates"], before["env_steps"])
        for task, before in zip(tasks, state["tasks"], strict=True)
    ):
        return []
    return [
        f"the learning rate of {name!r} was scheduled over {total} updates and is 0 from there on, "
        "so that this network no longer learns: a longer schedule needs a run of its own"
        for part in agent.contained()
        for name, total in part.schedules.items()
        if total and name not in part.schedule_starts  # those end with a stage of their own
    ]


def _check_data(tasks: list[Task], saved: list[Any], folder: Path) -> None:
    for task, before in zip(tasks, saved, strict=True):
        now = _identity(task)
        if before is not None and (now is None or now["sha256"] != before["sha256"]):
            raise UserError(
                f"the dataset {task.dataset} is not the one that {folder} was trained on (its "
                f"sha256 was {before['sha256'][:12]}...): put the old file back, or train anew"
            )


def extended(run: RunConfig, updates: int | None, env_steps: int | None) -> RunConfig:
    """The run with a longer last task; a shorter one is refused."""
    last = run.tasks[-1]
    for name, new in (("updates", updates), ("env_steps", env_steps)):
        if new is not None and new < getattr(last, name):
            raise UserError(
                f"--{name.replace('_', '-')} {new} is less than the run's {getattr(last, name)}: "
                "a resumed run can only become longer"
            )
    last = replace(
        last,
        updates=last.updates if updates is None else updates,
        env_steps=last.env_steps if env_steps is None else env_steps,
    )
    return replace(run, tasks=(*run.tasks[:-1], last))


def _results(
    run: RunConfig,
    tasks: list[Task],
    data: list[dict[str, Any] | None],
    trainer: Trainer,
    wall_s: float,
    device: str,
    status: str,
) -> dict[str, Any]:
    """The content of results.json: everything a report needs, raw returns included."""
    evaluations = trainer.evaluations
    plain = config.plain(run.agent)
    return {
        "format": FORMAT,
        "status": status,
        "agent": run.agent_name,
        "agent_config": plain,
        "tasks": [
            {
                "name": task.name,
                "env": task.env,
                "updates": task.updates,
                "env_steps": task.env_steps,
                "reward": task.reward,
                "shift": task.shift,
                "dataset": identity,
                "reference_scores": task.reference_scores,
            }
            for task, identity in zip(tasks, data, strict=True)
        ],
        "seeds": [run.seed + s for s in range(run.seeds)],
        "evaluations": evaluations,
        "last": evaluations[-1] if evaluations else None,
        "best": max(evaluations, key=merit) if evaluations else None,
        **({"lives": lives} if (lives := trainer.lives()) else {}),
        "updates": trainer.clock.counted_updates,
        "env_steps": trainer.clock.total_env_steps,
        "wall_time_s": round(wall_s, 1),
        "updates_per_s": round(trainer.clock.total_updates / max(trainer.seconds, 1e-9), 1),
        "precision": run.precision,
        "compile": run.compile,
        "threads": run.threads,
        "device": device,
        "data_mode": run.data_mode,
        "resources": trainer.agent.resources(),
        "versions": checkpoint.versions(),
    }


def merit(evaluation: dict[str, Any]) -> float:
    """Mean score where there is one, else mean return."""
    values = evaluation["score"] or evaluation["returns"]
    return float(np.mean(values))


def data_score(info: datasets.DatasetInfo) -> tuple[float, float | None]:
    """Mean return of a dataset's episodes, and its normalised score."""
    mean = float(datasets.statistics(datasets.load(info))["return_mean"])
    if info.reference_scores is None:
        return mean, None
    return mean, float(normalized_score(mean, *info.reference_scores))


def write(path: Path, text: str) -> None:
    """Replace a file of a run in one step."""
    atomic.write_text(path, text, "make room and resume")
