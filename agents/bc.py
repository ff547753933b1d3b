"""Behaviour cloning, and its top-fraction variant ("10% BC").

Faithful: squared error on dataset actions, tanh actor of two layers of 256, observations normalised
with std + 1e-3 (CORL). Differs: trajectories are cut at true episode ends. Known gaps: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import Agent, Batch, Metrics
from rl_shift.buffer import Buffer, Mixture
from rl_shift.networks import DeterministicActor

if TYPE_CHECKING:
    from rl_shift.config import Task


class BC(Agent):
    """L(actor) = E mean_d (pi(s) - a)^2."""

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of behaviour cloning."""

        batch_size: int = 256  # CORL
        hidden: tuple[int, ...] = (256, 256)  # CORL
        learning_rate: float = 3e-4  # Adam; CORL
        normalize: bool = True  # observations, std + 1e-3; CORL
        fraction: float = 1.0  # share of episodes kept, best returns first; 10% BC uses 0.1

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        super().__init__(observation_space, action_space, config)
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        self.actor = DeterministicActor(obs, config.hidden, action)
        self.optimizer("actor", lr=config.learning_rate)
        self.kept: Tensor | None = None

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Squared error, mean over batch and action dimensions."""
        loss = (self.actor(batch["obs"]) - batch["action"]).square().mean()
        return loss, {"actor/loss": loss}

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, obs) -> (N, action)."""
        return self.actor(self.normalizer(obs))

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Find the rows of the best episodes."""
        super().begin_task(task, buffer)
        self.kept = None

    def best_rows(self, buffer: Buffer) -> Tensor:
        """Row numbers of the best max(1, floor(fraction * n)) episodes by undiscounted return."""
        ranges = buffer.episodes()
        total = torch.cat(
            [
                torch.zeros(1, dtype=torch.float64, device=ranges.device),
                buffer.arrays()["reward"].double().cumsum(0),
            ]
        )
        returns = total[ranges[:, 1]] - total[ranges[:, 0]]
        count = max(1, int(self.config.fraction * len(ranges)))
        best = ranges[returns.argsort(descending=True)[:count]]
        return torch.cat([torch.arange(a, b, device=ranges.device) for a, b in best.tolist()])

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """Uniform transitions of the kept episodes."""
        if self.config.fraction >= 1.0 or isinstance(buffer, Mixture):
            return super().sample(buffer)
        if self.kept is None:
            self.kept = self.best_rows(buffer)
        return buffer.sample(self.config.batch_size, where=self.kept)

    def update(self, batch: Batch) -> Metrics:
        """One step of regression."""
        return self.learn("actor", self.actor_loss, self.normalizer.batch(batch))
