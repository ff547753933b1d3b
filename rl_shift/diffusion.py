"""Diffusion in EDM's form (Karras et al., 2022): preconditioning, loss, schedule and samplers.

The stochastic sampler takes its Euler step from the re-noised point, as EDM does; the published
code of Policy-Guided Diffusion takes it from the point before and distorts the samples. Also
DPM-Solver++(2M) (Lu et al., 2022). Sampling needs no gradients and never waits for the device: the
noise levels are numbers that the host knows beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rl_shift.errors import UserError

Denoise = Callable[[Tensor, Tensor], Tensor]  # D(x, sigma): (B, ...), () -> (B, ...)
Push = Callable[[Tensor, Tensor, int], Tensor]  # (x, sigma, step) -> x, before each step
Solver = Literal["heun", "euler", "dpm"]

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # EDM
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2  # EDM: noise levels of the training


class EDM(nn.Module):
    """A denoiser D(x; sigma) around a network F, for data of unit variance (sigma_data = 1).

    D(x; sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4)
    c_skip = 1 / (sigma^2 + 1),  c_out = sigma / sqrt(sigma^2 + 1),  c_in = 1 / sqrt(sigma^2 + 1)
    L = E (sigma^2 + 1) / sigma^2 (D(y + sigma eps; sigma) - y)^2,  ln sigma ~ N(-1.2, 1.2^2)

    Args:
        net: F(x, c_noise), (B, ...) and (B,) -> (B, ...).
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoise (B, ...) at noise levels (B,), or () for all."""
        sigma = sigma.expand(len(x))
        scale = (sigma.square() + 1).rsqrt()
        wide = (-1, *(1,) * (x.dim() - 1))
        c_in, c_out = scale.view(wide), (sigma * scale).view(wide)
        out: Tensor = c_in.square() * x + c_out * self.net(c_in * x, sigma.log() / 4)
        return out

    def loss(self, data: Tensor) -> Tensor:
        """The weighted error of one noise level per sample, (B, ...) -> ()."""
        sigma = (LOG_SIGMA_MEAN + LOG_SIGMA_STD * torch.randn_like(data.flatten(1)[:, 0])).exp()
        level = sigma.view(-1, *(1,) * (data.dim() - 1))
        error = self(data + level * torch.randn_like(data), sigma) - data
        return ((level.square() + 1) / level.square() * error.square()).mean()


def noise_levels(steps: int) -> list[float]:
    """EDM's noise levels sigma_0 > ... > sigma_{N-1}, and the final 0."""
    if steps < 2:
        raise UserError(f"a sampler of {steps} steps: give at least 2")
    top, bottom = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    levels = [(top + i / (steps - 1) * (bottom - top)) ** RHO for i in range(steps)]
    return [*levels, 0.0]


@dataclass(frozen=True)
class Sampler:
    """From noise to samples in `steps` steps.

    Attributes:
        steps: noise levels N; Heun asks the denoiser 2N - 1 times, the others N times.
        solver: "heun" (second order), "euler" (first), "dpm" (DPM-Solver++(2M)).
        churn: S_churn: how much noise is added back on the way; 0: a deterministic path. Heun only.
        churn_min: S_tmin, lowest noise level that is churned.
        churn_max: S_tmax, highest such level.
        churn_noise: S_noise, inflation of the noise that is added.

    Raises:
        UserError: for churn with a solver that it breaks (first order loses variance with it).
    """

    steps: int = 32
    solver: Solver = "heun"
    churn: float = 0.0
    churn_min: float = 0.05
    churn_max: float = 50.0
    churn_noise: float = 1.003

    def __post_init__(self) -> None:
        """Refuses what cannot work."""
        noise_levels(self.steps)
        if self.churn and self.solver != "heun":
            raise UserError(
                f"churn {self.churn:g} needs the heun sampler, not {self.solver}: it has no "
                "second-order step to restore the variance that churn loses"
            )

    @property
    def calls(self) -> int:
        """How often one sample asks the denoiser, guidance aside."""
        return 2 * self.steps - 1 if self.solver == "heun" else self.steps

    def levels(self) -> Iterator[tuple[float, float, float]]:
        """(sigma_i, sigma_i after churn, sigma_{i+1}) of every step."""
        levels = noise_levels(self.steps)
        for sigma, following in zip(levels[:-1], levels[1:], strict=True):
            churned = self.churn_min <= sigma <= self.churn_max
            gamma = min(self.churn / self.steps, math.sqrt(2) - 1) if churned else 0.0
            yield sigma, sigma * (1 + gamma), following

    def __call__(self, denoise: Denoise, noise: Tensor, push: Push | None = None) -> Tensor:
        """Samples from standard normal noise, (B, ...) -> (B, ...).

        Args:
            denoise: D(x, sigma), with sigma a tensor ().
            noise: standard normal, float32.
            push: guidance that moves x at the start of a step.
        """
        plan = list(self.levels())
        table = torch.tensor([level[:2] for level in plan]).to(noise)
        x = noise * plan[0][0]
        solve = self._dpm if self.solver == "dpm" else self._edm
        return solve(denoise, x, plan, table, push)

    def _edm(
        self,
        denoise: Denoise,
        x: Tensor,
        plan: list[tuple[float, float, float]],
        table: Tensor,
        push: Push | None,
    ) -> Tensor:
        for i, (sigma, raised, following) in enumerate(plan):
            if push is not None:
                x = push(x, table[i, 0], i)
            if raised > sigma:
                x = x + math.sqrt(raised**2 - sigma**2) * self.churn_noise * torch.randn_like(x)
            slope = (x - denoise(x, table[i, 1])) / raised
            start, x = x, x + (following - raised) * slope  # from the churned point
            if following > 0 and self.solver == "heun":
                end = (x - denoise(x, table[i + 1, 0])) / following
                x = start + 0.5 * (following - raised) * (slope + end)
        return x

    def _dpm(
        self,
        denoise: Denoise,
        x: Tensor,
        plan: list[tuple[float, float, float]],
        table: Tensor,
        push: Push | None,
    ) -> Tensor:
        before, step_before = x, 0.0
        for i, (sigma, _, following) in enumerate(plan):
            if push is not None:
                x = push(x, table[i, 0], i)
            clean = denoise(x, table[i, 0])
            if following == 0:
                return clean
            step = math.log(sigma / following)
            r = step_before / step
            mixed = clean if i == 0 else (1 + 0.5 / r) * clean - 0.5 / r * before
            x = following / sigma * x - math.expm1(-step) * mixed
            before, step_before = clean, step
        return x


def toy_std(sampler: Sampler) -> float:
    """Std of the samples for standard normal data and its exact denoiser x / (1 + sigma^2).

    Exact, not sampled: every step is linear. Its distance from 1 is what a sampler's speed costs.
    """
    if not sampler.churn:
        one = torch.ones(1, 1, dtype=torch.float64)
        return float(sampler(lambda x, sigma: x / (1 + sigma.square()), one).abs())
    variance = SIGMA_MAX**2
    for sigma, raised, following in sampler.levels():
        step = following - raised
        slope = raised / (1 + raised**2)
        gain = 1 + step * slope
        if following > 0:
            gain = 1 + 0.5 * step * (slope + following / (1 + following**2) * gain)
        added = sampler.churn_noise**2 * (raised**2 - sigma**2)
        variance = gain**2 * (variance + added)
    return math.sqrt(variance)
