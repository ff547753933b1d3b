"""SAC for the directions of Ant-Dir: what happened in one direction teaches all of them.

`scripts/make_datasets.py family AntDir` trains it. To use its run elsewhere, as with
`rl-shift evaluate datasets/AntDir.sac-expert`, set PYTHONPATH=scripts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import Batch, Metrics, Policy
from rl_shift.agents.sac import SAC
from rl_shift.envs.families import ANT_DIRECTIONS

# An observation of AntDirGoals (29,): height, quaternion, joints of four legs, velocity, angular
# velocity in the torso's frame, the joints' velocities, and the direction as a unit vector.
VELOCITY = slice(13, 15)
GOAL = slice(-2, None)
MOTORS = [6, 7, 0, 1, 2, 3, 4, 5]  # the joints in the order of an action, which begins with leg 4


def joints(legs: tuple[int, ...], hip: int, ankles: tuple[int, ...]) -> Tensor:
    """What the joints become where leg i takes the place of `legs[i]`, (8, 8)."""
    matrix = torch.zeros(8, 8)
    for leg, source in enumerate(legs):
        matrix[2 * leg, 2 * source] = hip
        matrix[2 * leg + 1, 2 * source + 1] = ankles[leg]
    return matrix


def apply(matrices: Tensor, rows: Tensor) -> Tensor:
    """(B, m, n), (B, n) -> (B, m): each row through its matrix."""
    return (matrices @ rows[..., None])[..., 0]


def symmetries() -> tuple[Tensor, Tensor]:
    """Images of the ant: matrices of observations (8, 29, 29) and of actions (8, 8, 8).

    Number k + 4 m is k clockwise quarter turns of the world and, if m is 1, a mirror that swaps
    left and right; the legs are named anew, so that the torso still looks ahead.
    """
    turn = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    mirror = torch.diag(torch.tensor([1.0, -1, 1]))
    number = torch.eye(1)
    images = []
    for vector, rotation, legs in (  # a mirror turns rotations the other way round
        (turn, turn, joints((1, 2, 3, 0), 1, (-1, 1, -1, 1))),  # neighbours' ankles have other axes
        (mirror, -mirror, joints((3, 2, 1, 0), -1, (1, 1, 1, 1))),
    ):
        torso = (number, number, rotation)
        obs = torch.block_diag(*torso, legs, vector, rotation, legs, vector[:2, :2])
        images.append((obs, legs[MOTORS][:, MOTORS]))
    power = torch.linalg.matrix_power
    obs, action = (
        torch.stack([power(mirrored, m) @ power(turned, k) for m in range(2) for k in range(4)])
        for turned, mirrored in zip(*images, strict=True)
    )
    return obs, action


class AntDirSAC(SAC):
    """SAC on `rl_shift/AntDirGoals-v0`; half of a batch is asked about another direction.

    r' = r + v . (g' - g), with v the mean of the velocities before and after the step: the reward
    of every direction is known. The networks only see directions from 0 to 45 degrees: the ant is
    as symmetric as a square, so that any other direction is one of these for an image of the ant.
    Our design, after hindsight relabelling.
    """

    @dataclass(frozen=True)
    class Config(SAC.Config):
        """SAC's, and what a batch is asked."""

        relabelled: float = 0.5  # share of a batch
        control: float = 0.3  # share of the control cost 0.5 |a|^2 that is charged

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Any
    ) -> None:
        super().__init__(observation_space, action_space, config)
        angles = torch.tensor(ANT_DIRECTIONS)
        self.register_buffer("goals", torch.stack([angles.cos(), angles.sin()], -1), False)
        for name, images in zip(("obs_images", "action_images"), symmetries(), strict=True):
            self.register_buffer(name, images, False)

    @staticmethod
    def image(goal: Tensor) -> Tensor:
        """(B, 2) -> (B,): which of `symmetries` brings a direction between 0 and 45 degrees."""
        angle = torch.atan2(goal[:, 1], goal[:, 0])
        turns = torch.round(angle / (math.pi / 2))
        mirrored = angle < turns * (math.pi / 2)
        return turns.long() % 4 + 4 * mirrored.long()

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, 29) -> (N, 8): SAC's action for the image, brought back."""
        image = self.image(obs[:, GOAL])
        action = super().act(apply(self.obs_images[image], obs), explore)
        return apply(self.action_images[image].mT, action)

    def distribution(self, obs: Tensor) -> Policy:
        """(N, 29) -> the Gaussian before the tanh, brought back."""
        image = self.image(obs[:, GOAL])
        seen = super().distribution(apply(self.obs_images[image], obs))
        back = self.action_images[image].mT
        return Policy(apply(back, seen.mean), apply(back.abs(), seen.std), squashed=True)

    def update(self, batch: Batch) -> Metrics:
        """SAC's update on images of the batch, a part of it with other directions."""
        obs, next_obs, action = batch["obs"], batch["next_obs"], batch["action"]
        n, old = len(obs), obs[:, GOAL]
        drawn = self.goals[(torch.rand(n, device=obs.device) * len(self.goals)).long()]
        chosen = torch.rand(n, 1, device=obs.device) < self.config.relabelled
        goal = torch.where(chosen, drawn, old)
        velocity = (obs[:, VELOCITY] + next_obs[:, VELOCITY]) / 2
        spared = (1 - self.config.control) * 0.5 * action.square().sum(-1)
        image = self.image(goal)
        both = torch.stack([obs, next_obs], -1)
        both[:, GOAL] = goal[..., None]
        both = self.obs_images[image] @ both
        return super().update(
            batch
            | {
                "obs": both[..., 0],
                "next_obs": both[..., 1],
                "action": apply(self.action_images[image], action),
                "reward": batch["reward"] + (velocity * (goal - old)).sum(-1) + spared,
            }
        )
