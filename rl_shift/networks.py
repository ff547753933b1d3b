"""Networks shared by agents: plain modules whose log-densities are written out.

`torch.distributions` validates on the host and breaks compiled graphs, so the few densities needed
here are a handful of lines each (our design).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

LOG_2PI = math.log(2 * math.pi)


class MLP(nn.Module):
    """Linear layers with ReLU between them, PyTorch's default initialisation.

    Args:
        inputs: width of the input.
        hidden: widths of the hidden layers.
        outputs: width of the output.
        layer_norm: LayerNorm after each activation.
        dropout: rate applied after each activation when `forward` is asked to drop.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        layer_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden, outputs]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(w) if layer_norm else nn.Identity() for w in hidden)
        self.dropout = dropout

    def forward(self, x: Tensor, drop: bool = False) -> Tensor:
        """(B, inputs) -> (B, outputs)."""
        for layer, norm in zip(self.layers, self.norms, strict=False):  # the last has none
            x = norm(F.relu(layer(x)))
            if drop and self.dropout > 0:
                x = F.dropout(x, self.dropout)
        return self.layers[-1](x)


class Critic(nn.Module):
    """`count` independent action-value networks Q_i(s, a)."""

    def __init__(
        self, obs: int, action: int, hidden: Sequence[int], count: int = 2, layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(MLP(obs + action, hidden, 1, layer_norm) for _ in range(count))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, obs), (B, action) -> (count, B)."""
        x = torch.cat([obs, action], -1)
        return torch.stack([q(x).squeeze(-1) for q in self.members])

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q_1 alone, (B,): what TD3's actor climbs."""
        return self.members[0](torch.cat([obs, action], -1)).squeeze(-1)


class Value(nn.Module):
    """State value V(s)."""

    def __init__(self, obs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.net = MLP(obs, hidden, 1)

    def forward(self, obs: Tensor) -> Tensor:
        """(B, obs) -> (B,)."""
        return self.net(obs).squeeze(-1)


class DeterministicActor(nn.Module):
    """pi(s) = tanh(MLP(s))."""

    def __init__(self, obs: int, hidden: Sequence[int], action: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = MLP(obs, hidden, action, dropout=dropout)

    def forward(self, obs: Tensor, drop: bool = False) -> Tensor:
        """(B, obs) -> (B, action) in [-1, 1]."""
        return torch.tanh(self.net(obs, drop))


class GaussianActor(DeterministicActor):
    """Normal(tanh(MLP(s)), exp(log_std)) with a state-independent log_std (initially 0).

    The distribution itself is not squashed; `log_std_range` clamps it at use.
    """

    def __init__(
        self,
        obs: int,
        hidden: Sequence[int],
        action: int,
        log_std_range: tuple[float, float] = (-20.0, 2.0),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(obs, hidden, action, dropout)
        self.log_std = nn.Parameter(torch.zeros(action))
        self.log_std_range = log_std_range

    def std(self) -> Tensor:
        """Standard deviations, (action,), the same in every state."""
        return self.log_std.clamp(*self.log_std_range).exp()

    def log_prob(self, obs: Tensor, action: Tensor, drop: bool = False) -> Tensor:
        """Log of N(action; mean, std) summed over action dimensions, (B,)."""
        log_std = self.log_std.clamp(*self.log_std_range)
        z = (action - self(obs, drop)) / log_std.exp()
        return -(0.5 * z.square() + log_std + 0.5 * LOG_2PI).sum(-1)

    def sample(self, obs: Tensor) -> Tensor:
        """One action per state, clipped to the box, (B, action)."""
        mean = self(obs)
        return (mean + self.std() * torch.randn_like(mean)).clamp(-1, 1)


class TanhGaussianActor(nn.Module):
    """a = tanh(u), u ~ Normal(mean(s), exp(log_std(s))), as in SAC."""

    def __init__(
        self,
        obs: int,
        hidden: Sequence[int],
        action: int,
        log_std_range: tuple[float, float] = (-20.0, 2.0),
    ) -> None:
        super().__init__()
        self.net = MLP(obs, hidden, 2 * action)
        self.log_std_range = log_std_range

    def forward(self, obs: Tensor) -> Tensor:
        """The mode-like action tanh(mean(s)), (B, action)."""
        return torch.tanh(self.net(obs).chunk(2, -1)[0])

    def gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-std of u, (B, action) each."""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(*self.log_std_range)

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Reparametrised action (B, action) and its log-density (B,)."""
        mean, log_std = self.gaussian(obs)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        # log(1 - tanh(u)^2) in a form that neither overflows nor cancels
        log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))
        log_prob = -(0.5 * noise.square() + log_std + 0.5 * LOG_2PI + log_det).sum(-1)
        return torch.tanh(u), log_prob


class Scalar(nn.Module):
    """One learnt number, such as a log-temperature."""

    def __init__(self, initial: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(initial)))

    def forward(self) -> Tensor:
        """The number, shape ()."""
        return self.value


class Normalizer(nn.Module):
    """(obs - mean) / std for vectors; images become floats (divided by 255 if `high` is 255).

    Until `fit` is called it is the identity. Every agent owns one as `self.normalizer`, applies it
    in the first line of `update` and of `act`, and saves it with its weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__()
        image = isinstance(space, spaces.Box) and space.dtype == np.uint8
        self.scale = 1 / 255 if image and float(np.max(space.high)) == 255.0 else 1.0  # type: ignore[attr-defined]
        shape = () if image or space.shape is None else space.shape
        self.rank = len(shape)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def fit(self, mean: Tensor, std: Tensor, epsilon: float = 1e-3) -> None:
        """Take the data's mean and standard deviation, (obs,); `epsilon` is added to std (CORL)."""
        self.mean.copy_(mean)
        self.std.copy_(std + epsilon)

    def forward(self, obs: Tensor) -> Tensor:
        """(B, obs) raw -> (B, obs) normalised."""
        if not obs.dtype.is_floating_point:
            return obs.to(self.mean.dtype) * self.scale
        mean, std = self.mean, self.std
        if mean.dim() > self.rank:  # stacked seeds, outside `learn`: (S, obs) against (S, B, obs)
            between = (1,) * (obs.dim() - mean.dim())
            mean = mean.reshape(mean.shape[0], *between, *mean.shape[1:])
            std = std.reshape(mean.shape)
        return (obs - mean) / std

    def batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with `obs` and `next_obs` normalised; everything else as it was."""
        return {
            key: self(value) if key in ("obs", "next_obs") else value
            for key, value in batch.items()
        }
