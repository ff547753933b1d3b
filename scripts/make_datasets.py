"""Rebuild the data of RESULTS.md: sets in D4RL's layout, rolled out from the Deep OPE policies."""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy reads it

ORIGIN = "D4RL-layout data regenerated from Deep OPE policies"
ENVS = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}
POLICY_FILES = {"hopper": "hopper", "walker2d": "walker", "halfcheetah": "halfcheetah"}
SETS = ("medium", "expert", "mixed", "medium-expert")
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


def deep_ope(arguments: argparse.Namespace) -> None:
    """Makes the missing ones of the chosen sets; finished files are left alone."""
    from rl_shift.errors import UserError
    from rl_shift.recording import record

    root = os.environ.get("RL_SHIFT_DATA")
    folder = arguments.policies or (Path(root) / "policies" / "deep_ope" if root else None)
    if folder is None or not folder.is_dir():
        raise UserError(
            f"policy folder {folder} does not exist; give --policies DIR or set RL_SHIFT_DATA"
        )
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
