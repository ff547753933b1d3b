"""Curiosity: novelty of transitions as the error of a model that is learnt along the way.

One interface. `error(batch)` gives the raw error of every transition, (B,); `loss(batch)` is what
the model learns from, and `model` is the submodule it trains. A scale eta turns an error into a
reward, eta / 2 * error, for every kind alike. Batches hold normalised observations.

Sizes and error conventions are the published code's of Reactive Exploration (Steinparz et al.,
2022): errors SUM over the latent dimensions. `disagreement` has the unsupervised-RL benchmark's
convention, the variance over models averaged over the dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from gymnasium.spaces import Discrete, Space
from torch import Tensor, nn
from torch.nn import functional as F

from rl_shift.online_networks import Features, Pixels, is_image, orthogonal

Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]

KINDS = ("icm", "rnd", "noveld", "ride", "disagreement", "none")


def encoder(space: Space[Any], latent: int) -> Features | nn.Sequential:
    """The published encoders: pixels to `latent` with a ReLU, or three layers, the last linear."""
    assert space.shape is not None
    if is_image(space):
        pixels = Pixels(space.shape)
        return nn.Sequential(pixels, Features(pixels.width, (latent,)))
    return Features(space.shape[0], (latent, latent, latent), linear_end=True)


class ActionEmbedding(nn.Module):
    """A table for discrete actions, a linear map for a vector of them."""

    def __init__(self, space: Space[Any], width: int) -> None:
        super().__init__()
        self.discrete = isinstance(space, Discrete)
        if isinstance(space, Discrete):
            self.layer: nn.Module = nn.Embedding(int(space.n), width)
        else:
            assert space.shape is not None
            self.layer = nn.Linear(space.shape[0], width)

    def forward(self, action: Tensor) -> Tensor:
        """Actions (B,) int64 or (B, action) -> (B, width)."""
        return self.layer(action)


class InverseDynamics(nn.Module):
    """ICM's networks: encoder e, forward model u(e(o), a), inverse model q(e(o), e(o'))."""

    log_std: nn.Parameter | None

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        latent: int,
        sampled: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder(observation_space, latent)
        self.embedding = ActionEmbedding(action_space, 4)
        self.forward_model = Features(latent + 4, (latent, latent, latent), linear_end=True)
        outputs = _width(action_space)
        self.inverse_model = Features(2 * latent, (latent, latent, outputs), linear_end=True)
        self.log_std = nn.Parameter(torch.zeros(outputs)) if sampled else None

    def predicted(self, latent: Tensor, action: Tensor) -> Tensor:
        """u(e(o), a), (B, latent)."""
        return self.forward_model(torch.cat([latent, self.embedding(action)], -1))


class Curiosity(nn.Module):
    """No curiosity at all, and the base of every kind.

    Attributes:
        trains: whether `model` has anything to learn.
        counts: whether `error` can use "visits", (B,): how often a rollout has seen an observation.
    """

    trains, counts = False, False

    def error(self, batch: Batch) -> Tensor:
        """Raw error of each transition, (B,)."""
        return torch.zeros_like(batch["reward"])

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """What `model` learns from."""
        raise NotImplementedError


class ICM(Curiosity):
    """Intrinsic curiosity module (Pathak et al., 2017): error of the predicted next latent.

    error = ||u(e(o), a) - e(o')||^2
    L     = w / 2 E ||u(e(o), a) - sg e(o')||^2 + (1 - w) L_inverse
    L_inverse: cross-entropy of the action, or the squared error of its predicted mean

    Args:
        observation_space: vector or image.
        action_space: Discrete or a vector.
        latent: width of e.
        forward_weight: w.
        sampled_inverse: for continuous actions, the published squared error of an action drawn from
            the predicted Gaussian instead of its mean.
    """

    trains = True

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        latent: int = 128,
        forward_weight: float = 0.2,
        sampled_inverse: bool = False,
    ) -> None:
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        sampled = sampled_inverse and not self.discrete
        self.model = InverseDynamics(observation_space, action_space, latent, sampled)
        self.forward_weight = forward_weight

    def error(self, batch: Batch) -> Tensor:
        """Squared distance of the predicted and the true next latent, (B,)."""
        predicted = self.model.predicted(self.model.encoder(batch["obs"]), batch["action"])
        return (predicted - self.model.encoder(batch["next_obs"])).square().sum(-1)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Forward and inverse model; the encoder learns from both."""
        model, action = self.model, batch["action"]
        latent, following = model.encoder(batch["obs"]), model.encoder(batch["next_obs"])
        difference = model.predicted(latent, action) - following.detach()
        forward = 0.5 * difference.square().sum(-1).mean()
        guess = model.inverse_model(torch.cat([latent, following], -1))
        if model.log_std is not None:
            guess = guess + model.log_std.exp() * torch.randn_like(guess)
        inverse = (
            F.cross_entropy(guess, action) if self.discrete else (guess - action).square().mean()
        )
        loss = self.forward_weight * forward + (1 - self.forward_weight) * inverse
        return loss, {"curiosity/forward": forward, "curiosity/inverse": inverse}


class RIDE(ICM):
    """Impact-driven exploration (Raileanu and Rocktaeschel, 2020) on ICM's encoder.

    error = ||e(o') - e(o)||^2 / sqrt(N(o)),  N: visits of o in this rollout, where they are given
    """

    counts = True

    def error(self, batch: Batch) -> Tensor:
        """Squared change of the latent, (B,)."""
        change = self.model.encoder(batch["next_obs"]) - self.model.encoder(batch["obs"])
        error = change.square().sum(-1)
        return error / batch["visits"].sqrt() if "visits" in batch else error


class RND(Curiosity):
    """Random network distillation (Burda et al., 2018): error of a predictor of random features.

    error = ||p(o') - t(o')||^2,  L = w E 1/2 ||p(o') - t(o')||^2

    The target's weights are buffers: saved, and never trained. Predictor and target are initialised
    separately; a copy made afterwards would leave no error at all.
    """

    trains = True

    def __init__(
        self, observation_space: Space[Any], latent: int = 512, weight: float = 0.2
    ) -> None:
        super().__init__()
        self.model, self.target = (_random_features(observation_space, latent) for _ in range(2))
        _freeze(self.target)
        self.weight = weight

    def distance(self, obs: Tensor) -> Tensor:
        """||p(o) - t(o)||^2, (B,)."""
        return (self.model(obs) - self.target(obs)).square().sum(-1)

    def error(self, batch: Batch) -> Tensor:
        """Distance at the next observation, (B,)."""
        return self.distance(batch["next_obs"])

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The predictor's error at the next observation."""
        loss = 0.5 * self.distance(batch["next_obs"]).mean()
        return self.weight * loss, {"curiosity/predictor": loss}


class NovelD(RND):
    """Difference of novelty (Zhang et al., 2021): RND's error, where it rises along a step.

    error = max(0, rnd(o') - alpha rnd(o)) 1[first visit of o in this rollout],  alpha = 0.5
    """

    counts, alpha = True, 0.5

    def error(self, batch: Batch) -> Tensor:
        """Rise of the distance, (B,)."""
        rise = self.distance(batch["next_obs"]) - self.alpha * self.distance(batch["obs"])
        error = rise.clamp(min=0)
        return error * (batch["visits"] == 1) if "visits" in batch else error


class Disagreement(Curiosity):
    """Disagreement of an ensemble of forward models (Pathak et al., 2019).

    error = mean over dimensions of Var_i f_i(o, a)

    On vectors the models predict the next observation, on images fixed random features of it.
    """

    trains = True

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        latent: int = 128,
        members: int = 5,
        hidden: int = 1024,
    ) -> None:
        super().__init__()
        self.features: nn.Module = nn.Identity()
        width = latent
        if is_image(observation_space):
            self.features = _random_features(observation_space, latent)
            _freeze(self.features)
        else:
            assert observation_space.shape is not None
            width = observation_space.shape[0]
        self.choices = _width(action_space) if isinstance(action_space, Discrete) else 0
        inputs = width + _width(action_space)
        self.model = nn.ModuleList(
            Features(inputs, (hidden, width), linear_end=True) for _ in range(members)
        )

    def predictions(self, batch: Batch) -> Tensor:
        """Every model's prediction, (members, B, width)."""
        action = batch["action"]
        if self.choices:
            action = F.one_hot(action, self.choices).to(batch["reward"].dtype)
        inputs = torch.cat([self.features(batch["obs"]), action], -1)
        return torch.stack([member(inputs) for member in self.model])

    def error(self, batch: Batch) -> Tensor:
        """Variance over the models, averaged over the dimensions, (B,)."""
        return self.predictions(batch).var(0).mean(-1)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Squared error of every model, averaged over dimensions, summed over models."""
        difference = self.predictions(batch) - self.features(batch["next_obs"])
        loss = difference.square().mean((-1, -2)).sum()
        return loss, {"curiosity/forward": loss / len(self.model)}


class RewardModel(Curiosity):
    """Predicts the reward of (o, a), with an encoder of its own; its error shows reward shifts.

    error = (R(o, a) - r)^2,  L = E (R(o, a) - r)^2
    """

    trains = True

    def __init__(self, observation_space: Space[Any], action_space: Space[Any]) -> None:
        super().__init__()
        self.model = _RewardNetwork(observation_space, action_space)

    def error(self, batch: Batch) -> Tensor:
        """Squared error of the predicted reward, (B,)."""
        return (self.model(batch["obs"], batch["action"]) - batch["reward"]).square()

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Mean squared error."""
        loss = self.error(batch).mean()
        return loss, {"reward_model/loss": loss}


class _RewardNetwork(nn.Module):
    """Two convolutions and three layers on images, four layers on vectors (published)."""

    def __init__(self, observation_space: Space[Any], action_space: Space[Any]) -> None:
        super().__init__()
        assert observation_space.shape is not None
        image = is_image(observation_space)
        pixels = Pixels(observation_space.shape) if image else None
        self.encoder: nn.Module = pixels or nn.Identity()
        inputs, embedded = (pixels.width, 4) if pixels else (observation_space.shape[0], 2)
        self.embedding = ActionEmbedding(action_space, embedded)
        widths = (128, 128, 1) if image else (128, 128, 128, 1)
        self.layers = Features(inputs + embedded, widths, linear_end=True)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, obs), (B, action) -> (B,)."""
        x = torch.cat([self.encoder(obs), self.embedding(action)], -1)
        return self.layers(x).squeeze(-1)


def curiosity(
    kind: str,
    observation_space: Space[Any],
    action_space: Space[Any],
    latent: int = 0,
    forward_weight: float = 0.2,
    sampled_inverse: bool = False,
) -> Curiosity:
    """The curiosity called `kind`.

    Args:
        kind: one of `KINDS`.
        observation_space: vector or image.
        action_space: Discrete or a vector.
        latent: width of the latent; 0: the published one (128; 512 for RND).
        forward_weight: weight of the forward (or predictor's) loss.
        sampled_inverse: see `ICM`.

    Raises:
        ValueError: for an unknown kind.
    """
    spaces = observation_space, action_space
    if kind in ("icm", "ride"):
        made = ICM if kind == "icm" else RIDE
        return made(*spaces, latent or 128, forward_weight, sampled_inverse)
    if kind == "rnd":
        return RND(observation_space, latent or 512, forward_weight)
    if kind == "noveld":
        return NovelD(observation_space, latent or 128, forward_weight)
    if kind == "disagreement":
        return Disagreement(*spaces, latent or 128)
    if kind == "none":
        return Curiosity()
    raise ValueError(f"unknown curiosity {kind!r}: choose {', '.join(KINDS)}")


def visits(obs: Tensor) -> Tensor:
    """How often each lane has seen each observation by then, itself included, (N, T) from 1.

    Observations are compared by a 64-bit random projection of their bytes, so nothing is counted in
    a dictionary and nothing waits for the device.

    Args:
        obs: raw observations of a rollout, (N, T, ...).
    """
    lanes, length = obs.shape[:2]
    rows = obs.reshape(lanes, length, -1).contiguous()
    rows = rows.view(torch.int32) if rows.dtype.is_floating_point else rows
    generator = torch.Generator(obs.device).manual_seed(0)
    bounds = -(2**62), 2**62
    weight = torch.randint(*bounds, rows.shape[-1:], generator=generator, device=obs.device)
    key = (rows.long() * weight).sum(-1)  # wraps around, which is what a hash may do
    sorted_key, order = key.sort(dim=-1, stable=True)  # equal observations together, in time order
    place = torch.arange(length, device=obs.device).expand(lanes, length)
    begins = torch.ones_like(place, dtype=torch.bool)
    begins[:, 1:] = sorted_key[:, 1:] != sorted_key[:, :-1]
    rank = place - torch.where(begins, place, 0).cummax(-1).values + 1
    return torch.empty_like(rank).scatter_(-1, order, rank)


def _width(space: Space[Any]) -> int:
    """Choices of a discrete action, or length of a continuous one."""
    return int(space.n) if isinstance(space, Discrete) else space.shape[0]  # type: ignore[index]


def _random_features(space: Space[Any], latent: int) -> nn.Sequential:
    """RND's network: the convolutions with LeakyReLU, two ReLU layers, a linear one; orthogonal."""
    assert space.shape is not None
    pixels = [Pixels(space.shape, F.leaky_relu)] if is_image(space) else []
    inputs = pixels[0].width if pixels else space.shape[0]
    made = nn.Sequential(*pixels, Features(inputs, (latent, latent, latent), linear_end=True))
    orthogonal(made)
    return made


def _freeze(module: nn.Module) -> None:
    """Turn parameters into buffers: saved with the weights, seen by no optimiser."""
    for inner in module.modules():
        for name, parameter in list(inner.named_parameters(recurse=False)):
            delattr(inner, name)
            inner.register_buffer(name, parameter.detach().clone())
