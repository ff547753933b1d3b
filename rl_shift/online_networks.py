"""Networks of the on-line agents: encoders of images and vectors, and heads for both action kinds.

Sizes and initialisation are stable-baselines3's, except the pixel encoder, which is that of the
published code of Reactive Exploration (two 3x3 convolutions for views of 11 x 11).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gymnasium.spaces import Box, Discrete, Space
from torch import Tensor, nn
from torch.nn import functional as F

from rl_shift.networks import LOG_2PI

Activation = Callable[[Tensor], Tensor]


def is_image(space: Space[Any]) -> bool:
    """Whether observations are images: uint8, (height, width, channels)."""
    return isinstance(space, Box) and space.dtype == "uint8" and len(space.shape) == 3


def unsupported(
    observation_space: Space[Any], action_space: Space[Any], continuous: bool
) -> str | None:
    """Why an agent of this file's networks cannot take these spaces, or None.

    Args:
        observation_space: a vector (Box), or an image of at least 7 x 7.
        action_space: Discrete from 0, or a vector (Box) where `continuous`.
        continuous: whether the agent takes a Box of actions.
    """
    vector = isinstance(observation_space, Box) and len(observation_space.shape) == 1
    if not vector and not is_image(observation_space):
        return "it needs observations that are a vector or a uint8 image (height, width, channels)"
    if is_image(observation_space) and min(observation_space.shape[:2]) < 7:  # type: ignore[index]
        return "it needs images of at least 7 x 7"
    if isinstance(action_space, Discrete):
        return None if action_space.start == 0 else "it needs discrete actions that count from 0"
    if continuous and isinstance(action_space, Box) and len(action_space.shape) == 1:
        return None
    return f"it needs discrete actions{' or a vector of them (a Box)' if continuous else ''}"


def orthogonal(module: nn.Module, gain: float = math.sqrt(2)) -> None:
    """Orthogonal weights and zero biases for every linear and convolutional layer of `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(layer.weight, gain)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


class Features(nn.Module):
    """Fully connected layers with an activation after each, or after all but the last.

    Args:
        inputs: width of the input.
        widths: widths of the layers, at least one.
        activation: of the hidden layers, and of the last one unless `linear_end`.
        linear_end: leave the last layer linear.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        activation: Activation = F.relu,
        linear_end: bool = False,
    ) -> None:
        super().__init__()
        pairs = itertools.pairwise([inputs, *widths])
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairs)
        self.activation, self.linear_end = activation, linear_end
        self.width = widths[-1] if widths else inputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, width)."""
        last = len(self.layers) - 1
        for k, layer in enumerate(self.layers):
            x = layer(x)
            if k < last or not self.linear_end:
                x = self.activation(x)
        return x


class Pixels(nn.Module):
    """Conv 3x3 stride 2 to 32, then to 64 channels, flattened: 11 x 11 x 3 gives 256 numbers."""

    def __init__(self, shape: Sequence[int], activation: Activation = F.relu) -> None:
        super().__init__()
        height, width, channels = shape
        self.convolutions = nn.ModuleList([nn.Conv2d(channels, 32, 3, 2), nn.Conv2d(32, 64, 3, 2)])
        self.activation = activation
        for _ in self.convolutions:
            height, width = (height - 3) // 2 + 1, (width - 3) // 2 + 1
        self.width = 64 * height * width

    def forward(self, x: Tensor) -> Tensor:
        """(B, height, width, channels) -> (B, width)."""
        x = x.movedim(-1, -3)
        for convolution in self.convolutions:
            x = self.activation(convolution(x))
        return x.flatten(1)


class Categorical(nn.Module):
    """Distribution over `choices` discrete actions; its parameters are the logits."""

    def __init__(self, inputs: int, choices: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, choices)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> logits (B, choices)."""
        return self.linear(x)

    def log_prob(self, logits: Tensor, action: Tensor) -> Tensor:
        """Log pi(action), (B,), of actions (B,) int64."""
        return F.log_softmax(logits, -1).gather(-1, action[..., None]).squeeze(-1)

    def entropy(self, logits: Tensor) -> Tensor:
        """Entropy in nats, (B,)."""
        log_prob = F.log_softmax(logits, -1)
        return -(log_prob.exp() * log_prob).sum(-1)

    def mode(self, logits: Tensor) -> Tensor:
        """The likeliest action, (B,) int64."""
        return logits.argmax(-1)

    def sample(self, logits: Tensor) -> Tensor:
        """One action per row, (B,) int64, by the Gumbel-max rule."""
        return (logits - (-torch.rand_like(logits).log()).log()).argmax(-1)


class ClippedGaussian(nn.Module):
    """Clip(N(mean(x), std), -1, 1): the distribution of the action that is executed.

    The density of an action inside the box is the Gaussian's; a bound carries the probability of
    everything beyond it. So a stored, clipped action has the right likelihood, which the density of
    the unclipped Gaussian at the bound is not (clipped action policy gradient, Fujita and Maeda,
    2018). `log_std` does not depend on the state and begins at 0.
    """

    def __init__(self, inputs: int, actions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, actions)
        self.log_std = nn.Parameter(torch.zeros(actions))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> mean of the unclipped Gaussian, (B, actions)."""
        return self.linear(x)

    def log_prob(self, mean: Tensor, action: Tensor) -> Tensor:
        """Log-likelihood of clipped actions (B, actions), summed over the dimensions, (B,)."""
        z = (action - mean) / self.log_std.exp()
        inside = -(0.5 * z.square() + self.log_std + 0.5 * LOG_2PI)
        beyond = torch.special.log_ndtr(torch.where(action > 0, -z, z))
        return torch.where(action.abs() < 1, inside, beyond).sum(-1)

    def entropy(self, mean: Tensor) -> Tensor:
        """Entropy of the unclipped Gaussian in nats, (B,)."""
        return (self.log_std + 0.5 * (LOG_2PI + 1)).sum(-1).expand(mean.shape[:-1])

    def mode(self, mean: Tensor) -> Tensor:
        """The mean, clipped, (B, actions)."""
        return mean.clamp(-1, 1)

    def sample(self, mean: Tensor) -> Tensor:
        """One action per row, (B, actions) in [-1, 1]."""
        return (mean + self.log_std.exp() * torch.randn_like(mean)).clamp(-1, 1)


class ActorCritic(nn.Module):
    """Policy and value: one pixel encoder for both, or separate Tanh layers on vectors.

    Args:
        observation_space: image or vector.
        action_space: Discrete or Box.
        hidden: layers on vectors; images have none after their features.
        features: width of the linear layer after the pixel encoder.
    """

    head: Categorical | ClippedGaussian

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        hidden: Sequence[int],
        features: int,
    ) -> None:
        super().__init__()
        self.encoder: nn.Module = nn.Identity()
        assert observation_space.shape is not None
        inputs = observation_space.shape[0]
        if is_image(observation_space):
            pixels = Pixels(observation_space.shape)
            self.encoder, inputs, hidden = (
                nn.Sequential(pixels, nn.Linear(pixels.width, features), nn.ReLU()),
                features,
                (),
            )
        self.actor = Features(inputs, hidden, torch.tanh)
        self.critic = Features(inputs, hidden, torch.tanh)
        self.value = nn.Linear(self.critic.width, 1)
        if isinstance(action_space, Discrete):
            self.head = Categorical(self.actor.width, int(action_space.n))
        else:
            self.head = ClippedGaussian(self.actor.width, action_space.shape[0])  # type: ignore[index]
        orthogonal(self)
        orthogonal(self.head, 0.01)
        orthogonal(self.value, 1.0)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised (B, obs) -> parameters of the policy (B, ...), value (B,)."""
        x = self.encoder(obs)
        return self.head(self.actor(x)), self.value(self.critic(x)).squeeze(-1)

    def policy(self, obs: Tensor) -> Tensor:
        """Parameters of the policy alone."""
        return self.head(self.actor(self.encoder(obs)))


class ActionValues(nn.Module):
    """Q(s, .) of all discrete actions, on an image or a vector.

    Args:
        observation_space: image or vector.
        choices: number of actions.
        hidden: ReLU layers on vectors; images have none after their features.
        features: width of the linear layer after the pixel encoder.
    """

    def __init__(
        self,
        observation_space: Space[Any],
        choices: int,
        hidden: Sequence[int],
        features: int,
    ) -> None:
        super().__init__()
        assert observation_space.shape is not None
        if is_image(observation_space):
            pixels = Pixels(observation_space.shape)
            layers = [pixels, Features(pixels.width, (features, choices), linear_end=True)]
        else:
            layers = [Features(observation_space.shape[0], (*hidden, choices), linear_end=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, obs: Tensor) -> Tensor:
        """Normalised (B, obs) -> (B, choices)."""
        return self.layers(obs)
