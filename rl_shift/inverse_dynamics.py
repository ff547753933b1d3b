"""Inverse dynamics: the action between two states, learnt on a dataset.

L = ||I(s, s') - a||^2. Legitimate only where the dynamics are nearly deterministic. Our design
after arXiv 2406.07541.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rl_shift.buffer import Buffer
from rl_shift.networks import MLP, Normalizer

USABLE_ERROR = 0.5  # largest validation error, as a share of the actions' variance


class InverseDynamics(nn.Module):
    """I(s, s') = tanh(MLP(s, (s' - s) / scale)) on normalised observations.

    The difference is better conditioned than s' itself; `scale` is the standard deviation of
    one-step differences.

    Attributes:
        scale: (obs,).
        step: (), the median length of one-step differences.
        variance: (action,), of the dataset's actions.
        error: (action,), mean squared validation error; negative until it is known.
    """

    scale: Tensor
    step: Tensor
    variance: Tensor
    error: Tensor

    def __init__(self, obs: int, action: int, hidden: Sequence[int], difference: bool = True):
        super().__init__()
        self.net = MLP(2 * obs, hidden, action)
        self.difference = difference
        self.register_buffer("scale", torch.ones(obs))
        self.register_buffer("step", torch.ones(()))
        self.register_buffer("variance", torch.ones(action))
        self.register_buffer("error", -torch.ones(action))

    def forward(self, obs: Tensor, next_obs: Tensor) -> Tensor:
        """(B, obs), (B, obs), normalised -> (B, action) in [-1, 1]."""
        second = (next_obs - obs) / self.scale if self.difference else next_obs
        return torch.tanh(self.net(torch.cat([obs, second], -1)))

    def errors(self, obs: Tensor, next_obs: Tensor, action: Tensor) -> Tensor:
        """Mean squared error per action dimension, (action,)."""
        return (self(obs, next_obs) - action).square().mean(0)

    def fit_statistics(self, buffer: Buffer, rows: Tensor, normalizer: Normalizer) -> None:
        """Take scales from the rows to learn from; none of them may end an episode."""
        batch = buffer.take(rows)
        std = normalizer.std.reshape(-1, batch["obs"].shape[-1])[0]  # equal for stacked seeds
        moved = (batch["next_obs"] - batch["obs"]) / std
        self.scale.copy_(moved.std(0) + 1e-6)
        self.step.copy_(moved.norm(dim=-1).median())
        self.variance.copy_(batch["action"].var(0))

    @property
    def usable(self) -> Tensor:
        """Whether the validation error is known and at most half the actions' variance, () bool."""
        share = self.error.mean(-1) / self.variance.mean(-1)
        return (self.error.amin(-1) >= 0) & (share <= USABLE_ERROR)


def inside_episodes(buffer: Buffer) -> Tensor:
    """(rows,) bool: transitions whose successor certainly belongs to the same episode."""
    arrays = buffer.arrays()
    return ~(arrays["terminated"] | arrays["truncated"])
