"""The command `demo`: train on the bundled dataset, evaluate, show the result beside the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_shift import config
from rl_shift.commands import run_training
from rl_shift.errors import UserError
from rl_shift.evaluate_command import EvaluationSettings, evaluated
from rl_shift.options import Parser, options_of, split

SUITE = "demo"  # the preset <agent>.demo says which agent, dataset and budget


@dataclass(frozen=True)
class DemoSettings:
    """Flags of `rl-shift demo`."""

    updates: int | None = None  # gradient updates; default: the preset's
    episodes: int = 20  # of the final evaluation
    seed: int = 0
    threads: int = 1  # CPU threads
    run_dir: str | None = None  # default: runs/AGENT.DATA.seedN.TIME


def demo(argv: list[str]) -> int:
    """`rl-shift demo`."""
    words, flags = split(argv, switches=("--help", "-h"))
    parser = Parser(
        options_of(DemoSettings),
        usage="rl-shift demo [options]",
        description="Trains for a few minutes on the dataset that comes with the package, "
        "evaluates in MuJoCo and shows the result beside the data's own.",
    )
    if {"--help", "-h"} & set(flags):
        parser.parser.print_help()
        return 0
    if words:
        raise UserError(f"rl-shift demo takes no argument {words[0]!r}; see rl-shift demo --help")
    settings = DemoSettings(**(parser.defaults() | parser.flags(flags)))
    preset = next(name for name in config.presets() if name.partition(".")[2] == SUITE)
    given: dict[str, Any] = {"seed": settings.seed, "threads": settings.threads}
    given["run_dir"] = settings.run_dir
    if settings.updates is not None:
        given["tasks.0.updates"] = settings.updates
    run = config.make(preset=preset, overrides=given)
    dataset = str(run.tasks[0].dataset)
    print(f"{run.agent_name} on {dataset}: {run.tasks[0].updates:,} updates", flush=True)
    folder = run_training(run)
    _show(folder, dataset, settings)
    return 0


def _show(folder: Path, dataset: str, settings: DemoSettings) -> None:
    """The policy's return and score beside the data's, and where everything lies."""
    from rl_shift import checkpoint, datasets, loggers
    from rl_shift.plotting import learning_curve
    from rl_shift.runs import data_score

    info = datasets.resolve(dataset)
    data_return, score_of_data = data_score(info)
    episodes = EvaluationSettings(episodes=settings.episodes, seed=settings.seed)
    [(_, result)] = evaluated(str(folder), {}, episodes)
    score = None if result.score is None else float(result.score.mean())
    print(f"\n{'':12}{'mean return':>12}{'D4RL-normalised score':>24}")
    for name, value, scaled in (
        ("the data", data_return, score_of_data),
        ("the policy", float(result.returns.mean()), score),
    ):
        print(f"{name:12}{value:12.1f}{'' if scaled is None else f'{scaled:24.1f}'}")
    print(f"({settings.episodes} episodes of the policy in {result.env_id})\n")
    try:
        picture = str(learning_curve(folder, data_return))
    except UserError as error:
        picture = f"none: {error}"
    print(f"learning curve: {picture}")
    print(f"TensorBoard:    tensorboard --logdir {folder / loggers.EVENTS}")
    print(f"checkpoint:     {checkpoint.latest(folder)}")
