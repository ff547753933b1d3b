"""Score models and corrections: analytic densities, invariants, a mixture that is learnt."""

import math

import pytest
import torch
from torch import Tensor

from rl_shift import seeding
from rl_shift.score import (
    Quantiles,
    ScoreNetwork,
    action_score_norm,
    correct_action,
    gate_strength,
    geometric_levels,
    nearest_level,
    state_displacement,
)


class Mixture:
    """Exact noise prediction of sum_k w_k N(mu_k, variance I), smoothed, in actions and states."""

    state_scale = 0.5

    def __init__(self, means: Tensor, variance: float, sigmas: tuple[float, ...]) -> None:
        self.means, self.variance, self.sigmas = means, variance, torch.tensor(sigmas)

    def __call__(self, obs: Tensor, action: Tensor, level: int) -> tuple[Tensor, Tensor]:
        def predicted(x: Tensor, sigma: Tensor) -> Tensor:
            total = self.variance + sigma**2
            apart = x[:, None] - self.means
            weight = (-apart.square().sum(-1) / (2 * total)).softmax(-1)
            return sigma * (weight[..., None] * apart).sum(1) / total

        sigma = self.sigmas[level]
        return predicted(obs, self.state_scale * sigma), predicted(action, sigma)


ONE = Mixture(torch.tensor([[0.2, -0.4]]), 0.01, (0.05, 0.1, 0.3))
TWO = Mixture(torch.tensor([[0.6, 0.6], [-0.6, -0.6]]), 0.01, (0.05, 0.1, 0.3))


def points(rows: int, seed: int = 0) -> Tensor:
    with seeding.forked(seed):
        return torch.rand(rows, 2) * 2 - 1


def test_levels_are_geometric_and_found_on_a_logarithmic_axis() -> None:
    sigmas = geometric_levels(0.02, 0.5, 10)
    assert sigmas[0] == 0.02 and sigmas[-1] == pytest.approx(0.5)
    assert {round(b / a, 9) for a, b in zip(sigmas, sigmas[1:], strict=False)} == {
        round(25 ** (1 / 9), 9)
    }
    assert [nearest_level(sigmas, s) for s in (0.001, 0.02, 0.2, 0.5, 9)] == [0, 0, 6, 9, 9]
    assert geometric_levels(0.02, 0.5, 1) == (0.5,)


def test_a_full_step_lands_on_the_posterior_mean() -> None:
    """Tweedie: K = 1, eta = 1 on a Gaussian."""
    obs, action = points(50), 0.5 * points(50, 1)
    for level, sigma in enumerate(ONE.sigmas.tolist()):
        share = ONE.variance / (ONE.variance + sigma**2)
        expected = ONE.means + share * (action - ONE.means)
        found = correct_action(ONE, obs, action, [level], 1.0)
        torch.testing.assert_close(found, expected)


def test_no_step_leaves_every_bit() -> None:
    action = torch.cat([points(50), torch.tensor([[1.0, -1.0], [0.0, -0.0]])])
    assert torch.equal(correct_action(TWO, points(52), action, [2, 1, 0], 0.0), action)
    assert torch.equal(correct_action(TWO, points(52), action, [], 1.0), action)


def test_a_mode_stays_and_what_lies_outside_moves_to_the_nearest() -> None:
    mode = ONE.means.clone()
    assert torch.equal(correct_action(ONE, mode, mode, [2, 1, 0], 0.5), mode)
    outside = torch.tensor([[0.9, 0.3], [-0.2, -0.9]])
    moved = correct_action(TWO, outside, outside, [1, 0], 0.5)
    nearest = TWO.means[(outside[:, None] - TWO.means).norm(dim=-1).argmin(-1)]
    assert ((moved - nearest).norm(dim=-1) < (outside - nearest).norm(dim=-1)).all()


@pytest.mark.parametrize("eta", [0.5, 1.0, 50.0])
def test_actions_stay_in_the_box_and_do_not_depend_on_the_batch(eta: float) -> None:
    far = Mixture(torch.tensor([[3.0, -3.0]]), 0.01, (0.05, 0.3, 0.5))
    action = torch.cat([points(20), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])])
    obs = points(22, 3)
    moved = correct_action(far, obs, action, [2, 1, 0], eta)
    assert (moved.abs() <= 1).all()
    one_by_one = [correct_action(far, obs[i : i + 1], action[i : i + 1], [2, 1, 0], eta)
                  for i in range(22)]  # fmt: skip
    assert torch.equal(moved, torch.cat(one_by_one))


def test_gate_spares_the_data_it_was_calibrated_on() -> None:
    data, quantiles = points(301), Quantiles(3)
    assert not quantiles.known
    quantiles.table.copy_(quantiles.of(TWO, data, data))
    assert quantiles.known
    for level in range(3):
        norms = action_score_norm(TWO, data, data, level)
        assert quantiles(level, 0.37).item() == pytest.approx(norms.quantile(0.37).item())
        for share, corrected in ((1.0, 0), (0.9, 30), (0.0, 300)):
            strength = gate_strength(norms, quantiles(level, share), "hard")
            assert strength.shape == (301, 1) and int(strength.sum()) == corrected
        soft = gate_strength(norms, quantiles(level, 0.5), "soft")
        assert int((soft == 1).sum()) == 151 and (soft > 0).all()
        assert (gate_strength(norms, quantiles(level, 0.5), "off") == 1).all()
    shut = correct_action(TWO, data, data, [2], 1.0, torch.zeros(301, 1))
    assert torch.equal(shut, data)


def test_state_displacement_is_a_bounded_step_along_the_score() -> None:
    obs = points(40)
    free = state_displacement(ONE, obs, obs, 2, 1.0, torch.tensor(9.0))
    sigma = 0.5 * 0.3
    torch.testing.assert_close(free, (ONE.means - obs) * sigma**2 / (ONE.variance + sigma**2))
    bound = state_displacement(ONE, obs, obs, 2, 1.0, torch.tensor(0.1))
    assert (bound.norm(dim=-1) <= 0.1 + 1e-6).all()
    torch.testing.assert_close(bound / bound.norm(dim=-1, keepdim=True),
                               free / free.norm(dim=-1, keepdim=True))  # fmt: skip
    assert not state_displacement(ONE, ONE.means, obs[:1], 2, 1.0, torch.tensor(0.1)).any()


@pytest.mark.parametrize("mode", ["joint", "conditional", "state"])
def test_a_mode_perturbs_and_predicts_its_own_part(mode: str) -> None:
    net = ScoreNetwork(3, 2, (8,), (0.1, 0.4), mode, 0.5)  # type: ignore[arg-type]
    obs, action = torch.randn(6, 3), torch.rand(6, 2)
    noise = torch.randn(6, 3), torch.randn(6, 2)
    level = torch.arange(6) % 2
    sigma = torch.tensor([0.1, 0.4])[level][:, None]
    shifted = obs + 0.5 * sigma * noise[0] * (mode != "conditional")
    by_hand = [net(shifted, action + sigma * noise[1], i) for i in (0, 1)]
    for part, (found, *known) in enumerate(
        zip(net(obs, action, level, noise), *by_hand, strict=True)
    ):
        modelled = mode == "joint" or mode == ("state", "conditional")[part]
        assert found.shape == (obs, action)[part].shape
        assert bool(found.any()) == modelled
        torch.testing.assert_close(found, torch.where((level == 0)[:, None], *known))


def test_a_learnt_mixture_points_as_the_analytic_one() -> None:
    """The second oracle of the specification: mean cosine above 0.95 after short training."""
    exact = Mixture(torch.tensor([[0.5, 0.5], [-0.5, 0.3], [0.1, -0.6]]), 0.01, (0.1, 0.2, 0.4))
    with seeding.forked(0):
        net = ScoreNetwork(1, 2, (64, 64), (0.1, 0.2, 0.4), "conditional")
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        obs = torch.zeros(512, 1)

        def draw(rows: int) -> Tensor:
            return exact.means[torch.randint(3, (rows,))] + 0.1 * torch.randn(rows, 2)

        for step in range(800):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * step / 800)) / 2
            optimizer.zero_grad()
            net.loss(obs, draw(512)).backward()
            optimizer.step()
        for level, sigma in enumerate((0.1, 0.2, 0.4)):
            x = draw(2000) + sigma * torch.randn(2000, 2)
            zero = torch.zeros(2000, 1)
            with torch.no_grad():
                found, truth = net(zero, x, level)[1], exact(zero, x, level)[1]
            cosine = torch.cosine_similarity(found, truth).mean()
            assert cosine > 0.95, (sigma, cosine)
