#!/usr/bin/env python
"""Compares learnt models with what is known exactly: scripts/diagnose.py WHAT RUN_DIR[#k].

score RUN  a score model against the closed-form score of the tanh-Gaussian policy that collected
           the run's dataset (our design after arXiv 2406.07541): cosine and explained share per
           noise level, share of perturbed actions whose exact density a correction raises.

synthetic RUN  the trajectories that a run's denoiser generates, over the strength of the guidance:
           error of their dynamics against MuJoCo, log-likelihood under the target policy, distance
           to the data; beside them the data, and an ensemble rolled to the same length.

cost       FLOP of one generation in PGD's presets, and what their samplers do to the exact denoiser
           of normal data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl_shift import atomic, datasets, held_out, plotting, runs, synthetic_quality, tanh_gaussian
from rl_shift.buffer import Buffer
from rl_shift.errors import UserError
from rl_shift.score import correct_action

PERTURBED = 0.3  # standard deviation of the perturbations that corrections have to undo


def score(spec: str, rows: int, picture: Path | None) -> dict[str, Any]:
    """The table of `diagnose.py score` on held-out rows."""
    agent, run, _ = runs.load_one(spec)
    network = getattr(agent, "average", None)
    if network is None:
        raise UserError(f"{spec} is no run that learnt a score model")
    if network.mode == "state":
        raise UserError(f"{spec} learnt scores of states alone (agent.mode state), none of actions")
    if rows < 1:
        raise UserError(f"--rows {rows}: give at least 1")
    info = datasets.resolve(str(run.tasks[0].dataset))
    policy = tanh_gaussian.behaviour_policy(info.path)
    buffer = Buffer.from_arrays(datasets.load(info))
    _, chosen = held_out.split_by_episode(buffer)
    batch = buffer.take(chosen[:: -(-len(chosen) // rows)])
    mean, std = tanh_gaussian.moments(policy, batch["obs"].numpy())
    clean, obs = batch["action"], agent.normalizer(batch["obs"])
    rng = np.random.default_rng(0)
    table = []
    for level, sigma in enumerate(network.sigmas.tolist()):
        noisy = clean + sigma * torch.from_numpy(rng.normal(size=clean.shape)).float()
        exact = sigma * tanh_gaussian.smoothed_score(noisy.numpy(), mean, std, sigma)
        with torch.no_grad():
            found = -network(obs, noisy, level)[1].double().numpy()
        lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(exact, axis=-1)
        cosine = (found * exact).sum(-1) / np.maximum(lengths, 1e-12)
        table.append(
            {
                "sigma": sigma,
                "mean cosine": float(cosine.mean()),
                "median cosine": float(np.median(cosine)),
                "explained share": float(1 - ((found - exact) ** 2).sum() / (exact**2).sum()),
            }
        )
    noise = PERTURBED * torch.from_numpy(rng.normal(size=clean.shape)).float()
    perturbed = (clean + noise).clamp(-1, 1)
    with torch.no_grad():
        levels, eta = agent.levels, agent.config.eta_action
        moved = correct_action(network, obs, perturbed, levels, eta)
    before, after = (tanh_gaussian.log_density(a.numpy(), mean, std) for a in (perturbed, moved))
    result = {"levels": table, "raised": float((after > before).mean()), "rows": len(clean)}
    if picture is not None:
        draw(result, spec, picture)
    return result


def draw(result: dict[str, Any], spec: str, path: Path) -> None:
    """Cosine and explained share over the noise levels."""
    figure = plotting.figure(6, 3.4)
    axes: Any = figure.add_subplot()
    x = [row["sigma"] for row in result["levels"]]
    for key, mark in (("mean cosine", "o-"), ("median cosine", "s--"), ("explained share", "^-")):
        axes.plot(x, [row[key] for row in result["levels"]], mark, label=key)
    axes.set(xscale="log", xlabel="noise scale (action units)", ylim=(0, 1.02))
    axes.set_title(f"learnt score against the exact one: {Path(spec).name}", fontsize=10)
    ticks = [0.02, 0.05, 0.1, 0.2, 0.5]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    plotting.save(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Parse, compute, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for_score = commands.add_parser("score", help="score model against the closed form")
    for_score.add_argument("run")
    for_score.add_argument("--rows", type=int, default=500, help="held-out rows")
    for_score.add_argument("--picture", type=Path, help="PNG to write")
    for_synthetic = commands.add_parser("synthetic", help="generated trajectories")
    for_synthetic.add_argument("run")
    for_synthetic.add_argument("--coefficients", type=float, nargs="+", default=[0, 1, 4, 16, 64])
    for_synthetic.add_argument("--policy", help="run of the target policy; default: the run's base")
    for_synthetic.add_argument("--model", help="run with an ensemble to compare with")
    for_synthetic.add_argument("--windows", type=int, default=256)
    for_synthetic.add_argument("--moves", type=int, default=2000, help="transitions replayed")
    for_synthetic.add_argument("--picture", type=Path, help="PNG to write")
    for_synthetic.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    for_cost = commands.add_parser("cost", help="FLOP and sampling error of PGD's presets")
    for_cost.add_argument("--obs", type=int, default=17, help="width of an observation")
    for_cost.add_argument("--action", type=int, default=6, help="width of an action")
    for_cost.add_argument(
        "--timed", type=int, default=0, metavar="WINDOWS", help="also time passes of so many"
    )
    given = parser.parse_args(argv)
    chosen = {"score": print_score, "synthetic": print_synthetic, "cost": print_cost}
    try:
        chosen[given.what](given)
    except UserError as error:
        print(f"diagnose: error: {error}", file=sys.stderr)
        return 2
    return 0


def print_score(given: argparse.Namespace) -> None:
    """`diagnose.py score`."""
    result = score(given.run, given.rows, given.picture)
    for row in result["levels"]:
        print("  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print(
        f"corrections raise the exact density of {100 * result['raised']:.1f} % of {result['rows']}"
        f" actions perturbed by N(0, {PERTURBED}^2)"
    )


def print_synthetic(given: argparse.Namespace) -> None:
    """`diagnose.py synthetic`."""
    result = synthetic_quality.compare(
        given.run, given.coefficients, given.policy, given.model, given.windows, given.moves
    )
    named = [("data", result["data"])]
    named += [(f"coefficient {row['coefficient']:g}", row) for row in result["guided"]]
    named += [("ensemble", result["model"])] if "model" in result else []
    keys = ("log_likelihood", "spread", "dynamics_mse", "dynamics_median", "distance", "left_out",
            "terminated", "ending")  # fmt: skip
    print(f"{'':>16}" + "".join(f"{key:>17}" for key in keys))
    for name, row in named:
        cells = ("-" if row.get(key) is None else f"{row[key]:.4f}" for key in keys)
        print(f"{name:>16}" + "".join(f"{cell:>17}" for cell in cells))
    if given.picture is not None:
        synthetic_quality.picture(result, given.picture)
    if given.json is not None:
        with atomic.replacing(given.json, "give --json FILE") as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")


def print_cost(given: argparse.Namespace) -> None:
    """`diagnose.py cost`."""
    presets = ("pgd.td3_bc", "pgd.gpu", "pgd.paper")
    print(
        f"{'preset':>12} parameters calls transitions      FLOP FLOP/transition "
        "std of N(0, 1) held MB" + "  seconds" * bool(given.timed)
    )
    for row in synthetic_quality.costs(presets, given.obs, given.action, given.timed):
        print(
            f"{row['preset']:>12} {row['parameters']:10d} {row['calls']:5d} "
            f"{row['transitions']:11d} {row['flop']:9.2e} {row['flop_per_transition']:15.2e} "
            f"{row['toy_std']:14.4f} {row['held_bytes'] / 1e6:7.0f}"
            + (f" {row['seconds']:8.0f}" if given.timed else "")
        )
    print("published sampler, its own Euler step: std 1.0300 (specified, not run)")


if __name__ == "__main__":
    sys.exit(main())
