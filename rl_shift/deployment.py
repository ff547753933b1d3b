"""A trained policy outside of training: raw observations in, the environment's own actions out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rl_shift.agent import Agent
from rl_shift.config import RunConfig, Task
from rl_shift.envs import make_env
from rl_shift.envs.wrappers import UnitAction
from rl_shift.errors import UserError
from rl_shift.evaluation import Result, evaluate


class PolicyModule(nn.Module):
    """Observations as they were trained on -> the environment's actions, without gradients.

    The normaliser, and the map of [-1, 1] onto the environment's box, are inside.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    centre: Tensor

    def __init__(self, agent: Agent, box: UnitAction | None) -> None:
        """Of an agent of one seed; `box` is None for discrete actions."""
        super().__init__()
        self.agent = agent
        self.discrete = isinstance(agent.action_space, spaces.Discrete)
        self.scaled = box is not None and not box.identity
        shape = agent.action_space.shape or ()
        device = agent.normalizer.mean.device
        numbers = {"low": -1.0, "high": 1.0, "scale": 1.0, "centre": 0.0}
        for name, usual in numbers.items():
            value = np.full(shape, usual, np.float32) if box is None else getattr(box, name)
            self.register_buffer(name, torch.from_numpy(value.copy()).to(device))

    def forward(self, obs: Tensor, explore: bool = False) -> Tensor:
        """(N, obs) -> (N, action) in the environment's box, or (N,) int64."""
        action: Tensor = self.agent.act(obs, explore)
        if self.discrete:
            return action
        action = torch.maximum(torch.minimum(action, self.high), self.low)
        return action * self.scale + self.centre if self.scaled else action


class TrainedPolicy:
    """The policy of a run, ready to act; see `load_policy`.

    Attributes:
        agent: the trained agent, in evaluation mode and focused on the task.
        task: of the run.
        run: its configuration.
        observation_space: the environment's own.
        action_space: the environment's own.
        module: from observations as the agent has them to the environment's actions.
    """

    def __init__(self, agent: Agent, task: Task, run: RunConfig) -> None:
        """Takes what `runs.load_agent` gives."""
        if agent.seeds > 1:
            raise UserError(f"the run holds {agent.seeds} seeds: name one, such as RUN_DIR#0")
        self.agent, self.task, self.run = agent, task, run
        agent.eval()
        agent.focus(task)
        self.observation_space: spaces.Space[Any] = agent.observation_space
        self.action_space: spaces.Space[Any] = agent.action_space
        box = None
        if task.env is not None:
            env = make_env(task.env, shift=task.shift, obs_pad=task.obs_pad)
            box = _unit_action(env)
            bare = env.unwrapped
            self.observation_space, self.action_space = bare.observation_space, bare.action_space
            env.close()
        self.module = PolicyModule(agent, box)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray[Any, Any], Any]:
        """Actions for one observation or for a batch, called as Stable-Baselines3's are.

        Args:
            observation: the environment's own, (obs,) or (N, obs); a dict where it gives dicts.
            state: handed through; these policies have no memory.
            episode_start: ignored, for the same reason.
            deterministic: False explores as in training.

        Returns:
            (action,) or (N, action) in the environment's own box, or numbers of actions; `state`.

        Raises:
            UserError: observations of another shape than the policy was trained on.
        """
        rows, single = self._rows(observation)
        obs = torch.from_numpy(rows).to(self.agent.normalizer.mean.device)
        with torch.no_grad():
            action = self.module(obs, not deterministic).cpu().numpy()
        return (action[0] if single else action), state

    def evaluate(self, episodes: int = 10, seed: int = 0) -> Result:
        """Whole episodes in the task's environment; the result has returns, lengths and score."""
        if self.task.env is None:
            raise UserError(f"task {self.task.name!r} names no environment: use rl_shift.evaluate")
        task, scores = self.task, self.task.reference_scores
        return evaluate(
            self.agent,
            self.task.env,
            episodes,
            seed,
            reference_scores=scores,
            obs_pad=task.obs_pad,
            shift=task.shift,
        )

    def _rows(self, observation: Any) -> tuple[np.ndarray[Any, Any], bool]:
        """(N, ...) rows as the agent was trained on, and whether there was but one, without N."""
        wanted = tuple(self.agent.observation_space.shape or ())
        if isinstance(observation, Mapping):
            rows = _flattened(self.observation_space, observation)
        else:
            rows = np.asarray(observation)
        if not isinstance(self.agent.observation_space, spaces.Box):
            return rows.reshape(-1), rows.ndim == 0
        rows = rows.astype(self.agent.observation_space.dtype, copy=False)
        bare = (wanted[0] - self.task.obs_pad,) if self.task.obs_pad else wanted
        single = rows.shape == bare
        if not single and rows.shape[1:] != bare:
            raise UserError(
                f"observations of shape {rows.shape}; the policy takes {bare}, or a batch of them"
            )
        rows = rows[None] if single else rows
        if self.task.obs_pad:
            rows = np.pad(rows, ((0, 0), (0, self.task.obs_pad)))
        return np.ascontiguousarray(rows), single


def load_policy(spec: str | Path, task: int = -1) -> TrainedPolicy:
    """The policy of a run folder's newest checkpoint; RUN_DIR#k takes one of several seeds.

    Args:
        spec: the run folder.
        task: index of the task to act in, for runs of several.

    Raises:
        UserError: no run, several seeds, no such task, or an environment that cannot be made.
    """
    from rl_shift import runs

    agent, run, tasks = runs.load_agent(spec)
    if not -len(tasks) <= task < len(tasks):
        raise UserError(f"{spec} has {len(tasks)} tasks: there is no task {task}")
    return TrainedPolicy(agent, tasks[task], run)


def _unit_action(env: gymnasium.Env[Any, Any]) -> UnitAction | None:
    """The wrapper that maps [-1, 1] onto the environment's box."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, UnitAction):
            return env
        env = env.env
    return None


def _flattened(space: spaces.Space[Any], observation: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """A dict of vectors, or of batches of vectors, as Gymnasium's FlattenObservation has it."""
    if not isinstance(space, spaces.Dict):
        raise UserError("observations are a dict, but the environment's own are not")
    parts = []
    for key, part in space.spaces.items():
        if not isinstance(part, spaces.Box):
            raise UserError(f"the observations' part {key!r} is a {part}: only boxes are taken")
        values = np.asarray(observation[key])
        batch = values.shape[: values.ndim - len(part.shape)]
        parts.append(values.reshape(*batch, -1))
    return np.concatenate(parts, axis=-1)
