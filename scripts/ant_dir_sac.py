"""SAC for the directions of Ant-Dir: what happened in one direction teaches all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.spaces import Space

from rl_shift.agent import Batch, Metrics
from rl_shift.agents.sac import SAC
from rl_shift.envs.families import ANT_DIRECTIONS

VELOCITY = slice(13, 15)  # of the torso, in an observation of Ant-Dir
GOAL = slice(-2, None)  # the direction as a unit vector, which AntDirGoals appends


class AntDirSAC(SAC):
    """SAC on `rl_shift/AntDirGoals-v0`; half of a batch is asked about another direction.

    r' = r + v . (g' - g), with v the mean of the velocities before and after the step: the reward
    of every direction is known. Our design, after hindsight relabelling.
    """

    @dataclass(frozen=True)
    class Config(SAC.Config):
        """SAC's, and how much is relabelled."""

        relabelled: float = 0.5  # share of a batch

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Any
    ) -> None:
        super().__init__(observation_space, action_space, config)
        angles = torch.tensor(ANT_DIRECTIONS)
        self.register_buffer("goals", torch.stack([angles.cos(), angles.sin()], -1), False)

    def update(self, batch: Batch) -> Metrics:
        """SAC's update on a batch of which a part has other goals."""
        obs, next_obs = batch["obs"], batch["next_obs"]
        n, old = len(obs), obs[:, GOAL]
        drawn = self.goals[(torch.rand(n, device=obs.device) * len(self.goals)).long()]
        chosen = torch.rand(n, 1, device=obs.device) < self.config.relabelled
        goal = torch.where(chosen, drawn, old)
        velocity = (obs[:, VELOCITY] + next_obs[:, VELOCITY]) / 2
        return super().update(
            batch
            | {
                "obs": torch.cat([obs[:, : GOAL.start], goal], -1),
                "next_obs": torch.cat([next_obs[:, : GOAL.start], goal], -1),
                "reward": batch["reward"] + (velocity * (goal - old)).sum(-1),
            }
        )
