"""IQL: offline reinforcement learning with implicit Q-learning (Kostrikov, Nair, Levine, 2021).

Faithful to CORL's implementation by default: actor and critic use the value from before its own
update. `variant="official"` is the order of the authors' code: value first. Known gaps: none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import Agent, Batch, Metrics, Policy
from rl_shift.networks import Critic, GaussianActor, Value


class IQL(Agent):
    """Expectile value, one-step critic, advantage-weighted actor; no action outside the data.

    L(value)  = E |tau - 1(u < 0)| u^2,           u = min_i Q'_i(s, a) - V(s)
    L(critic) = mean_i E (Q_i(s, a) - r - gamma (1 - terminated) V(s'))^2
    L(actor)  = -E min(exp(beta u), 100) log pi(a|s)
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of IQL; CORL's values for MuJoCo."""

        batch_size: int = 256
        hidden: tuple[int, ...] = (256, 256)
        learning_rate: float = 3e-4  # Adam; the actor's decays as a cosine
        discount: float = 0.99
        tau: float = 0.005  # target averaging
        expectile: float = 0.7
        beta: float = 3.0  # inverse temperature of the advantage weights
        deterministic: bool = False  # squared error instead of log-density; CORL on hopper-medium
        dropout: float = 0.0  # actor only; 0.1 on adroit and kitchen
        log_std_min: float = -20.0  # CORL; -5 in the official code
        normalize: bool = True  # observations, std + 1e-3; off in the official code
        schedule_updates: int = 0  # length of the actor's cosine; 0: the run's updates, as in CORL
        variant: Literal["corl", "official"] = "corl"  # order of the three updates

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        super().__init__(observation_space, action_space, config)
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        self.value = Value(obs, config.hidden)
        self.critic = Critic(obs, action, config.hidden)
        self.target_critic = copy.deepcopy(self.critic)
        self.actor = GaussianActor(
            obs, config.hidden, action, (config.log_std_min, 2.0), config.dropout
        )
        self.optimizer("value", "critic", lr=config.learning_rate)
        self.optimizer(
            "actor",
            lr=config.learning_rate,
            schedule="cosine",
            schedule_updates=config.schedule_updates,
        )

    def target_q(self, batch: Batch) -> Tensor:
        """min_i Q'_i(s, a), (B,): the same for value and actor, so `update` asks once."""
        return self.target_critic(batch["obs"], batch["action"]).amin(0)

    def advantage(self, batch: Batch) -> Tensor:
        """Advantage u = min_i Q'_i(s, a) - V(s), (B,)."""
        return batch["target_q"] - self.value(batch["obs"])

    def value_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Expectile regression."""
        u = self.advantage(batch)
        weight = torch.where(u > 0, self.config.expectile, 1 - self.config.expectile)
        loss = (weight * u.square()).mean()
        return loss, {"value/loss": loss, "value/advantage": u.mean()}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """One-step backup through V, mean over both critics."""
        next_value = self.value(batch["next_obs"])
        target = batch["reward"] + self.config.discount * ~batch["terminated"] * next_value
        q = self.critic(batch["obs"], batch["action"])
        loss = (q - target).square().mean()
        return loss, {"critic/loss": loss, "critic/q": q.mean()}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Advantage-weighted regression."""
        weight = (self.config.beta * self.advantage(batch)).exp().clamp(max=100.0)
        if self.config.deterministic:
            error = (self.actor(batch["obs"], drop=True) - batch["action"]).square().sum(-1)
        else:
            error = -self.actor.log_prob(batch["obs"], batch["action"], drop=True)
        loss = (weight * error).mean()
        return loss, {"actor/loss": loss}

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, obs) -> (N, action): the mean, or a sample when exploring."""
        obs = self.normalizer(obs)
        if explore and not self.config.deterministic:
            return self.actor.sample(obs)
        return self.actor(obs)

    def distribution(self, obs: Tensor) -> Policy:
        """(N, obs) -> the Gaussian that the actor maximises."""
        if self.config.deterministic:
            return super().distribution(obs)
        return Policy(self.actor(self.normalizer(obs)), self.actor.std())

    def update(self, batch: Batch) -> Metrics:
        """Actor, critic, value (CORL), or value, actor, critic (official); then the target."""
        batch = self.normalizer.batch(batch)
        batch["target_q"] = self.run(self.target_q, batch)
        official = self.config.variant == "official"
        metrics = self.learn("value", self.value_loss, batch) if official else {}
        metrics |= self.learn("actor", self.actor_loss, batch)
        metrics |= self.learn("critic", self.critic_loss, batch)
        if not official:
            metrics |= self.learn("value", self.value_loss, batch)
        self.polyak("critic", "target_critic", self.config.tau)
        return metrics
