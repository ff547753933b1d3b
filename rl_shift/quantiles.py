"""Return distributions by implicit quantile networks: critics, fractions, the quantile loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_shift.networks import ActionValues, EnsembleLinear, EnsembleMLP


class QuantileCritic(ActionValues):
    """`count` networks Z_i(s, a, tau); as an action value, the mean over evenly spaced fractions.

    The features of (s, a) are multiplied by a sigmoid layer on cos(pi k tau), k = 1..embedding.
    All hidden layers but the last come before the product, the last behind it.
    """

    def __init__(
        self,
        obs: int,
        action: int,
        hidden: Sequence[int],
        count: int = 2,
        quantiles: int = 8,
        embedding: int = 64,
    ) -> None:
        super().__init__()
        before = list(hidden[:-1]) or list(hidden)
        self.quantiles, self.embedding = quantiles, embedding
        self.trunk = EnsembleMLP(count, obs + action, before[:-1], before[-1])
        self.fraction = EnsembleLinear(count, embedding, before[-1])
        self.head = EnsembleMLP(count, before[-1], hidden[-1:], 1)

    def quantile(self, obs: Tensor, action: Tensor, fraction: Tensor) -> Tensor:
        """(B, obs), (B, action), fractions (B, Q) -> (count, B, Q)."""
        k = torch.arange(1, self.embedding + 1, device=obs.device, dtype=obs.dtype)
        features = F.relu(self.trunk(torch.cat([obs, action], -1)))  # (count, B, width)
        waves = torch.cos(math.pi * k * fraction.flatten()[:, None])  # (B Q, embedding)
        gate = torch.sigmoid(self.fraction(waves))  # (count, B Q, width)
        rows = gate * features.repeat_interleave(fraction.shape[-1], 1)
        z: Tensor = self.head(rows)
        return z.reshape(-1, *fraction.shape)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, obs), (B, action) -> expected values, (count, B)."""
        middle = torch.arange(self.quantiles, device=obs.device, dtype=obs.dtype) + 0.5
        fraction = (middle / self.quantiles).expand(len(obs), self.quantiles)
        return self.quantile(obs, action, fraction).mean(-1)


def random_fractions(like: Tensor) -> tuple[Tensor, Tensor]:
    """A random partition of [0, 1]: its midpoints and its widths, both of `like`'s shape (B, Q)."""
    width = torch.rand_like(like) + 0.1
    width = width / width.sum(-1, keepdim=True)
    return width.cumsum(-1) - width / 2, width


def quantile_loss(z: Tensor, target: Tensor, fraction: Tensor, weight: Tensor) -> Tensor:
    """Quantile Huber loss: mean over rows and fractions, sum over networks.

    Args:
        z: (count, B, Q), predicted quantiles.
        target: (count, B, P), samples of the target's distribution.
        fraction: (B, Q), those of `z`.
        weight: (B, P), probabilities of the samples.
    """
    difference = z[..., None] - target[..., None, :]
    huber = F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none")
    above = (difference > 0).to(z.dtype)
    loss = (fraction[..., None] - above).abs() * huber * weight[..., None, :]
    return loss.sum(-1).mean((-2, -1)).sum()
