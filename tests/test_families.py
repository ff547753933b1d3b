"""Task families against the numbers of the code that published them."""

import gymnasium
import mujoco
import numpy as np
import pytest

from rl_shift import envs
from rl_shift.envs import families

ACTIONS = np.random.default_rng(0).uniform(-1, 1, size=(200, 8)).astype(np.float32)


def test_grids() -> None:
    assert families.CHEETAH_VELOCITIES[7] == pytest.approx(0.6)
    assert [families.CHEETAH_VELOCITIES[k] for k in families.SEQUENCES["CheetahVel/cugro"]] == (
        pytest.approx([0.075, 0.45, 0.825, 1.2, 1.575])
    )
    assert len(families.ANT_DIRECTIONS) == 50
    assert [families.ANT_DIRECTIONS[k] for k in families.SEQUENCES["AntDir/cod-4"]] == [
        5.4289, 3.7543, 3.5281, 0.3471,
    ]  # fmt: skip
    assert [families.ANT_DIRECTIONS[k] for k in families.SEQUENCES["AntDir/cod-6"]] == [
        4.0057, 1.8707, 4.5116, 4.2522, 4.5162, 0.1832,
    ]  # fmt: skip


def play(id: str, **kwargs: float) -> tuple[list[float], gymnasium.Env]:
    env = envs.make_env(id, **kwargs)
    env.reset(seed=3)
    assert env.action_space.shape is not None
    size, rewards, truncated = env.action_space.shape[0], [], False
    for action in ACTIONS:
        _, reward, terminated, truncated, _ = env.step(action[:size])
        rewards.append(float(reward))
        if terminated or truncated:
            break
    return rewards, env


def test_cheetah_vel() -> None:
    env = envs.make_env("rl_shift/CheetahVel-15-v0")
    obs, _ = env.reset(seed=0)
    inner = env.unwrapped
    assert obs.shape == (20,) and obs.dtype == np.float32
    assert inner.goal == pytest.approx(1.2)  # type: ignore[attr-defined]
    data = inner.data  # type: ignore[attr-defined]
    expected = np.concatenate([data.qpos[1:], data.qvel, data.body("torso").xpos])
    np.testing.assert_allclose(obs, expected.astype(np.float32))
    before = data.qpos[0]
    _, reward, terminated, _, _ = env.step(ACTIONS[0][:6])
    velocity = (data.qpos[0] - before) / 0.05
    cost = 0.05 * float(np.square(ACTIONS[0][:6]).sum())
    assert reward == pytest.approx(-abs(velocity - 1.2) - cost, abs=1e-5)
    assert not terminated
    rewards, env = play("rl_shift/CheetahVel-v0", goal=2.0)
    assert len(rewards) == 200


def test_ant_dir() -> None:
    env = envs.make_env("rl_shift/AntDir-10-v0")
    obs, _ = env.reset(seed=0)
    assert obs.shape == (27,)
    inner = env.unwrapped
    goal = inner.goal  # type: ignore[attr-defined]
    data = inner.data  # type: ignore[attr-defined]
    assert goal == 5.4289
    for action in ACTIONS[:5]:
        before = data.body(1).xpos[:2].copy()
        _, reward, terminated, _, _ = env.step(action)
        velocity = (data.body(1).xpos[:2] - before) / 0.05
        forces = float(np.square(np.clip(data.cfrc_ext, -1, 1)).sum())
        expected = velocity @ [np.cos(goal), np.sin(goal)] + 1
        expected -= 0.5 * float(np.square(action).sum()) + 0.0005 * forces
        assert reward == pytest.approx(expected, abs=1e-5)
    data.qpos[2] = 1.5
    assert env.step(np.zeros(8, np.float32))[2]


@pytest.mark.parametrize(("name", "sizes"), [("CheetahVel", (20, 1)), ("AntDir", (27, 2))])
def test_goals_are_drawn_per_episode_and_shown(name: str, sizes: tuple[int, int]) -> None:
    env, inner = envs.make_env(f"rl_shift/{name}Goals-v0"), envs.make_env(f"rl_shift/{name}-7-v0")
    grid = families.CHEETAH_VELOCITIES if name == "CheetahVel" else families.ANT_DIRECTIONS
    goals = []
    for episode in range(5):
        obs, _ = env.reset(seed=3 if episode == 0 else None)
        goal = env.unwrapped.goal  # type: ignore[attr-defined]
        told = [goal] if name == "CheetahVel" else [np.cos(goal), np.sin(goal)]
        assert obs.shape == (sum(sizes),) and goal in grid
        np.testing.assert_allclose(obs[sizes[0] :], told, rtol=1e-6)
        goals.append(goal)
    assert len(set(goals)) > 1
    plain, _ = inner.reset(seed=11)
    obs, _ = env.reset(seed=11)
    np.testing.assert_array_equal(obs[: sizes[0]], plain)  # the goal moves nothing else
    env.unwrapped.goal = inner.unwrapped.goal  # type: ignore[attr-defined]
    for action in ACTIONS[:3]:
        (seen, reward, *_), (other, expected, *_) = (
            e.step(action[: inner.action_space.shape[0]]) for e in (env, inner)  # type: ignore[index]
        )  # fmt: skip
        np.testing.assert_array_equal(seen[: sizes[0]], other)
        assert reward == expected


@pytest.mark.parametrize(
    ("id", "base", "sizes"),
    [
        ("rl_shift/WalkerRandParams-3-v0", "Walker2d-v5", (17, 6)),
        ("rl_shift/HopperRandParams-3-v0", "Hopper-v5", (11, 3)),
    ],
)
def test_random_parameters(id: str, base: str, sizes: tuple[int, int]) -> None:
    env, plain = envs.make_env(id), envs.make_env(base)
    assert env.observation_space.shape == (sizes[0],) and env.action_space.shape == (sizes[1],)
    assert env.spec is not None and env.spec.max_episode_steps == 200
    mine, theirs = env.unwrapped.model, plain.unwrapped.model  # type: ignore[attr-defined]
    assert env.unwrapped.dt == pytest.approx(0.008)  # type: ignore[attr-defined]
    for name, (low, high) in {
        "body_mass": (0.2963, 3.375), "geom_friction": (0.2963, 3.375),
        "body_inertia": (0.2963, 3.375), "dof_damping": (0.455, 2.197),
    }.items():  # fmt: skip
        old, new = getattr(theirs, name).ravel(), getattr(mine, name).ravel()
        ratio = new[old > 0] / old[old > 0]
        assert (ratio >= low - 1e-3).all() and (ratio <= high + 1e-3).all()
        assert len(np.unique(ratio.round(9))) > 1  # each element by itself
    data = mujoco.MjData(mine)
    mujoco.mj_forward(mine, data)
    assert mine.body_subtreemass[0] == pytest.approx(mine.body_mass.sum())  # mj_setConst ran
    rewards, env = play(id)
    info_env = envs.make_env(id)
    info_env.reset(seed=3)
    _, reward, _, _, info = info_env.step(ACTIONS[0][: sizes[1]])
    cost = 1e-3 * float(np.square(ACTIONS[0][: sizes[1]]).sum())
    assert reward == pytest.approx(info["x_velocity"] + 1 - cost, abs=1e-6)
    assert rewards == play(id)[0]  # a member is the same in every process
    assert rewards != play(id.replace("-3-", "-4-"))[0]
    info_env.reset(seed=3)
    info_env.unwrapped.data.qpos[1] = 0.1  # type: ignore[attr-defined]
    assert info_env.step(np.zeros(sizes[1], np.float32))[2]
