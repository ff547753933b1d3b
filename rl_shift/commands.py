"""The commands `train` and `list`; imported only when one of them runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rl_shift import agents, config, config_source
from rl_shift.errors import UserError, nearest
from rl_shift.options import Parser, options_of, split, taken

if TYPE_CHECKING:
    from rl_shift.config import RunConfig

TRAIN_USAGE = """rl-shift train AGENT|module:Class [--preset NAME] [--config FILE]... [options]
       rl-shift train --preset NAME [options]
       rl-shift train --resume RUN_DIR [--updates N] [--env-steps N]"""

TRAIN_TEXT = """Trains an agent and evaluates it on the way. What is not given comes from --config
files (YAML; the last one wins), then from --preset (`rl-shift list presets`), then from the
agent's own defaults. Further tasks are --tasks.1.dataset and so on. `rl-shift train AGENT --help`
shows that agent's own fields as --agent.FIELD."""


SWITCHES = ("--overwrite", "--help", "-h")  # flags without a value


def train(argv: list[str]) -> int:
    """`rl-shift train`: from the command line to a finished run folder."""
    words, flags = split(argv, SWITCHES)
    if {"--help", "-h"} & set(flags):
        _train_help(*_sources(words, flags))
    elif any(flag.partition("=")[0] == "--resume" for flag in flags):
        _resume(words, flags)
    else:
        run_training(configured(argv))
    return 0


def configured(argv: list[str]) -> RunConfig:
    """The resolved configuration that a command line of `train` asks for."""
    words, flags = split(argv, SWITCHES)
    name, preset, paths = _sources(words, flags)
    layers = config.layers_of(preset, paths)
    return config.resolve(config.chosen_agent(name, preset, layers), layers, flags)


def _sources(words: list[str], flags: list[str]) -> tuple[str | None, str | None, list[str]]:
    """AGENT, the preset and the files; their flags are taken out of `flags`."""
    presets, paths = taken(flags, "--preset"), taken(flags, "--config")
    if len(words) > 1:
        raise UserError(f"unexpected argument {words[1]!r}; give one AGENT, the rest as --flags")
    if len(presets) > 1:
        raise UserError("give one --preset; stack further settings with --config FILE")
    return next(iter(words), None), next(iter(presets), None), paths


def run_training(run: RunConfig, progress: bool = True) -> Path:
    """Trains and says where the result lies."""
    from rl_shift import runs

    run = replace(run, run_dir=str(config.run_folder(run)))
    _say_what(run)
    folder = _stoppable(lambda: runs.train(run, progress=progress), Path(str(run.run_dir)))
    _say_where(folder)
    return folder


def _resume(words: list[str], flags: list[str]) -> None:
    """Goes on with a run; only its budgets may change."""
    folder = taken(flags, "--resume")[-1]
    parser = Parser(options_of(ResumeSettings))
    allowed = {option.flag for option in parser.options.values()}
    refused = words + [f.partition("=")[0] for f in flags if f.partition("=")[0] not in allowed]
    if refused:
        raise UserError(
            "--resume goes on with the run's own configuration and takes only "
            f"{', '.join(sorted(allowed))}, not {refused[0]}"
        )
    settings = ResumeSettings(**(parser.defaults() | parser.flags(flags)))
    existing_run(folder)
    from rl_shift import runs

    done = _stoppable(
        lambda: runs.resume(Path(folder), settings.updates, settings.env_steps), Path(folder)
    )
    _say_where(done)


def _stoppable(work: Callable[[], Path], folder: Path) -> Path:
    """Runs training; Ctrl-C (the trainer has saved by then) says how to go on."""
    try:
        return work()
    except KeyboardInterrupt as stop:
        if any(folder.glob("checkpoints")) or any(folder.glob("seed*/checkpoints")):
            hint = f"stopped and saved; go on with: rl-shift train --resume {folder}"
        else:
            hint = "stopped before the first checkpoint"
        raise KeyboardInterrupt(hint) from stop


def _say_what(run: RunConfig) -> None:
    """The file behind every dataset id, and the environment its policy is evaluated in."""
    from rl_shift import datasets

    found = [(task, datasets.resolve(task.dataset)) for task in run.tasks if task.dataset]
    for task, info in found:
        where = task.env or info.env_id
        print(f"{task.name}: {info.path}", f"evaluated in {where}" if where else "", sep="  ")


def _say_where(folder: Path) -> None:
    print(f"run folder: {folder}")
    print(f"evaluate:   rl-shift evaluate {folder}")
    if len(config.load(folder / "config.yaml").tasks) == 1:  # a sequence ends with its last stage
        print(f"go on:      rl-shift train --resume {folder} [--updates N] [--env-steps N]")


def _train_help(name: str | None, preset: str | None, paths: list[str]) -> None:
    config_class = None
    layers = config.layers_of(preset, paths)
    if name or preset or any("agent_name" in data for _, data in layers):
        agent = config.chosen_agent(name, preset, layers)
        config_class = config_source.config_class(agent) or config.config_class_of(agent)
    known = ", ".join(agents.names())
    parser = config.run_parser(config_class, usage=TRAIN_USAGE, description=TRAIN_TEXT)
    add = parser.parser.add_argument
    add("agent_name", metavar="AGENT", nargs="?", help=f"{known}, or module:Class of your own")
    ready = ", ".join(config.presets())
    add("--preset", metavar="NAME", help=f"settings that come with the package: {ready}")
    add("--config", metavar="FILE", help="YAML file; may be repeated")
    add("--resume", metavar="RUN_DIR", help="go on with a stopped run, or train it longer")
    parser.parser.print_help()


@dataclass(frozen=True)
class ResumeSettings:
    """What may change when a run goes on."""

    updates: int | None = None  # new total of gradient updates
    env_steps: int | None = None  # new total of environment steps


def existing_run(spec: str) -> Path:
    """The folder of RUN_DIR or RUN_DIR#k, which must be a run."""
    folder = Path(spec.partition("#")[0])
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml")
    return folder


def limit_torch(threads: int) -> None:
    """Torch's own thread count; the BLAS libraries got theirs before they were loaded.

    Raises:
        UserError: fewer than one thread.
    """
    if threads < 1:
        raise UserError(f"--threads must be at least 1, not {threads}")
    import torch

    torch.set_num_threads(threads)


def check_seed(seed: int) -> None:
    """Refuses what `rl_shift.seeding` makes no generator of, as a mistake on the command line."""
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed must lie in [0, 2**64), not {seed}")


# ---- list --------------------------------------------------------------------------------------


def listing(argv: list[str]) -> int:
    """`rl-shift list agents|envs|datasets|presets`."""
    kinds: dict[str, Callable[[], None]] = {
        "agents": _list_agents,
        "envs": _list_envs,
        "datasets": _list_datasets,
        "presets": _list_presets,
    }
    if {"--help", "-h"} & set(argv):
        print(f"usage: rl-shift list {'|'.join(kinds)}\n\nLists what the other commands accept.")
        return 0
    if len(argv) != 1 or argv[0] not in kinds:
        hint = nearest(argv[0], kinds) if argv else ""
        raise UserError(f"rl-shift list takes one of {', '.join(kinds)}{hint}")
    kinds[argv[0]]()
    return 0


def _list_agents() -> None:
    names = agents.names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {agents.summary(name)}".rstrip())
    print("\nyour own: rl-shift train module:Class")


def _list_presets() -> None:
    names = config.presets()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  validated: {config.validated(name)}")


def _list_datasets() -> None:
    from rl_shift.data_commands import print_table

    print_table()


def _list_envs() -> None:
    import gymnasium

    import rl_shift.envs  # noqa: F401  (registers ours)

    for env_id, spec in sorted(gymnasium.registry.items()):
        if spec.kwargs.get("member") is None:  # the members of a family follow from its first line
            print(env_id)
    print("\nmembers of the families of tasks: rl_shift/CheetahVel-0-v0, rl_shift/AntDir-0-v0, ...")
    print("\nyour own: --env module:Id-v0")
