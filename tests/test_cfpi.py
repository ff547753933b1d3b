"""Closed-form operators against their constraints, the quantile critic, and CFPI as a whole."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from rl_shift import agents, improvement, quantiles
from rl_shift.compile import Updater
from rl_shift.config import Task
from rl_shift.errors import UserError
from rl_shift.networks import TanhMixture

OBS, ACTION = Box(-np.inf, np.inf, (2,), np.float32), Box(-1.0, 1.0, (2,), np.float32)


def agent_of(**changes: Any) -> Any:
    kind = agents.get("cfpi")
    torch.manual_seed(3)
    return kind(OBS, ACTION, kind.Config(hidden=(8, 8), components=3, **changes))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(rows: int = 6, components: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, std = random(rows, components, 2), (0.3 * random(rows, components, 2, seed=1)).exp()
    weight = random(rows, components, seed=2).log_softmax(-1)
    return mean, std, weight, random(rows, components, 2, seed=3)


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, std).log_prob(x).sum(-1)


# ---- operators ---------------------------------------------------------------------------------


def test_single_gaussian_is_the_best_point_within_its_bound() -> None:
    mean, std, g = random(2), random(2, seed=1).exp(), random(2, seed=2)
    a = improvement.single_step(mean, std, g, 0.5)
    assert (0.5 * ((a - mean) / std).square().sum()).item() == pytest.approx(0.5, rel=1e-5)
    z = random(20_000, 2, seed=5)
    z = z / z.norm(dim=1, keepdim=True) * torch.rand(20_000, 1, dtype=z.dtype)  # |z|^2 / 2 <= 0.5
    assert ((mean + std * z) @ g).max() <= a @ g + 1e-6
    assert torch.equal(improvement.single_step(mean, std, g, 0.0), mean)
    assert torch.equal(improvement.single_step(mean, std, torch.zeros(2), 0.5), mean)


def test_one_component_or_two_equal_ones_are_the_single_gaussian() -> None:
    mean, std, _, g = mixture(components=1)
    single = improvement.single_step(mean[:, 0], std[:, 0], g[:, 0], 0.5)
    one = improvement.component_steps(mean, std, torch.zeros(6, 1), g, 0.5)
    torch.testing.assert_close(one[:, 0], single)
    twice = [x.expand(6, 2, 2) for x in (mean, std, g)]
    half = torch.full((6, 2), math.log(0.5))
    two = improvement.component_steps(twice[0], twice[1], half, twice[2], 0.5)
    torch.testing.assert_close(two, single[:, None].expand(6, 2, 2))
    centre, precision, cost = improvement.jensen_centre(mean, std, torch.zeros(6, 1))
    jensen, feasible = improvement.jensen_step(centre, precision, cost, g[:, 0], 0.5)
    assert feasible.all()
    torch.testing.assert_close(jensen, single, rtol=1e-4, atol=1e-5)


def test_every_candidate_with_a_budget_keeps_the_mixtures_density() -> None:
    mean, std, weight, g = mixture(200)
    peak = weight - (std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
    highest = peak.amax(-1, keepdim=True)
    for log_tau in (0.0, 0.5, 2.0):
        candidates = improvement.component_steps(mean, std, weight, g, log_tau)
        each = log_normal(candidates[:, :, None], mean[:, None], std[:, None])  # (B, N, K)
        density = (weight[:, None] + each).logsumexp(-1)
        free = log_tau + peak - highest > 0
        assert (density >= highest - log_tau - 1e-6)[free].all()
        moved = (candidates != mean).any(-1)
        assert torch.equal(moved, free)  # a negative radicand is the component's mean
    published = improvement.component_steps(mean, std, weight, g, 0.5, published_scale=True)
    each = log_normal(published[:, :, None], mean[:, None], std[:, None])
    assert ((weight[:, None] + each).logsumexp(-1) < highest - 0.5).any()  # it may violate it


def test_the_published_scale() -> None:
    mean, std, weight, g = mixture(1)
    m, s, w, d = (x[0].numpy() for x in (mean, std, weight, g))
    peak = w - np.log(s).sum(1) - math.log(2 * math.pi)
    kappa = np.sqrt(np.maximum(2 * (0.5 + peak - peak.max()), 0))[:, None]
    length = np.sqrt((s**2 * d**2).sum(0, keepdims=True))  # over components
    expected = m + math.sqrt(2) * kappa * s**2 * d / length
    found = improvement.component_steps(mean, std, weight, g, 0.5, published_scale=True)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5)


def test_jensen_lies_on_its_bound_and_wide_mixtures_are_infeasible() -> None:
    mean, std, weight, g = mixture()
    mean = 0.1 * mean
    centre, precision, cost = improvement.jensen_centre(mean, std, weight)
    a, feasible = improvement.jensen_step(centre, precision, cost, g[:, 0], 0.5)
    assert feasible.all()
    bound = (weight.exp()[..., None] * ((a[:, None] - mean) / std).square()).sum((1, 2))
    torch.testing.assert_close(bound, torch.full_like(bound, 1.0), rtol=1e-4, atol=1e-4)
    centre, precision, cost = improvement.jensen_centre(100 * mean, std, weight)
    a, feasible = improvement.jensen_step(centre, precision, cost, g[:, 0], 0.5)
    assert not feasible.any()
    assert torch.equal(a, centre)


def test_no_gradient_no_step_and_no_nan() -> None:
    mean, std, weight, _ = mixture()
    zero = torch.zeros_like(mean)
    for published in (False, True):
        assert torch.equal(
            improvement.component_steps(mean, std, weight, zero, 0.5, published), mean
        )
    centre, precision, cost = improvement.jensen_centre(0.1 * mean, std, weight)
    assert torch.equal(improvement.jensen_step(centre, precision, cost, zero[:, 0], 0.5)[0], centre)


def test_the_best_allowed_candidate() -> None:
    candidates = random(2, 3, 2)
    value = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 2.0]])
    allowed = torch.tensor([[True, False, True], [False, False, False]])
    found = improvement.best_of(candidates, value, allowed)
    assert torch.equal(found, torch.stack([candidates[0, 2], candidates[1, 0]]))


# ---- behaviour and critic ----------------------------------------------------------------------


def test_the_mixtures_density_integrates_to_one() -> None:
    torch.manual_seed(0)
    behaviour = TanhMixture(2, (8,), 1, 3)
    behaviour.net.layers[-1].bias.data[[2, 5, 8]] = -1.0  # log_std: hardly any mass at the edge
    u = torch.linspace(-5, 5, 20_001)[:, None]
    density = behaviour.log_prob(torch.ones(1, 2).expand(len(u), 2), torch.tanh(u)).exp()
    mass = torch.trapezoid(density * (1 - torch.tanh(u[:, 0]).square()), u[:, 0])
    assert mass.item() == pytest.approx(1.0, abs=1e-3)


def test_fractions_are_a_partition() -> None:
    torch.manual_seed(0)
    middle, width = quantiles.random_fractions(torch.empty(5, 8))
    torch.testing.assert_close(width.sum(-1), torch.ones(5))
    edges = torch.cat([torch.zeros(5, 1), width.cumsum(-1)], 1)
    torch.testing.assert_close(middle, (edges[:, 1:] + edges[:, :-1]) / 2)


def test_quantile_loss_by_hand_and_by_its_minimum() -> None:
    z, target = torch.tensor([[[0.0, 3.0]]]), torch.tensor([[[0.5, 1.0]]])
    fraction, weight = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.4, 0.6]])
    # |tau - 1(z > z')| times Huber, weighted over z', mean over tau
    first = 0.25 * (0.125 * 0.4 + 0.5 * 0.6)
    second = 0.25 * (2.0 * 0.4 + 1.5 * 0.6)
    loss = quantiles.quantile_loss(z, target, fraction, weight)
    assert loss.item() == pytest.approx((first + second) / 2)
    # of many samples, the minimum lies near the quantile
    samples = torch.linspace(0, 100, 401)[None, None]
    candidates = torch.linspace(0, 100, 201)
    even = torch.full((1, 401), 1 / 401)
    at = torch.stack(
        [quantiles.quantile_loss(c[None, None, None], samples, torch.tensor([[0.9]]), even)
         for c in candidates]
    )  # fmt: skip
    assert candidates[at.argmin()].item() == pytest.approx(90.0, abs=1.0)


def test_the_critic_multiplies_features_by_cosines_of_the_fraction() -> None:
    torch.manual_seed(0)
    critic = quantiles.QuantileCritic(2, 2, (4, 4), count=2, quantiles=3, embedding=5)
    obs, action, fraction = torch.randn(3, 2), torch.randn(3, 2), torch.rand(3, 2)
    z = critic.quantile(obs, action, fraction).detach().numpy()
    x = torch.cat([obs, action], 1).numpy()
    for i in range(2):

        def affine(layer: Any, x: np.ndarray, i: int = i) -> np.ndarray:
            return x @ layer.weight[i].detach().numpy() + layer.bias[i].detach().numpy()

        h = np.maximum(affine(critic.trunk.layers[0], x), 0)
        for q in range(2):
            waves = np.cos(np.pi * np.arange(1, 6) * fraction[:, q : q + 1].numpy())
            gate = 1 / (1 + np.exp(-affine(critic.fraction, waves)))
            merged = np.maximum(affine(critic.head.layers[0], gate * h), 0)
            value = affine(critic.head.layers[1], merged)[:, 0]
            np.testing.assert_allclose(z[i, :, q], value, rtol=1e-4, atol=1e-6)
    middles = torch.tensor([1 / 6, 0.5, 5 / 6]).expand(3, 3)
    torch.testing.assert_close(critic(obs, action), critic.quantile(obs, action, middles).mean(-1))


# ---- the agent ---------------------------------------------------------------------------------


def batch_of() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "obs": torch.randn(5, 2, generator=g),
        "action": torch.rand(5, 2, generator=g) * 2 - 1,
        "reward": torch.randn(5, generator=g),
        "next_obs": torch.randn(5, 2, generator=g),
        "next_action": torch.rand(5, 2, generator=g) * 2 - 1,
        "terminated": torch.tensor([False, True, False, False, True]),
    }


def test_conservative_value_is_the_mean_less_the_spread() -> None:
    agent, batch = agent_of(pessimism=0.7), batch_of()
    q = agent.critic(batch["obs"], batch["action"])
    expected = q.mean(0) - 0.7 * (q[0] - q[1]).abs() / math.sqrt(2)
    found = agent.conservative(agent.critic, batch["obs"], batch["action"][:, None])[:, 0]
    torch.testing.assert_close(found, expected)


def test_actions_improve_the_value_stay_inside_and_do_not_depend_on_the_batch() -> None:
    agent, obs = agent_of(log_tau=(0.1, 0.5)), torch.randn(64, 2)
    action = agent.act(obs, False)
    assert (action.abs() < 1).all()
    alone = torch.cat([agent.act(row[None], False) for row in obs])
    torch.testing.assert_close(action, alone, rtol=1e-4, atol=1e-5)

    def value(a: Tensor) -> Tensor:
        return agent.conservative(agent.critic, obs, a[:, None])[:, 0]

    log_weight, mean, _ = agent.behaviour(obs)
    heaviest = mean[torch.arange(64), log_weight.argmax(-1)]
    gain = value(action) - value(torch.tanh(heaviest))
    assert gain.mean() > 0 and (gain > 0).float().mean() > 0.9


def test_no_budget_gives_the_best_mean_and_light_components_are_left_out() -> None:
    agent = agent_of(log_tau=(0.0,), operator="components")
    obs = torch.randn(16, 2)
    _, mean, _ = agent.behaviour(obs)
    value = agent.conservative(agent.critic, obs, torch.tanh(mean))
    best = torch.tanh(mean[torch.arange(16), value.argmax(-1)])
    torch.testing.assert_close(agent.act(obs, False), best)
    last = agent.behaviour.net.layers[-1]
    last.bias.data[0] -= 20.0  # the first component's weight
    value = value.clone()
    value[:, 0] = -math.inf
    best = torch.tanh(mean[torch.arange(16), value.argmax(-1)])
    torch.testing.assert_close(agent.act(obs, False), best)


def test_gradients_are_those_through_the_tanh() -> None:
    agent, obs = agent_of(operator="jensen", log_tau=(50.0,)), torch.randn(4, 2)
    log_weight, mean, log_std = agent.behaviour(obs)
    centre, precision, cost = improvement.jensen_centre(mean, log_std.exp(), log_weight)
    step = 1e-2
    slope = []
    for d in range(2):
        shift = step * torch.eye(2)[d]
        high, low = (
            agent.conservative(agent.critic, obs, torch.tanh(centre + s)[:, None])[:, 0]
            for s in (shift, -shift)
        )
        slope.append((high - low) / (2 * step))
    expected, feasible = improvement.jensen_step(
        centre, precision, cost, torch.stack(slope, 1), 50.0
    )
    assert feasible.all()
    torch.testing.assert_close(agent.act(obs, False), torch.tanh(expected), rtol=0.02, atol=0.02)


def test_stages_and_what_each_learns() -> None:
    agent = agent_of(mode="multi", sarsa_updates=5, behaviour_updates=3)
    task = Task(name="t", dataset="d", updates=8)
    stages = [(s.name, s.updates, s.counted) for s in agent.stages(task)]
    assert stages == [("behaviour", 3, False), ("sarsa", 5, True), ("improvement", 3, True)]
    updater, batch = Updater(agent), batch_of()
    for stage, moves in (
        ("behaviour", {"behaviour"}),
        ("sarsa", {"critic", "target_critic"}),
        ("improvement", {"critic", "target_critic"}),
    ):
        agent.stage = stage
        before = {n: p.clone() for n, p in agent.named_parameters()}
        updater(batch)
        changed = {
            n.partition(".")[0] for n, p in agent.named_parameters() if (p != before[n]).any()
        }
        assert changed == moves
    zero = agent_of(behaviour_updates=3)
    assert [s.name for s in zero.stages(task)] == ["behaviour", "sarsa"]


def test_targets_own_network_in_sarsa_and_the_smaller_one_in_improvement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent, batch = agent_of(), batch_of()
    seen: list[Tensor] = []
    import rl_shift.agents.cfpi as module

    def spy(z: Tensor, target: Tensor, fraction: Tensor, weight: Tensor) -> Tensor:
        seen.append(target)
        return z.sum()

    monkeypatch.setattr(module, "quantile_loss", spy)
    for stage in ("sarsa", "improvement"):
        agent.stage = stage
        agent.critic_loss(batch)
    sarsa, improved = seen
    assert sarsa.shape[0] == 2 and improved.shape[0] == 1
    for target in seen:  # no bootstrap after a termination
        ends = target[:, batch["terminated"]]
        torch.testing.assert_close(
            ends, batch["reward"][batch["terminated"]][:, None].expand_as(ends)
        )
    assert all(not t.requires_grad or t.grad_fn is not None for t in seen)


def test_bad_settings_are_refused() -> None:
    for changes in ({"log_tau": ()}, {"log_tau": (-0.1,)}):
        with pytest.raises(UserError, match="log_tau"):
            agent_of(**changes)


def test_how_far_to_go_is_chosen_at_evaluation() -> None:
    """The operator works on finished networks; what was learnt with does not change."""
    kind = agents.get("cfpi")
    chosen = {f.name for f in dataclasses.fields(kind.Config) if f.metadata.get("evaluation")}
    assert chosen == {"log_tau", "operator", "pessimism"}
