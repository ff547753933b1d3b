"""From vector environment to buffer; the only file that knows how environments reset themselves.

Under SAME_STEP a call returns one true transition per lane. Where an episode ends in it, the
returned observation belongs to the next episode already, and the true last one is in
`infos["final_obs"]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rl_shift import seeding
from rl_shift.errors import UserError

if TYPE_CHECKING:
    from rl_shift.agent import Agent
    from rl_shift.buffer import Buffer
    from rl_shift.life import Life


class Collector:
    """Steps N lanes with an agent and appends what happens to a ring buffer of N lanes."""

    def __init__(
        self,
        vector_env: SyncVectorEnv,
        buffer: Buffer,
        seed: int,
        task: int = 0,
        reward: tuple[float, float] = (1.0, 0.0),
        life: Life | None = None,
    ) -> None:
        """Tie an environment to a buffer.

        Args:
            vector_env: made with `autoreset_mode=AutoresetMode.SAME_STEP`.
            buffer: a ring with one lane per environment and the columns of `transition_spec`.
            seed: of the environments' first episodes and of random actions.
            task: number written into the column "task".
            reward: (scale, shift) of the stored reward; reported returns are raw.
            life: takes every raw reward.
        """
        mode = vector_env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(f"the vector environment resets by {mode}, make it with SAME_STEP")
        if buffer.lanes != vector_env.num_envs:
            raise ValueError(
                f"{vector_env.num_envs} environments write into a buffer of {buffer.lanes} lanes"
            )
        self.env = vector_env
        self.buffer = buffer
        self.seed = seed
        self.steps = 0  # vector steps so far
        self._scale, self._shift = reward
        self.life = life
        self.task = task
        self._task = np.full(vector_env.num_envs, task, dtype=np.int64)
        self._generator = seeding.numpy_generator(seed, "random_action")
        self._begun = False
        self._obs: np.ndarray[Any, Any] = np.empty(0)  # (N, obs), where every lane stands
        self._returns = np.zeros(vector_env.num_envs)
        self._lengths = np.zeros(vector_env.num_envs, dtype=np.int64)

    def reset(self) -> None:
        """Begin a new episode in every lane, from seeds of their own."""
        lanes = range(self.env.num_envs)
        seeds: list[int | None] = [
            seeding.child(self.seed, "env", lane, self.steps) for lane in lanes
        ]
        obs, _ = self.env.reset(seed=seeds)
        self._obs, self._begun = np.array(obs), True
        self._returns[:] = 0
        self._lengths[:] = 0
        self.buffer.cut()  # the rows that follow do not continue the ones before

    def collect(
        self, agent: Agent, steps: int, explore: bool = True, random: bool = False
    ) -> dict[str, list[float]]:
        """Make `steps` steps in every lane and append them to the buffer.

        Args:
            agent: asked for actions, (N, obs) -> (N, action).
            steps: vector steps; N transitions each.
            explore: passed on to `act`.
            random: take uniform actions instead of the agent's (warm-up).

        Returns:
            Raw undiscounted "returns" and "lengths" of the episodes that ended, in order.
        """
        if agent.seeds > 1:
            raise UserError(
                f"{type(agent).__name__} holds {agent.seeds} stacked seeds, but an online task "
                "collects for one: use --seeds K, which runs one process per seed"
            )
        if not self._begun:
            self.reset()
        finished: dict[str, list[float]] = {"returns": [], "lengths": []}
        for _ in range(steps):
            action = self._random_action() if random else self._action(agent, explore)
            self._step(action, finished)
        return finished

    def _action(self, agent: Agent, explore: bool) -> np.ndarray[Any, Any]:
        """The agent's actions, (N, action)."""
        device = next((p.device for p in agent.parameters()), self.buffer.device)
        kind = self.buffer.spec["obs"][1]
        obs = torch.as_tensor(self._obs).to(device, kind)
        action: np.ndarray[Any, Any] = agent.run(agent.act, obs, explore).cpu().numpy()
        return action

    def _random_action(self) -> np.ndarray[Any, Any]:
        """Uniform in [-1, 1] or over the choices, (N, action)."""
        lanes, space = self.env.num_envs, self.env.single_action_space
        if isinstance(space, Discrete):
            return self._generator.integers(space.start, space.start + space.n, lanes)
        uniform = self._generator.random((lanes, *(space.shape or ())), dtype=np.float32)
        return 2 * uniform - 1

    def _step(self, action: np.ndarray[Any, Any], finished: dict[str, list[float]]) -> None:
        obs, reward, terminated, truncated, infos = self.env.step(action)
        ended = terminated | truncated
        next_obs = np.array(obs)
        self._returns += reward
        self._lengths += 1
        if self.life is not None:
            self.life.add(reward, infos)
        for lane in ended.nonzero()[0]:
            next_obs[lane] = infos["final_obs"][lane]
            finished["returns"].append(float(self._returns[lane]))
            finished["lengths"].append(int(self._lengths[lane]))
        self.buffer.extend(
            {
                "obs": self._obs,
                "action": action,
                "reward": self._scale * reward + self._shift,
                "next_obs": next_obs,
                "terminated": terminated,
                "truncated": truncated,
                "task": self._task,
            }
        )
        self._returns[ended] = 0
        self._lengths[ended] = 0
        self._obs = np.array(obs) if ended.any() else next_obs
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """What an exact continuation needs, the environments included where they can be exported.

        The buffer is saved by its owner.
        """
        from rl_shift.envs import env_state

        if not self._begun:
            self.reset()
        try:
            envs = env_state(self.env)
        except NotImplementedError:
            envs = None
        return {
            "steps": self.steps,
            "obs": torch.from_numpy(np.array(self._obs)),
            "returns": torch.from_numpy(self._returns.copy()),
            "lengths": torch.from_numpy(self._lengths.copy()),
            "generator": self._generator.bit_generator.state,
            "envs": envs,
            "life": None if self.life is None else self.life.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> bool:
        """Continue where `state` was taken; load the buffer's own state first.

        Returns:
            Whether the continuation is exact. It is not for environments that cannot export their
            state: those begin new episodes, which the caller should tell the user.
        """
        from rl_shift.envs import set_env_state

        self.steps = int(state["steps"])
        self._generator.bit_generator.state = state["generator"]
        if self.life is not None:
            self.life.load_state(state["life"])
        if state["envs"] is None:
            self.reset()
            return False
        set_env_state(self.env, state["envs"])
        self._obs, self._begun = state["obs"].numpy().copy(), True
        self._returns[:] = state["returns"].numpy()
        self._lengths[:] = state["lengths"].numpy()
        return True
