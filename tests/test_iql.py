"""IQL against numbers worked out by hand: losses, order of updates, schedule, dropout."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from rl_shift import agents
from rl_shift.compile import Updater
from rl_shift.config import Task

OBS, ACTION = Box(-np.inf, np.inf, (2,), np.float32), Box(-1.0, 1.0, (2,), np.float32)


def agent_of(**changes: Any) -> Any:
    kind = agents.get("iql")
    torch.manual_seed(3)
    return kind(OBS, ACTION, kind.Config(hidden=(4,), **changes))


def batch_of() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "obs": torch.randn(6, 2, generator=g),
        "action": torch.rand(6, 2, generator=g) * 2 - 1,
        "reward": torch.randn(6, generator=g),
        "next_obs": torch.randn(6, 2, generator=g),
        "terminated": torch.tensor([False, True, False, False, True, False]),
    }


def test_losses() -> None:
    agent, batch = agent_of(expectile=0.8, beta=2.0), batch_of()
    agent.actor.log_std.data[:] = torch.tensor([0.3, -0.4])
    with torch.no_grad():
        u = agent.target_critic(batch["obs"], batch["action"]).min(0).values
        u = (u - agent.value(batch["obs"])).numpy()
        next_value = agent.value(batch["next_obs"]).numpy()
        q = agent.critic(batch["obs"], batch["action"]).numpy()
        mean = agent.actor(batch["obs"]).numpy()
    batch["target_q"] = agent.run(agent.target_q, batch)
    expected = np.mean(np.abs(0.8 - (u < 0)) * u**2)
    np.testing.assert_allclose(agent.value_loss(batch)[0].item(), expected, rtol=1e-5)
    target = batch["reward"].numpy() + 0.99 * ~batch["terminated"].numpy() * next_value
    expected = np.mean((q - target) ** 2)  # the mean of both critics
    np.testing.assert_allclose(agent.critic_loss(batch)[0].item(), expected, rtol=1e-5)
    std = np.exp([0.3, -0.4])
    density = -0.5 * ((batch["action"].numpy() - mean) / std) ** 2
    log_prob = (density - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(1)
    expected = -np.mean(np.minimum(np.exp(2.0 * u), 100.0) * log_prob)
    np.testing.assert_allclose(agent.actor_loss(batch)[0].item(), expected, rtol=1e-5)


def test_weights_are_clamped() -> None:
    agent, batch = agent_of(beta=1e4, deterministic=True), batch_of()
    batch["target_q"] = agent.run(agent.target_q, batch)
    error = (agent.actor(batch["obs"]) - batch["action"]).square().sum(-1)
    weight = (agent.advantage(batch) > 0) * 100.0
    torch.testing.assert_close(agent.actor_loss(batch)[0], (weight * error).mean())


def test_log_std_is_clamped() -> None:
    agent, batch = agent_of(log_std_min=-5.0), batch_of()
    agent.actor.log_std.data[:] = -50.0
    low = agent.actor.log_prob(batch["obs"], batch["action"])
    agent.actor.log_std.data[:] = -5.0
    torch.testing.assert_close(low, agent.actor.log_prob(batch["obs"], batch["action"]))


@pytest.mark.parametrize("variant", ["corl", "official"])
def test_order_of_the_updates(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_of(variant=variant)
    order: list[str] = []
    learn = agent.learn
    monkeypatch.setattr(agent, "learn", lambda name, *a: order.append(name) or learn(name, *a))
    Updater(agent)(batch_of())
    first = ["value"] if variant == "official" else []
    assert order == [*first, "actor", "critic", *(["value"] if variant == "corl" else [])]


def test_only_the_actors_rate_decays_to_zero() -> None:
    agent = agent_of()

    class NoData:
        def __len__(self) -> int:
            return 0

    agent.begin_task(Task(name="t", dataset="d", updates=4), NoData())
    updater = Updater(agent)
    rates = []
    for _ in range(5):
        updater(batch_of())
        rates.append({n: float(o.param_groups[0]["lr"]) for n, o in agent.optimizers.items()})
    cosine = [0.5 * (1 + np.cos(np.pi * k / 4)) * 3e-4 for k in range(5)]
    np.testing.assert_allclose([r["actor"] for r in rates], cosine, atol=1e-10)
    assert {r["critic"] for r in rates} == {r["value"] for r in rates} == {rates[0]["value"]}


def test_dropout_is_for_the_actors_loss_alone() -> None:
    agent, batch = agent_of(dropout=0.5), batch_of()
    batch["target_q"] = agent.run(agent.target_q, batch)
    losses = {agent.actor_loss(batch)[0].item() for _ in range(4)}
    assert len(losses) > 1
    acts = [agent.act(batch["obs"], False) for _ in range(3)]
    assert torch.equal(acts[0], acts[1]) and torch.equal(acts[1], acts[2])
