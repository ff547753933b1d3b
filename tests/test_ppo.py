"""PPO: advantages across ends, the clipped surrogate, the likelihood of clipped actions."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from rl_shift import agents, cli, config, envs, evaluation, seeding
from rl_shift.errors import UserError
from rl_shift.online_networks import ActorCritic, Categorical, ClippedGaussian, Pixels
from rl_shift.rollouts import minibatches
from rl_shift.running import RunningStatistics
from rl_shift.trainer import Trainer

VECTOR = Box(-np.inf, np.inf, (3,), np.float32)
IMAGE = Box(0, 1, (11, 11, 3), np.uint8)


def agent_of(actions: Any = None, **changes: Any) -> Any:
    kind = agents.get("ppo")
    torch.manual_seed(3)
    space = actions if actions is not None else Discrete(3)
    return kind(VECTOR, space, kind.Config(hidden=(8,), **changes))


def rollout(lanes: int, length: int, space: Any = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    obs = torch.randn(lanes, length + 1, 3, generator=g)
    if isinstance(space, Box):
        action = (2 * torch.randn(lanes, length, *space.shape, generator=g)).clamp(-1, 1)
    else:
        action = torch.randint(3, (lanes, length), generator=g)
    return {
        "obs": obs[:, :-1],
        "action": action,
        "reward": torch.randn(lanes, length, generator=g),
        "next_obs": obs[:, 1:],
        "terminated": torch.rand(lanes, length, generator=g) < 0.1,
        "truncated": torch.rand(lanes, length, generator=g) < 0.1,
    }


def plain_advantages(batch: dict[str, Tensor], agent: Any) -> Tensor:
    """The recursion as it is written in the paper, step by step from the end."""
    c = agent.config
    lanes, length = batch["reward"].shape
    out = torch.zeros(lanes, length)
    for lane in range(lanes):
        following = 0.0
        for t in reversed(range(length)):
            value = float(agent.actor_critic(batch["obs"][lane, t][None])[1])
            next_value = float(agent.actor_critic(batch["next_obs"][lane, t][None])[1])
            next_value *= 1 - float(batch["terminated"][lane, t])
            delta = float(batch["reward"][lane, t]) + c.discount * next_value - value
            goes_on = 1 - float(batch["terminated"][lane, t] | batch["truncated"][lane, t])
            following = delta + c.discount * c.gae_lambda * goes_on * following
            out[lane, t] = following
    return out


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 64])
def test_advantages_are_the_papers_recursion(length: int) -> None:
    agent, batch = agent_of(), rollout(2, length)
    rows = agent.targets(batch)
    expected = plain_advantages(batch, agent).flatten()
    torch.testing.assert_close(rows["advantage"], expected, rtol=1e-4, atol=1e-5)
    value = agent.actor_critic(rows["obs"])[1]
    torch.testing.assert_close(rows["return"], rows["advantage"] + value)


@torch.no_grad()
def test_a_truncation_bootstraps_and_a_termination_does_not() -> None:
    agent, batch = agent_of(gae_lambda=0.0), rollout(1, 8)
    batch["terminated"][:] = batch["truncated"][:] = False
    unbroken = agent.targets(batch)["advantage"]
    batch["truncated"][0, 3] = True
    torch.testing.assert_close(agent.targets(batch)["advantage"], unbroken)
    batch["terminated"][0, 3] = True
    ended = agent.targets(batch)["advantage"]
    value = agent.actor_critic(batch["next_obs"][0, 3][None])[1]
    torch.testing.assert_close(unbroken[3] - ended[3], 0.99 * value[0])


@torch.no_grad()
def test_the_old_likelihood_is_that_of_the_policy_that_acted() -> None:
    for space in (Discrete(3), Box(-1.0, 1.0, (2,), np.float32)):
        agent, batch = agent_of(space), rollout(2, 16, space)
        rows = agent.run(agent.targets, batch)
        _, metrics = agent.loss(rows)
        assert float(metrics["policy/kl"]) == pytest.approx(0, abs=1e-6)
        assert float(metrics["policy/clipped"]) == 0


@torch.no_grad()
def test_the_surrogate_is_clipped_on_one_side() -> None:
    agent, batch = agent_of(), agent_of().targets(rollout(1, 32))
    batch = {k: v.detach() for k, v in batch.items()}
    batch["log_prob"] = batch["log_prob"] - math.log(1.5)  # every ratio is 1.5
    a = batch["advantage"]
    a = (a - a.mean()) / (a.std() + 1e-8)
    expected = torch.minimum(1.5 * a, 1.2 * a).mean()
    loss, metrics = agent.loss(batch)
    torch.testing.assert_close(metrics["policy/loss"], -expected)
    assert float(metrics["policy/clipped"]) == 1
    torch.testing.assert_close(loss, -expected + 0.5 * metrics["value/loss"])


def test_every_row_is_used_once_per_epoch() -> None:
    rows = {"advantage": torch.arange(32.0)}
    pieces = torch.cat([b["advantage"] for b in minibatches(rows, 8)])
    assert not torch.equal(pieces, rows["advantage"])
    assert torch.equal(pieces.sort().values, rows["advantage"])


def test_minibatches_have_one_shape_and_every_pass_leaves_out_other_rows() -> None:
    rows = {"advantage": torch.arange(100.0)}
    passes = [list(minibatches(rows, 64)) for _ in range(20)]
    assert [[len(b["advantage"]) for b in one] for one in passes] == [[64]] * 20
    used = torch.cat([b["advantage"] for one in passes for b in one])
    assert len(used.unique()) == 100
    assert [len(b["advantage"]) for b in minibatches(rows, 128)] == [100]


def test_observations_are_normalised_by_what_was_collected() -> None:
    agent, batch = agent_of(normalize=True, rollout=32), rollout(2, 16)
    batch["obs"] = 5 + 3 * batch["obs"]
    agent.update(batch)
    rows = batch["obs"].flatten(0, 1)
    torch.testing.assert_close(agent.normalizer.mean, rows.mean(0))
    torch.testing.assert_close(agent.normalizer.std, rows.std(0, correction=0) + 1e-4)
    far = torch.full((1, 3), 1e6)
    assert torch.equal(agent.normalized(far), torch.full((1, 3), 5.0))


def test_running_statistics_are_those_of_everything_seen() -> None:
    statistics, g = RunningStatistics((2,)), torch.Generator().manual_seed(0)
    rows = 100 + torch.randn(50, 2, generator=g) * torch.tensor([1.0, 7.0])
    for part in rows.split([1, 20, 29]):
        statistics.update(part)
    torch.testing.assert_close(statistics.mean, rows.mean(0))
    torch.testing.assert_close(statistics.std, rows.std(0, correction=0), rtol=1e-4, atol=1e-4)


# ---- heads ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_categorical_against_its_definition() -> None:
    head, logits = Categorical(4, 3), torch.tensor([[0.0, 1.0, -2.0]])
    p = logits.softmax(-1)
    for k in range(3):
        torch.testing.assert_close(head.log_prob(logits, torch.tensor([k])).exp(), p[:, k])
    torch.testing.assert_close(head.entropy(logits), -(p * p.log()).sum(-1))
    with seeding.forked(1):
        drawn = head.sample(logits.expand(20_000, 3)).bincount(minlength=3) / 20_000
    torch.testing.assert_close(drawn, p[0], rtol=0, atol=0.015)


@torch.no_grad()
def test_the_clipped_gaussian_is_a_distribution() -> None:
    """Density inside the box plus the mass at both bounds is one; draws agree with both."""
    head = ClippedGaussian(1, 1).double()
    head.log_std.data.fill_(math.log(0.8))
    mean = torch.tensor([0.5], dtype=torch.float64)
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1, None]
    inside = float(head.log_prob(mean, grid).exp().sum() * (2 / 20_000))
    low, high = (float(head.log_prob(mean, torch.tensor([x])).exp()) for x in (-1.0, 1.0))
    assert inside + low + high == pytest.approx(1, abs=1e-3)
    with seeding.forked(2):
        drawn = head.sample(mean.expand(20_000, 1))
    assert float((drawn == 1).double().mean()) == pytest.approx(high, abs=0.02)
    assert float((drawn == -1).double().mean()) == pytest.approx(low, abs=0.02)


@torch.no_grad()
def test_pixels_have_the_published_sizes() -> None:
    assert Pixels((11, 11, 3)).width == 256
    agent = ActorCritic(IMAGE, Discrete(3), (64,), 128)
    output, value = agent(torch.zeros(5, 11, 11, 3))
    assert output.shape == (5, 3) and value.shape == (5,)
    weight = agent.head.linear.weight
    torch.testing.assert_close(weight @ weight.T, 1e-4 * torch.eye(3), rtol=1e-3, atol=1e-8)


@torch.no_grad()
def test_pictures_of_zeros_and_ones_are_not_divided() -> None:
    kind = agents.get("ppo")
    agent = kind(IMAGE, Discrete(3), kind.Config())
    assert float(agent.normalized(torch.ones(1, 11, 11, 3, dtype=torch.uint8)).max()) == 1.0


# ---- learning ------------------------------------------------------------------------------------


def trained(name: str, lanes: int, env_steps: int, **changes: Any) -> tuple[Any, Trainer]:
    env = envs.make_env("CartPole-v1")
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    task = config.Task("cartpole", "CartPole-v1", env_steps=env_steps, **spaces)
    kind = agents.get(name)
    with seeding.forked(1):
        agent = kind(env.observation_space, env.action_space, kind.Config(**changes))
    run = config.RunConfig(name, agent.config, (task,), lanes=lanes, eval_episodes=1, eval_every=0)
    trainer = Trainer(agent, [task], run)
    with seeding.forked(0):
        trainer.run()
    return agent, trainer


def test_cartpole_is_learnt_in_seconds() -> None:
    agent, trainer = trained(
        "ppo", 8, 12_288, rollout=512, batch_size=256, learning_rate=2e-3, gae_lambda=0.9,
        discount=0.98,
    )  # fmt: skip
    assert agent.lanes == 8 and agent.collect_every == 64
    assert agent.updates == 24 and trainer.clock.total_env_steps == 12_288
    returns = evaluation.evaluate(agent, "CartPole-v1", 5, seed=1).returns
    assert returns.mean() > 150, returns  # a random policy gets about 22


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout": 0}, "PPO: rollout must be at least 2, not 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"gae_lambda": 1.5}, "gae_lambda must lie between 0 and 1"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0"),
        ({"entropy_coefficient": math.nan}, "entropy_coefficient must be a number, not nan"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        agent_of(**changes)


def test_more_lanes_than_rows_of_a_rollout_are_refused() -> None:
    with pytest.raises(UserError, match="8 lanes need a row each, but this agent's buffer has 4"):
        trained("ppo", 8, 64, rollout=4)


@pytest.mark.parametrize("name", ["ppo", "reactive"])
def test_datasets_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", "rl_shift/hopper-replay-v0"  # comes with the package
    budget = ["--updates", "10", "--run-dir", str(run), "--device", "cpu"]
    assert cli.main(["train", name, "--dataset", data, *budget]) == 2
    assert "leave the dataset out" in capsys.readouterr().err
    assert not run.exists()
    env_steps = ["--env", "Hopper-v5", "--env-steps", "10", "--agent.rollout", "2"]
    if name == "ppo":
        assert cli.main(["train", name, "--dataset", data, *budget[2:], *env_steps]) == 2
        assert "leave the dataset out" in capsys.readouterr().err


@pytest.mark.parametrize("actions", [Discrete(3), Box(-1, 1, (2,), np.float32)])
def test_exploring_again_makes_actions_uniform_and_keeps_values(actions: Any) -> None:
    agent = agent_of(actions)
    obs = torch.randn(5, 3)
    with torch.no_grad():
        for parameter in agent.actor_critic.head.parameters():
            parameter.add_(torch.randn_like(parameter))
        before = agent.actor_critic(obs)[1]
    agent.explore_again()
    output, value = agent.actor_critic(obs)
    assert torch.equal(value, before)
    fresh = type(agent.actor_critic.head)(*agent.actor_critic.head.linear.weight.shape[::-1])
    highest = fresh.entropy(torch.zeros_like(output))
    torch.testing.assert_close(agent.actor_critic.head.entropy(output), highest)
