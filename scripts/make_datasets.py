#!/usr/bin/env python
"""Rebuild the data of RESULTS.md in D4RL's layout: Deep OPE policies, task families, a replay."""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy reads it

ORIGIN = "D4RL-layout data regenerated from Deep OPE policies"
ENVS = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}
POLICY_FILES = {"hopper": "hopper", "walker2d": "walker", "halfcheetah": "halfcheetah"}
SETS = ("medium", "expert", "mixed", "medium-expert")
BODIES = {"WalkerRandParams": "walker2d", "HopperRandParams": "hopper"}  # families of bodies
# Who makes the data of a family with goals: agent, settings, env steps until medium and expert.
GOAL_AGENTS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "CheetahVel": ("sac", {}, (80_000, 400_000)),
    "AntDir": (
        "ant_dir_sac:AntDirSAC",
        {"precision": "medium", "agent_config": {"updates_per_collect": 8}},
        (200_000, 400_000),
    ),
}
# Snapshots whose returns are nearest to D4RL's sets; they share the steps evenly.
SNAPSHOTS: dict[str, dict[str, tuple[str, ...]]] = {
    "hopper": {"medium": ("3",), "mixed": ("random", "0", "1", "2", "3"), "expert": ("6",)},
    "walker2d": {"medium": ("3",), "mixed": ("random", "0", "1", "2", "3"), "expert": ("9",)},
    "halfcheetah": {"medium": ("1",), "mixed": ("random", "0", "1"), "expert": ("10",)},
}


def file_name(env: str, kind: str, steps: int) -> str:
    """Such as deep-ope-hopper-medium-500k.hdf5."""
    size = f"{steps // 1000}k" if steps % 1000 == 0 else str(steps)
    return f"deep-ope-{env}-{kind}-{size}.hdf5"


def policies(env: str, kind: str, folder: Path) -> list[str | Path]:
    """The policies of a set: npz files, or "random"."""
    sets = SNAPSHOTS[env]
    names = sets["medium"] + sets["expert"] if kind == "medium-expert" else sets[kind]
    stem = POLICY_FILES[env]
    return [name if name == "random" else folder / f"{stem}_online_{name}.npz" for name in names]


def policy_folder(given: Path | None) -> Path:
    """Where the npz files of the Deep OPE policies lie."""
    from rl_shift.dataset_lookup import roots
    from rl_shift.errors import UserError

    asked = [given] if given else [root / "policies" / "deep_ope" for root in roots()]
    folder = next((path for path in asked if path.is_dir()), None)
    if folder is None:
        tried = ", ".join(map(str, asked)) or "RL_SHIFT_DATA is not set"
        raise UserError(
            f"no folder of policies ({tried}): give --policies DIR, or set RL_SHIFT_DATA to "
            "folders of which one has policies/deep_ope"
        )
    return folder


def deep_ope(arguments: argparse.Namespace) -> None:
    """Makes the missing ones of the chosen sets; finished files are left alone."""
    from rl_shift.recording import record

    folder = policy_folder(arguments.policies)
    for kind in arguments.set or SETS[:3]:
        for env in arguments.env or ENVS:
            out = arguments.out / file_name(env, kind, arguments.steps)
            if out.exists():
                print(f"{out}: exists", flush=True)
                continue
            start = time.perf_counter()
            record(
                policies(env, kind, folder),
                ENVS[env],
                arguments.steps,
                out,
                seed=arguments.seed,
                origin=ORIGIN,
            )
            seconds = time.perf_counter() - start
            print(f"{out}: {seconds:.0f} s, {arguments.steps / seconds:.0f} steps/s", flush=True)


def replay(arguments: argparse.Namespace) -> None:
    """Thins the replay buffer of a run of ours; the bundled dataset was made this way."""
    from rl_shift.replay import record_replay

    path = record_replay(arguments.run_dir, arguments.out, arguments.rows, arguments.origin)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def trained(folder: Path, name: str, env_steps: int) -> None:
    """A SAC run that observes the goal, brought to `env_steps`; one seed, 8 lanes."""
    from rl_shift import api, runs

    if not (folder / "checkpoints").is_dir():
        agent, settings, _ = GOAL_AGENTS[name]
        api.train(
            agent, env=f"rl_shift/{name}Goals-v0", env_steps=env_steps, run_dir=folder, lanes=8,
            compile="on", save_every=40_000, log_every=4000, eval_every=40_000, overwrite=True,
            **settings,
        )  # fmt: skip
        return
    results = folder / "results.json"
    found = json.loads(results.read_text()) if results.is_file() else {}
    if found.get("status") != "finished":
        runs.resume(folder)
        found = json.loads(results.read_text())
    if found["env_steps"] < env_steps:
        runs.resume(folder, env_steps=env_steps)


def mean_return(policy: str | Path, env: str, folder: Path) -> float:
    """Of 20 episodes, on seeds that no dataset has."""
    from rl_shift.datasets import episode_returns, load
    from rl_shift.recording import record

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = record([policy], env, 4000, Path(scratch) / "episodes.hdf5", seed=2**20)
        return float(episode_returns(load(path, cache=False)).mean())


def sequence(family: str, name: str | None) -> tuple[int, ...]:
    """The members of a sequence of a family."""
    from rl_shift.envs.families import SEQUENCES
    from rl_shift.errors import UserError

    if name is None:
        return ()
    if f"{family}/{name}" not in SEQUENCES:
        raise UserError(f"--sequence {family}/{name} is none of {', '.join(SEQUENCES)}")
    return SEQUENCES[f"{family}/{name}"]


def goal_conditioned(arguments: argparse.Namespace) -> dict[str, str | Path]:
    """Medium and expert of a family with goals: one SAC that sees the goal, early and late."""
    name, out = arguments.family, arguments.out
    medium_steps, env_steps = GOAL_AGENTS[name][2]
    medium, expert = out / f"{name}.sac-medium", out / f"{name}.sac-expert"
    trained(medium, name, arguments.medium_steps or medium_steps)
    if not expert.exists():
        copy = expert.with_name(expert.name + ".partial")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(medium, copy)
        copy.rename(expert)
    trained(expert, name, arguments.env_steps or env_steps)
    return {"medium": medium, "expert": expert}


def family(arguments: argparse.Namespace) -> None:
    """Random, medium and expert data of every member.

    Families with goals: from one goal-conditioned SAC. Families of bodies: from the Deep OPE
    policies of the unchanged body, which walk in most members. Reference scores: the mean returns
    of the random policy and of the expert, 20 episodes each.
    """
    from rl_shift.recording import record

    name, out = arguments.family, arguments.out
    members = [*arguments.member, *sequence(name, arguments.sequence)]
    out.mkdir(parents=True, exist_ok=True)
    body, made_by = BODIES.get(name), "a goal-conditioned SAC of ours"
    if body:
        folder, made_by = policy_folder(arguments.policies), "Deep OPE, trained on another body"
        found = {kind: policies(body, kind, folder)[0] for kind in ("medium", "expert")}
    else:
        found = goal_conditioned(arguments)
    qualities: dict[str, str | Path] = {"random": "random", **found}
    summary = out / f"{name}.returns.json"
    table: dict[str, dict[str, float]] = {}
    if summary.is_file():  # of other members, made before
        table = json.loads(summary.read_text())
    for member in members:
        env = f"rl_shift/{name}-{member}-v0"
        if env not in table:
            table[env] = {k: mean_return(policy, env, out) for k, policy in qualities.items()}
        print(env, {k: round(v, 1) for k, v in table[env].items()}, flush=True)
        for quality, policy in qualities.items():
            path = out / f"rlshift-{name.lower()}-{member}-{quality}-v0.hdf5"
            if path.exists():
                print(f"{path}: exists", flush=True)
                continue
            record(
                [policy],
                env,
                arguments.steps,
                path,
                seed=arguments.seed,
                origin=f"rl_shift: {name}, {quality} policy of {made_by}",
                reference_scores=(table[env]["random"], table[env]["expert"]),
            )
    written = summary.with_name(f".{summary.name}.partial")
    written.write_text(json.dumps(table, indent=2))
    written.rename(summary)


def main() -> int:
    """Parses the command line; 0, or 2 after a mistake the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("deep-ope", help="sets from the Deep OPE SAC policies")
    command.add_argument("--env", action="append", choices=list(ENVS), help="default: all")
    command.add_argument("--set", action="append", choices=SETS, help="default: the first three")
    command.add_argument("--steps", type=int, default=500_000)
    command.add_argument("--out", type=Path, default=Path("datasets"))
    command.add_argument("--policies", type=Path, help="default: $RL_SHIFT_DATA/policies/deep_ope")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=deep_ope)
    command = commands.add_parser("family", help="members of a family of tasks")
    command.add_argument("family", choices=(*GOAL_AGENTS, *BODIES))
    command.add_argument("--member", action="append", type=int, default=[])
    command.add_argument("--sequence", help="all members of one: cugro, ten, cod-4, cod-6, four")
    command.add_argument("--steps", type=int, default=100_000, help="of each dataset")
    medium, expert = (
        ", ".join(f"{name} {found[2][place]}" for name, found in GOAL_AGENTS.items())
        for place in (0, 1)
    )
    command.add_argument("--medium-steps", type=int, help=f"until medium; default: {medium}")
    command.add_argument("--env-steps", type=int, help=f"until expert; default: {expert}")
    command.add_argument("--out", type=Path, default=Path("datasets"))
    command.add_argument("--policies", type=Path, help="of families of bodies; see deep-ope")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=family)
    command = commands.add_parser("replay", help="episodes of a trained run's replay buffer")
    command.add_argument("run_dir", type=Path, help="such as runs/sac.Hopper-v5.seed0")
    command.add_argument("--rows", type=int, default=45_000, help="at most; default 45000")
    command.add_argument("--out", type=Path, default=Path("replay.hdf5"))
    command.add_argument("--origin", default="replay buffer of an rl_shift run")
    command.set_defaults(run=replay)
    arguments = parser.parse_args()
    from rl_shift.errors import UserError

    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
