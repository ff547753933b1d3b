"""TD3+BC: a minimalist approach to offline reinforcement learning (Fujimoto and Gu, 2021).

Faithful to CORL's implementation: critic loss is the sum of both squared errors, the cloning term
is a mean over batch and action dimensions, targets move only on the delayed steps. Known gaps:
none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import Agent, Batch, Metrics
from rl_shift.networks import ActionValues, Critic, DeterministicActor


class TD3BC(Agent):
    """Twin critics and a deterministic actor that climbs Q_1 and stays near the data.

    L(critic) = sum_i E (Q_i(s, a) - y)^2
    y         = r + gamma (1 - terminated) min_i Q'_i(s', clip(pi'(s') + clipped noise))
    L(actor)  = -lambda E Q_1(s, pi(s)) + E mean_d (pi(s) - a)^2,  lambda = alpha / E|Q_1(s, pi(s))|
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of TD3+BC; the paper's and CORL's values."""

        batch_size: int = 256
        hidden: tuple[int, ...] = (256, 256)
        learning_rate: float = 3e-4  # Adam, actor and critics
        discount: float = 0.99
        tau: float = 0.005  # target averaging
        alpha: float = 2.5  # weight of the value term
        policy_noise: float = 0.2  # target smoothing
        noise_clip: float = 0.5
        policy_delay: int = 2  # critic updates per actor update
        layer_norm: bool = False  # critics only; True is ours, after ReBRAC
        normalize: bool = True  # observations, std + 1e-3
        exploration_noise: float = 0.1  # online only; TD3

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Any
    ) -> None:
        super().__init__(observation_space, action_space, config)
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        self.delay = config.policy_delay
        self.actor, self.critic = self.networks(obs, action)
        self.target_actor = copy.deepcopy(self.actor)
        self.target_critic = copy.deepcopy(self.critic)
        for name, rate in self.learning_rates().items():
            self.optimizer(name, lr=rate)

    def networks(self, obs: int, action: int) -> tuple[DeterministicActor, ActionValues]:
        """Actor and critics for these widths; what descends from TD3+BC has others."""
        c = self.config
        actor = DeterministicActor(obs, c.hidden, action)
        return actor, Critic(obs, action, c.hidden, layer_norm=c.layer_norm)

    def learning_rates(self) -> dict[str, float]:
        """Adam's rate of each network."""
        return dict.fromkeys(("actor", "critic"), self.config.learning_rate)

    def smoothed_action(self, obs: Tensor) -> Tensor:
        """The target actor's action with clipped noise, (B, obs) -> (B, action)."""
        c = self.config
        action: Tensor = self.target_actor(obs)
        if c.policy_noise:
            noise = c.policy_noise * torch.randn_like(action)
            action = (action + noise.clamp(-c.noise_clip, c.noise_clip)).clamp(-1, 1)
        return action

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Both critics regress on the smoothed, pessimistic target."""
        next_action = self.smoothed_action(batch["next_obs"])
        target_q = self.target_critic(batch["next_obs"], next_action).amin(0)
        target = batch["reward"] + self.config.discount * ~batch["terminated"] * target_q
        q = self.critic(batch["obs"], batch["action"])
        loss = (q - target).square().mean(-1).sum()
        return loss, {"critic/loss": loss, "critic/q": q.mean()}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Climb Q_1, stay near the data."""
        action = self.actor(batch["obs"])
        q = self.critic.first(batch["obs"], action)
        cloning = (action - batch["action"]).square().mean()
        loss = -self.config.alpha * q.mean() / q.abs().mean().detach() + cloning
        return loss, {"actor/loss": loss, "actor/cloning": cloning}

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, obs) -> (N, action)."""
        action: Tensor = self.actor(self.normalizer(obs))
        if explore:
            noise = self.config.exploration_noise * torch.randn_like(action)
            action = (action + noise).clamp(-1, 1)
        return action

    def update(self, batch: Batch) -> Metrics:
        """Critic every time; actor and targets every `policy_delay`-th."""
        batch = self.normalizer.batch(batch)
        metrics = self.learn("critic", self.critic_loss, batch)
        if (self.updates + 1) % self.delay == 0:
            metrics |= self.learn("actor", self.actor_loss, batch)
            self.polyak("critic", "target_critic", self.config.tau)
            self.polyak("actor", "target_actor", self.config.tau)
        return metrics
