"""A critic whose values the data's rewards cannot add up to is reported, once."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from rl_shift import agents, config, runs
from rl_shift.agent import Agent
from rl_shift.buffer import Buffer
from rl_shift.trainer import Trainer
from rl_shift.value_check import GLANCE, METRIC, ValueCheck

OBS, ACTION = Box(-np.inf, np.inf, (2,), np.float32), Box(-1.0, 1.0, (2,), np.float32)


def agent_of(name: str, **changes: Any) -> Agent:
    kind = agents.get(name)
    return kind(OBS, ACTION, kind.Config(**changes))


def buffer_of(reward: np.ndarray) -> Buffer:
    rows = len(reward)
    arrays = {key: np.zeros((rows, 2), np.float32) for key in ("obs", "action", "next_obs")}
    ends = {key: np.zeros(rows, bool) for key in ("terminated", "truncated")}
    task = np.zeros(rows, np.int64)
    return Buffer.from_arrays({**arrays, **ends, "reward": reward, "task": task})


def metrics(*q: float) -> dict[str, torch.Tensor]:
    return {METRIC: torch.tensor(q)}


def test_one_warning_beyond_ten_times_what_rewards_are_worth(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check = ValueCheck(agent_of("td3_bc", discount=0.9), buffer_of(np.linspace(-2, 1, 50)))
    for q in (metrics(199.0), metrics(-1e9), metrics(10.0, 199.0), {}):
        check(q, 1000)
    assert not caplog.records  # rewards of size 2 are worth 20
    check(metrics(10.0, 201.0), 3000)  # one of two seeds
    check(metrics(1e9), 4000)
    (record,) = caplog.records
    assert "critic/q is 201 after 3000 updates" in record.getMessage()
    assert "worth at most 20 at discount 0.9" in record.getMessage()


def test_a_reward_that_is_rare_counts(caplog: pytest.LogCaptureFixture) -> None:
    reward = np.zeros(2 * GLANCE)
    reward[1] = 1.0  # not among every second row
    check = ValueCheck(agent_of("td3_bc"), buffer_of(reward))
    check(metrics(999.0), 1)
    assert not caplog.records
    check(metrics(1001.0), 2)
    assert len(caplog.records) == 1


def test_the_discount_is_that_of_the_agent_within(caplog: pytest.LogCaptureFixture) -> None:
    buffer = buffer_of(np.ones(10))
    small = {"base": "td3_bc", "network": "mlp", "window": 2, "width": 8, "depth": 1}
    around = agent_of("pgd", **small, base_config={"discount": 0.9})
    for agent in (agent_of("bc"), agent_of("td3_bc", discount=1.0), around):
        ValueCheck(agent, buffer)(metrics(101.0), 1)
    (record,) = caplog.records
    assert "discount 0.9" in record.getMessage()


def test_training_reports_it(pendulum_sets: list[str], caplog: pytest.LogCaptureFixture) -> None:
    values = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 4, "log_every": 2}
    run = config.make("td3_bc", overrides=values | {"eval_episodes": 1})
    tasks = runs.resolve(run)
    agent: Any = runs.make_agent(run, tasks)
    with torch.no_grad():
        for member in agent.critic.members:
            member.layers[-1].bias += 1e6
    Trainer(agent, tasks, run).run()
    assert [r.name for r in caplog.records] == ["rl_shift.value_check"]
