"""Guidance of sampled actions towards a policy, in closed form: no gradient reaches a network.

Spec of Policy-Guided Diffusion. "additive" is the published rule with our N-invariant strength;
"bounded" and "curvature" place the guidance into the denoiser's output (our design). Only the
action block is ever moved, and the observations that the policy sees are constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rl_shift.diffusion import Denoise, Sampler
from rl_shift.trajectories import INSIDE

if TYPE_CHECKING:
    from rl_shift.agent import Policy
    from rl_shift.trajectories import TrajectoryCodec

Form = Literal["additive", "bounded", "curvature"]
Norm = Literal["none", "frobenius", "rms"]
LEAST_STD = 0.1  # of a Gaussian policy: IQL's may shrink to e^-20, and the score explodes
REFERENCE_STEPS = 256  # the published number of steps, per which a coefficient is meant
LOG_2PI = math.log(2 * math.pi)


def score(
    codec: TrajectoryCodec, policy: Callable[[Tensor], Policy], x: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the policy's log-likelihood in the action block of x, and its curvature.

    With v = de-standardised actions before tanh, s their std, pi and sigma the policy's mean and
    std (1 where it is deterministic, never below 0.1):
    g = -(tanh v - pi) (1 - tanh^2 v) s / sigma^2,  curvature = ((1 - tanh^2 v) s / sigma)^2
    and without the tanh for policies that are squashed themselves. Equation as published, without
    a Jacobian term.

    Args:
        codec: knows the layout and the statistics.
        policy: raw observations (N, obs) -> `Policy`.
        x: encoded windows, (B, T, d).

    Returns:
        Both (B, T, action).
    """
    latent = codec.latents(x)
    at = policy(codec.observations(x).flatten(0, -2))
    mean, slope = at.mean.view_as(latent), codec.std[codec.latent].expand_as(latent)
    if at.squashed:
        error = latent - mean
    else:
        action = latent.tanh()
        error, slope = action - mean, (1 - action.square()) * slope
    if at.std is None:
        return -error * slope, slope.square()
    precision = at.std.expand_as(at.mean).view_as(latent).clamp(min=LEAST_STD).pow(-2)
    return -error * slope * precision, slope.square() * precision


def log_likelihood(at: Policy, action: Tensor) -> Tensor:
    """Log-likelihood of actions (N, action), as `score` means it, (N,).

    Real actions may lie on the edge of the box, where atanh has no value: they are taken just
    inside it, as far out as generated ones can be.
    """
    std = torch.ones_like(action) if at.std is None else at.std.expand_as(action)
    std = std.clamp(min=LEAST_STD)
    error = (action.clamp(-INSIDE, INSIDE).atanh() if at.squashed else action) - at.mean
    return -(0.5 * (error / std).square() + std.log() + 0.5 * LOG_2PI).sum(-1)


@dataclass(frozen=True)
class Guidance:
    """How the policy's score enters a sampler; the strength is a factor given at sampling.

    Attributes:
        form: "additive": x += lambda_i g at the start of step i (published).
            "bounded": D += lambda kappa g, kappa = sigma^2 / (1 + sigma^2); keep lambda <= 1.
            "curvature": D += lambda kappa g / (1 + lambda kappa curvature): lambda is the exponent
            of the policy's likelihood.
        norm: additive only: g as it is, or divided by its norm or its root mean square per window.
        denoised: additive only: g is taken at D(x), one more call per step.
        bump: additive only: weight c of the half sine in lambda_i.
        invariant: additive only: strengths are meant per 256 steps, whatever the sampler's number.
    """

    form: Form = "curvature"
    norm: Norm = "rms"
    denoised: bool = False
    bump: float = 0.3
    invariant: bool = True

    def strengths(self, steps: int) -> list[float]:
        """lambda_i of the additive form for coefficient 1: from 1 down to 0 at the last step."""
        scale = REFERENCE_STEPS / steps if self.invariant else 1.0
        decay = [
            1 - i / steps + self.bump * math.sin(math.pi * (i + 1) / steps) for i in range(steps)
        ]
        return [*(scale * value for value in decay[:-1]), 0.0]

    def sample(
        self,
        sampler: Sampler,
        denoise: Denoise,
        noise: Tensor,
        codec: TrajectoryCodec,
        policy: Callable[[Tensor], Policy],
        coefficient: Tensor,
    ) -> Tensor:
        """Guided windows from standard normal noise, (B, T, d); the coefficient is a tensor ()."""
        block, strengths = codec.latent, self.strengths(sampler.steps)

        def moved(x: Tensor, by: Tensor) -> Tensor:
            parts = [x[..., : block.start], x[..., block] + by, x[..., block.stop :]]
            return torch.cat(parts, -1)

        def push(x: Tensor, sigma: Tensor, step: int) -> Tensor:
            if strengths[step] == 0:
                return x
            g = score(codec, policy, denoise(x, sigma) if self.denoised else x)[0]
            if self.norm != "none":
                norm = g.flatten(1).norm(dim=1)[:, None, None] + 1e-8
                g = g / norm * (math.sqrt(g[0].numel()) if self.norm == "rms" else 1.0)
            return moved(x, strengths[step] * coefficient * g)

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            clean = denoise(x, sigma)
            g, curvature = score(codec, policy, clean)
            weight = coefficient * sigma.square() / (1 + sigma.square())
            if self.form == "curvature":
                weight = weight / (1 + weight * curvature)
            return moved(clean, weight * g)

        if self.form == "additive":
            return sampler(denoise, noise, push)
        return sampler(guided, noise)


def tuned(coefficient: Tensor, spread: Tensor, target: float) -> Tensor:
    """One step of the self-tuned strength: stronger while actions spread wider than the target.

    PolyGRAD's dual step in log scale (our design): c <- c exp(0.5 (r / s* - 1)), at least 1e-4.

    Args:
        coefficient: c, ().
        spread: r, root mean square of action - policy on a probe, ().
        target: s*.
    """
    return (coefficient * (0.5 * (spread / target - 1)).exp()).clamp(min=1e-4)
