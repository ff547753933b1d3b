"""CQL: conservative Q-learning for offline RL (Kumar et al., 2020), the version CQL(H).

Faithful to CORL's implementation: importance-weighted logsumexp over uniform and policy actions,
next-state actions scored at the present state, backup without entropy, learnt scale of the actor's
log_std. Differs: temperature, actor and critics step in turn, where CORL computes the three losses
first; target actions come from the same pass of the actor. Known gaps: no cloning phase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rl_shift.agent import Batch, Metrics
from rl_shift.agents.sac import SAC
from rl_shift.networks import (
    ActionValues,
    EnsembleCritic,
    Scalar,
    TanhGaussianActor,
    initialise_orthogonal,
)


class CQL(SAC):
    """SAC whose critics are pushed down on actions that the data do not show.

    L(critic) = sum_i E (Q_i(s, a) - y)^2 + w E clamp(logsumexp_a~ (Q_i(s, a~) - log mu(a~)) - Q_i)
    y         = r + gamma (1 - terminated) min_i Q'_i(s', a'),  a' ~ pi
    a~        : K each of mu = uniform, pi(.|s') and pi(.|s)
    L(actor)  = E alpha log pi(a~|s) - min_i Q_i(s, a~)
    L(alpha)  = -log alpha E (log pi(a~|s) + target entropy)
    w = cql_alpha, with `lagrange` times alpha' on (difference - gap), alpha' climbing its own term
    """

    @dataclass(frozen=True)
    class Config:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Hyper-parameters of CQL; CORL's values for MuJoCo."""

        batch_size: int = 256
        hidden: tuple[int, ...] = (256, 256, 256)  # actor
        critic_hidden: tuple[int, ...] = ()  # (): as `hidden`; CORL on antmaze: five of 256
        actor_learning_rate: float = 3e-5  # Adam, actor and temperature; 1e-4 on antmaze, adroit
        critic_learning_rate: float = 3e-4  # Adam, critics and alpha'
        discount: float = 0.99
        tau: float = 0.005  # target averaging
        cql_alpha: float = 10.0  # weight of the conservative term; antmaze 5, adroit 1
        actions: int = 10  # K, sampled actions of each kind
        target_entropy: float | None = None  # None: -dim(A)
        lagrange: bool = False  # learn the weight; maze2d, antmaze
        gap: float = 5.0  # of the Lagrange version; antmaze 0.8
        max_backup: bool = False  # target: best of K next actions; antmaze
        difference_min: float = -math.inf  # lower clamp of the conservative difference; antmaze
        normalize: bool = True  # observations, std + 1e-3; off on antmaze

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        super().__init__(observation_space, action_space, config)
        if config.lagrange:
            self.log_weight = Scalar(1.0)  # log alpha'
            self.optimizer("log_weight", lr=config.critic_learning_rate)

    def networks(self, obs: int, action: int) -> tuple[TanhGaussianActor, ActionValues]:
        """Actor with a small last layer and a learnt scale, critics with orthogonal weights."""
        c = self.config
        actor = TanhGaussianActor(obs, c.hidden, action, learnt_scale=True)
        nn.init.xavier_uniform_(actor.net.layers[-1].get_parameter("weight"), gain=0.01)
        nn.init.zeros_(actor.net.layers[-1].get_parameter("bias"))
        critic = EnsembleCritic(obs, action, c.critic_hidden or c.hidden)
        initialise_orthogonal(critic.net, last_gain=0.01)
        return actor, critic

    def learning_rates(self) -> dict[str, float]:
        """Adam's rate of each network."""
        slow, fast = self.config.actor_learning_rate, self.config.critic_learning_rate
        return {"actor": slow, "log_alpha": slow, "critic": fast}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Bellman error and conservative term of both critics, in one pass of each network."""
        c, obs = self.config, batch["obs"]
        here, here_density = self.actor.samples(obs, c.actions)
        backup = c.actions if c.max_backup else 1
        there, there_density = self.actor.samples(batch["next_obs"], c.actions + backup)
        next_q = self.target_critic.several(batch["next_obs"], there[:, c.actions :])
        next_value = next_q.amin(0).amax(-1)
        target = batch["reward"] + c.discount * ~batch["terminated"] * next_value

        uniform = 2 * torch.rand_like(here) - 1
        log_uniform = torch.full_like(here_density, -math.log(2) * here.shape[-1])
        actions = [uniform, there[:, : c.actions], here, batch["action"][:, None]]
        density = torch.cat([log_uniform, there_density[:, : c.actions], here_density], 1)
        q = self.critic.several(obs, torch.cat(actions, 1))  # (2, B, 3 K + 1), the data's last
        high, low = torch.logsumexp(q[..., :-1] - density, -1), q[..., -1]
        difference = (high - low).clamp(min=c.difference_min).mean(-1)  # (2,)

        bellman = (low - target).square().mean(-1).sum()
        loss = bellman + self.conservative(difference)
        return loss, {
            "critic/loss": loss,
            "critic/bellman": bellman,
            "critic/q": low.mean(),
            "critic/difference": difference.mean(),
        }

    def conservative(self, difference: Tensor) -> Tensor:
        """Weighted sum of both critics' differences, (2,) -> (); alpha' learns from the same."""
        if not self.config.lagrange:
            return self.config.cql_alpha * difference.sum()
        weight = self.log_weight().exp().clamp(0.0, 1e6)
        excess = self.config.cql_alpha * (difference - self.config.gap)
        return (weight.detach() * excess).sum() - 0.5 * (weight * excess.detach()).sum()

    def update(self, batch: Batch) -> Metrics:
        """Temperature, actor, critics (with alpha' where it is learnt), target."""
        batch = self.normalizer.batch(batch)
        metrics = self.learn("log_alpha", self.alpha_loss, batch)
        metrics |= self.learn("actor", self.actor_loss, batch)
        critics = ("critic", "log_weight") if self.config.lagrange else ("critic",)
        metrics |= self.learn(critics, self.critic_loss, batch)
        self.polyak("critic", "target_critic", self.config.tau)
        return metrics
