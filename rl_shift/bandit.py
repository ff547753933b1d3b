"""`rl-shift report bandit`: what a policy is worth that is chosen by a few online episodes.

The evaluation protocol of "A Clean Slate for Offline Reinforcement Learning" (arXiv 2504.11453):
several trained policies are the arms of a UCB bandit, one pull is one stored episode, and after
every pull the true mean of the arm with the best empirical mean is reported. Two things differ from
its published code: returns are scaled to [0, 1] before the index is computed, so that the bonus
means the same on every task, and arms that were never pulled have no empirical mean (there it was
0, the best of all where returns are negative).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rl_shift import seeding
from rl_shift.errors import UserError
from rl_shift.options import asked
from rl_shift.report_cells import last_of, scored
from rl_shift.report_runs import Gathered, Leg, add_evaluations, gather
from rl_shift.report_sections import labels

Floats = NDArray[np.float64]
EXPLORATION = 2.0  # alpha of the index
FEW = 1000  # stored returns of an arm; the protocol asks for as many

USAGE = "rl-shift report bandit --pool DIR [--pool DIR]... [--evaluations FILE.json]... [options]"
TEXT = """Draws policies at random from a pool of trained ones, lets a UCB bandit choose among them
with stored episodes, and shows the true mean return of its choice by the number of episodes it has
seen: 0 is a random choice. Every seed of every run is one policy; its episodes are those of the
last evaluation, or of a file of `rl-shift evaluate RUN_DIR --json FILE`. Writes bandit.csv, and
bandit.png where matplotlib is installed."""


@dataclass(frozen=True)
class BanditSettings:
    """Flags of `rl-shift report bandit`."""

    arms: int = 8  # policies in a draw
    pulls: int = 200  # online episodes at most
    trials: int = 1000  # draws
    alpha: float = EXPLORATION  # of the exploration bonus
    seed: int = 0  # of the draws
    out: str = "report"  # folder of bandit.csv and bandit.png


@dataclass(frozen=True)
class Curve:
    """Mean over the trials after 0, 1, ... pulls, with its 95 % bootstrap interval, (P + 1,)."""

    mean: Floats
    low: Floats
    high: Floats


def bandit(argv: list[str]) -> int:
    """`rl-shift report bandit`."""
    given = asked(BanditSettings, argv, USAGE, TEXT, repeated=("--pool", "--evaluations"))
    if given is None:
        return 0
    words, settings, [folders, files] = given
    if not folders or words:
        raise UserError(f"give the pool with --pool: {USAGE}")
    if min(settings.arms, settings.trials) < 1 or settings.pulls < 0:
        raise UserError("--arms and --trials must be at least 1, --pulls at least 0")
    found = gather(folders)
    add_evaluations(found, files)
    pools = pools_of(found)
    for text in (*found.problems, *found.notes):
        print(f"note: {text}")
    out = Path(settings.out)
    curves = {}
    for name, pool in pools.items():
        if len(pool) < 2:
            print(f"{name}: one policy alone is no choice")
            continue
        returns, told = _told(name, pool, settings.arms)
        print(told)
        arms = min(settings.arms, len(pool))
        chosen = pulls(
            returns, arms, settings.pulls, settings.trials, settings.alpha, settings.seed
        )
        curves[name] = interval(chosen, settings.seed)
    if not curves:
        raise UserError("there is no task with two policies: give a larger --pool")
    _write(curves, out)
    for name, curve in curves.items():
        points = [p for p in (0, 1, 5, 10, 25, 50, 100, 200) if p < len(curve.mean)]
        line = ", ".join(f"{p}: {curve.mean[p]:.1f}" for p in points)
        print(f"{name}: mean by online episodes {line}")
    return 1 if found.problems else 0


def pools_of(found: Gathered) -> dict[str, list[tuple[str, Floats]]]:
    """Per task and unit the policies with their scores, (E,) each; runs of one task only."""
    named = labels(found.runs)
    pools: dict[str, list[tuple[str, Floats]]] = {}
    legs: dict[str, Leg] = {}
    for run in found.runs:
        leg = run.legs[0]
        if len(run.legs) > 1 or run.status != "finished" or not (run.evaluations or run.final):
            continue
        unit = "return" if leg.reference_scores is None else "D4RL-normalised score"
        name = f"{leg.name} ({unit})"
        first = legs.setdefault(name, leg)
        same = ("env", "reference_scores", "shift")
        if any(getattr(first, key) != getattr(leg, key) for key in same):
            found.problems.append(
                f"{run.folder.name} was left out: its environment, shift or reference scores are "
                f"not those of the other policies of {leg.name}"
            )
            continue
        for seed, returns in zip(run.seeds, scored(leg, last_of(run).returns), strict=True):
            pools.setdefault(name, []).append((f"{named(run)} seed {seed}", returns))
    return pools


def _told(name: str, pool: Sequence[tuple[str, Floats]], arms: int) -> tuple[list[Floats], str]:
    returns = [scores for _, scores in pool]
    least = min(map(len, returns))
    text = f"{name}: {len(pool)} policies with {least} or more stored episodes"
    if arms > len(pool):
        text += f"; every draw takes all of them, not {arms}"
    if least < FEW:
        text += f"; the protocol asks for {FEW}: evaluate with --episodes {FEW}"
    return returns, text


def pulls(
    returns: Sequence[Floats],
    arms: int,
    count: int,
    trials: int,
    alpha: float = EXPLORATION,
    seed: int = 0,
) -> Floats:
    """True mean of the empirically best arm after 0 to `count` pulls, (trials, count + 1).

    Index of an arm: m + sqrt(alpha ln t / n), with m its empirical mean of returns scaled to [0, 1]
    over the whole pool, n its pulls and t all pulls so far; arms without a pull come first. Before
    the first pull the choice is random.

    Args:
        returns: stored episodes of every policy of the pool.
        arms: policies of a trial, drawn without replacement.
        count: pulls of a trial, with replacement from the arm's episodes.
        trials: independent draws.
        alpha: of the bonus.
        seed: of everything random.
    """
    generator = seeding.numpy_generator(seed, "bandit")
    true = np.array([scores.mean() for scores in returns])
    sizes = np.array([len(scores) for scores in returns])
    low, high = (f([f(scores) for scores in returns]) for f in (np.min, np.max))
    table = np.full((len(returns), sizes.max()), np.nan)
    for k, scores in enumerate(returns):
        table[k, : len(scores)] = (scores - low) / (high - low if high > low else 1.0)
    drawn = generator.random((trials, len(returns))).argsort(axis=1)[:, :arms]
    rows = np.arange(trials)
    sums, numbers = np.zeros((trials, arms)), np.zeros((trials, arms))
    out = np.empty((trials, count + 1))
    out[:, 0] = true[drawn[:, 0]]  # the order of a draw is random
    for t in range(1, count + 1):
        with np.errstate(divide="ignore", invalid="ignore"):
            means = sums / numbers
            index = means + np.sqrt(alpha * np.log(t) / numbers)
        pulled = np.where(numbers > 0, index, np.inf).argmax(axis=1)
        policy = drawn[rows, pulled]
        episode = (generator.random(trials) * sizes[policy]).astype(np.int64)
        sums[rows, pulled] += table[policy, episode]
        numbers[rows, pulled] += 1
        empirical = np.where(numbers > 0, sums / np.maximum(numbers, 1), -np.inf)
        out[:, t] = true[drawn[rows, empirical.argmax(axis=1)]]
    return out


def interval(chosen: Floats, seed: int = 0, resamples: int = 1000) -> Curve:
    """Mean over the trials, (trials, P), with the percentile bootstrap interval over them."""
    generator = seeding.numpy_generator(seed, "bandit", "bootstrap")
    trials = len(chosen)
    counts = generator.multinomial(trials, np.full(trials, 1 / trials), size=resamples)
    low, high = np.quantile(counts @ chosen / trials, [0.025, 0.975], axis=0)
    return Curve(chosen.mean(axis=0), low, high)


def _write(curves: dict[str, Curve], out: Path) -> None:
    from rl_shift import report_pictures
    from rl_shift.runs import write

    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["task", "episodes", "mean", "low", "high"])
    for name, curve in curves.items():
        for k, numbers in enumerate(zip(curve.mean, curve.low, curve.high, strict=True)):
            rows.writerow([name, k, *(f"{number:.4f}" for number in numbers)])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror}; choose another --out") from error
    write(out / "bandit.csv", text.getvalue())
    print(f"table: {out / 'bandit.csv'}")
    if report_pictures.available():
        report_pictures.choices(curves, out / "bandit.png")
        print(f"picture: {out / 'bandit.png'}")
