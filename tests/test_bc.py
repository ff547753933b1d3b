"""Behaviour cloning: its loss, and which episodes its best fraction is."""

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box

from rl_shift import agents
from rl_shift.buffer import Buffer

OBS, ACTION = Box(-np.inf, np.inf, (2,), np.float32), Box(-1.0, 1.0, (1,), np.float32)


def agent_of(**changes: Any) -> Any:
    kind = agents.get("bc")
    torch.manual_seed(3)
    return kind(OBS, ACTION, kind.Config(hidden=(4,), **changes))


def data() -> Buffer:
    """Ten episodes of three rows; episode k returns (7 k) mod 10, its rows show k as reward."""
    reward = np.repeat([(7 * k) % 10 / 3 for k in range(10)], 3).astype(np.float32)
    rng = np.random.default_rng(0)
    last = np.tile([False, False, True], 10)
    return Buffer.from_arrays(
        {
            "obs": rng.normal(size=(30, 2)).astype(np.float32),
            "action": rng.uniform(-1, 1, (30, 1)).astype(np.float32),
            "reward": reward,
            "next_obs": rng.normal(size=(30, 2)).astype(np.float32),
            "terminated": last,
            "truncated": np.zeros(30, dtype=bool),
        }
    )


def test_loss_is_a_mean_over_batch_and_dimensions() -> None:
    agent = agent_of()
    obs, action = torch.randn(5, 2), torch.rand(5, 1)
    expected = np.mean((agent.actor(obs).detach().numpy() - action.numpy()) ** 2)
    loss = agent.actor_loss({"obs": obs, "action": action})[0].item()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_the_best_fraction() -> None:
    buffer = data()
    best = [k for k in range(10) if (7 * k) % 10 >= 8]  # the two best of ten
    rows = agent_of(fraction=0.25).best_rows(buffer)  # floor(2.5) episodes
    assert sorted(rows.tolist()) == sorted(3 * k + i for k in best for i in range(3))
    assert len(agent_of(fraction=0.001).best_rows(buffer)) == 3  # at least one episode


def test_only_those_rows_are_sampled() -> None:
    agent, buffer = agent_of(fraction=0.1, batch_size=64), data()
    rewards = agent.sample(buffer)["reward"]
    assert rewards.unique().tolist() == [3.0]
    assert len(agent_of(batch_size=256).sample(buffer)["reward"].unique()) == 10
