"""Plain eager CQL: the frozen yardstick of `scripts/bench.py` for agents that sample many actions.

Written the way the field usually writes it: states repeated for every sampled action and sent
through the actor again, one pass of each critic per kind of action, distributions from
`torch.distributions`, `.item()` of every loss. The mathematics are those of our agent: temperature,
actor and critics step in turn, and the backup's action is drawn beside the next state's others.

FROZEN, like `bench_reference.py`, whose rules it follows.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from bench_reference import PlainBatch, soft_update
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution


def mlp(inputs: int, outputs: int, hidden: int = 256) -> nn.Sequential:
    """Three hidden ReLU layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


class Number(nn.Module):
    """One learnt number."""

    def __init__(self, initial: float) -> None:
        """Start at `initial`."""
        super().__init__()
        self.value = nn.Parameter(torch.tensor(initial))

    def forward(self) -> Tensor:
        """The number, ()."""
        return self.value


class TanhGaussianPolicy(nn.Module):
    """Gaussian through tanh, its log std scaled and shifted by learnt numbers."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        """Build the network."""
        super().__init__()
        self.net = mlp(obs_dim, 2 * action_dim)
        self.scale, self.offset = Number(1.0), Number(-1.0)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(N, obs) -> an action (N, act) and its log density (N,)."""
        mean, log_std = torch.chunk(self.net(obs), 2, dim=-1)
        log_std = torch.clamp(self.scale() * log_std + self.offset(), -20.0, 2.0)
        std = torch.exp(log_std)
        distribution = TransformedDistribution(
            Normal(mean, std), TanhTransform(cache_size=1), validate_args=False
        )
        action = distribution.rsample()
        return action, distribution.log_prob(action).sum(-1)


class Critic(nn.Module):
    """One action value."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        """Build the network."""
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(N, obs), (N, act) -> (N,)."""
        return self.net(torch.cat([obs, action], 1)).squeeze(-1)


class PlainCQL:
    """CQL(H) (Kumar et al., 2020), CORL's settings for the locomotion sets."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        """Build networks, target critics and three optimisers."""
        self.actor = TanhGaussianPolicy(obs_dim, action_dim)
        self.critic_1, self.critic_2 = Critic(obs_dim, action_dim), Critic(obs_dim, action_dim)
        self.critic_1_target = copy.deepcopy(self.critic_1)
        self.critic_2_target = copy.deepcopy(self.critic_2)
        self.log_alpha = Number(0.0)
        critics = [*self.critic_1.parameters(), *self.critic_2.parameters()]
        self.critic_optimizer = torch.optim.Adam(critics, lr=3e-4)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-5)
        self.alpha_optimizer = torch.optim.Adam(self.log_alpha.parameters(), lr=3e-5)
        self.discount, self.tau, self.target_entropy = 0.99, 0.005, -float(action_dim)
        self.actions, self.cql_alpha = 10, 10.0

    def repeated(self, obs: Tensor, times: int) -> Tensor:
        """(B, obs) -> (B times, obs), every row `times` in turn."""
        return obs.unsqueeze(1).repeat(1, times, 1).reshape(-1, obs.shape[-1])

    def update(self, batch: PlainBatch) -> dict[str, float]:
        """Temperature, actor, critics, targets."""
        log = {}
        obs, action, reward, next_obs, terminal = batch
        rows, count = len(obs), self.actions

        _, log_pi = self.actor(obs)
        alpha_loss = -(self.log_alpha() * (log_pi + self.target_entropy).detach()).mean()
        log["alpha_loss"] = alpha_loss.item()
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()

        pi, log_pi = self.actor(obs)
        q = torch.min(self.critic_1(obs, pi), self.critic_2(obs, pi))
        actor_loss = (self.log_alpha().exp().detach() * log_pi - q).mean()
        log["actor_loss"] = actor_loss.item()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()

        with torch.no_grad():
            here, log_here = self.actor(self.repeated(obs, count))
            there, log_there = self.actor(self.repeated(next_obs, count + 1))
            there = there.reshape(rows, count + 1, -1)
            log_there = log_there.reshape(rows, count + 1)
            backup = there[:, -1]
            target_q = torch.min(
                self.critic_1_target(next_obs, backup), self.critic_2_target(next_obs, backup)
            )
            target_q = reward + (1 - terminal) * self.discount * target_q
            uniform = 2 * torch.rand(rows * count, action.shape[-1]) - 1
            kinds = (
                (uniform, -math.log(2) * action.shape[-1]),
                (there[:, :count].reshape(rows * count, -1), log_there[:, :count]),
                (here, log_here.reshape(rows, count)),
            )

        critic_loss = torch.zeros(())
        for critic in (self.critic_1, self.critic_2):
            q = critic(obs, action)
            scores = [
                critic(self.repeated(obs, count), actions).reshape(rows, count) - density
                for actions, density in kinds
            ]
            difference = (torch.logsumexp(torch.cat(scores, 1), 1) - q).mean()
            critic_loss = critic_loss + F.mse_loss(q, target_q) + self.cql_alpha * difference
        log["critic_loss"] = critic_loss.item()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        soft_update(self.critic_1_target, self.critic_1, self.tau)
        soft_update(self.critic_2_target, self.critic_2, self.tau)
        return log
