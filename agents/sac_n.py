"""SAC-N and EDAC: uncertainty-based offline RL with a diversified ensemble (An et al., 2021).

Faithful to CORL's implementation: N critics, their minimum in target and actor, entropy in the
backup. `eta` above 0 is EDAC: critics whose action gradients at the data disagree. Known gaps:
continuous actions only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl_shift.agent import Batch, Metrics
from rl_shift.agents.sac import SAC
from rl_shift.networks import ActionValues, EnsembleCritic, TanhGaussianActor, initialise


class SACN(SAC):
    """SAC with N critics; pessimism is their minimum.

    L(alpha)  = -log alpha E (log pi(a~|s) + target entropy)
    L(actor)  = E alpha log pi(a~|s) - min_i Q_i(s, a~)
    L(critic) = sum_i E (Q_i(s, a) - y)^2 + eta / (N - 1) E sum_{i != j} <g_i, g_j>
    y         = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi(a'|s')),  a' ~ pi
    g_i       = dQ_i/da (s, a) of unit length
    """

    @dataclass(frozen=True)
    class Config:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Hyper-parameters of SAC-N and EDAC; CORL's values for halfcheetah-medium."""

        batch_size: int = 256
        hidden: tuple[int, ...] = (256, 256, 256)
        learning_rate: float = 3e-4  # Adam, all networks
        discount: float = 0.99
        tau: float = 0.005  # target averaging
        critics: int = 10  # N; hopper-medium: 500 (SAC-N), 50 (EDAC)
        eta: float = 0.0  # weight of EDAC's gradient diversity; 0: SAC-N
        target_entropy: float | None = None  # None: -dim(A)
        normalize: bool = False  # observations; CORL: off

    def networks(self, obs: int, action: int) -> tuple[TanhGaussianActor, ActionValues]:
        """N critics and an actor with a narrow range of log_std; EDAC's initialisation of both."""
        hidden, log_std = self.config.hidden, (-5.0, 2.0)
        actor = TanhGaussianActor(obs, hidden, action, log_std, slope_epsilon=1e-6)
        critic = EnsembleCritic(obs, action, hidden, self.config.critics)
        initialise(actor.net, hidden_bias=0.1, last=1e-3)
        initialise(critic.net, hidden_bias=0.1, last=3e-3)
        return actor, critic

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Soft Bellman error of every critic, and their diversity."""
        q = self.critic(batch["obs"], batch["action"])
        loss = (q - self.target(batch)).square().mean(-1).sum()
        metrics = {"critic/q": q.mean(), "critic/spread": (q.amax(0) - q.amin(0)).mean()}
        if self.config.eta > 0 and self.config.critics > 1:
            metrics["critic/alignment"] = alignment = self.alignment(batch)
            loss = loss + self.config.eta * alignment
        return loss, {"critic/loss": loss, **metrics}

    def alignment(self, batch: Batch) -> Tensor:
        """Mean over the batch of sum_{i != j} <g_i, g_j> / (N - 1)."""
        each = batch["action"].expand(self.config.critics, *batch["action"].shape)
        g = torch.func.grad(lambda a: self.critic(batch["obs"], a).sum())(each)  # (N, B, action)
        g = g / (g.norm(dim=-1, keepdim=True) + 1e-10)
        together = g.sum(0).square().sum(-1) - g.square().sum((0, -1))
        return together.mean() / (self.config.critics - 1)

    def update(self, batch: Batch) -> Metrics:
        """Temperature, actor, critics, target."""
        batch = self.normalizer.batch(batch)
        metrics = self.learn("log_alpha", self.alpha_loss, batch)
        metrics |= self.learn("actor", self.actor_loss, batch)
        metrics |= self.learn("critic", self.critic_loss, batch)
        self.polyak("critic", "target_critic", self.config.tau)
        return metrics
