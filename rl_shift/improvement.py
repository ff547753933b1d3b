"""Closed-form policy improvement: the best action of a linearised value within a density bound.

Around a behaviour density with anchors mu_i, diagonal covariances Sigma_i and weights lambda_i, and
with g the gradient of the value, each operator maximises <g, a> subject to a lower bound on the
behaviour's log-density (Li et al., 2023). Everything is computed before a tanh, elementwise over
the batch; standard deviations stand for the diagonals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rl_shift.networks import LOG_2PI


def single_step(mean: Tensor, std: Tensor, gradient: Tensor, log_tau: float) -> Tensor:
    """Mu + sqrt(2 log tau) Sigma g / sqrt(g' Sigma g): one Gaussian, (..., action) each."""
    return mean + math.sqrt(2 * log_tau) * _direction(std, gradient)


def component_steps(
    mean: Tensor,
    std: Tensor,
    log_weight: Tensor,
    gradient: Tensor,
    log_tau: float,
    published_scale: bool = False,
) -> Tensor:
    """One candidate for each component of a mixture, by the bound log sum >= log largest term.

    mu_i + kappa_i Sigma_i g_i / sqrt(g_i' Sigma_i g_i) with
    kappa_i = sqrt(2 (log tau + log lambda_i + log p_i - M)), M = max_j (log lambda_j + log p_j), a
    negative radicand counting as 0 and p_i the density at the component's own mean.

    Args:
        mean: (B, K, action).
        std: (B, K, action).
        log_weight: (B, K), log lambda.
        gradient: (B, K, action), at each component's mean.
        log_tau: the budget, at least 0.
        published_scale: the published code's step instead: sqrt(2) longer, and normalised over
            the components instead of the action's dimensions.

    Returns:
        (B, K, action).
    """
    peak = log_weight - (std.log() + 0.5 * LOG_2PI).sum(-1)
    kappa = (2 * (log_tau + peak - peak.amax(-1, keepdim=True))).clamp(min=0).sqrt()[..., None]
    if published_scale:
        scaled = std.square() * gradient
        length = (scaled * gradient).sum(-2, keepdim=True).sqrt()
        return mean + math.sqrt(2) * kappa * scaled / (length + 1e-7)
    return mean + kappa * _direction(std, gradient)


def jensen_centre(mean: Tensor, std: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where Jensen's bound of a mixture is highest, its curvature there and what it costs.

    Returns:
        The centre mu_bar (B, action), the diagonal of A = sum_i lambda_i Sigma_i^-1 (B, action),
        and sum_i lambda_i (mu_i - mu_bar)' Sigma_i^-1 (mu_i - mu_bar), (B,).
    """
    precision = log_weight.exp()[..., None] / (std.square() + 1e-6)
    total = precision.sum(-2)
    centre = (precision * mean).sum(-2) / total
    cost = (precision * (mean - centre[..., None, :]).square()).sum((-2, -1))
    return centre, total, cost


def jensen_step(
    centre: Tensor, precision: Tensor, cost: Tensor, gradient: Tensor, log_tau: float
) -> tuple[Tensor, Tensor]:
    """mu_bar + sqrt(rho) A^-1 g / sqrt(g' A^-1 g), rho = 2 log tau - cost; and whether rho >= 0.

    Returns:
        (B, action), the centre itself where nothing is feasible; (B,) bool.
    """
    rho = 2 * log_tau - cost
    step = rho.clamp(min=0).sqrt()[..., None] * _direction(precision.rsqrt(), gradient)
    return centre + step, rho >= 0


def _direction(std: Tensor, gradient: Tensor) -> Tensor:
    """Sigma g of unit Mahalanobis length; 0 where g is 0."""
    scaled = std.square() * gradient
    return scaled / ((scaled * gradient).sum(-1, keepdim=True).sqrt() + 1e-7)


def best_of(candidates: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """The allowed candidate of highest value: (B, N, action), (B, N), (B, N) -> (B, action).

    Where none is allowed, the first.
    """
    best = value.masked_fill(~allowed, -math.inf).argmax(-1)
    index = best[:, None, None].expand(len(best), 1, candidates.shape[-1])
    return torch.gather(candidates, 1, index).squeeze(1)
