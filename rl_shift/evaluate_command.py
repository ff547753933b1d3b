"""The command `evaluate`: returns of a run's checkpoint, or paired comparisons on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_shift import atomic, config
from rl_shift.commands import check_seed, existing_run, limit_torch
from rl_shift.errors import UserError
from rl_shift.options import Parser, options_of, split

if TYPE_CHECKING:
    from rl_shift.agent import Agent
    from rl_shift.config import Task
    from rl_shift.evaluation import Result
    from rl_shift.metrics import Interval

    Results = list[tuple[Task, Result]]  # one entry per task
    Variant = tuple[dict[str, Any], Results]  # evaluation-time values, results


TAILS = (5, 10, 25)  # per cent of the episodes


@dataclass(frozen=True)
class EvaluationSettings:
    """Flags of `rl-shift evaluate`."""

    episodes: int = 100  # per task and seed
    env: str | None = None  # Gymnasium id; default: the run's own environments
    shift: str | None = None  # KIND:field=value,...+...: of the environments; none: leave it out
    seed: int = 0  # of the environments; equal seeds give equal initial states
    lanes: int = 10  # environments side by side
    sample: bool = False  # play the policy as it acted in training, exploring: the one a life used
    compare: str | None = None  # FIELD=A,B: the same episodes with each value, paired
    json: str | None = None  # also write every return to this file
    video: str | None = None  # folder: also film the first episode of every task and seed
    video_steps: int = 0  # film so many steps of it at most; 0: all of it
    threads: int = 1  # CPU threads


def evaluate(argv: list[str]) -> int:
    """`rl-shift evaluate`."""
    words, flags = split(argv, switches=("--help", "-h"))
    if any(flag.partition("=")[0] == "--ope" for flag in flags):
        from rl_shift.ope_command import ope

        return ope(words, flags)
    parser = Parser(
        options_of(EvaluationSettings),
        usage="rl-shift evaluate RUN_DIR[#k] [options] [--agent.FIELD V]...\n"
        "       rl-shift evaluate POLICY... --ope fqe --dataset ID|PATH [options]",
        description="Evaluates the last checkpoint of a run on whole episodes. RUN_DIR#k takes the "
        "k-th of several seeds. --agent.FIELD and --compare accept the fields that the agent marks "
        "as evaluation-time.",
    )
    if {"--help", "-h"} & set(flags):
        parser.parser.print_help()
        return 0
    if len(words) != 1:
        raise UserError(f"give one RUN_DIR, not {len(words)}: rl-shift evaluate RUN_DIR")
    own = [flag for flag in flags if flag.startswith("--agent.")]
    values = parser.flags([flag for flag in flags if flag not in own])
    settings = EvaluationSettings(**(parser.defaults() | values))
    spec = words[0]
    requested = _requested(spec, own, settings.compare)
    _check(settings)
    limit_torch(settings.threads)
    variants = [(change, evaluated(spec, change, settings)) for change in requested]
    for change, results in variants:
        for task, result in results:
            print(_line(task, result, change, settings.sample))
            for detail in _details(task, result, risk=settings.compare is not None):
                print(f"  {detail}")
    pairs = [paired(variants[0], later) for later in variants[1:]]
    for line in [line for pair in pairs for line in pair]:
        print(line["text"])
    if settings.json is not None:
        report = json.dumps(_report(spec, settings, variants, pairs), indent=1)
        atomic.write_text(Path(settings.json), report + "\n", "choose another --json")
    if settings.video is not None:
        _film(spec, requested[0], settings)
    return 0


def _film(spec: str, change: Mapping[str, Any], settings: EvaluationSettings) -> None:
    """The first episode of every task and seed as a file."""
    from rl_shift.video import film

    agent, tasks = _loaded(spec, change, settings)
    folder, steps = Path(str(settings.video)), settings.video_steps
    for task in tasks:
        for one in film(agent, task, folder, settings.seed, settings.sample, steps):
            print(f"video: {one.path} (return {one.total:.1f} in {one.steps} steps)")


def _requested(spec: str, flags: list[str], compare: str | None) -> list[dict[str, Any]]:
    """The evaluation-time values of every variant, checked against the run's agent."""
    run = config.load(existing_run(spec) / "config.yaml")
    given = {}
    for flag in flags:
        name, equals, value = flag.removeprefix("--agent.").partition("=")
        if not equals:
            raise UserError(f"--agent.{name} needs a value")
        given[name] = value
    texts = [given]
    if compare is not None:
        field, choices = compared(compare)
        texts = [given | {field: choice} for choice in choices]
    return [config.evaluation_overrides(type(run.agent), text) for text in texts]


def compared(text: str) -> tuple[str, list[str]]:
    """`agent.FIELD=A,B` or `FIELD=A,B`: the field and its values; brackets keep commas together."""
    field, equals, values = text.partition("=")
    choices, depth = [""], 0
    for letter in values:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            choices.append("")
        else:
            choices[-1] += letter
    if not equals or len(choices) < 2 or not all(choices):
        raise UserError(f"--compare {text!r} must look like FIELD=A,B")
    return field.removeprefix("agent."), choices


def evaluated(spec: str, overrides: Mapping[str, Any], settings: EvaluationSettings) -> Results:
    """One result per task of the run; with `env` just one."""
    from rl_shift.evaluation import evaluate as play

    agent, tasks = _loaded(spec, overrides, settings)
    results = []
    for task in tasks:
        agent.focus(task)
        result = play(
            agent,
            str(task.env),
            episodes=settings.episodes,
            seed=settings.seed,
            lanes=settings.lanes,
            reference_scores=task.reference_scores,
            obs_pad=task.obs_pad,
            shift=task.shift,
            diagnose=True,
            explore=settings.sample,
        )
        results.append((task, result))
    return results


def _loaded(
    spec: str, overrides: Mapping[str, Any], settings: EvaluationSettings
) -> tuple[Agent, list[Task]]:
    """The agent, and its tasks as they are to be played."""
    from rl_shift import runs
    from rl_shift.dataset_table import reference_scores_of

    agent, _, tasks = runs.load_agent(spec, dict(overrides))
    if settings.env is not None:
        tasks = [task for task in tasks if task.env == settings.env][-1:] or [
            _unseen(settings.env, agent)
        ]
        scores = reference_scores_of(settings.env) or tasks[0].reference_scores
        tasks = [replace(tasks[0], shift=None, reference_scores=scores)]
    if settings.shift is not None:
        shift = None if settings.shift == "none" else _shift(settings.shift, agent)
        tasks = [replace(task, shift=shift) for task in tasks]
    for task in tasks:
        if task.env is None:
            raise UserError(f"task {task.name!r} of {spec} names no environment: give --env ID")
    return agent, tasks


def _unseen(env_id: str, agent: Agent) -> Task:
    """A task that the agent was not trained on: whatever it acts with where its spaces fit."""
    from rl_shift import envs
    from rl_shift.config import Task

    last = agent.begun[-1] if agent.begun else None
    pad = 0 if last is None else last.obs_pad
    env = envs.make_env(env_id, obs_pad=pad)
    spaces = env.observation_space, env.action_space
    env.close()
    return Task(
        name=env_id,
        env=env_id,
        obs_pad=pad,
        observation_space=spaces[0],
        action_space=spaces[1],
    )


def _shift(text: str, agent: Agent) -> Any:
    """The specification; relative noise is in units of the deviation that the agent knows."""
    from rl_shift.envs.shift import with_state_std

    for part in agent.contained():
        std = part.normalizer.std
        std = std[0] if std.dim() > 1 else std  # equal over seeds
        if std.dim() == 1 and not bool((std == 1).all()):
            return with_state_std(text, std.tolist())
    return text


def paired(first: Variant, second: Variant) -> list[dict[str, Any]]:
    """Second minus first, episode by episode, with 95 % intervals, per task.

    Of the mean, Student's t over the episodes of one policy, or over the means of several seeds,
    whose episodes are not independent; of the lower tails' difference, from redrawn pairs of
    episodes, as a tail rests on few of them.
    """
    from rl_shift.evaluation import differences, normalized_spread
    from rl_shift.metrics import mean_interval

    lines = []
    for (task, before), (_, after) in zip(first[1], second[1], strict=True):
        difference, unit = differences(after, before), "return"
        if task.reference_scores is not None:
            difference = normalized_spread(difference, *task.reference_scores)
            unit = "D4RL-normalised score"
        seeds, episodes = difference.shape
        _, low, high = mean_interval(difference.mean(1) if seeds > 1 else difference)
        over = f"{episodes} paired episodes"
        if seeds > 1:
            over = f"the means of {seeds} seeds, {over} each"
        title = f"{_label(second[0])} minus {_label(first[0])}"
        tails = _tail_differences(task, before, after)
        shown = [f"{k} {t[0]:+.2f} [{t[1]:+.2f}, {t[2]:+.2f}]" for k, t in tails.items()]
        lines.append(
            {
                "task": task.name,
                "what": title,
                "unit": unit,
                "mean": float(difference.mean()),
                "interval": [float(low), float(high)],
                "tails": {
                    name: {"difference": t.value, "interval": [t.low, t.high]}
                    for name, t in tails.items()
                },
                "text": f"{task.name}: {title}: {unit} {difference.mean():+.2f}, 95 % interval "
                f"[{low:+.2f}, {high:+.2f}] over {over}\n"
                f"  {', '.join(shown)} (95 % bootstrap intervals of the pairs)",
            }
        )
    return lines


def _tail_differences(task: Task, before: Result, after: Result) -> dict[str, Interval]:
    """CVaR after minus CVaR before, over all episodes, on the scale of the score."""
    from rl_shift.evaluation import normalized_score
    from rl_shift.metrics import conditional_value_at_risk, paired_bootstrap_interval

    first, second = after.returns.ravel(), before.returns.ravel()
    if task.reference_scores is not None:
        first, second = (normalized_score(x, *task.reference_scores) for x in (first, second))
    return {
        f"CVaR {percent} %": paired_bootstrap_interval(
            first, second, partial(conditional_value_at_risk, fraction=percent / 100)
        )
        for percent in TAILS
    }


def _line(task: Task, result: Result, change: Mapping[str, Any], sampled: bool) -> str:
    """Mean over everything, spread over episodes, and each seed where there are several."""
    returns = result.returns
    text = f"{task.name} on {result.env_id}{', ' + _label(change) if change else ''}"
    text += f"{', exploring' if sampled else ''}: "
    text += f"return {returns.mean():.1f} (std {returns.std():.1f} over {returns.size} episodes)"
    if result.score is not None:
        text += f", D4RL-normalised score {result.score.mean():.1f}"
    if returns.shape[0] > 1:
        per_seed = result.score if result.score is not None else returns.mean(axis=1)
        text += f" (seeds: {', '.join(f'{value:.1f}' for value in per_seed)})"
    return text


def risks(task: Task, result: Result) -> dict[str, float]:
    """VaR and CVaR of all episodes (lower tail: larger is better), on the scale of the score."""
    from rl_shift.evaluation import normalized_score
    from rl_shift.metrics import conditional_value_at_risk, value_at_risk

    returns = result.returns.ravel()
    if task.reference_scores is not None:
        returns = normalized_score(returns, *task.reference_scores)
    found = {}
    for percent in TAILS:
        found[f"VaR {percent} %"] = float(value_at_risk(returns, percent / 100))
        found[f"CVaR {percent} %"] = float(conditional_value_at_risk(returns, percent / 100))
    return found


def _details(task: Task, result: Result, risk: bool) -> list[str]:
    """The lower tail, and what the agent says about its own actions."""
    numbers = [risks(task, result)] if risk else []
    numbers.append({key: float(value.mean()) for key, value in result.diagnostics.items()})
    return [
        ", ".join(f"{key} {value:.4g}" for key, value in some.items()) for some in numbers if some
    ]


def _label(change: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={value}" for field, value in change.items())


def _report(
    spec: str, settings: EvaluationSettings, variants: list[Variant], pairs: list[Any]
) -> dict[str, Any]:
    evaluations = [
        {
            "task": task.name,
            "env": result.env_id,
            "agent": dict(change),
            "returns": result.returns.tolist(),
            "lengths": result.lengths.tolist(),
            "score": None if result.score is None else result.score.tolist(),
            "risk": risks(task, result),
            "diagnostics": {key: value.tolist() for key, value in result.diagnostics.items()},
            "reference_scores": task.reference_scores,
        }
        for change, results in variants
        for task, result in results
    ]
    lines = [line for pair in pairs for line in pair]
    return {
        "format": 1,
        "run": spec,
        "episodes": settings.episodes,
        "shift": settings.shift,
        "seed": settings.seed,
        "sample": settings.sample,
        "evaluations": evaluations,
        "differences": [{k: v for k, v in line.items() if k != "text"} for line in lines],
    }


def _check_replaceable(path: Path) -> None:
    """An older evaluation may be replaced, another kind of file is somebody's mistake."""
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(1) not in b"{[":
                raise UserError(f"--json {path} exists and is no JSON file: choose another --json")


def _check(settings: EvaluationSettings) -> None:
    """Refuses before the episodes are played, not after."""
    for name in ("episodes", "lanes"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    check_seed(settings.seed)
    if settings.json is not None:
        atomic.check_writable(Path(settings.json), "choose another --json")
        _check_replaceable(Path(settings.json))
    if settings.video_steps < 0:
        raise UserError(f"--video-steps must be at least 0, not {settings.video_steps}")
    if settings.video is not None:
        from rl_shift.video import film_writer

        film_writer()
