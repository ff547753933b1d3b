"""Section `online` of the benchmark: PPO on JellyBean against a plain one-environment PPO.

`PlainPPO` is FROZEN like `bench_reference.py`: one environment, one observation at a time, default
Adam, `zero_grad` / `backward` / `step`, a Python loop for the advantages, `.item()` of every loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

from rl_shift import agents, envs
from rl_shift.benchmark import Candidate, Row, compare, largest_difference, pinned, warm_up
from rl_shift.buffer import Buffer, transition_spec
from rl_shift.collector import Collector
from rl_shift.compile import Updater
from rl_shift.config import Task

ENV = "rl_shift/JellyBean-v0"
ROLLOUT = 2048
FAST = {"batch_size": 256, "epochs": 4, "learning_rate": 1e-3}  # of the preset ppo.jellybean


class PlainNetworks(nn.Module):
    """Two convolutions, 128 features, policy and value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3, 2), nn.Conv2d(32, 64, 3, 2)
        self.features, self.policy, self.value = (nn.Linear(i, o) for i, o in SIZES)

    def forward(self, obs: Tensor) -> tuple[Categorical, Tensor]:
        """(B, 11, 11, 3) float -> distribution, value (B,)."""
        x = F.relu(self.conv2(F.relu(self.conv1(obs.permute(0, 3, 1, 2)))))
        x = F.relu(self.features(x.flatten(1)))
        return Categorical(logits=self.policy(x)), self.value(x).squeeze(-1)


SIZES = ((256, 128), (128, 3), (128, 1))


class PlainPPO:
    """PPO with the published settings on one environment."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.env, self.obs = env, env.reset(seed=0)[0]
        self.net = PlainNetworks()
        self.adam = torch.optim.Adam(self.net.parameters(), lr=3e-4, eps=1e-5)
        self.rng = np.random.default_rng(0)

    def collect(self) -> dict[str, Tensor]:
        """2048 steps, one at a time."""
        rows: dict[str, list[Any]] = {
            key: [] for key in ("obs", "action", "reward", "log_prob", "value", "ended")
        }
        for _ in range(ROLLOUT):
            with torch.no_grad():
                policy, value = self.net(torch.as_tensor(self.obs).float()[None])
                action = policy.sample()
                log_prob = policy.log_prob(action)
            following, reward, terminated, truncated, _ = self.env.step(action.item())
            found = (self.obs, action.item(), reward, log_prob.item(), value.item(), terminated)
            for key, x in zip(rows, found, strict=True):
                rows[key].append(x)
            self.obs = self.env.reset()[0] if terminated or truncated else following
        batch = {key: torch.as_tensor(np.array(x)) for key, x in rows.items()}
        batch["obs"] = batch["obs"].float()
        return {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}

    def advantages(self, batch: dict[str, Tensor], last: Tensor) -> Tensor:
        """Generalised advantages, step by step from the end."""
        found, following, next_value = [], 0.0, last.item()
        for t in reversed(range(len(batch["reward"]))):
            goes_on = 1.0 - float(batch["ended"][t])
            delta = batch["reward"][t].item() + 0.99 * goes_on * next_value
            following = delta - batch["value"][t].item() + 0.99 * 0.95 * goes_on * following
            next_value = batch["value"][t].item()
            found.append(following)
        return torch.tensor(found[::-1])

    def learn(self, rows: dict[str, Tensor]) -> float:
        """One minibatch."""
        policy, value = self.net(rows["obs"])
        advantage = rows["advantage"]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        ratio = (policy.log_prob(rows["action"]) - rows["log_prob"]).exp()
        clipped = ratio.clamp(0.8, 1.2)
        loss = -torch.min(ratio * advantage, clipped * advantage).mean()
        loss = loss + 0.5 * F.mse_loss(value, rows["return"])
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
        self.adam.step()
        return loss.item()

    def iteration(self) -> None:
        """One rollout, ten passes in minibatches of 64."""
        batch = self.collect()
        with torch.no_grad():
            last = self.net(torch.as_tensor(self.obs).float()[None])[1]
        batch["advantage"] = self.advantages(batch, last)
        batch["return"] = batch["advantage"] + batch["value"]
        for _ in range(10):
            order = torch.as_tensor(self.rng.permutation(ROLLOUT))
            for start in range(0, ROLLOUT, 64):
                self.learn({k: v[order[start : start + 64]] for k, v in batch.items()})


def ours(
    lanes: int, mode: Any = "off", rollout: int = ROLLOUT, **changes: Any
) -> tuple[Any, Callable[[], None]]:
    """The agent, and one iteration of it: a rollout over `lanes`, and its update."""
    vector = envs.make(ENV, lanes)
    spaces = vector.single_observation_space, vector.single_action_space
    kind = agents.get("ppo")
    agent = kind(*spaces, kind.Config(rollout=rollout, **changes))
    ring = Buffer(transition_spec(*spaces), agent.buffer_capacity, lanes)
    agent.begin_task(Task("bench", ENV, env_steps=rollout), ring)
    collector, updater = Collector(vector, ring, 0), Updater(agent, mode)

    def iteration() -> None:
        collector.collect(agent, agent.collect_every)
        updater(agent.sample(ring))

    return agent, iteration


def check() -> float:
    """Largest difference of the parameters after one minibatch of both, from equal ones."""
    agent, _ = ours(1)
    plain = PlainPPO(envs.make_env(ENV))
    networks = agent.actor_critic
    mine = [*networks.encoder.parameters(), *networks.head.parameters()]
    mine += list(networks.value.parameters())
    with torch.no_grad():
        for its, own in zip(plain.net.parameters(), mine, strict=True):
            its.copy_(own)
    g = torch.Generator().manual_seed(0)
    rows = {
        "obs": (torch.rand(64, 11, 11, 3, generator=g) > 0.8).float(),
        "action": torch.randint(3, (64,), generator=g),
        "log_prob": torch.full((64,), -1.1),
        "advantage": torch.randn(64, generator=g),
        "return": torch.randn(64, generator=g),
    }
    plain.learn(rows)
    agent.step(rows)
    return largest_difference(list(plain.net.parameters()), mine)


def online_section(
    *,
    rounds: int = 6,
    seconds: float = 1.0,
    cpu: int | None = None,
    modes: tuple[str, ...] = ("off",),
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Frames per second of collection and learning together."""
    difference = check()
    if difference > 1e-5:
        raise AssertionError(f"online: a minibatch differs from the reference's by {difference}")
    candidates = [
        Candidate("plain PPO, 1 env", PlainPPO(envs.make_env(ENV)).iteration, units=ROLLOUT)
    ]
    for mode in modes:
        for label, lanes, changes in (
            ("published settings, 1 lane", 1, {}),
            ("published settings, 16 lanes", 16, {}),
            ("preset ppo.jellybean, 16 lanes", 16, FAST),
        ):
            call = ours(lanes, mode, **changes)[1]  # type: ignore[arg-type]
            candidates.append(Candidate(f"{label}, compile {mode}", call, units=ROLLOUT))
    for candidate in candidates:
        warm_up(candidate, calls=1)
    with pinned(cpu):
        return compare(
            f"online {ENV}", candidates, rounds=rounds, seconds=seconds, unit="frames/s",
            progress=progress,
        )  # fmt: skip
