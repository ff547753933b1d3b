"""SAC: the density of the squashed policy, entropy in the backup, the temperature's direction."""

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box

from rl_shift import agents

OBS, ACTION = Box(-np.inf, np.inf, (2,), np.float32), Box(-1.0, 1.0, (2,), np.float32)


def agent_of(**changes: Any) -> Any:
    kind = agents.get("sac")
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


def test_log_density_of_the_squashed_action() -> None:
    actor = agent_of().actor.double()
    obs = torch.randn(50, 2, dtype=torch.float64)
    action, log_prob = actor.sample(obs)
    mean, log_std = (x.detach().numpy() for x in actor.net(obs).chunk(2, -1))
    u = np.arctanh(action.detach().numpy())
    normal = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    expected = (normal - np.log1p(-(action.detach().numpy() ** 2))).sum(1)
    np.testing.assert_allclose(log_prob.detach().numpy(), expected, rtol=1e-7)


def test_the_backup_holds_the_entropy() -> None:
    agent, batch = agent_of(), batch_of()
    agent.log_alpha.value.data.fill_(np.log(0.7))
    torch.manual_seed(9)
    loss = agent.critic_loss(batch)[0]
    torch.manual_seed(9)
    with torch.no_grad():
        action, log_prob = agent.actor.sample(batch["next_obs"])
        soft = agent.target_critic(batch["next_obs"], action).min(0).values - 0.7 * log_prob
        target = batch["reward"] + 0.99 * ~batch["terminated"] * soft
        errors = agent.critic(batch["obs"], batch["action"]) - target
    torch.testing.assert_close(loss, errors.square().mean(1).sum())


def test_the_temperature_rises_where_the_entropy_is_too_low() -> None:
    batch = batch_of()
    for target, rises in ((50.0, True), (-50.0, False)):
        agent = agent_of(target_entropy=target)
        agent.learn("log_alpha", agent.alpha_loss, batch)
        assert (float(agent.log_alpha().detach()) > 0) == rises
    assert agent_of().target_entropy == -2.0


def test_acting() -> None:
    agent, obs = agent_of(), torch.randn(20, 2)
    assert torch.equal(agent.act(obs, False), agent.act(obs, False))
    assert not torch.equal(agent.act(obs, True), agent.act(obs, True))
