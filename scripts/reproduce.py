#!/usr/bin/env python
"""Reproduce the tables of RESULTS.md: data, training, final evaluations and the report.

    scripts/reproduce.py baselines --sets hopper-medium --agents bc --seeds 1

Everything takes many hours; an estimate is printed before training starts. The same command goes on
where it stopped. Runs lie in OUT/AGENT.ENV-SET, their final evaluations beside them.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch read it

ENVS, KINDS = ("hopper", "walker2d", "halfcheetah"), ("medium", "mixed", "expert")
SETS = [f"{env}-{kind}" for kind in KINDS for env in ENVS]
UPDATES = {"bc": 50_000, "td3_bc": 100_000, "iql": 100_000}
SETTINGS = {
    "compile": "on", "log_every": 1000, "save_every": 25_000,
    "eval_every": 10_000, "eval_episodes": 10,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=("baselines",))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, metavar="ENV-SET")
    parser.add_argument("--agents", nargs="+", default=list(UPDATES), metavar="AGENT")
    parser.add_argument("--updates", type=int, help="default: 50,000 for bc, 100,000 for others")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--precision", choices=("highest", "high", "medium"), default="highest",
        help="of matrix products; medium is faster on a CPU with AMX",
    )  # fmt: skip
    parser.add_argument("--episodes", type=int, default=50, help="of the final evaluation")
    parser.add_argument("--steps", type=int, default=500_000, help="of each dataset")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--data", type=Path, default=Path("datasets"), help="for new datasets")
    parser.add_argument("--processes", type=int, help="runs at a time; default: usable cores")
    return parser.parse_args()


def main() -> int:
    """Everything that is not done yet; 0, 1 if a run failed, 2 after a user's mistake."""
    given = arguments()
    from rl_shift.errors import UserError

    try:
        return reproduce(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return 130


def dataset(name: str, steps: int) -> str:
    """The id that scripts/make_datasets.py gives a set."""
    return f"deep-ope-{name}-" + (f"{steps // 1000}k" if steps % 1000 == 0 else f"{steps}")


def make_missing(given: argparse.Namespace) -> None:
    """Roll out the datasets that are in none of the dataset folders."""
    from rl_shift import datasets
    from rl_shift.dataset_lookup import roots
    from rl_shift.errors import UserError

    named = [str(root) for root in roots()]
    os.environ["RL_SHIFT_DATA"] = os.pathsep.join([*named, str(given.data)])
    script = str(Path(__file__).with_name("make_datasets.py"))
    for name in given.sets:
        try:
            datasets.resolve(dataset(name, given.steps))
            continue
        except UserError:
            print(f"{dataset(name, given.steps)}: not found, is made in {given.data}", flush=True)
        env, _, kind = name.partition("-")
        command = [sys.executable, script, "deep-ope", "--env", env, "--set", kind]
        command += [f"--steps={given.steps}", f"--out={given.data}"]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"the dataset {name} could not be made, see above")


def reproduce(given: argparse.Namespace) -> int:
    """Datasets, runs, final evaluations, report."""
    from rl_shift import config
    from rl_shift.evaluate_command import evaluate
    from rl_shift.grid import Planned
    from rl_shift.report import report
    from rl_shift.separate_seeds import finished, jobs
    from rl_shift.sweep import Sweep, SweepSettings

    make_missing(given)
    planned = []
    for name in given.sets:
        for agent in given.agents:
            own = {"seeds": given.seeds, "tasks.0.dataset": dataset(name, given.steps)}
            own["precision"] = given.precision
            own["tasks.0.updates"] = given.updates or UPDATES.get(agent, 100_000)
            planned.append(Planned(f"{agent}.{name}", config.make(agent, overrides=SETTINGS | own)))
    failed = Sweep(planned, given.out, SweepSettings(processes=given.processes)).run()
    finals = []
    for plan in planned:
        folder, final = given.out / plan.name, given.out / f"{plan.name}.final.json"
        if not all(finished(job) for job in jobs(plan.run, folder)):
            continue
        finals.append(str(final))
        if not final.is_file() or final.stat().st_mtime < (folder / "results.json").stat().st_mtime:
            options = [f"--episodes={given.episodes}", "--seed=1000", f"--json={final}"]
            evaluate([str(folder), *options])
    folders = [str(given.out / p.name) for p in planned if (given.out / p.name).is_dir()]
    told = ["--evaluations", *finals] if finals else []
    return failed | report([*folders, *told, "--out", str(given.out / "report")])


if __name__ == "__main__":
    sys.exit(main())
