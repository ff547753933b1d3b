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


class ActionValues(nn.Module):
    """Several action-value networks Q_i(s, a); `forward` gives (count, B)."""

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, obs), (B, action) -> (count, B)."""
        raise NotImplementedError

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q_1 alone, (B,): what TD3's actor climbs."""
        return self(obs, action)[0]

    def several(self, obs: Tensor, actions: Tensor) -> Tensor:
        """K actions of each state: (B, obs), (B, K, action) -> (count, B, K)."""
        rows, k = actions.shape[:2]
        obs = obs[:, None].expand(rows, k, obs.shape[-1])
        return self(obs.flatten(0, 1), actions.flatten(0, 1)).unflatten(-1, (rows, k))


class Critic(ActionValues):
    """`count` independent action-value networks, one after the other."""

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


class EnsembleLinear(nn.Module):
    """`count` linear layers as one batched product; each begins as PyTorch's own layer does.

    Attributes:
        weight: (count, inputs, outputs).
        bias: (count, 1, outputs).
    """

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        layers = [nn.Linear(inputs, outputs) for _ in range(count)]
        self.weight = nn.Parameter(torch.stack([x.weight.detach().T for x in layers]))
        self.bias = nn.Parameter(torch.stack([x.bias.detach()[None] for x in layers]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) for all or (count, B, inputs) -> (count, B, outputs)."""
        return torch.baddbmm(self.bias, x.expand(len(self.weight), *x.shape[-2:]), self.weight)


class EnsembleNorm(nn.Module):
    """LayerNorm with a scale and a shift of its own for each of `count` members."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, 1, width))
        self.bias = nn.Parameter(torch.zeros(count, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """(count, B, width) -> the same."""
        return F.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


class EnsembleMLP(nn.Module):
    """`count` independent MLPs evaluated side by side, ReLU between the layers.

    One batched product per layer is never slower than a loop over the members on a CPU (measured:
    1.0 times as fast for 2 members and 1.1 times for 10 and 50, width 256, batch 256).

    Args:
        count: members.
        inputs: width of the input.
        hidden: widths of the hidden layers.
        outputs: width of each member's output.
        layer_norm: LayerNorm after each activation.
    """

    def __init__(
        self,
        count: int,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden, outputs]
        self.layers = nn.ModuleList(
            EnsembleLinear(count, i, o) for i, o in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(
            EnsembleNorm(count, w) if layer_norm else nn.Identity() for w in hidden
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) for all or (count, B, inputs) -> (count, B, outputs)."""
        for layer, norm in zip(self.layers, self.norms, strict=False):  # the last has none
            x = norm(F.relu(layer(x)))
        return self.layers[-1](x)


class EnsembleCritic(ActionValues):
    """`count` independent action-value networks in one `EnsembleMLP`."""

    def __init__(
        self, obs: int, action: int, hidden: Sequence[int], count: int = 2, layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.net = EnsembleMLP(count, obs + action, hidden, 1, layer_norm)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, obs), (B, action) for all or (count, B, action) -> (count, B)."""
        obs = obs.expand(*action.shape[:-1], obs.shape[-1])
        return self.net(torch.cat([obs, action], -1)).squeeze(-1)


def initialise(net: MLP | EnsembleMLP, hidden_bias: float, last: float) -> None:
    """Hidden biases `hidden_bias`, last layer uniform in [-last, last] (SAC-N, EDAC, ReBRAC)."""
    for layer in net.layers[:-1]:
        nn.init.constant_(layer.get_parameter("bias"), hidden_bias)
    for p in net.layers[-1].parameters():
        nn.init.uniform_(p, -last, last)


def initialise_orthogonal(net: EnsembleMLP, last_gain: float) -> None:
    """Orthogonal weights of gain sqrt(2), the last layer's of `last_gain`; biases 0 (CQL)."""
    for layer in net.layers:
        gain = last_gain if layer is net.layers[-1] else math.sqrt(2)
        for member in layer.get_parameter("weight").data:
            nn.init.orthogonal_(member, gain)
        nn.init.zeros_(layer.get_parameter("bias"))


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

    The distribution itself is not squashed; `log_std_range` clamps it at use. `bounded=False`
    leaves the mean without its tanh (AWAC).
    """

    def __init__(
        self,
        obs: int,
        hidden: Sequence[int],
        action: int,
        log_std_range: tuple[float, float] = (-20.0, 2.0),
        dropout: float = 0.0,
        bounded: bool = True,
    ) -> None:
        super().__init__(obs, hidden, action, dropout)
        self.log_std = nn.Parameter(torch.zeros(action))
        self.log_std_range = log_std_range
        self.bounded = bounded

    def forward(self, obs: Tensor, drop: bool = False) -> Tensor:
        """The mean, (B, action)."""
        mean: Tensor = self.net(obs, drop)
        return torch.tanh(mean) if self.bounded else mean

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
    """a = tanh(u), u ~ Normal(mean(s), exp(log_std(s))), as in SAC.

    `learnt_scale` gives log_std = m raw(s) + b with learnt numbers m (initially 1) and b
    (initially -1), as in CQL. `slope_epsilon` is added to the slope 1 - tanh(u)^2 inside its
    logarithm, as in SAC-N; 0 is the exact density.
    """

    def __init__(
        self,
        obs: int,
        hidden: Sequence[int],
        action: int,
        log_std_range: tuple[float, float] = (-20.0, 2.0),
        learnt_scale: bool = False,
        slope_epsilon: float = 0.0,
    ) -> None:
        super().__init__()
        self.net = MLP(obs, hidden, 2 * action)
        self.log_std_range, self.slope_epsilon = log_std_range, slope_epsilon
        self.scale = Scalar(1.0) if learnt_scale else None
        self.offset = Scalar(-1.0) if learnt_scale else None

    def forward(self, obs: Tensor) -> Tensor:
        """The mode-like action tanh(mean(s)), (B, action)."""
        return torch.tanh(self.gaussian(obs)[0])

    def gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log_std of u, (B, action) each."""
        mean, log_std = self.net(obs).chunk(2, -1)
        if self.scale is not None and self.offset is not None:
            log_std = self.scale() * log_std + self.offset()
        return mean, log_std.clamp(*self.log_std_range)

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Reparametrised action (B, action) and its log-density (B,)."""
        return self._squashed(*self.gaussian(obs))

    def samples(self, obs: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`count` of them from one pass of the network: (B, count, action), (B, count)."""
        mean, log_std = self.gaussian(obs)
        mean = mean[:, None].expand(len(obs), count, mean.shape[-1])
        return self._squashed(mean, log_std[:, None])

    def _squashed(self, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        return torch.tanh(u), self._density(u, noise, log_std)

    def _density(self, u: Tensor, z: Tensor, log_std: Tensor) -> Tensor:
        """Log-density of tanh(u), where z = (u - mean) / std, (..., action) -> (...)."""
        if self.slope_epsilon:
            slope = torch.log(1 - torch.tanh(u).square() + self.slope_epsilon)
        else:
            slope = log_tanh_slope(u)
        return -(0.5 * z.square() + log_std + 0.5 * LOG_2PI + slope).sum(-1)

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Log-density of given actions, (B,); those at the edge count as 1 - 1e-5."""
        mean, log_std = self.gaussian(obs)
        u = torch.atanh(action.clamp(-1 + 1e-5, 1 - 1e-5))
        return self._density(u, (u - mean) / log_std.exp(), log_std)


def log_tanh_slope(u: Tensor) -> Tensor:
    """log(1 - tanh(u)^2) in a form that neither overflows nor cancels, elementwise."""
    return 2 * (math.log(2) - u - F.softplus(-2 * u))


class TanhMixture(nn.Module):
    """a = tanh(u), u from a mixture of K Gaussians with diagonal covariances, all given s.

    log_std is clipped to [-5, 2] and the means to [-9, 9]: beyond, the tanh is flat.
    """

    def __init__(self, obs: int, hidden: Sequence[int], action: int, components: int) -> None:
        super().__init__()
        self.net = MLP(obs, hidden, components * (2 * action + 1))
        self.components = components

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, obs) -> log-weights (B, K), means and log_std of u (B, K, action)."""
        rows = self.net(obs).unflatten(-1, (self.components, -1))
        mean, log_std = rows[..., 1:].chunk(2, -1)
        return rows[..., 0].log_softmax(-1), mean.clamp(-9, 9), log_std.clamp(-5, 2)

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Log-density of given actions, (B,); those at the edge count as 1 - 1e-5."""
        log_weight, mean, log_std = self(obs)
        u = torch.atanh(action.clamp(-1 + 1e-5, 1 - 1e-5))
        z = (u[:, None] - mean) / log_std.exp()
        each = -(0.5 * z.square() + log_std + 0.5 * LOG_2PI).sum(-1)
        return torch.logsumexp(log_weight + each, -1) - log_tanh_slope(u).sum(-1)


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
