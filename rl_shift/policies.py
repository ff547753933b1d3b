"""Policies that `recording` rolls out: uniform random, tanh-Gaussian npz files, trained runs."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rl_shift.errors import UserError

Rows = np.ndarray


class Policy(Protocol):
    """Acts for N lanes at once; the noise of each lane comes in from its episode's generator."""

    name: str
    noise_width: int  # standard normal (or, for `uniform`, unit-interval) draws per step
    uniform: bool

    def act(self, obs: Rows, noise: Rows) -> tuple[Rows, Rows | None]:
        """(N, obs), (N, noise_width) -> actions (N, action) in [-1, 1], log-densities (N,)."""
        ...


class RandomPolicy:
    """Uniform in [-1, 1]^d, hence a constant density."""

    uniform = True

    def __init__(self, action_width: int) -> None:
        """A policy for `action_width` dimensions."""
        self.name = "random"
        self.noise_width = action_width

    def act(self, obs: Rows, noise: Rows) -> tuple[Rows, Rows | None]:
        """See `Policy`; noise is uniform in [0, 1)."""
        log_density = -self.noise_width * np.log(2.0)
        return (2 * noise - 1).astype(np.float32), np.full(len(obs), log_density)


class TanhGaussianPolicy:
    """SAC policy of the Deep OPE npz layout: a = tanh(mean + exp(log_std) * eps).

    Weights are stored (out, in): `fc0`, `fc1` with ReLU, `last_fc` for the mean and
    `last_fc_log_std`, which rlkit, their trainer, clips to [-20, 2].
    """

    uniform = False

    def __init__(self, weights: dict[str, Rows], name: str) -> None:
        """Takes float32 arrays keyed as in the file, see `load`."""
        self.name = name
        self.weights = weights
        self.noise_width = int(weights["last_fc.bias"].shape[0])
        self.obs_width = int(weights["fc0.weight"].shape[1])

    @classmethod
    def load(cls, path: Path) -> TanhGaussianPolicy:
        """Reads and checks an npz file; nothing in it is ever unpickled."""
        layers = ("fc0", "fc1", "last_fc", "last_fc_log_std")
        keys = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
        try:
            with np.load(path, allow_pickle=False) as file:
                missing = [key for key in keys if key not in file]
                if missing:
                    raise UserError(
                        f"policy {path} lacks the array {missing[0]!r}; expected {', '.join(keys)}"
                    )
                weights = {key: np.asarray(file[key], dtype=np.float32) for key in keys}
        except FileNotFoundError as error:
            raise UserError(f"policy file {path} does not exist; check the path") from error
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"policy file {path} is not a readable npz file ({error})") from error
        inputs = weights["fc0.weight"].shape[1:]
        for layer in layers:
            weight, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
            wanted = inputs if layer in ("fc0", "fc1") else weights["fc1.bias"].shape
            if weight.ndim != 2 or bias.shape != weight.shape[:1] or weight.shape[1:] != wanted:
                raise UserError(
                    f"policy {path}: {layer} has weight {weight.shape} and bias {bias.shape}; "
                    f"expected (out, {wanted[0]}) and (out,)"
                )
            inputs = bias.shape
        return cls(weights, path.stem)

    def distribution(self, obs: Rows) -> tuple[Rows, Rows]:
        """(N, obs) -> mean and log standard deviation before the tanh, (N, action) each."""
        w = self.weights
        hidden = np.maximum(obs @ w["fc0.weight"].T + w["fc0.bias"], 0)
        hidden = np.maximum(hidden @ w["fc1.weight"].T + w["fc1.bias"], 0)
        mean = hidden @ w["last_fc.weight"].T + w["last_fc.bias"]
        log_std = hidden @ w["last_fc_log_std.weight"].T + w["last_fc_log_std.bias"]
        return mean, np.clip(log_std, -20.0, 2.0)

    def act(self, obs: Rows, noise: Rows) -> tuple[Rows, Rows | None]:
        """See `Policy`; the density is that of the squashed action."""
        mean, log_std = self.distribution(obs)
        raw = (mean + np.exp(log_std) * noise).astype(np.float64)
        normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
        # log(1 - tanh(x)^2) without cancellation
        squash = 2 * (np.log(2.0) - raw - np.logaddexp(0.0, -2 * raw))
        return np.tanh(raw).astype(np.float32), (normal - squash).sum(-1)


class RunPolicy:
    """A trained run's agent, acting as it explores: a stochastic policy's actions are sampled."""

    uniform = False
    noise_width = 0

    def __init__(self, agent: Any, name: str, context: Rows | None = None) -> None:
        """Wraps an agent of one seed; `context` is appended to every observation."""
        self.agent = agent
        self.name = name
        self.context = np.zeros(0, np.float32) if context is None else context.astype(np.float32)

    def act(self, obs: Rows, noise: Rows) -> tuple[Rows, Rows | None]:
        """See `Policy`; agents export no density."""
        import torch

        told = np.broadcast_to(self.context, (len(obs), len(self.context)))
        seen = torch.from_numpy(np.concatenate([obs, told], -1))
        action = self.agent.run(self.agent.act, seen, True)
        return action.cpu().numpy(), None


def load_policy_from_run(spec: str, obs_width: int, context: Rows | None = None) -> RunPolicy:
    """The agent of a run folder's latest checkpoint, one seed (`RUN_DIR#k` of several).

    One that observes `context` too, a task's goal, is told it in every step.
    """
    from rl_shift.runs import load_one

    agent, _, _ = load_one(spec)
    wanted = agent.observation_space.shape
    if context is not None and wanted == (obs_width + len(context),):
        return RunPolicy(agent.cpu(), Path(spec).name, context)
    if wanted != (obs_width,):
        raise UserError(
            f"policy {spec} observes {wanted}, the environment gives ({obs_width},); choose the "
            "matching --env"
        )
    return RunPolicy(agent.cpu(), Path(spec).name)


def load_policy(
    policy: str | Path, obs_width: int, action_width: int, context: Rows | None = None
) -> Policy:
    """The policy named "random", an npz file or a run folder, checked against the environment.

    `context`: the goal of an environment that has one, for runs that observe it.
    """
    if str(policy) == "random":
        return RandomPolicy(action_width)
    path = Path(policy)
    if path.suffix != ".npz":
        return load_policy_from_run(str(policy), obs_width, context)
    loaded = TanhGaussianPolicy.load(path)
    if (loaded.obs_width, loaded.noise_width) != (obs_width, action_width):
        raise UserError(
            f"policy {path} maps {loaded.obs_width} observations to {loaded.noise_width} actions, "
            f"the environment has {obs_width} and {action_width}; choose the matching --env"
        )
    return loaded
