"""Denoising score models of a dataset's density, and corrections of actions along them.

Published: denoising score matching (Vincent, 2011), noise-conditional (Song and Ermon, NCSN, 2019),
Tweedie's identity E[z | z~] = z~ + sigma^2 grad log p_sigma(z~). The form over (obs, action), its
scales, modes and the corrections are our design after arXiv 2406.07541.

Words: observations are normalised, actions lie in [-1, 1]. `sigma` of a level is in action units;
observations get `state_scale * sigma`. A `Denoiser` predicts the standard normal noise that was
added; the score is minus that prediction over the scale of the noise. Corrections take any
`Denoiser`, an analytic one included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Mode = Literal["joint", "conditional", "state"]
Gate = Literal["off", "hard", "soft"]
QUANTILES = 101  # stored per level: 0 %, 1 % .. 100 %


def geometric_levels(low: float, high: float, count: int) -> tuple[float, ...]:
    """Noise scales from `low` to `high`, each a constant multiple of the one before."""
    if count == 1:
        return (high,)
    return tuple(low * (high / low) ** (i / (count - 1)) for i in range(count))


def nearest_level(sigmas: Sequence[float], sigma: float) -> int:
    """Index of the level whose scale is nearest on a logarithmic axis."""
    return min(range(len(sigmas)), key=lambda i: abs(math.log(sigmas[i] / sigma)))


class Denoiser(Protocol):
    """What corrections need of a score model."""

    sigmas: Tensor  # (L,), in action units
    state_scale: float

    def __call__(self, obs: Tensor, action: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """(B, obs), (B, action) -> predicted noise of both, zeros where it is not modelled."""
        ...


class ScoreNetwork(nn.Module):
    """Noise prediction eps(z + sigma_i eps, i) at L levels; an MLP with SiLU.

    | mode          | z             | noise on | predicts |
    |---------------|---------------|----------|----------|
    | `joint`       | (obs, action) | both     | both     |
    | `conditional` | (obs, action) | action   | action   |
    | `state`       | obs           | obs      | obs      |

    Args:
        obs: width of observations.
        action: width of actions.
        hidden: widths of the hidden layers; the first one gets the level's embedding added.
        sigmas: scales of the noise, increasing.
        mode: see above.
        state_scale: scale of observation noise relative to action noise.
    """

    sigmas: Tensor
    one_hot: Tensor

    def __init__(
        self,
        obs: int,
        action: int,
        hidden: Sequence[int],
        sigmas: Sequence[float],
        mode: Mode = "joint",
        state_scale: float = 0.5,
    ) -> None:
        super().__init__()
        self.mode, self.state_scale = mode, state_scale
        inputs = obs + (0 if mode == "state" else action)
        outputs = (obs if mode != "conditional" else 0) + (action if mode != "state" else 0)
        widths = [inputs + len(sigmas), *hidden, outputs]  # the level comes in as a one-hot vector
        self.layers = nn.ModuleList(
            nn.Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)
        )
        # both follow from the settings, so they are no part of a checkpoint
        self.register_buffer("sigmas", torch.tensor(sigmas), persistent=False)
        self.register_buffer("one_hot", torch.eye(len(sigmas)), persistent=False)

    def forward(
        self,
        obs: Tensor,
        action: Tensor,
        level: int | Tensor,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicted noise of (obs, action), (B, obs) and (B, action).

        Args:
            obs: (B, obs), normalised.
            action: (B, action).
            level: one index, or (B,) of them.
            noise: standard normal numbers to add at the level's scale, as while learning.
        """
        if noise is not None:
            sigma = self.sigmas[level].unsqueeze(-1)
            if self.mode != "conditional":
                obs = obs + self.state_scale * sigma * noise[0]
            action = action + sigma * noise[1]
        code = self.one_hot[level].expand(obs.shape[0], -1)
        x = torch.cat([obs, code] if self.mode == "state" else [obs, action, code], -1)
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        x = self.layers[-1](x)
        if self.mode == "conditional":
            return torch.zeros_like(obs), x
        if self.mode == "state":
            return x, torch.zeros_like(action)
        return x[..., : obs.shape[-1]], x[..., obs.shape[-1] :]

    def loss(self, obs: Tensor, action: Tensor) -> Tensor:
        """E ||eps_theta - eps||^2 over the modelled parts: the sigma^2-weighted score matching.

        The levels of a batch are stratified: row i has level i modulo L.
        """
        level = torch.arange(obs.shape[0], device=obs.device) % len(self.sigmas)
        noise = torch.randn_like(obs), torch.randn_like(action)
        predicted = self(obs, action, level, noise)
        parts = {"joint": (0, 1), "conditional": (1,), "state": (0,)}[self.mode]
        errors = [(predicted[i] - noise[i]).square().sum(-1).mean() for i in parts]
        return torch.stack(errors).sum()


# ---- corrections -------------------------------------------------------------------------------


def correct_action(
    denoiser: Denoiser,
    obs: Tensor,
    action: Tensor,
    levels: Sequence[int],
    eta: float,
    strength: Tensor | float = 1.0,
) -> Tensor:
    """Steps a <- clip(a + eta sigma^2 grad_a log p_sigma(s, a)), one per level.

    With `eta` 1 a step lands on the posterior mean of the clean action (Tweedie).

    Args:
        denoiser: the score model.
        obs: (B, obs), normalised.
        action: (B, action) in [-1, 1].
        levels: of the steps, usually decreasing.
        eta: step size in units of sigma^2.
        strength: factor on the steps, 0..1, (B, 1) or one number; see `gate_strength`.
    """
    for level in levels:
        predicted = denoiser(obs, action, level)[1]
        step = eta * denoiser.sigmas[level] * strength * predicted
        action = (action - step).clamp(-1, 1)
    return action


def state_displacement(
    denoiser: Denoiser, obs: Tensor, action: Tensor, level: int, eta: float, limit: Tensor
) -> Tensor:
    """Displacement eta sigma_s^2 grad_s log p of a normalised state, norm at most `limit`."""
    sigma = denoiser.state_scale * denoiser.sigmas[level]
    delta = -eta * sigma * denoiser(obs, action, level)[0]
    norm = delta.norm(dim=-1, keepdim=True)
    return delta * (limit / norm.clamp(min=1e-12)).clamp(max=1.0)


def action_score_norm(denoiser: Denoiser, obs: Tensor, action: Tensor, level: int) -> Tensor:
    """How far from the data an action looks: sigma ||grad_a log p_sigma(s, a)||, (B,)."""
    return denoiser(obs, action, level)[1].norm(dim=-1)


def gate_strength(statistic: Tensor, threshold: Tensor, gate: Gate) -> Tensor:
    """How much of a correction is applied, (B, 1) in 0..1.

    `hard`: all of it above the threshold, none at or below it. `soft`: the ratio of the statistic
    to the threshold, at most 1.
    """
    if gate == "off":
        strength = torch.ones_like(statistic)
    elif gate == "hard":
        strength = (statistic > threshold).to(statistic.dtype)
    else:
        strength = (statistic / threshold.clamp(min=1e-12)).clamp(max=1.0)
    return strength.unsqueeze(-1)


class Quantiles(nn.Module):
    """Quantiles of `action_score_norm` on dataset actions, for every level; kept with the model."""

    table: Tensor

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.full((levels, QUANTILES), -1.0))

    @property
    def known(self) -> bool:
        """Whether they were computed."""
        return bool((self.table >= 0).all())

    def of(self, denoiser: Denoiser, obs: Tensor, action: Tensor) -> Tensor:
        """(L, 101) from rows (B, obs), (B, action)."""
        norms = torch.stack(
            [
                action_score_norm(denoiser, obs, action, level)
                for level in range(len(denoiser.sigmas))
            ]
        )
        ranked = norms.sort(-1).values
        place = torch.linspace(0, norms.shape[-1] - 1, QUANTILES, device=obs.device)
        low = place.long()
        high = (low + 1).clamp(max=norms.shape[-1] - 1)
        between = (place - low).to(norms.dtype)
        return torch.lerp(ranked[:, low], ranked[:, high], between.expand(len(norms), -1))

    def forward(self, level: int, share: float) -> Tensor:
        """The `share`-quantile at a level, (), linear between the stored ones."""
        place = share * (QUANTILES - 1)
        low = min(int(place), QUANTILES - 2)
        return torch.lerp(self.table[level, low], self.table[level, low + 1], place - low)
