#!/usr/bin/env python
"""Kill training with SIGKILL again and again; the end must be that of an uninterrupted run.

    scripts/kill_test.py td3_bc --dataset hopper-medium-v2 --updates 20000 --save-every 100

Everything but the options of this script goes to `rl-shift train`. The run is started in a process
of its own, killed at a random time, resumed, killed again; after the last kill it runs to its end.
Then its last checkpoint is compared, bit by bit, with that of a run that nobody disturbed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TRAIN = (sys.executable, "-m", "rl_shift", "train")
POLL_S = 0.005
TIMES = ("seconds", "wall_s")  # what may differ: how long it took


@dataclass
class Kill:
    """One SIGKILL."""

    after_s: float  # since the process started
    resumed_from: int | None  # position of the checkpoint it began with
    newest: int | None  # position of the checkpoint it left
    unfinished: int  # checkpoints it was writing or removing


@dataclass
class Outcome:
    """What happened, and the places at which the two ends differ."""

    whole_s: float
    kills: list[Kill] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def kill_test(arguments: Sequence[str], folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Train twice with `arguments`: undisturbed, and with `kills` kills at random times."""
    whole, killed = folder / "whole", folder / "killed"
    seen: list[tuple[float, int]] = []  # when a checkpoint was first seen, and its position
    began = time.monotonic()
    process = start(arguments, whole)
    while process.poll() is None:
        position = newest(whole)
        if position is not None and (not seen or position > seen[-1][1]):
            seen.append((time.monotonic() - began, position))
        time.sleep(POLL_S)
    ended(process, whole)
    outcome = Outcome(time.monotonic() - began)
    first_s, last = seen[0][0], seen[-1][1]
    interval_s = (seen[-1][0] - first_s) / max(len(seen) - 1, 1)
    generator = np.random.default_rng(seed)
    while len(outcome.kills) < kills:
        before = newest(killed)
        target, deadline = last + 1, generator.uniform(0, first_s)
        if generator.random() < 0.75:  # in training, else while it starts
            target = (before or 0) + generator.uniform(0, 0.8 * last / kills)
            deadline = np.inf
        began = time.monotonic()
        process = start(arguments, killed)
        while process.poll() is None and time.monotonic() - began < deadline:
            if deadline == np.inf and (newest(killed) or 0) > target:
                deadline = time.monotonic() - began + generator.uniform(0, 2 * interval_s)
            time.sleep(POLL_S)
        if process.poll() is not None:
            ended(process, killed)
            break  # nothing is left to be killed
        process.kill()
        process.wait()
        found = [*killed.glob("checkpoints/.tmp-*"), *killed.glob("checkpoints/*.replaced")]
        after_s = time.monotonic() - began
        outcome.kills.append(Kill(after_s, before, newest(killed), len(found)))
    ended(start(arguments, killed), killed)
    outcome.differences = list(differences(state(whole), state(killed)))
    return outcome


def start(arguments: Sequence[str], run_dir: Path) -> subprocess.Popen[bytes]:
    """The command line of a user: resume where there is a checkpoint, else train."""
    if newest(run_dir) is None:
        command = [*TRAIN, *arguments, "--run-dir", str(run_dir), "--overwrite"]
    else:
        command = [*TRAIN, "--resume", str(run_dir)]
    with run_dir.with_suffix(".log").open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Wait for the process; it must not fail."""
    if process.wait() != 0:
        log = run_dir.with_suffix(".log").read_text(encoding="utf-8")
        raise SystemExit(f"training failed with exit code {process.returncode}:\n{log}")


def newest(run_dir: Path) -> int | None:
    """Position of the newest whole checkpoint; None where there is none."""
    from rl_shift import checkpoint
    from rl_shift.errors import UserError

    try:
        return int(checkpoint.latest(run_dir).name.removesuffix(".replaced").rpartition("_")[2])
    except UserError:
        return None


def state(run_dir: Path) -> dict[str, Any]:
    """The last checkpoint's state, times apart."""
    from rl_shift import checkpoint

    found, _ = checkpoint.load(checkpoint.latest(run_dir))
    return {key: value for key, value in found.items() if key not in TIMES}


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Paths at which two states are not bitwise equal."""
    import torch

    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            # Gymnasium seeds an environment's spaces from the system; nobody draws from them.
            if "/envs/" not in path or not str(key).endswith("observation_space"):
                yield from differences(a.get(key), b.get(key), f"{path}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{path}/{i}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield path
    elif type(a) is not type(b) or a != b:
        yield path


def main() -> int:
    """Run it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kill-seed", type=int, default=0, help="of the random times")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_test(arguments, Path(folder), options.kills, options.kill_seed)
    print(f"undisturbed run: {outcome.whole_s:.1f} s\n")
    print("| kill | after s | resumed from | newest checkpoint | unfinished ones left |")
    print("|---|---|---|---|---|")
    for number, kill in enumerate(outcome.kills, 1):
        start, left = ("none" if k is None else k for k in (kill.resumed_from, kill.newest))
        print(f"| {number} | {kill.after_s:.2f} | {start} | {left} | {kill.unfinished} |")
    print(f"\n{len(outcome.kills)} kills; differences from the undisturbed run: ", end="")
    print(", ".join(outcome.differences) or "none")
    return 1 if outcome.differences or len(outcome.kills) < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())
