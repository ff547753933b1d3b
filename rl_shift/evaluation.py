"""Evaluation: whole episodes, raw undiscounted returns, seeds and generators of its own.

All lanes act in one batched forward pass per step; the environments are a plain list stepped in
turn, which is faster here than a vector environment (no copies, no autoreset, finished lanes rest).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from rl_shift import seeding
from rl_shift.agent import Agent
from rl_shift.envs import make_env
from rl_shift.envs.wrappers import UnitAction
from rl_shift.errors import UserError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """Outcome of one evaluation of S stacked seeds over E episodes.

    Attributes:
        returns: (S, E) raw undiscounted returns, in the order of the episodes' seeds.
        lengths: (S, E) int64 numbers of steps.
        score: (S,) mean D4RL-normalised score x100, None without reference scores.
        env_id: the environment.
        seed: the evaluation's seed: equal seeds mean equal initial states.
        diagnostics: what `Agent.diagnostics` says, (S,) each: mean over all steps.
    """

    returns: Floats
    lengths: NDArray[np.int64]
    score: Floats | None
    env_id: str
    seed: int
    diagnostics: dict[str, Floats] = field(default_factory=dict)


def normalized_fraction(returns: Any, ref_min: float, ref_max: float) -> Any:
    """(R - ref_min) / (ref_max - ref_min), D4RL's own convention, without the factor 100."""
    return (np.asarray(returns, dtype=np.float64) - ref_min) / (ref_max - ref_min)


def normalized_score(returns: Any, ref_min: float, ref_max: float) -> Any:
    """100 (R - ref_min) / (ref_max - ref_min): 0 is the random policy, 100 the expert."""
    return 100.0 * normalized_fraction(returns, ref_min, ref_max)


def normalized_spread(deviation: Any, ref_min: float, ref_max: float) -> Any:
    """A standard deviation (or width) of returns on the scale of `normalized_score`: no shift."""
    return 100.0 * np.asarray(deviation, dtype=np.float64) / (ref_max - ref_min)


def differences(first: Result, second: Result) -> Floats:
    """(S, E) episode-wise first - second of two evaluations with equal initial states."""
    if (first.env_id, first.seed, first.returns.shape) != (
        second.env_id,
        second.seed,
        second.returns.shape,
    ):
        raise UserError(
            f"evaluations on {first.env_id} (seed {first.seed}, {first.returns.shape}) and "
            f"{second.env_id} (seed {second.seed}, {second.returns.shape}) cannot be paired: use "
            "the same environment, seed and number of episodes"
        )
    return first.returns - second.returns


class Evaluator:
    """The environments of one evaluation task, made once and reused.

    Args:
        env_id: any id that `make_env` takes.
        lanes: episodes that run side by side, per stacked seed.
        reference_scores: (ref_min, ref_max) for the normalised score.
        obs_pad: zeros appended to every observation (D4RL's ant: 27 numbers + 84 contact forces
            that were zero in its simulator).
        shift: the task's shift, handed to `make_env`. Its clock may outlive an episode, so shifted
            environments are made anew for every evaluation.
        max_steps: where an episode is cut if the environment has no end of its own.
    """

    def __init__(
        self,
        env_id: str,
        lanes: int = 10,
        reference_scores: tuple[float, float] | None = None,
        obs_pad: int = 0,
        shift: Any = None,
        max_steps: int = 100_000,
    ) -> None:
        self.env_id = env_id
        self.lanes = lanes
        self.reference_scores = reference_scores
        self.obs_pad = obs_pad
        self.shift = shift
        self.max_steps = max_steps
        self._envs: list[gymnasium.Env[Any, Any]] = []

    def __enter__(self) -> Evaluator:
        """Use as a context manager to close the environments."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the environments."""
        self.close()

    def close(self) -> None:
        """Close the environments; a later `evaluate` makes new ones."""
        for env in self._envs:
            env.close()
        self._envs.clear()

    def evaluate(
        self,
        agent: Agent,
        episodes: int = 10,
        seed: int = 0,
        diagnose: bool = False,
        explore: bool = False,
    ) -> Result:
        """Run `episodes` whole episodes per stacked seed with `act(obs, explore)`.

        Episode i starts from its own seed, the same for every stacked seed and whatever was
        evaluated before. A lane that ends takes the next episode of its seed, so short episodes
        are not over-represented. A truncation that `info["hidden_reset"]` marks ends no episode:
        such a life goes on after `reset()`. The training's generators and modes are left as they
        were. `diagnose` also asks the agent for its `diagnostics` at every step. What `explore`
        draws depends on the seed and on the number of lanes.
        """
        if episodes < 1:
            raise UserError(f"an evaluation needs at least one episode, got {episodes}")
        lanes = min(self.lanes, episodes)
        envs = self._open(agent.seeds * lanes)
        self._check_shape(agent, envs[0])
        modes = [(module, module.training) for module in agent.modules()]
        agent.eval()
        if diagnose:  # most agents have nothing to say
            diagnose = getattr(agent.diagnostics, "__func__", None) is not Agent.diagnostics
        try:
            with seeding.forked(seeding.child(seed, "evaluation")):
                returns, lengths, sums = self._play(
                    agent, envs, lanes, episodes, seed, diagnose, explore
                )
        finally:
            for module, training in modes:
                module.training = training
        score = None
        if self.reference_scores is not None:
            score = normalized_score(returns, *self.reference_scores).mean(axis=1)
        diagnostics = {key: total / lengths.sum(axis=1) for key, total in sums.items()}
        return Result(returns, lengths, score, self.env_id, seed, diagnostics)

    def _open(self, count: int) -> list[gymnasium.Env[Any, Any]]:
        if self.shift is not None:
            self.close()
        while len(self._envs) < count:
            self._envs.append(make_env(self.env_id, shift=self.shift, obs_pad=self.obs_pad))
        return self._envs[:count]

    def _check_shape(self, agent: Agent, env: gymnasium.Env[Any, Any]) -> None:
        given, expected = env.observation_space.shape, agent.observation_space.shape
        if given != expected:
            padding = f" with {self.obs_pad} zeros appended" if self.obs_pad else ""
            raise UserError(
                f"{self.env_id} gives observations of shape {given}{padding}, the agent was built "
                f"for {expected}: evaluate it on the environment of its dataset"
            )

    def _play(
        self,
        agent: Agent,
        envs: list[gymnasium.Env[Any, Any]],
        lanes: int,
        episodes: int,
        seed: int,
        diagnose: bool,
        explore: bool,
    ) -> tuple[Floats, NDArray[np.int64], dict[str, Floats]]:
        """Returns and lengths (S, E), sums of diagnostics (S,).

        Environment k runs episodes of stacked seed k // lanes.
        """
        stacked = agent.seeds
        sums: dict[str, Floats] = {}
        starts = [seeding.child(seed, "episode", i) for i in range(episodes)]
        returns = np.zeros((stacked, episodes))
        lengths = np.zeros((stacked, episodes), dtype=np.int64)

        space = envs[0].observation_space
        obs = np.zeros((stacked, lanes, *(space.shape or ())), dtype=space.dtype)
        batch = torch.from_numpy(obs if stacked > 1 else obs[0])  # shares memory with `rows`
        rows = obs.reshape(len(envs), *obs.shape[2:])
        device = next(itertools.chain(agent.parameters(), agent.buffers()), batch).device
        discrete = isinstance(envs[0].action_space, gymnasium.spaces.Discrete)

        # clip and rescale all lanes at once: one by one it is a tenth of a MuJoCo step
        unit = envs[0] if isinstance(envs[0], UnitAction) else None
        steps: list[Callable[[Any], Any]] = [
            env.env.step if isinstance(env, UnitAction) else env.step for env in envs
        ]
        episode = [k % lanes for k in range(len(envs))]
        waiting = [iter(range(lanes, episodes)) for _ in range(stacked)]
        total, length = [0.0] * len(envs), [0] * len(envs)
        for k, env in enumerate(envs):
            rows[k] = env.reset(seed=starts[episode[k]])[0]
        active = list(range(len(envs)))
        while active:
            inputs = batch.to(device)
            chosen = agent.run(agent.act, inputs, explore).cpu().numpy()
            if diagnose:
                resting = np.ones(len(envs), bool)
                resting[active] = False
                for key, value in agent.run(agent.diagnostics, inputs).items():
                    values = value.cpu().numpy().reshape(len(envs)).astype(np.float64)
                    values[resting] = 0.0
                    per_seed = values.reshape(stacked, lanes).sum(axis=1)
                    sums[key] = sums.get(key, np.zeros(stacked)) + per_seed
            chosen = chosen.reshape(len(envs), *chosen.shape[1 + (stacked > 1) :])
            actions = unit.action(chosen) if unit else chosen.tolist() if discrete else chosen
            ended = []
            for k in active:
                rows[k], reward, terminated, truncated, info = steps[k](actions[k])
                total[k] += float(reward)
                length[k] += 1
                if length[k] >= self.max_steps:
                    ended.append(k)
                elif truncated and info.get("hidden_reset"):  # a life that goes on elsewhere
                    rows[k] = envs[k].reset()[0]
                elif terminated or truncated:
                    ended.append(k)
            for k in ended:
                where = k // lanes, episode[k]
                returns[where], lengths[where] = total[k], length[k]
                total[k], length[k] = 0.0, 0
                following = next(waiting[k // lanes], None)
                if following is None:
                    active.remove(k)  # its last observation stays in the batch, unread
                else:
                    episode[k] = following
                    rows[k] = envs[k].reset(seed=starts[following])[0]
        return returns, lengths, sums


def evaluate(
    agent: Agent,
    env_id: str,
    episodes: int = 10,
    seed: int = 0,
    lanes: int = 10,
    reference_scores: tuple[float, float] | None = None,
    obs_pad: int = 0,
    shift: Any = None,
    diagnose: bool = False,
    explore: bool = False,
) -> Result:
    """One evaluation in environments of its own; see `Evaluator`."""
    with Evaluator(env_id, lanes, reference_scores, obs_pad, shift) as evaluator:
        return evaluator.evaluate(agent, episodes, seed, diagnose, explore)
