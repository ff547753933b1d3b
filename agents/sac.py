"""SAC: soft actor-critic with a learnt temperature (Haarnoja et al., 2018).

Faithful: tanh-Gaussian actor, twin critics, entropy in the backup, target entropy -dim(A). The
temperature's loss is linear in log alpha, as in the authors' code. Known gaps: continuous actions
only.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import Agent, Batch, Metrics, Policy
from rl_shift.networks import ActionValues, Critic, Scalar, TanhGaussianActor


class SAC(Agent):
    """Maximum-entropy off-policy learning.

    L(critic) = sum_i E (Q_i(s, a) - y)^2
    y         = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi(a'|s')),  a' ~ pi
    L(actor)  = E alpha log pi(a~|s) - min_i Q_i(s, a~)
    L(alpha)  = -log alpha E (log pi(a~|s) + target entropy)
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of SAC; the paper's values where not said otherwise."""

        batch_size: int = 256
        hidden: tuple[int, ...] = (256, 256)
        learning_rate: float = 3e-4  # Adam, all networks
        discount: float = 0.99
        tau: float = 0.005  # target averaging
        target_entropy: float | None = None  # None: -dim(A)
        normalize: bool = False  # observations of a first dataset; ours, for offline-to-online
        warmup_steps: int = 10_000  # uniform actions before the first update
        collect_every: int = 1  # vector steps between rounds of updates
        updates_per_collect: int = 1  # updates per round
        buffer_capacity: int = 1_000_000

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Any
    ) -> None:
        super().__init__(observation_space, action_space, config)
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        self.target_entropy = (
            -float(action) if config.target_entropy is None else config.target_entropy
        )
        self.actor, self.critic = self.networks(obs, action)
        self.target_critic = copy.deepcopy(self.critic)
        self.log_alpha = Scalar(0.0)
        for name, rate in self.learning_rates().items():
            self.optimizer(name, lr=rate)

    def networks(self, obs: int, action: int) -> tuple[TanhGaussianActor, ActionValues]:
        """Actor and critics for these widths; what descends from SAC has others."""
        hidden = self.config.hidden
        return TanhGaussianActor(obs, hidden, action), Critic(obs, action, hidden)

    def learning_rates(self) -> dict[str, float]:
        """Adam's rate of each network."""
        return dict.fromkeys(("actor", "critic", "log_alpha"), self.config.learning_rate)

    def target(self, batch: Batch) -> Tensor:
        """The backup y = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi), (B,)."""
        next_action, log_prob = self.actor.sample(batch["next_obs"])
        soft = self.target_critic(batch["next_obs"], next_action).amin(0)
        soft = soft - self.log_alpha().exp() * log_prob
        return batch["reward"] + self.config.discount * ~batch["terminated"] * soft

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Soft Bellman error of both critics."""
        q = self.critic(batch["obs"], batch["action"])
        loss = (q - self.target(batch)).square().mean(-1).sum()
        return loss, {"critic/loss": loss, "critic/q": q.mean()}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Entropy-regularised improvement."""
        action, log_prob = self.actor.sample(batch["obs"])
        q = self.critic(batch["obs"], action).amin(0)
        loss = (self.log_alpha().exp() * log_prob - q).mean()
        return loss, {"actor/loss": loss, "actor/entropy": -log_prob.mean()}

    def alpha_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Moves the entropy towards its target."""
        _, log_prob = self.actor.sample(batch["obs"])
        loss = -(self.log_alpha() * (log_prob + self.target_entropy)).mean()
        return loss, {"alpha/value": self.log_alpha().exp()}

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, obs) -> (N, action): a sample when exploring, else tanh of the mean."""
        obs = self.normalizer(obs)
        return self.actor.sample(obs)[0] if explore else self.actor(obs)

    def distribution(self, obs: Tensor) -> Policy:
        """(N, obs) -> the Gaussian before the tanh."""
        mean, log_std = self.actor.gaussian(self.normalizer(obs))
        return Policy(mean, log_std.exp(), squashed=True)

    def update(self, batch: Batch) -> Metrics:
        """Critics, actor, temperature, target."""
        batch = self.normalizer.batch(batch)
        metrics = self.learn("critic", self.critic_loss, batch)
        metrics |= self.learn("actor", self.actor_loss, batch)
        metrics |= self.learn("log_alpha", self.alpha_loss, batch)
        self.polyak("critic", "target_critic", self.config.tau)
        return metrics
