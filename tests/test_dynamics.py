"""The Gaussian ensemble: the loss by hand, a linear system recovered, elites, early stopping."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rl_shift.agent import Agent, Batch, Metrics
from rl_shift.buffer import Buffer
from rl_shift.dynamics import GaussianEnsemble, split_rows
from rl_shift.errors import UserError

OBS, ACTION = 3, 2


def transitions(rows: int, noise: float = 0.0, seed: int = 0) -> Batch:
    """s' = s + 0.1 A s + B a (+ noise), r = s_0 - a_1, on observations far from unit scale."""
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(rows, OBS, generator=g) * torch.tensor([1.0, 20.0, 0.1]) + 3.0
    action = torch.rand(rows, ACTION, generator=g) * 2 - 1
    scale = torch.tensor([0.5, 4.0, 0.02])
    change = scale * torch.stack([action[:, 0], action[:, 1], action.sum(-1)], -1)
    change = change + noise * scale * torch.randn(rows, OBS, generator=g)
    return {
        "obs": obs,
        "action": action,
        "next_obs": obs + change,
        "reward": obs[:, 0] - action[:, 1],
    }


class Learns(Agent):
    """The least agent that trains an ensemble."""

    @dataclass(frozen=True)
    class Config:
        members: int = 3

    def __init__(self, observation_space: Any, action_space: Any, config: Config) -> None:
        super().__init__(observation_space, action_space, config)
        self.dynamics = GaussianEnsemble(OBS, ACTION, (64, 64), config.members, 2)
        self.optimizer("dynamics", lr=1e-3)

    def update(self, batch: Batch) -> Metrics:
        return self.learn("dynamics", self.dynamics.loss, batch)


def trained(noise: float, updates: int = 400) -> Learns:
    torch.manual_seed(0)
    box = spaces.Box(-1.0, 1.0, (ACTION,), np.float32)
    agent = Learns(spaces.Box(-np.inf, np.inf, (OBS,), np.float32), box, Learns.Config())
    rows = transitions(4000, noise)
    agent.dynamics.fit(rows)
    for k in range(updates):
        at = torch.randint(4000, (3 * 64,), generator=torch.Generator().manual_seed(k))
        agent.update({key: value[at].unflatten(0, (3, 64)) for key, value in rows.items()})
    return agent


def test_the_loss_is_the_likelihood_by_hand() -> None:
    torch.manual_seed(0)
    model = GaussianEnsemble(OBS, ACTION, (8,), 2, 1)
    rows = transitions(16)
    model.fit(rows)
    loss, _ = model.loss(rows)
    target = torch.cat([rows["next_obs"] - rows["obs"], rows["reward"][:, None]], -1)
    prediction = model.predict(rows["obs"], rows["action"])
    assert prediction.reward is not None
    mean = torch.cat([prediction.next_obs - rows["obs"], prediction.reward[..., None]], -1)
    density = torch.distributions.Normal(mean, prediction.std).log_prob(target)
    # From log-densities in the data's units to (z^2 + log var) in standardised ones.
    constant = 0.5 * math.log(2 * math.pi) + model.target_std.log()
    expected = (-2 * (density + constant)).mean((1, 2)).sum()
    weights = [w.square().sum() for w in model.weights]
    expected = expected + 0.5 * (2.5e-5 * weights[0] + 5e-5 * weights[1])
    expected = expected + 0.01 * (0.5 + 10.0) * 4
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_a_linear_system_is_recovered_and_its_noise_measured() -> None:
    agent = trained(noise=0.1)
    test, model = transitions(500, seed=9), agent.dynamics
    scale = torch.tensor([0.5, 4.0, 0.02])
    error = (model.mean(test["obs"], test["action"]) - test["next_obs"]).abs() / scale
    assert error.mean() < 0.06  # the noise alone is 0.08
    std = model.predict(test["obs"], test["action"]).std[..., :OBS].mean((0, 1)) / scale
    assert ((std > 0.05) & (std < 0.2)).all(), std
    reward = model.sample(test["obs"], test["action"])[1]
    assert (reward - test["reward"]).abs().mean() < 0.3


def test_samples_come_from_elites_and_spread_like_their_std() -> None:
    torch.manual_seed(1)
    model = GaussianEnsemble(OBS, ACTION, (8,), members=4, elites=2)
    row = {key: value[:1].expand(4000, *value.shape[1:]) for key, value in transitions(1).items()}
    model.elites.copy_(torch.tensor([3, 1]))
    means, _, std = model.predict(row["obs"][:1], row["action"][:1])
    drawn, _, penalty = model.sample(row["obs"], row["action"])
    expected = means[[3, 1], 0].mean(0)
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0.0, atol=0.1)
    variance = (std[[3, 1], 0, :OBS].square() + (means[[3, 1], 0] - expected).square()).mean(0)
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.15, atol=0.0)
    torch.testing.assert_close(penalty[0], std[:, 0].norm(dim=-1).max())
    torch.testing.assert_close(model.mean(row["obs"], row["action"])[0], expected)


def test_elites_are_the_best_and_training_stops_without_progress() -> None:
    model = GaussianEnsemble(OBS, ACTION, (8,), members=3, elites=2)
    assert not model.converged(torch.tensor([3.0, 1.0, 2.0]), patience=2)
    assert model.elites.tolist() == [1, 2]
    assert not model.converged(torch.tensor([2.0, 1.0, 2.0]), patience=2)  # the first is better
    assert not model.converged(torch.tensor([1.99, 0.995, 2.0]), patience=2)  # less than 1 %
    assert model.converged(torch.tensor([2.5, 1.5, 2.5]), patience=2)
    model.fit(transitions(50))  # other data: their errors are another record
    assert not model.converged(torch.tensor([9.0, 9.0, 8.0]), patience=2)
    assert not model.converged(torch.tensor([8.0, 9.0, 8.0]), patience=2)
    assert model.best.tolist() == [8.0, 9.0, 8.0]


def test_members_start_different_and_the_mean_is_differentiable() -> None:
    model = GaussianEnsemble(OBS, ACTION, members=2, elites=1, reward=False)
    assert not torch.equal(model.weights[0][0], model.weights[0][1])
    rows = transitions(5)
    slope = torch.func.grad(lambda a: model.mean(rows["obs"], a).sum())(rows["action"])
    assert slope.shape == (5, ACTION) and slope.abs().sum() > 0
    assert model.sample(rows["obs"], rows["action"])[1].tolist() == [0.0] * 5


def test_constant_dimensions_are_harmless() -> None:
    rows = transitions(50)
    rows["obs"][:, 1], rows["next_obs"][:, 1], rows["reward"] = 7.0, 7.0, torch.zeros(50)
    model = GaussianEnsemble(OBS, ACTION, (8,), 2, 2)
    model.fit(rows)
    assert model.loss(rows)[0].isfinite()
    assert model.error(rows).isfinite().all()


def test_rows_are_split_once_and_for_all() -> None:
    def buffer(rows: int) -> Buffer:
        return Buffer.from_arrays({"reward": np.zeros(rows, np.float32)}, seeds=(5,))

    train, held = split_rows(buffer(50))
    assert len(held) == 10 and len(train) == 40
    assert torch.cat([train, held]).sort().values.tolist() == list(range(50))
    assert torch.equal(split_rows(buffer(50))[1], held)
    assert len(split_rows(buffer(9000))[1]) == 1000
    some: Tensor = torch.arange(0, 50, 2)
    assert all(bool((part % 2 == 0).all()) for part in split_rows(buffer(50), some))
    with pytest.raises(UserError, match="at least two"):
        split_rows(buffer(1))
    with pytest.raises(UserError, match="between 1 and 2"):
        GaussianEnsemble(OBS, ACTION, (8,), 2, 3)
