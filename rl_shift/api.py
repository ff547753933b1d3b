"""Training from a script or a notebook: what `rl-shift train` does, as functions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_shift import config, runs
from rl_shift.config import SHORT_FLAGS, RunConfig

if TYPE_CHECKING:
    from rl_shift.agent import Agent
    from rl_shift.runs import Moment

Callback = Callable[["Moment"], object]


def configure(
    agent: str | type[Agent] | None = None,
    *,
    preset: str | None = None,
    files: Sequence[str | Path] = (),
    agent_config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> RunConfig:
    """A run's configuration; precedence: defaults < preset < files < the rest.

    Args:
        agent: a name that `rl-shift list agents` shows, "module:Class", or a class.
        preset: a name that `rl-shift list presets` shows.
        files: YAML files.
        agent_config: fields of the agent's Config.
        **settings: the flags of `rl-shift train` with underscores: dataset, env, updates, env_steps
            and shift of the first task, and seed, seeds, eval_every, run_dir, ... of the run;
            `tasks`, a list of dicts, where there are several.

    Raises:
        UserError: an unknown key or a value of the wrong type.
    """
    name = agent if isinstance(agent, str | None) else f"{agent.__module__}:{agent.__qualname__}"
    overrides: dict[str, Any] = {f"agent.{k}": v for k, v in (agent_config or {}).items()}
    for number, task in enumerate(settings.pop("tasks", ())):
        overrides |= {f"tasks.{number}.{key}": value for key, value in task.items()}
    for key, value in settings.items():
        text = str(value) if isinstance(value, Path) else value
        overrides[f"tasks.0.{key}" if key in SHORT_FLAGS else key] = text
    return config.make(name, preset=preset, files=files, overrides=overrides)


def train(
    agent: str | type[Agent] | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Train and return the run folder, which every command of `rl-shift` takes.

    Args:
        agent: see `configure`.
        callbacks: each is called with a `Moment` whenever something was logged or evaluated;
            returning False (not None) saves a checkpoint and stops.
        progress: show a bar.
        **settings: see `configure`.
    """
    run = configure(agent, **settings)
    folder = config.run_folder(run)
    run = replace(run, run_dir=str(folder))
    if not callbacks:
        return runs.train(run, progress)
    with closing(runs.moments(run, progress)) as moments:
        for moment in moments:
            if any([callback(moment) is False for callback in callbacks]):
                break
    return folder


def iterate(
    agent: str | type[Agent] | None = None, *, progress: bool = False, **settings: Any
) -> Generator[Moment]:
    """Train as a loop over what is logged; leaving it saves a checkpoint.

    `moment.trainer` is the trainer, for a look at its agent, its buffer and its evaluations.
    """
    return runs.moments(configure(agent, **settings), progress)
