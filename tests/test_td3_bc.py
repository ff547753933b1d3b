"""TD3+BC against numbers worked out in NumPy."""

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import nn

from rl_shift import agents
from rl_shift.compile import Updater

OBS, ACTION = Box(-np.inf, np.inf, (2,), np.float32), Box(-1.0, 1.0, (2,), np.float32)


def agent_of(**changes: Any) -> Any:
    kind = agents.get("td3_bc")
    torch.manual_seed(3)
    return kind(OBS, ACTION, kind.Config(hidden=(4,), **changes))


def batch_of(rows: int = 5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "obs": torch.randn(rows, 2, generator=g),
        "action": torch.rand(rows, 2, generator=g) * 2 - 1,
        "reward": torch.randn(rows, generator=g),
        "next_obs": torch.randn(rows, 2, generator=g),
        "terminated": torch.tensor([False, True, False, False, True]),
    }


def mlp(net: nn.Module, x: np.ndarray) -> np.ndarray:
    layers = [(p.detach().numpy(), q.detach().numpy()) for p, q in _pairs(net)]
    for weight, bias in layers[:-1]:
        x = np.maximum(x @ weight.T + bias, 0)
    return x @ layers[-1][0].T + layers[-1][1]


def _pairs(net: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    flat = list(net.parameters())
    return list(zip(flat[::2], flat[1::2], strict=True))


def test_losses() -> None:
    agent, batch = agent_of(policy_noise=0.0), batch_of()
    arrays = {k: v.numpy() for k, v in batch.items()}

    def q(critic: Any, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        x = np.concatenate([obs, action], 1)
        return np.stack([mlp(member, x)[:, 0] for member in critic.members])

    next_action = np.tanh(mlp(agent.target_actor.net, arrays["next_obs"]))
    worst = q(agent.target_critic, arrays["next_obs"], next_action).min(0)
    target = arrays["reward"] + 0.99 * (1.0 - arrays["terminated"]) * worst
    errors = q(agent.critic, arrays["obs"], arrays["action"]) - target
    expected = (errors**2).mean(1).sum()  # the sum of both critics' mean squared errors
    np.testing.assert_allclose(agent.critic_loss(batch)[0].item(), expected, rtol=1e-5)

    action = np.tanh(mlp(agent.actor.net, arrays["obs"]))
    q1 = q(agent.critic, arrays["obs"], action)[0]
    cloning = ((action - arrays["action"]) ** 2).mean()  # over batch and action dimensions
    expected = -2.5 / np.abs(q1).mean() * q1.mean() + cloning
    np.testing.assert_allclose(agent.actor_loss(batch)[0].item(), expected, rtol=1e-5)


def test_target_noise_is_clipped() -> None:
    agent, batch = agent_of(policy_noise=1000.0, noise_clip=0.0), batch_of()
    quiet = agent_of(policy_noise=0.0)
    torch.testing.assert_close(agent.critic_loss(batch)[0], quiet.critic_loss(batch)[0])


def test_actor_and_targets_move_on_every_second_update_only() -> None:
    agent, batch = agent_of(), batch_of()
    updater = Updater(agent)
    for k in range(1, 5):
        before = {n: p.clone() for n, p in agent.named_parameters()}
        updater(batch)
        moved = {n for n, p in agent.named_parameters() if not torch.equal(p, before[n])}
        heads = {name.partition(".")[0] for name in moved}
        late = {"actor", "target_actor", "target_critic"}
        assert heads == ({"critic"} | late if k % 2 == 0 else {"critic"})


def test_targets_average() -> None:
    agent, batch = agent_of(policy_delay=1, tau=0.25), batch_of()
    before = agent.target_critic.members[0].layers[0].weight.clone()
    Updater(agent)(batch)
    source = agent.critic.members[0].layers[0].weight
    expected = 0.75 * before + 0.25 * source
    torch.testing.assert_close(agent.target_critic.members[0].layers[0].weight, expected)
