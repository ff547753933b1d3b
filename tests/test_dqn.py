"""DQN: targets of the three variants, prioritised draws, annealing, copies."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from rl_shift import agents, config, seeding
from rl_shift.buffer import Buffer, Mixture, transition_spec
from rl_shift.errors import UserError
from rl_shift.priorities import Priorities

OBS, ACTION = Box(-np.inf, np.inf, (2,), np.float32), Discrete(3)


def agent_of(**changes: Any) -> Any:
    kind = agents.get("dqn")
    torch.manual_seed(3)
    agent = kind(OBS, ACTION, kind.Config(**{"hidden": (8,), "batch_size": 4, **changes}))
    with torch.no_grad():
        for p in agent.target_q.parameters():  # so that both networks choose differently
            p.add_(torch.randn_like(p))
    return agent


def batch_of(rows: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "obs": torch.randn(rows, 2, generator=g),
        "action": torch.randint(3, (rows,), generator=g),
        "reward": torch.randn(rows, generator=g),
        "next_obs": torch.randn(rows, 2, generator=g),
        "terminated": torch.arange(rows) % 3 == 0,
        "truncated": torch.arange(rows) % 3 == 1,
    }


def ring(rows: int = 0, capacity: int = 32, lanes: int = 1) -> Buffer:
    buffer = Buffer(transition_spec(OBS, ACTION), capacity, lanes)
    if rows:
        buffer.extend(batch_of(rows) | {"task": torch.zeros(rows, dtype=torch.int64)})
    return buffer


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_every": 0}, "DQN: target_every must be at least 1, not 0"),
        ({"updates_per_collect": 0}, "updates_per_collect must be at least 1"),
        ({"epsilon_end": 1.5}, "epsilon_end must lie between 0 and 1"),
        ({"discount": -0.1}, "discount must lie between 0 and 1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        agent_of(**changes)


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "value"),
    [
        ({}, lambda target, online: target.max(-1).values),
        ({"double": True}, lambda target, online: target[torch.arange(6), online.argmax(-1)]),
        ({"temperature": 0.3}, lambda target, online: 0.3 * (target / 0.3).exp().sum(-1).log()),
    ],
)
def test_the_target(variant: dict[str, Any], value: Any) -> None:
    agent, batch = agent_of(**variant), batch_of()
    _, metrics = agent.loss(batch)
    target, online = agent.target_q(batch["next_obs"]), agent.q(batch["next_obs"])
    # a truncated row bootstraps, a terminated one does not
    y = batch["reward"] + 0.99 * (1 - batch["terminated"].float()) * value(target, online)
    q = agent.q(batch["obs"])[torch.arange(6), batch["action"]]
    torch.testing.assert_close(metrics["q/error"], (q - y).abs())


@torch.no_grad()
def test_the_loss_is_hubers_and_weighted() -> None:
    agent, batch = agent_of(), batch_of()
    loss, metrics = agent.loss(batch)
    e = metrics["q/error"]
    huber = torch.where(e < 1, 0.5 * e * e, e - 0.5)
    torch.testing.assert_close(loss, huber.mean())
    weight = torch.arange(6.0)
    torch.testing.assert_close(agent.loss(batch | {"weight": weight})[0], (weight * huber).mean())


def test_the_target_is_copied_now_and_then() -> None:
    agent = agent_of(target_every=3)
    first = next(agent.target_q.parameters()).clone()
    for k in range(1, 7):
        agent.update(batch_of())
        agent.advance()
        target, own = next(agent.target_q.parameters()), next(agent.q.parameters())
        assert torch.equal(target, own) == (k % 3 == 0)
        if k < 3:
            assert torch.equal(target, first)


def begin(agent: Any, env_steps: int, lanes: int = 1) -> None:
    spaces = {"observation_space": OBS, "action_space": ACTION}
    task = config.Task("toy", "toy", env_steps=env_steps, **spaces)
    agent.begin_task(task, ring(lanes=lanes))


def test_epsilon_falls_over_the_first_tenth() -> None:
    agent = agent_of(warmup_steps=0, collect_every=2)
    begin(agent, 1000, lanes=2)  # four steps per update
    seen = {}
    for agent.updates in (0, 10, 25, 100):
        seen[agent.env_steps] = agent.epsilon
    assert seen == pytest.approx({0: 1.0, 40: 0.62, 100: 0.05, 400: 0.05})
    agent.explore_again()
    assert agent.epsilon == 1.0
    agent.updates += 25
    assert agent.epsilon == pytest.approx(0.05)


def test_epsilon_can_begin_anew_every_period() -> None:
    agent = agent_of(warmup_steps=0, collect_every=1, epsilon_period=100)
    begin(agent, 1000)
    values = []
    for agent.updates in (0, 5, 10, 99, 100, 105, 110):
        values.append(agent.epsilon)
    assert values == pytest.approx([1.0, 0.525, 0.05, 0.05, 1.0, 0.525, 0.05])


def test_exploration_is_as_likely_as_epsilon_says() -> None:
    agent, obs = agent_of(warmup_steps=0), torch.zeros(20_000, 2)
    begin(agent, 10**9)
    greedy = agent.run(agent.act, obs, False)
    with seeding.forked(0):
        first = agent.run(agent.act, obs, True).bincount(minlength=3) / 20_000
    assert (first - 1 / 3).abs().max() < 0.02  # epsilon is 1
    agent.updates = 10**9
    with seeding.forked(0):
        share = (agent.run(agent.act, obs, True) == greedy).double().mean()
    assert float(share) == pytest.approx(1 - 0.05 * 2 / 3, abs=0.01)


def test_soft_q_learning_explores_by_its_values() -> None:
    agent, obs = agent_of(temperature=0.5), torch.zeros(20_000, 2)
    with seeding.forked(0):
        share = agent.run(agent.act, obs, True).bincount(minlength=3) / 20_000
        expected = (agent.run(agent.q, obs[:1])[0] / 0.5).softmax(-1)
    torch.testing.assert_close(share, expected, rtol=0, atol=0.015)


# ---- prioritised replay ----------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 2, 10, 17, 1000])
def test_rows_are_drawn_in_proportion_to_their_priorities(capacity: int) -> None:
    priorities, weight = Priorities(capacity), (torch.arange(capacity) % 3).double() + 1
    weight[capacity // 2] = 0 if capacity > 1 else 1
    priorities.set(torch.arange(capacity), weight)
    with seeding.forked(0):
        index, probability = priorities.draw(50_000)
    torch.testing.assert_close(probability, weight[index] / weight.sum())
    share = index.bincount(minlength=capacity) / 50_000
    torch.testing.assert_close(share.double(), weight / weight.sum(), rtol=0, atol=0.01)
    assert capacity == 1 or capacity // 2 not in index
    again = Priorities.restored(priorities.state())
    with seeding.forked(0):
        assert torch.equal(again.draw(50_000)[0], index)


def test_new_rows_come_first_and_updates_set_priorities() -> None:
    agent, buffer = agent_of(prioritized=True), ring(8)
    batch: dict[str, Tensor] = {}
    for _ in range(12):
        batch = agent.sample(buffer)
        agent.update(batch)
        agent.advance()
    assert agent.priorities is not None
    rows = agent.priorities.rows.flatten()
    error = agent.loss(batch_of(8))[1]["q/error"].detach()
    assert set(batch["index"].tolist()) <= set(range(8))
    assert rows[8:].eq(0).all() and rows[:8].gt(0).all()
    assert float(rows[:8].min()) < 1 or float(error.min()) > 1
    buffer.extend(batch_of(2) | {"task": torch.zeros(2, dtype=torch.int64)})
    agent.sample(buffer)
    rows = agent.priorities.rows.flatten()
    assert rows[8:10].eq(agent.priorities.largest).all() and agent.ranked == 10


def test_importance_weights_undo_the_priorities() -> None:
    agent, buffer = agent_of(prioritized=True, importance_exponent=1.0, batch_size=8), ring(8)
    agent.sample(buffer)
    assert agent.priorities is not None
    agent.priorities.set(torch.arange(8), torch.arange(1.0, 9.0))
    batch = agent.sample(buffer)
    product = batch["weight"] * (batch["index"] + 1)
    torch.testing.assert_close(product, product[:1].expand(8))
    assert float(batch["weight"].max()) == 1


def test_prioritised_replay_reads_one_buffer() -> None:
    agent = agent_of(prioritized=True)
    with pytest.raises(UserError, match="prioritised replay reads one buffer"):
        agent.sample(Mixture([(ring(8), 0.5), (ring(8), 0.5)]))


def test_newest_rows_of_a_ring() -> None:
    buffer = ring(capacity=8, lanes=2)
    zeros = {"task": torch.zeros(2, dtype=torch.int64)}
    for k in range(5):
        buffer.extend(batch_of(2) | zeros | {"reward": torch.tensor([k, k + 0.5])})
    assert buffer.appended == 10
    assert buffer.take(buffer.newest(4))["reward"].tolist() == [3, 3.5, 4, 4.5]
    assert len(buffer.newest(100)) == 8
    again = ring(capacity=8, lanes=2)
    again.load_state(buffer.state())
    assert again.appended == 10 and torch.equal(again.newest(3), buffer.newest(3))


@pytest.mark.parametrize("variant", [{}, {"double": True}, {"temperature": 0.5}])
def test_the_values_of_a_small_world_are_found(variant: dict[str, Any]) -> None:
    """A random deterministic world of two states: Q-values against value iteration."""
    g = torch.Generator().manual_seed(4)
    following = torch.randint(2, (2, 3), generator=g)
    reward = torch.randn(2, 3, generator=g)
    ends = torch.tensor([[False, False, True], [False, False, False]])
    expected, temperature = torch.zeros(2, 3), variant.get("temperature", 0.0)
    for _ in range(200):
        if temperature:
            value = temperature * (expected / temperature).logsumexp(-1)
        else:
            value = expected.max(-1).values
        expected = reward + 0.8 * (1 - ends.float()) * value[following]
    state, action = (
        x.flatten() for x in torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
    )
    batch = {
        "obs": torch.eye(2)[state],
        "action": action,
        "reward": reward.flatten(),
        "next_obs": torch.eye(2)[following.flatten()],
        "terminated": ends.flatten(),
    }
    agent = agent_of(hidden=(32,), learning_rate=3e-3, discount=0.8, target_every=20, **variant)
    for _ in range(600):
        agent.update(batch)
        agent.advance()
    found = agent.run(agent.q, torch.eye(2))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
