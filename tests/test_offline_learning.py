"""Every offline agent beats behaviour cloning on one-step data of mixed quality."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from rl_shift import agents, seeding
from rl_shift.buffer import Buffer
from rl_shift.compile import Updater
from rl_shift.config import Task

OBS, ACTION = Box(-np.inf, np.inf, (2,), np.float32), Box(-1.0, 1.0, (2,), np.float32)
ROWS = 4_000


def best(obs: Any) -> Any:
    """The action worth 0; any other is worth minus its squared distance from it."""
    return 0.6 * obs.clip(-1, 1)


def arrays_of() -> dict[str, np.ndarray]:
    """Three rows in five by a good policy, two by one that does the opposite; one-step episodes."""
    rng = seeding.numpy_generator(0, "mixed")
    obs = rng.uniform(-1, 1, (ROWS, 2)).astype(np.float32)
    good = rng.random((ROWS, 1)) < 0.6
    action = np.where(good, best(obs), -best(obs)) + 0.1 * rng.normal(size=(ROWS, 2))
    action = action.clip(-1, 1).astype(np.float32)
    return {
        "obs": obs,
        "action": action,
        "reward": -((action - best(obs)) ** 2).sum(1).astype(np.float32),
        "next_obs": obs,
        "next_action": action,
        "terminated": np.ones(ROWS, bool),
        "truncated": np.zeros(ROWS, bool),
        "task": np.zeros(ROWS, np.int64),
    }


def regret(name: str, **settings: Any) -> float:
    """Mean squared distance from the best action after 300 updates of every stage."""
    kind = agents.get(name)
    with seeding.forked(0):
        agent = kind(OBS, ACTION, kind.Config(batch_size=128, hidden=(32, 32), **settings))
        buffer = Buffer.from_arrays(arrays_of(), seeds=(0,))
        task = Task(name="t", dataset="t", updates=300, data=SimpleNamespace())
        agent.begin_task(task, buffer)
        updater = Updater(agent)
        for stage in agent.stages(task):
            agent.enter(stage.name)
            for _ in range(300):
                updater(agent.sample(buffer))
        obs = torch.rand(500, 2) * 2 - 1
        action: Tensor = agent.run(agent.act, obs, False)
        return (action - best(obs)).square().sum(-1).mean().item()


@pytest.fixture(scope="module")
def cloning() -> float:
    return regret("bc", learning_rate=3e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("td3_bc", {"learning_rate": 3e-3}),
        ("iql", {"learning_rate": 3e-3, "beta": 10.0}),
        ("rebrac", {"actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3}),
        ("awac", {"learning_rate": 3e-3, "temperature": 0.1}),
        ("cql", {"actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3, "cql_alpha": 0.1}),
        ("sac_n", {"learning_rate": 3e-3, "critics": 3}),
        ("sac_n", {"learning_rate": 3e-3, "critics": 3, "eta": 0.1}),
        ("cfpi", {"learning_rate": 3e-3, "behaviour_learning_rate": 3e-3, "components": 2}),
    ],
)
def test_better_than_behaviour_cloning(name: str, settings: dict[str, Any], cloning: float) -> None:
    found = regret(name, **settings)
    assert found < 0.6 * cloning, (found, cloning)
