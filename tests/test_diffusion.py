"""EDM and its samplers against exact Gaussian toys; the denoisers' sizes. Numbers of the spec."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_shift.denoisers import ResidualMLP, TemporalUNet, multiply_adds
from rl_shift.diffusion import EDM, Sampler, noise_levels, toy_std
from rl_shift.errors import UserError


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of standard normal data."""
    return x / (1 + sigma.square())


def exact_std(sampler: Sampler, monkeypatch: pytest.MonkeyPatch, wrong_base: bool = False) -> float:
    """Std of the toy's samples without sampling: the sampler is linear in x and in every noise.

    Each of the churn's injections is sent through the sampler on its own; the squares add up.
    """
    lanes = sampler.steps + 1  # x itself, and the noise of each step
    injections = iter(range(1, lanes))

    def unit(like: Tensor) -> Tensor:
        out = torch.zeros_like(like)
        out[next(injections)] = 1.0
        return out

    monkeypatch.setattr(torch, "randn_like", unit)
    start = torch.zeros(lanes, 1, dtype=torch.float64)
    start[0] = 1.0
    if wrong_base:  # as published: the Euler step starts before the churn
        return float(_published(sampler, start).norm())
    return float(sampler(gaussian, start).norm())


def _published(sampler: Sampler, x: Tensor) -> Tensor:
    """The published code's step, for comparison."""
    x = x * noise_levels(sampler.steps)[0]
    for sigma, raised, following in sampler.levels():
        hat = x
        if raised > sigma:
            hat = x + math.sqrt(raised**2 - sigma**2) * 1.003 * torch.randn_like(x)
        slope = (hat - gaussian(hat, torch.tensor(raised))) / raised
        x = x + (following - raised) * slope
        if following > 0:
            end = (x - gaussian(x, torch.tensor(following))) / following
            x = hat + 0.5 * (following - raised) * (slope + end)
    return x


@pytest.mark.parametrize(
    ("steps", "churned", "ode"),
    [
        (16, 1.1334, 1.0583),
        (32, 1.0473, 1.0127),
        (64, 1.0213, 1.0029),
        (256, 1.0063, 1.0001),
    ],
)
def test_the_toy_std_is_the_exact_one(
    steps: int, churned: float, ode: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert toy_std(Sampler(steps)) == pytest.approx(ode, abs=1e-4)
    assert toy_std(Sampler(steps, churn=80.0)) == pytest.approx(churned, abs=1e-4)
    assert exact_std(Sampler(steps), monkeypatch) == pytest.approx(ode, abs=1e-3)
    assert exact_std(Sampler(steps, churn=80.0), monkeypatch) == pytest.approx(churned, abs=1e-3)


def test_the_published_base_point_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = exact_std(Sampler(32, churn=80.0), monkeypatch, wrong_base=True)
    assert wrong == pytest.approx(1.3376, abs=1e-3)


@pytest.mark.parametrize(("steps", "std"), [(8, 1.181), (32, 1.0137), (64, 1.0030)])
def test_dpm_solver(steps: int, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert exact_std(Sampler(steps, "dpm"), monkeypatch) == pytest.approx(std, abs=1e-3)


def test_euler_loses_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exact_std(Sampler(32, "euler"), monkeypatch) == pytest.approx(0.9203, abs=1e-3)
    with pytest.raises(UserError, match="needs the heun sampler"):
        Sampler(32, "euler", churn=80.0)
    with pytest.raises(UserError, match="at least 2"):
        Sampler(1)


def test_sampled_std() -> None:
    noise = torch.randn(3000, 31, generator=torch.Generator().manual_seed(0))
    assert float(Sampler(32)(gaussian, noise).std()) == pytest.approx(1.0127, abs=0.03)


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [(Sampler(32), 63), (Sampler(256, churn=80.0), 511), (Sampler(32, "dpm"), 32)],
)
def test_calls_of_the_denoiser(sampler: Sampler, calls: int) -> None:
    asked = 0

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return gaussian(x, sigma)

    sampler(counting, torch.ones(1, 1))
    assert asked == sampler.calls == calls


def test_sampling_reads_no_value_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: Any) -> None:
        raise AssertionError("a value is read")

    for method in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(Tensor, method, read)
    denoiser = EDM(TemporalUNet(4, 8))
    with torch.no_grad():
        Sampler(3, churn=80.0)(denoiser, torch.ones(2, 8, 4))
        Sampler(3, "dpm")(denoiser, torch.ones(2, 8, 4))


# ---- the objective -----------------------------------------------------------------------------


class Exact(torch.nn.Module):
    """F of the exact denoiser of normal data: D = c_skip x, so F = 0."""

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_preconditioning_and_loss_by_hand() -> None:
    torch.manual_seed(0)
    x, sigma = torch.randn(5, 3), torch.tensor([0.01, 0.5, 1.0, 3.0, 80.0])
    exact = EDM(Exact())
    torch.testing.assert_close(exact(x, sigma), gaussian(x, sigma[:, None]))
    # The error of the exact denoiser is sigma^2 / (1 + sigma^2), and its weight the inverse.
    assert float(exact.loss(torch.randn(20_000, 4))) == pytest.approx(1.0, abs=0.02)

    class Inputs(torch.nn.Module):
        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            return x * level[:, None]

    out = EDM(Inputs())(x, sigma)
    c_in, level = (sigma**2 + 1).rsqrt()[:, None], sigma.log()[:, None] / 4
    torch.testing.assert_close(out, c_in**2 * x + sigma[:, None] * c_in * c_in * x * level)


def test_noise_levels() -> None:
    levels = noise_levels(32)
    assert (levels[0], levels[-1]) == (pytest.approx(80.0), 0.0)
    assert levels[-2] == pytest.approx(0.002)
    assert len(levels) == 33


# ---- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "parameters", "operations"),
    [
        (32, 179_129, 2.37e6),
        (64, 704_857, 9.3e6),
        (128, 2_796_185, 36.8e6),
        (256, 11_138_329, 146e6),
    ],
)
def test_the_unet_has_the_published_size(width: int, parameters: int, operations: float) -> None:
    net = TemporalUNet(25, width)
    assert sum(p.numel() for p in net.parameters()) == parameters
    counted = multiply_adds(net, torch.zeros(1, 32, 25), torch.zeros(1))
    assert counted == pytest.approx(operations, rel=0.01)


def test_the_published_default_has_the_published_size() -> None:
    with torch.device("meta"):
        net = TemporalUNet(25, 1024)
    assert sum(p.numel() for p in net.parameters()) == 177_656_857


@pytest.mark.parametrize("length", [31, 32, 33, 129])
def test_the_unet_takes_any_length(length: int) -> None:
    net = TemporalUNet(6, 8)
    assert net(torch.randn(2, length, 6), torch.zeros(2)).shape == (2, length, 6)


def test_a_width_that_groups_cannot_divide_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 8"):
        TemporalUNet(6, 12)


@pytest.mark.parametrize("kind", ["unet", "mlp"])
def test_a_small_denoiser_learns_a_line_of_data(kind: str) -> None:
    """Windows (T, 2) that are one number repeated with signs: samples keep the pattern."""
    torch.manual_seed(0)
    pattern = torch.tensor([[1.0, -1.0]]).repeat(4, 1)
    net = TemporalUNet(2, 16, 2) if kind == "unet" else ResidualMLP((4, 2), 64, 2, 32)
    denoiser = EDM(net)
    optimizer = torch.optim.Adam(denoiser.parameters(), 3e-3)
    for _ in range(250):
        loss = denoiser.loss(torch.randn(64, 1, 1) * pattern)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x = Sampler(12)(denoiser, torch.randn(256, 4, 2)) * pattern
    spread = x.std((1, 2)).mean() / x.mean((1, 2)).std()
    assert spread < 0.4  # of unrelated numbers: more than 2
    assert x.mean((1, 2)).std() == pytest.approx(1.0, abs=0.4)
