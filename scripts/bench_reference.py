"""Plain eager TD3+BC and IQL: the frozen yardstick of `scripts/bench.py`.

Written the way the field usually writes them (the semantics are CORL's): one module per network,
default Adam, `zero_grad` / `backward` / `step`, a Python loop over parameters for the targets,
`.item()` of every loss at every update, five NumPy arrays indexed one after another, one
environment stepped at a time. Observations are normalised once, in the arrays.

FROZEN: every ratio in the project's tables is relative to this file. It is never edited together
with an agent, never made faster or slower, and imports nothing of the project.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal


class PlainBatch(NamedTuple):
    """Observations (B, obs), actions (B, act), rewards (B,), next observations, terminals (B,)."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminal: Tensor


class PlainArrays:
    """A dataset as five NumPy arrays; a batch is five fancy indexings and five conversions."""

    def __init__(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        next_obs: np.ndarray,
        terminal: np.ndarray,
        seed: int = 0,
    ) -> None:
        """Keep float32 copies of the arrays (N, ...)."""
        self.obs = np.array(obs, dtype=np.float32)
        self.action = np.array(action, dtype=np.float32)
        self.reward = np.array(reward, dtype=np.float32)
        self.next_obs = np.array(next_obs, dtype=np.float32)
        self.terminal = np.array(terminal, dtype=np.float32)
        self.random = np.random.default_rng(seed)

    def normalize(self, eps: float = 1e-3) -> None:
        """Shift and scale both observation arrays by the statistics of the first."""
        self.mean, self.std = self.obs.mean(0), self.obs.std(0) + eps
        self.obs = (self.obs - self.mean) / self.std
        self.next_obs = (self.next_obs - self.mean) / self.std

    def sample(self, batch_size: int) -> PlainBatch:
        """Draw uniformly with replacement."""
        index = self.random.integers(0, len(self.obs), size=batch_size)
        return PlainBatch(
            torch.from_numpy(self.obs[index]),
            torch.from_numpy(self.action[index]),
            torch.from_numpy(self.reward[index]),
            torch.from_numpy(self.next_obs[index]),
            torch.from_numpy(self.terminal[index]),
        )


def mlp(inputs: int, outputs: int, hidden: int = 256) -> nn.Sequential:
    """Two hidden ReLU layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


class Policy(nn.Module):
    """Deterministic tanh policy."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        """Build the network."""
        super().__init__()
        self.net = mlp(obs_dim, action_dim)

    def forward(self, obs: Tensor) -> Tensor:
        """(B, obs) -> (B, act) in (-1, 1)."""
        return torch.tanh(self.net(obs))


class GaussianPolicy(nn.Module):
    """Gaussian around a tanh mean with a log std that does not depend on the state."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        """Build the network; log std starts at 0."""
        super().__init__()
        self.net = mlp(obs_dim, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: Tensor) -> Normal:
        """(B, obs) -> distribution over (B, act)."""
        return Normal(torch.tanh(self.net(obs)), torch.exp(self.log_std.clamp(-20.0, 2.0)))


class Critic(nn.Module):
    """One action value."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        """Build the network."""
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, obs), (B, act) -> (B,)."""
        return self.net(torch.cat([obs, action], 1)).squeeze(-1)


class Value(nn.Module):
    """State value."""

    def __init__(self, obs_dim: int) -> None:
        """Build the network."""
        super().__init__()
        self.net = mlp(obs_dim, 1)

    def forward(self, obs: Tensor) -> Tensor:
        """(B, obs) -> (B,)."""
        return self.net(obs).squeeze(-1)


def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move every target parameter a fraction tau towards its source."""
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.data.copy_((1 - tau) * t.data + tau * s.data)


class PlainTD3BC:
    """TD3+BC (Fujimoto and Gu, 2021), CORL's settings for the locomotion sets."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        """Build networks, targets and three optimisers."""
        self.actor = Policy(obs_dim, action_dim)
        self.actor_target = copy.deepcopy(self.actor)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.critic_1 = Critic(obs_dim, action_dim)
        self.critic_1_target = copy.deepcopy(self.critic_1)
        self.critic_1_optimizer = torch.optim.Adam(self.critic_1.parameters(), lr=3e-4)
        self.critic_2 = Critic(obs_dim, action_dim)
        self.critic_2_target = copy.deepcopy(self.critic_2)
        self.critic_2_optimizer = torch.optim.Adam(self.critic_2.parameters(), lr=3e-4)
        self.discount, self.tau, self.alpha = 0.99, 0.005, 2.5
        self.policy_noise, self.noise_clip, self.policy_delay = 0.2, 0.5, 2
        self.updates = 0

    def update(self, batch: PlainBatch) -> dict[str, float]:
        """One critic step; every second call an actor step and the targets."""
        log = {}
        self.updates += 1
        obs, action, reward, next_obs, terminal = batch
        with torch.no_grad():
            noise = (torch.randn_like(action) * self.policy_noise).clamp(
                -self.noise_clip, self.noise_clip
            )
            next_action = (self.actor_target(next_obs) + noise).clamp(-1.0, 1.0)
            target_q1 = self.critic_1_target(next_obs, next_action)
            target_q2 = self.critic_2_target(next_obs, next_action)
            target_q = torch.min(target_q1, target_q2)
            target_q = reward + (1 - terminal) * self.discount * target_q

        critic_loss = F.mse_loss(self.critic_1(obs, action), target_q) + F.mse_loss(
            self.critic_2(obs, action), target_q
        )
        log["critic_loss"] = critic_loss.item()
        self.critic_1_optimizer.zero_grad()
        self.critic_2_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_1_optimizer.step()
        self.critic_2_optimizer.step()

        if self.updates % self.policy_delay == 0:
            pi = self.actor(obs)
            q = self.critic_1(obs, pi)
            weight = self.alpha / q.abs().mean().detach()
            actor_loss = -weight * q.mean() + F.mse_loss(pi, action)
            log["actor_loss"] = actor_loss.item()
            self.actor_optimizer.zero_grad()
            actor_loss.backward()
            self.actor_optimizer.step()
            soft_update(self.critic_1_target, self.critic_1, self.tau)
            soft_update(self.critic_2_target, self.critic_2, self.tau)
            soft_update(self.actor_target, self.actor, self.tau)
        return log

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Normalised (obs,) -> (act,)."""
        state = torch.tensor(obs.reshape(1, -1), dtype=torch.float32)
        return self.actor(state).cpu().numpy().flatten()


class PlainIQL:
    """IQL (Kostrikov et al., 2021) in CORL's order: every loss sees the networks of before."""

    def __init__(self, obs_dim: int, action_dim: int, max_steps: int = 1_000_000) -> None:
        """Build networks, target critics, three optimisers and the actor's cosine schedule."""
        self.critic_1, self.critic_2 = Critic(obs_dim, action_dim), Critic(obs_dim, action_dim)
        self.critic_1_target = copy.deepcopy(self.critic_1).requires_grad_(False)
        self.critic_2_target = copy.deepcopy(self.critic_2).requires_grad_(False)
        self.value = Value(obs_dim)
        self.actor = GaussianPolicy(obs_dim, action_dim)
        critics = [*self.critic_1.parameters(), *self.critic_2.parameters()]
        self.critic_optimizer = torch.optim.Adam(critics, lr=3e-4)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=3e-4)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.actor_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.actor_optimizer, max_steps
        )
        self.discount, self.tau, self.expectile, self.beta = 0.99, 0.005, 0.7, 3.0

    def update(self, batch: PlainBatch) -> dict[str, float]:
        """Value, critics, targets, actor."""
        log = {}
        obs, action, reward, next_obs, terminal = batch
        with torch.no_grad():
            next_value = self.value(next_obs)
            target_q = torch.min(
                self.critic_1_target(obs, action), self.critic_2_target(obs, action)
            )

        advantage = target_q - self.value(obs)
        side = torch.abs(self.expectile - (advantage < 0).float())
        value_loss = torch.mean(side * advantage**2)
        log["value_loss"] = value_loss.item()
        self.value_optimizer.zero_grad()
        value_loss.backward()
        self.value_optimizer.step()

        target = reward + (1.0 - terminal) * self.discount * next_value
        critic_loss = (
            F.mse_loss(self.critic_1(obs, action), target)
            + F.mse_loss(self.critic_2(obs, action), target)
        ) / 2
        log["critic_loss"] = critic_loss.item()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        soft_update(self.critic_1_target, self.critic_1, self.tau)
        soft_update(self.critic_2_target, self.critic_2, self.tau)

        weight = torch.exp(self.beta * advantage.detach()).clamp(max=100.0)
        actor_loss = torch.mean(-weight * self.actor(obs).log_prob(action).sum(-1))
        log["actor_loss"] = actor_loss.item()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        self.actor_schedule.step()
        return log

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Normalised (obs,) -> (act,), the mean action."""
        state = torch.tensor(obs.reshape(1, -1), dtype=torch.float32)
        return self.actor(state).mean.clamp(-1.0, 1.0).cpu().numpy().flatten()


def plain_returns(
    env: Any,
    act: Callable[[np.ndarray], np.ndarray],
    seeds: Sequence[int],
    mean: np.ndarray,
    std: np.ndarray,
) -> np.ndarray:
    """Undiscounted returns (E,) of one episode per seed, one environment, one step at a time."""
    returns = []
    for seed in seeds:
        obs, _ = env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(act((obs - mean) / std))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return np.array(returns)
