"""Learnt forward models: an ensemble of Gaussian networks, as in MOPO (Yu et al., 2020).

Settings of OfflineRL-Kit: weight decay per layer, soft bounds on the log-variance, standardised
inputs, elites by hold-out error. Differs: targets are standardised as well, so that one loss fits
tasks of any scale, and members are one batched product. Learning goes through an agent's `learn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl_shift import seeding
from rl_shift.errors import UserError

if TYPE_CHECKING:
    from rl_shift.buffer import Buffer

Batch = dict[str, Tensor]
WEIGHT_DECAY = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # OfflineRL-Kit, by layer
BOUND_WEIGHT = 0.01  # OfflineRL-Kit: pulls the bounds of the log-variance together


class Prediction(NamedTuple):
    """What the members of an ensemble say of the same E x B transitions, in the data's units."""

    next_obs: Tensor  # (E, B, obs) means
    reward: Tensor | None  # (E, B) means
    std: Tensor  # (E, B, obs + 1), or (E, B, obs) without rewards


class GaussianEnsemble(nn.Module):
    """E independent networks p(s' - s, r | s, a) = N(mean, diag(exp(logvar))).

    L = sum_E [mean (mean - y)^2 exp(-logvar) + logvar] + sum_layers decay/2 |W|^2
        + 0.01 (sum max_logvar - sum min_logvar),  y = standardised (s' - s, r)
    with logvar held softly between two learnt bounds. Observations and actions are raw; `fit`
    takes the statistics of the data. Nothing here is a `forward`: agents call the methods.

    Args:
        obs: width of an observation.
        action: width of an action.
        hidden: widths of the hidden layers, SiLU between them.
        members: networks E.
        elites: how many of them `sample` and `mean` use.
        reward: whether the reward is predicted too.
        weight_decay: by layer; layers beyond its end take its last value.

    Raises:
        UserError: if there are more elites than members.
    """

    input_mean: Tensor
    input_std: Tensor
    target_mean: Tensor
    target_std: Tensor
    elites: Tensor
    best: Tensor
    stale: Tensor

    def __init__(
        self,
        obs: int,
        action: int,
        hidden: Sequence[int] = (200, 200, 200, 200),
        members: int = 7,
        elites: int = 5,
        reward: bool = True,
        weight_decay: Sequence[float] = WEIGHT_DECAY,
    ) -> None:
        super().__init__()
        if not 1 <= elites <= members:
            raise UserError(f"{elites} elites of {members} members: choose between 1 and {members}")
        self.obs, self.members, self.reward = obs, members, reward
        inputs, targets = obs + action, obs + reward
        widths = [inputs, *hidden, 2 * targets]
        self.decays = [weight_decay[min(k, len(weight_decay) - 1)] for k in range(len(hidden) + 1)]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for into, out in zip(widths[:-1], widths[1:], strict=True):
            weight = torch.empty(members, into, out)
            std = 0.5 / into**0.5  # OfflineRL-Kit: truncated at two standard deviations
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
            self.weights.append(weight)
            self.biases.append(torch.zeros(members, 1, out))
        self.max_logvar = nn.Parameter(torch.full((targets,), 0.5))
        self.min_logvar = nn.Parameter(torch.full((targets,), -10.0))
        for name, width in (("input", inputs), ("target", targets)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        self.register_buffer("elites", torch.arange(elites))
        self.register_buffer("best", torch.zeros(members))  # hold-out errors, see `converged`
        self.register_buffer("stale", torch.tensor(-1))  # checks without progress; -1: none yet

    def fit(self, rows: Batch) -> None:
        """Take the statistics of transitions, (B, ...); constant dimensions keep std 1.

        Errors on other data do not compare with these: `converged` starts anew.
        """
        inputs = torch.cat([rows["obs"], rows["action"]], -1)
        for name, values in (("input", inputs), ("target", self._target(rows))):
            std, mean = torch.std_mean(values.double(), 0, correction=0)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(torch.where(std < 1e-6, 1.0, std))
        self.best.zero_()
        self.stale.fill_(-1)

    def _target(self, rows: Batch) -> Tensor:
        """(s' - s, r) in the data's units, (..., obs + 1)."""
        change = rows["next_obs"] - rows["obs"]
        return torch.cat([change, rows["reward"][..., None]], -1) if self.reward else change

    def _distribution(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of standardised targets, (E, B, targets) each."""
        x = (torch.cat([obs, action], -1) - self.input_mean) / self.input_std
        x = x.expand(self.members, *x.shape[-2:])
        last = len(self.weights) - 1
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = F.silu(x) if k < last else x
        mean, logvar = x.chunk(2, -1)
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)
        return mean, self.min_logvar + F.softplus(logvar - self.min_logvar)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The class's L on raw transitions, (B, ...) for all members or (E, B, ...) for each."""
        mean, logvar = self._distribution(batch["obs"], batch["action"])
        error = (mean - (self._target(batch) - self.target_mean) / self.target_std).square()
        likelihood = (error * (-logvar).exp() + logvar).mean((1, 2)).sum()
        decay = sum(
            0.5 * rate * weight.square().sum()
            for rate, weight in zip(self.decays, self.weights, strict=True)
        )
        bounds = self.max_logvar.sum() - self.min_logvar.sum()
        loss = likelihood + decay + BOUND_WEIGHT * bounds
        return loss, {"dynamics/loss": loss, "dynamics/mse": error.mean()}

    def error(self, rows: Batch) -> Tensor:
        """Mean squared error of each member on transitions (B, ...), standardised, (E,)."""
        mean, _ = self._distribution(rows["obs"], rows["action"])
        return (
            (mean - (self._target(rows) - self.target_mean) / self.target_std).square().mean((1, 2))
        )

    def converged(self, error: Tensor, patience: int = 5, improvement: float = 0.01) -> bool:
        """Choose the elites by hold-out error (E,) and say whether training may stop.

        It may after `patience` calls in a row in which no member became better by more than
        `improvement` of its best. For `Agent.check`: it reads the device.
        """
        self.elites.copy_(error.argsort()[: len(self.elites)])
        better = (self.best - error > improvement * self.best) | (self.stale < 0)
        self.best.copy_(torch.where(better, error, self.best))
        self.stale.copy_(torch.where(better.any(), 0, self.stale + 1))
        return int(self.stale) >= patience

    def predict(self, obs: Tensor, action: Tensor) -> Prediction:
        """All members on raw (B, obs), (B, action), or on (E, B, ...) each its own."""
        mean, logvar = self._distribution(obs, action)
        mean = mean * self.target_std + self.target_mean
        std = (0.5 * logvar).exp() * self.target_std
        reward = mean[..., self.obs] if self.reward else None
        return Prediction(obs + mean[..., : self.obs], reward, std)

    def mean(self, obs: Tensor, action: Tensor) -> Tensor:
        """Mean next observation over the elites, (B, obs); differentiable."""
        return self.predict(obs, action).next_obs[self.elites].mean(0)

    def sample(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A next observation and reward from one random elite per row, and how unsure all are.

        Returns:
            next_obs (B, obs), reward (B,) (zeros if not predicted), and MOPO's penalty
            max_i |std_i|_2 over all members, (B,).
        """
        means, rewards, std = self.predict(obs, action)
        if rewards is not None:
            means = torch.cat([means, rewards[..., None]], -1)
        draw = torch.randint(len(self.elites), (len(obs),), device=obs.device)
        rows = torch.arange(len(obs), device=obs.device)
        member = self.elites[draw]
        chosen = means[member, rows] + std[member, rows] * torch.randn_like(std[0])
        reward = chosen[:, self.obs] if self.reward else torch.zeros_like(chosen[:, 0])
        return chosen[:, : self.obs], reward, std.norm(dim=-1).amax(0)


def split_rows(
    buffer: Buffer, rows: Tensor | None = None, most: int = 1000
) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, min(20 %, `most`) of them, int64 each.

    The split depends on the first seed of the buffer alone, so a resumed run finds the same.

    Args:
        buffer: flat data.
        rows: the rows that may be used, such as those whose `next_obs` is known; None: all.
        most: largest number of rows held out.

    Raises:
        UserError: if fewer than two rows can be used.
    """
    rows = torch.arange(len(buffer), device=buffer.device) if rows is None else rows
    if len(rows) < 2:
        raise UserError(f"{len(rows)} transitions cannot be divided: a model needs at least two")
    generator = seeding.torch_generator(buffer.seeds[0], "holdout", device=buffer.device)
    order = torch.randperm(len(rows), generator=generator, device=buffer.device)
    held = max(1, min(len(rows) // 5, most))
    return rows[order[held:]].sort().values, rows[order[:held]].sort().values
