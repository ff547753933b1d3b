"""Trained policies outside of training: shapes, scaling, Stable-Baselines3's way of calling."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import rl_shift
from rl_shift.deployment import TrainedPolicy
from rl_shift.errors import UserError

ENV, DICTS = "DeployPendulum-v0", "DeployDicts-v0"
QUICK: dict[str, Any] = {
    "agent_config": {"hidden": [8], "batch_size": 8, "warmup_steps": 10},
    "env_steps": 20,
    "eval_every": 0,
    "eval_episodes": 1,
    "progress": False,
}


class Dicts(gymnasium.Env[Any, Any]):
    """Observations in two parts; a reward for the action that equals them, in [0, 4] x [-3, 3]."""

    observation_space = spaces.Dict(
        {"place": spaces.Box(-1, 1, (2,), np.float32), "a": spaces.Box(-1, 1, (1,), np.float32)}
    )
    action_space = spaces.Box(np.array([0, -3], np.float32), np.array([4, 3], np.float32))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        return self.observation_space.sample(), float(action[0]), False, False, {}


@pytest.fixture(scope="module", autouse=True)
def _environments() -> Iterator[None]:
    pendulum = "gymnasium.envs.classic_control.pendulum:PendulumEnv"
    gymnasium.register(ENV, pendulum, max_episode_steps=20)
    gymnasium.register(DICTS, Dicts, max_episode_steps=5)
    yield
    for name in (ENV, DICTS):
        gymnasium.registry.pop(name)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> TrainedPolicy:
    """Of Pendulum, whose actions live in [-2, 2]."""
    folder = tmp_path_factory.mktemp("runs") / "pendulum"
    return rl_shift.load_policy(rl_shift.train("sac", env=ENV, run_dir=folder, **QUICK))


def test_actions_are_the_environments_own(policy: TrainedPolicy) -> None:
    obs = np.array([1.0, 0.0, 0.5], np.float64)
    action, state = policy.predict(obs, state="kept", deterministic=True)
    assert action.shape == (1,) and state == "kept"
    with torch.no_grad():
        inner = policy.agent.act(torch.tensor(obs[None], dtype=torch.float32), False)
    np.testing.assert_allclose(action, 2 * inner.numpy()[0], rtol=1e-6)
    batch, _ = policy.predict(np.stack([obs, obs, -obs]), deterministic=True)
    assert batch.shape == (3, 1)
    np.testing.assert_allclose(batch[1], action, rtol=1e-6)
    assert policy.action_space == spaces.Box(-2.0, 2.0, (1,))
    assert not policy.agent.training


def test_stochastic_actions_differ_and_stay_in_the_box(policy: TrainedPolicy) -> None:
    rows = np.zeros((64, 3), np.float32)
    rows[:, 0] = 1
    first, _ = policy.predict(rows)
    assert first.std() > 0
    assert np.abs(first).max() <= 2


def test_a_policy_evaluates_as_the_command_does(policy: TrainedPolicy) -> None:
    one, two = policy.evaluate(3, seed=5), policy.evaluate(3, seed=5)
    assert one.returns.shape == (1, 3)
    np.testing.assert_array_equal(one.returns, two.returns)
    env = gymnasium.make(ENV)
    from rl_shift.seeding import child

    obs, _ = env.reset(seed=child(5, "episode", 0))
    total = 0.0
    for _ in range(20):
        action, _ = policy.predict(obs, deterministic=True)
        obs, reward, *_ = env.step(action)
        total += float(reward)
    env.close()
    assert total == pytest.approx(one.returns[0, 0], rel=1e-5)


def test_wrong_shapes_are_refused(policy: TrainedPolicy) -> None:
    with pytest.raises(UserError, match=r"\(4,\); the policy takes \(3,\)"):
        policy.predict(np.zeros(4))


def test_dicts_are_flattened_as_in_training(tmp_path: Path) -> None:
    folder = rl_shift.train("sac", env=DICTS, run_dir=tmp_path / "run", **QUICK)
    policy = rl_shift.load_policy(folder)
    obs = policy.observation_space.sample()
    action, _ = policy.predict(obs, deterministic=True)
    assert policy.action_space.contains(action)
    flat = spaces.flatten(policy.observation_space, obs)
    np.testing.assert_allclose(policy.predict(flat, deterministic=True)[0], action, rtol=1e-6)
    several = {key: np.stack([value, -value]) for key, value in obs.items()}
    both, _ = policy.predict(several, deterministic=True)
    np.testing.assert_allclose(both[0], action, rtol=1e-5)


def test_one_seed_of_several_is_named(tmp_path: Path) -> None:
    folder = rl_shift.train(
        "bc",
        dataset="rl_shift/hopper-replay-v0",
        updates=3,
        seeds=2,
        agent_config={"hidden": [8]},
        eval_episodes=1,
        run_dir=tmp_path / "run",
        progress=False,
    )
    with pytest.raises(UserError, match="name one"):
        rl_shift.load_policy(folder)
    first, second = (rl_shift.load_policy(f"{folder}#{k}") for k in (0, 1))
    obs = np.zeros(11)
    assert not np.array_equal(first.predict(obs)[0], second.predict(obs)[0])
    with pytest.raises(UserError, match="no task 1"):
        rl_shift.load_policy(f"{folder}#0", task=1)


# ---- Stable-Baselines3 -------------------------------------------------------------------------


class VectorOfOne:
    """Stable-Baselines3's DummyVecEnv around one environment, as far as evaluation calls it."""

    num_envs = 1

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.env = env

    def reset(self) -> Any:
        return self.env.reset(seed=0)[0][None]

    def step(self, actions: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(actions[0])
        if terminated or truncated:
            obs, _ = self.env.reset()
        done = np.array([terminated or truncated])
        return obs[None], np.array([reward]), done, [info]


def evaluate_policy(model: Any, env: Any, episodes: int, deterministic: bool = True) -> list[float]:
    """The loop of stable_baselines3.common.evaluation.evaluate_policy, its calls as they are."""
    returns, total = [], np.zeros(env.num_envs)
    observations = env.reset()
    states = None
    episode_starts = np.ones((env.num_envs,), dtype=bool)
    while len(returns) < episodes:
        actions, states = model.predict(
            observations,
            state=states,
            episode_start=episode_starts,
            deterministic=deterministic,
        )
        observations, rewards, dones, _ = env.step(actions)
        total += rewards
        episode_starts = dones
        if dones[0]:
            returns.append(float(total[0]))
            total[:] = 0
    return returns


def test_the_calls_of_stable_baselines3_work(policy: TrainedPolicy) -> None:
    env = gymnasium.make(ENV)
    returns = evaluate_policy(policy, VectorOfOne(env), 2)
    env.close()
    assert len(returns) == 2
    assert all(-20 * 17 < r < 0 for r in returns)


@pytest.mark.skipif(
    importlib.util.find_spec("stable_baselines3") is None,
    reason="needs stable_baselines3, which is no dependency",
)
@pytest.mark.filterwarnings("ignore")
def test_stable_baselines3_itself_evaluates_a_policy(policy: TrainedPolicy) -> None:
    from stable_baselines3.common.evaluation import (  # pyright: ignore[reportMissingImports]
        evaluate_policy as theirs,
    )
    from stable_baselines3.common.monitor import (  # pyright: ignore[reportMissingImports]
        Monitor,
    )

    env = Monitor(gymnasium.make(ENV))
    env.reset(seed=0)
    mean, spread = theirs(policy, env, n_eval_episodes=3)
    env.close()
    assert -20 * 17 < mean < 0 and spread >= 0
