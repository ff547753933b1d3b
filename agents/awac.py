"""AWAC: accelerating online RL with offline datasets (Nair et al., 2020).

Faithful to CORL's implementation: Gaussian actor with an unbounded mean, actions sampled from it
clamped to the box and scored there, no actor target. Differs: the evaluated mean is clipped to the
box here, by the environment there. Known gaps: none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import Agent, Batch, Metrics, Policy
from rl_shift.networks import EnsembleCritic, GaussianActor


class AWAC(Agent):
    """Advantage-weighted regression on the policy's own critics.

    L(critic) = sum_i E (Q_i(s, a) - r - gamma (1 - terminated) min_j Q'_j(s', a'))^2,  a' ~ pi
    L(actor)  = -E min(exp(A / lambda), 100) log pi(a|s)
    A         = min_i Q_i(s, a) - min_i Q_i(s, a~),  a~ ~ pi(s)
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of AWAC; CORL's values for MuJoCo."""

        batch_size: int = 256
        hidden: tuple[int, ...] = (256, 256, 256)
        learning_rate: float = 3e-4  # Adam, actor and critics
        discount: float = 0.99
        tau: float = 0.005  # target averaging
        temperature: float = 0.3333  # lambda; 0.1 on other domains
        weight_max: float = 100.0  # bound of the advantage weights
        log_std_min: float = -20.0
        log_std_max: float = 2.0
        normalize: bool = True  # observations, std + 1e-3

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        super().__init__(observation_space, action_space, config)
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        log_std = (config.log_std_min, config.log_std_max)
        self.actor = GaussianActor(obs, config.hidden, action, log_std, bounded=False)
        self.critic = EnsembleCritic(obs, action, config.hidden)
        self.target_critic = copy.deepcopy(self.critic)
        self.optimizer("actor", "critic", lr=config.learning_rate)

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Backup through an action of the present policy, without entropy."""
        next_q = self.target_critic(batch["next_obs"], self.actor.sample(batch["next_obs"]))
        target = batch["reward"] + self.config.discount * ~batch["terminated"] * next_q.amin(0)
        q = self.critic(batch["obs"], batch["action"])
        loss = (q - target).square().mean(-1).sum()
        return loss, {"critic/loss": loss, "critic/q": q.mean()}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Regression on the data's actions, weighted by how much better they are."""
        value = self.critic(batch["obs"], self.actor.sample(batch["obs"]).detach()).amin(0)
        advantage = self.critic(batch["obs"], batch["action"]).amin(0) - value
        weight = (advantage / self.config.temperature).exp().clamp(max=self.config.weight_max)
        log_prob = self.actor.log_prob(batch["obs"], batch["action"])
        loss = -(weight.detach() * log_prob).mean()
        return loss, {"actor/loss": loss, "actor/advantage": advantage.mean()}

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, obs) -> (N, action): the mean, or a sample when exploring."""
        obs = self.normalizer(obs)
        return self.actor.sample(obs) if explore else self.actor(obs).clamp(-1, 1)

    def distribution(self, obs: Tensor) -> Policy:
        """(N, obs) -> the Gaussian, its mean as it is before the clip."""
        return Policy(self.actor(self.normalizer(obs)), self.actor.std())

    def update(self, batch: Batch) -> Metrics:
        """Critics, actor, target."""
        batch = self.normalizer.batch(batch)
        metrics = self.learn("critic", self.critic_loss, batch)
        metrics |= self.learn("actor", self.actor_loss, batch)
        self.polyak("critic", "target_critic", self.config.tau)
        return metrics
