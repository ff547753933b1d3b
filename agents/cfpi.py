"""CFPI: offline RL with closed-form policy improvement operators (Li et al., 2023).

Faithful to the paper's derivation: single-Gaussian and mixture operators, quantile SARSA critics,
zero-step and multi-step forms. Differs: fixed fractions and budgets where the published code draws
them at evaluation; its step scaling only with `published_scale`. Known gaps: no VAE behaviour, no
sampled-action operator.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import EVALUATION, Agent, Batch, Metrics, Stage
from rl_shift.errors import UserError
from rl_shift.improvement import best_of, component_steps, jensen_centre, jensen_step
from rl_shift.networks import TanhMixture
from rl_shift.quantiles import QuantileCritic, quantile_loss, random_fractions

if TYPE_CHECKING:
    from rl_shift.config import Task


class CFPI(Agent):
    """Acts by one step from the behaviour, as far as its density allows; no policy is trained.

    L(behaviour) = -E log beta(a|s),  a mixture of tanh Gaussians
    L(critic)    = quantile Huber loss of Z_i(s, a) to r + gamma (1 - terminated) Z'_i(s', a')
    Q            = mean_i E Z_i - beta_LB std_i E Z_i
    act          = best by Q of the candidates of `rl_shift.improvement`
    Multi-step: after `sarsa_updates`, a' is the operator's action with clipped noise, and the
    target the smaller Z', both by the target critics.
    """

    columns = ("next_action",)

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of CFPI; the published code's for MuJoCo."""

        batch_size: int = 256
        hidden: tuple[int, ...] = (256, 256, 256)
        learning_rate: float = 3e-4  # Adam, critics
        behaviour_learning_rate: float = 1e-4  # Adam
        behaviour_updates: int = 500_000  # of the behaviour's own stage
        discount: float = 0.99
        tau: float = 0.005  # target averaging
        components: int = 4  # 1: single Gaussian; 8 in a variant, antmaze 8 or 12
        log_tau: tuple[float, ...] = field(  # budgets tried; single Gaussian: 0.2, 0.4, .., 2.0
            default=(0.5,), metadata=EVALUATION
        )
        operator: Literal["both", "components", "jensen"] = field(  # bounds that give candidates
            default="both", metadata=EVALUATION
        )
        pessimism: float = field(  # beta_LB, standard deviations below the critics' mean
            default=1.0, metadata=EVALUATION
        )
        weight_min: float = 0.05  # lighter components are left out; 0.03 on antmaze
        quantiles: int = 8
        embedding: int = 64  # cosines of a fraction
        mode: Literal["zero", "multi"] = "zero"  # SARSA alone, or improvement in the target, too
        sarsa_updates: int = 20_000  # before improvement enters the target (multi)
        policy_noise: float = 0.1  # on the target's action (multi)
        noise_clip: float = 0.5
        published_scale: bool = False  # the published code's longer step, for comparisons with it
        normalize: bool = True  # observations, std + 1e-3; off on antmaze

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        super().__init__(observation_space, action_space, config)
        if config.components < 1 or not config.log_tau or min(config.log_tau) < 0:
            raise UserError("CFPI needs at least one component and budgets log_tau of at least 0")
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        self.behaviour = TanhMixture(obs, config.hidden, action, config.components)
        self.critic = QuantileCritic(
            obs, action, config.hidden, 2, config.quantiles, config.embedding
        )
        self.target_critic = copy.deepcopy(self.critic)
        self.optimizer("behaviour", lr=config.behaviour_learning_rate)
        self.optimizer("critic", lr=config.learning_rate)

    def behaviour_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Negative log-likelihood of the data's actions."""
        loss = -self.behaviour.log_prob(batch["obs"], batch["action"]).mean()
        return loss, {"behaviour/loss": loss}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Each network regresses on its own target, at the data's next action."""
        next_action = batch["next_action"]
        if self.stage == "improvement":
            c = self.config
            noise = c.policy_noise * torch.randn_like(next_action)
            noise = noise.clamp(-c.noise_clip, c.noise_clip)
            improved = self.improved(self.target_critic, batch["next_obs"])
            next_action = (improved + noise).clamp(-1, 1)
        like = batch["reward"][:, None].expand(len(batch["reward"]), self.config.quantiles)
        fraction, _ = random_fractions(like)
        next_fraction, weight = random_fractions(like)
        next_z = self.target_critic.quantile(batch["next_obs"], next_action, next_fraction)
        if self.stage == "improvement":
            next_z = next_z.amin(0, keepdim=True)
        alive = ~batch["terminated"][:, None]
        target = batch["reward"][:, None] + self.config.discount * alive * next_z
        z = self.critic.quantile(batch["obs"], batch["action"], fraction)
        loss = quantile_loss(z, target, fraction, weight)
        return loss, {"critic/loss": loss, "critic/q": z.mean()}

    def conservative(self, critic: QuantileCritic, obs: Tensor, actions: Tensor) -> Tensor:
        """Lower bound of the value: (B, obs), (B, N, action) -> (B, N)."""
        q = critic.several(obs, actions)
        return q.mean(0) - self.config.pessimism * q.std(0)

    def improved(self, critic: QuantileCritic, obs: Tensor) -> Tensor:
        """Normalised (B, obs) -> (B, action): the best candidate of all operators and budgets."""
        c = self.config

        def value(u: Tensor) -> Tensor:
            return self.conservative(critic, obs, torch.tanh(u))

        log_weight, mean, log_std = self.behaviour(obs)
        std = log_std.exp()
        centre, precision, cost = jensen_centre(mean, std, log_weight)
        anchors = torch.cat([mean, centre[:, None]], 1)
        gradient = torch.func.grad(lambda u: value(u).sum())(anchors)
        # the heaviest component always counts
        heavy = log_weight >= log_weight.amax(-1, keepdim=True).clamp(max=math.log(c.weight_min))
        found, allowed = [], []
        for log_tau in c.log_tau:
            if c.operator != "jensen":
                found.append(
                    component_steps(
                        mean, std, log_weight, gradient[:, :-1], log_tau, c.published_scale
                    )
                )
                allowed.append(heavy)
            if c.operator != "components":
                step, feasible = jensen_step(centre, precision, cost, gradient[:, -1], log_tau)
                found.append(step[:, None])
                allowed.append(feasible[:, None])
        candidates = torch.cat(found, 1)
        return torch.tanh(best_of(candidates, value(candidates), torch.cat(allowed, 1)))

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, obs) -> (N, action)."""
        return self.improved(self.critic, self.normalizer(obs))

    def stages(self, task: Task) -> list[Stage]:
        """The behaviour, then SARSA, then (multi-step) improvement inside the target."""
        c = self.config
        first = min(c.sarsa_updates, task.updates) if c.mode == "multi" else task.updates
        legs = [
            Stage("behaviour", updates=c.behaviour_updates, counted=False),
            Stage("sarsa", updates=first),
            Stage("improvement", updates=task.updates - first),
        ]
        return [leg for leg in legs if leg.updates]

    def update(self, batch: Batch) -> Metrics:
        """The behaviour in its stage, the critics in theirs."""
        batch = self.normalizer.batch(batch)
        if self.stage == "behaviour":
            return self.learn("behaviour", self.behaviour_loss, batch)
        metrics = self.learn("critic", self.critic_loss, batch)
        self.polyak("critic", "target_critic", self.config.tau)
        return metrics
