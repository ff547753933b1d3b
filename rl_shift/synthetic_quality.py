"""How true and how on-policy generated trajectories are: simulator replay, likelihood, distance.

The two axes of Policy-Guided Diffusion's main comparison. Dynamics error: MuJoCo is set to each
generated state, takes the generated action, and its next observation is compared with the generated
one. Coordinates that observations omit (the root's x) are 0. Our design where not said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_shift import benchmark, config, datasets, envs, plotting, runs, seeding
from rl_shift.agent import Agent, Policy
from rl_shift.buffer import Buffer
from rl_shift.denoisers import ResidualMLP, TemporalUNet, multiply_adds
from rl_shift.diffusion import Sampler, toy_std
from rl_shift.dynamics import GaussianEnsemble
from rl_shift.errors import UserError
from rl_shift.guidance import log_likelihood
from rl_shift.trajectories import TrajectoryCodec, window_starts

Batch = dict[str, Tensor]
REPLAYABLE = ("Hopper", "Walker2d", "HalfCheetah")  # obs = (qpos without the root's x, qvel)
PATHS = 12  # trajectories drawn
CLIPPED = 10.0  # where hopper and walker2d clip velocities: no unique true state lies behind


class Replay:
    """A simulator that says where actions truly lead.

    Args:
        env_id: a Gymnasium id of a planar locomotion task.

    Raises:
        UserError: for any other task.
    """

    def __init__(self, env_id: str) -> None:
        if env_id.partition("-")[0] not in REPLAYABLE:
            raise UserError(
                f"{env_id} cannot be set to an observation: choose {', '.join(REPLAYABLE)}"
            )
        env: Any = envs.make_env(env_id)
        self.env = env.unwrapped
        self.positions = int(self.env.model.nq) - 1
        self.clips = not env_id.startswith("HalfCheetah")
        self.env.reset(seed=0)

    def next_obs(self, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        """(N, obs), (N, action) -> (N, obs)."""
        found = np.empty_like(obs)
        for k, (row, move) in enumerate(zip(obs, action, strict=True)):
            qpos = np.concatenate([[0.0], row[: self.positions]])
            self.env.set_state(qpos, row[self.positions :])
            found[k] = self.env.step(move)[0]
        return found

    def usable(self, *obs: np.ndarray) -> np.ndarray:
        """Rows whose velocities lie inside the clip in all of these, (N,) bool."""
        inside = np.ones(len(obs[0]), bool)
        if self.clips:
            for rows in obs:
                inside &= (np.abs(rows[:, self.positions :]) < CLIPPED - 1e-3).all(-1)
        return inside


def report(
    rows: Batch,
    policy: Callable[[Tensor], Policy],
    replay: Replay,
    data: Batch,
    std: Tensor,
    moves: int,
) -> dict[str, Any]:
    """The quality of windows of transitions, (B, T, ...).

    Args:
        rows: obs, action, reward, next_obs, terminated; "alive" marks rows that count, if given.
        policy: the target policy.
        replay: the simulator.
        data: real transitions, (N, ...), for distances.
        std: of the data's observations, (obs,), the unit of errors.
        moves: transitions to replay at most.
    """
    length = rows["reward"].shape[1]
    time = torch.arange(length).expand(len(rows["reward"]), -1).flatten()
    flat = {key: value.flatten(0, 1) for key, value in rows.items()}
    counts = flat.pop("alive", torch.ones_like(flat["terminated"]))
    order = torch.nonzero(counts)[:, 0]
    order = order[:: max(1, len(order) // moves)][:moves]
    flat, time = {key: value[order] for key, value in flat.items()}, time[order]
    obs, action, claimed = (flat[k].double().numpy() for k in ("obs", "action", "next_obs"))
    usable = replay.usable(obs, claimed)
    true = replay.next_obs(obs[usable], action[usable])
    usable[usable] = replay.usable(true)
    true = true[replay.usable(true)]
    error = (((true - claimed[usable]) / std.numpy()) ** 2).mean(-1)
    at = policy(flat["obs"])
    point = torch.cat([flat["obs"] / std, flat["action"]], -1)[:1000]
    near = torch.cat([data["obs"] / std, data["action"]], -1)
    steps = time.numpy()[usable]
    return {
        "dynamics_mse": float(error.mean()),
        "dynamics_median": float(np.median(error)),
        "by_step": [float(error[steps == t].mean()) for t in range(length) if (steps == t).any()],
        "left_out": float(1 - usable.mean()),
        "log_likelihood": float(log_likelihood(at, flat["action"]).mean()),
        "spread": float((flat["action"] - _greedy(at)).square().mean().sqrt()),
        "distance": float(torch.cdist(point, near).amin(1).mean()),
        "reward": float(flat["reward"].mean()),
        "saturated": float((flat["action"].abs() > 0.99).float().mean()),
        "transitions": len(order),
    }


def _greedy(at: Policy) -> Tensor:
    return at.mean.tanh() if at.squashed else at.mean


def model_windows(
    model: GaussianEnsemble,
    act: Callable[[Tensor], Tensor],
    termination: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    obs: Tensor,
    length: int,
) -> Batch:
    """An ensemble rolled by a policy from real states, (B, obs) -> windows (B, length, ...).

    Rows after a predicted end are not "alive".
    """
    steps: list[Batch] = []
    alive = torch.ones_like(obs[:, 0], dtype=torch.bool)
    for _ in range(length):
        action = act(obs)
        next_obs, reward, _ = model.sample(obs, action)
        ended = torch.zeros_like(alive)
        if termination is not None:
            ended = termination(obs, action, next_obs)
        steps.append(
            {
                "obs": obs,
                "action": action,
                "reward": reward,
                "next_obs": next_obs,
                "terminated": ended,
                "alive": alive,
            }
        )
        alive, obs = alive & ~ended, next_obs
    return {key: torch.stack([step[key] for step in steps], 1) for key in steps[0]}


def compare(
    spec: str,
    coefficients: Sequence[float],
    policy_spec: str | None = None,
    model_spec: str | None = None,
    windows: int = 256,
    moves: int = 2000,
) -> dict[str, Any]:
    """Reports on the data, on a run's denoiser at several strengths, and on an ensemble.

    `terminated` is the share of transitions that end an episode, `ending` the median distance of
    the observations in which they do to the data's nearest one, in its standard deviations (of the
    data: between every other one and the rest).

    Args:
        spec: a run that trained a trajectory denoiser.
        coefficients: strengths of the guidance; 0 is unguided.
        policy_spec: run whose agent is the target policy; None: the base of `spec`.
        model_spec: run that trained an ensemble, rolled to the same length by the same policy.
        windows: windows per strength.
        moves: transitions replayed per strength.

    Raises:
        UserError: if the runs do not hold what is asked for, or nothing is.
    """
    if windows < 1 or moves < 1:
        raise UserError(f"{windows} windows, {moves} moves: give at least 1 of each")
    for coefficient in coefficients:
        if not 0 <= coefficient < math.inf:
            raise UserError(f"coefficient {coefficient:g}: give 0 (unguided) or more")
    found, run, tasks = runs.load_one(spec)
    agent: Any = found
    codec = getattr(agent, "codec", None)
    if not isinstance(codec, TrajectoryCodec):
        raise UserError(f"{spec} is no run that learnt to generate trajectories")
    target: Agent = agent.base if policy_spec is None else runs.load_one(policy_spec)[0]
    agent.base = target
    info = datasets.resolve(str(run.tasks[0].dataset))
    buffer = Buffer.from_arrays(datasets.load(info))
    task = runs.resolve(run)[0]
    replay = Replay(str(task.env or tasks[0].env))
    std = buffer.statistics("obs")[1].clamp(min=1e-6)
    near = {k: v[:: -(-len(buffer) // 20_000)] for k, v in buffer.arrays().items()}
    length = int(codec.window) - 1

    def asked(rows: Batch) -> dict[str, Any]:
        with torch.no_grad():
            return report(rows, target.distribution, replay, near, std, moves)

    starts, _ = window_starts(buffer, length + 1, agent.config.stride, agent.config.repeat_endings)
    real = buffer.windows(windows, length, starts)
    ends = buffer.arrays()["obs"][buffer.arrays()["terminated"]] / std
    results: dict[str, Any] = {"window": length + 1, "data": asked(_plain(real)), "guided": []}
    results["data"]["terminated"] = len(ends) / len(buffer)
    results["data"]["ending"] = _nearest(ends[::2], ends[1::2])
    results["data"]["paths"] = real["obs"][:PATHS, :, 0].tolist()
    for coefficient in coefficients:
        agent.coefficient.fill_(coefficient)
        with torch.no_grad(), seeding.forked(0):
            x = agent.generate(windows, coefficient > 0)
        rows = {
            key: value.view(windows, length, *value.shape[1:])
            for key, value in codec.transitions(x).items()
        }
        last = codec.last(x)
        ended = last["obs"][last["terminated"]] / std
        inside = int(rows["terminated"].sum())
        results["guided"].append(
            {
                "coefficient": coefficient,
                **asked(rows),
                "terminated": (inside + len(ended)) / (windows * length + len(ended)),
                "ending": _nearest(ended, ends),
                "paths": rows["obs"][:PATHS, :, 0].tolist(),
            }
        )
    if model_spec is not None:
        model = getattr(runs.load_one(model_spec)[0], "dynamics", None)
        if not isinstance(model, GaussianEnsemble):
            raise UserError(f"{model_spec} is no run that learnt an ensemble")
        with torch.no_grad(), seeding.forked(0):
            act = lambda obs: target.act(obs, False)  # noqa: E731
            rows = model_windows(model, act, task.termination, real["obs"][:, 0], length)
        results["model"] = asked(rows)
    return results


def _nearest(rows: Tensor, others: Tensor) -> float | None:
    """Median distance of rows to the nearest of others; None where there are none."""
    if not len(rows) or not len(others):
        return None
    return float(torch.cdist(rows, others).amin(1).median())


def _plain(batch: Batch) -> Batch:
    keys = ("obs", "action", "reward", "next_obs", "terminated")
    return {key: batch[key] for key in keys}


def costs(presets: Sequence[str], obs: int, action: int, timed: int = 0) -> list[dict[str, Any]]:
    """What one full generation costs in each preset, with its sampler's error beside it.

    FLOP are twice the multiply-adds of the denoiser's layers. `held_bytes` is what stays in memory:
    the denoiser, its average, Adam's two moments, and the generated rows.

    Args:
        presets: names of presets of an agent that generates trajectories.
        obs: width of an observation.
        action: width of an action.
        timed: windows of a batch whose passes through the denoiser are timed on this machine;
            `seconds`, process CPU time of an unguided generation, is extrapolated from them.
            0: not timed.

    Raises:
        UserError: for a negative `timed`.
    """
    if timed < 0:
        raise UserError(f"{timed} windows cannot be timed: give 1 or more, or 0 to time nothing")
    width, rows = obs + action + 2, []
    given = {"tasks.0.dataset": "rl_shift/hopper-replay-v0"}
    for preset in presets:
        c = config.make(preset=preset, overrides=given).agent
        sampler = Sampler(c.sampler_steps, c.solver, c.churn)
        with torch.device("cpu" if timed else "meta"):
            if c.network == "mlp":
                net: Any = ResidualMLP((c.window, width), c.width, c.depth)
            else:
                net = TemporalUNet(width, c.width)
            inputs = torch.zeros(1, c.window, width), torch.zeros(1)
            each = multiply_adds(net, *inputs)
        parameters = sum(p.numel() for p in net.parameters())
        transitions = c.windows * (c.window - 1)
        row = {
            "preset": preset,
            "parameters": parameters,
            "calls": sampler.calls,
            "transitions": transitions,
            "flop": 2.0 * each * c.windows * sampler.calls,
            "toy_std": toy_std(sampler),
            "flop_per_transition": 2.0 * each * sampler.calls / (c.window - 1),
            "held_bytes": 4 * (4 * parameters + transitions * (2 * obs + action + 1)),
        }
        if timed:
            batch = torch.randn(timed, c.window, width), torch.ones(timed)
            work = benchmark.Candidate(preset, partial(net, *batch), units=timed)
            with torch.no_grad():
                windows_per_s = benchmark.run_block(benchmark.warm_up(work, calls=1), seconds=2.0)
            row["seconds"] = sampler.calls * c.windows / windows_per_s
        rows.append(row)
    return rows


def picture(results: dict[str, Any], path: Path) -> None:
    """Dynamics error over likelihood; where windows have several steps also over the step."""
    several = results["window"] > 2
    figure = plotting.figure(11 if several else 4.4, 3.3)
    panels = list(figure.subplots(1, 3)) if several else [figure.add_subplot()]
    guided, model = results["guided"], results.get("model")
    x = [row["log_likelihood"] for row in guided]
    y = [row["dynamics_mse"] for row in guided]
    panels[0].plot(x, y, "o-", label="diffusion, guided")
    for row, at in zip(guided, zip(x, y, strict=True), strict=True):
        text = f"{row['coefficient']:g}"
        panels[0].annotate(text, at, xytext=(3, 4), textcoords="offset points")
    if model is not None:
        point = [model["log_likelihood"]], [model["dynamics_mse"]]
        panels[0].plot(*point, "s", label="ensemble, rolled")
    panels[0].set(
        xlabel="log-likelihood under the policy", ylabel="dynamics error (MSE / variance)"
    )
    if several:
        draw_steps(results, *panels[1:])
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    plotting.save(figure, path)


def draw_steps(results: dict[str, Any], errors: Any, paths: Any) -> None:
    """Dynamics error and first observation over the step within the window, on two axes."""
    guided = results["guided"]
    lines = [(f"{row['coefficient']:g}", row["by_step"], "-") for row in guided]
    if "model" in results:
        lines.append(("ensemble", results["model"]["by_step"], "k--"))
    for label, values, style in lines:
        errors.plot(range(1, len(values) + 1), values, style, label=label)
    errors.set(xlabel="step within the window", yscale="log")
    drawn = [("data", results["data"], "grey"), ("generated", guided[-1], "tab:blue")]
    for name, row, colour in drawn:
        for k, values in enumerate(row["paths"]):
            paths.plot(values, color=colour, alpha=0.6, label=name if k == 0 else None)
    paths.set(xlabel="step within the window", ylabel="first observation")
