"""The agent that makes Ant-Dir's data: images of the ant in MuJoCo, rewards of other directions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_shift import agents
from rl_shift.envs import make_env
from rl_shift.envs.families import ANT_DIRECTIONS


@pytest.fixture
def ant(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    env = make_env("rl_shift/AntDirGoals-v0")
    kind = agents.get("ant_dir_sac:AntDirSAC")
    config = kind.Config(relabelled=1.0, control=1.0, hidden=(8,))
    return kind(env.observation_space, env.action_space, config)


def ant_steps(count: int) -> dict[str, torch.Tensor]:
    """Steps of random actions in random directions, and the velocity that the reward counts."""
    env = make_env("rl_shift/AntDirGoals-v0")
    rows = []
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    for step in range(count):
        action = env.action_space.sample()
        next_obs, reward, terminated, _, info = env.step(action)
        rows.append((obs, action, next_obs, reward, [info["x_velocity"], info["y_velocity"]]))
        obs = env.reset()[0] if terminated or step % 10 == 9 else next_obs
    names = ("obs", "action", "next_obs", "reward", "velocity")
    return {
        name: torch.tensor(np.array(column), dtype=torch.float32)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def test_images_of_the_ant_do_what_the_ant_does(ant: Any) -> None:
    env: Any = make_env("rl_shift/AntDirGoals-v0")
    rows = ant_steps(40)
    env.reset(seed=0)
    assert len({tuple(image.flatten().tolist()) for image in ant.obs_images}) == 8
    for obs, action in zip(rows["obs"], rows["action"], strict=True):
        plain: Any = None  # what the ant does; the first image is the ant itself
        for obs_image, action_image in zip(ant.obs_images, ant.action_images, strict=True):
            state = (obs_image @ obs).double().numpy()
            env.unwrapped.set_state(np.append([0, 0], state[:13]), state[13:27])
            env.unwrapped.goal = float(np.arctan2(state[28], state[27]))
            next_obs, reward, *_ = env.step((action_image @ action).numpy())
            plain = plain or (next_obs, reward)
            np.testing.assert_allclose(next_obs, obs_image.numpy() @ plain[0], atol=1e-4)
            assert reward == pytest.approx(plain[1], abs=1e-4)
    for obs_image, action_image in zip(ant.obs_images, ant.action_images, strict=True):
        there = ant.act(rows["obs"] @ obs_image.T, explore=False)
        assert torch.allclose(
            there, ant.act(rows["obs"], explore=False) @ action_image.T, atol=1e-5
        )


def test_directions_are_learnt_from_each_other(ant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(type(ant).__base__, "update", lambda self, batch: seen.append(batch) or {})
    given = ant_steps(64)
    ant.update(given)
    (rows,) = seen
    images = torch.einsum("koi,bi->kbo", ant.obs_images, given["obs"])
    image = (images - rows["obs"])[..., :-2].abs().sum(-1).argmin(0)
    obs, next_obs = (
        torch.einsum("boi,bo->bi", ant.obs_images[image], rows[key]) for key in ("obs", "next_obs")
    )
    goal = obs[:, -2:]
    assert torch.allclose(obs[:, :-2], given["obs"][:, :-2], atol=1e-5)
    assert torch.allclose(next_obs, torch.cat([given["next_obs"][:, :-2], goal], -1), atol=1e-5)
    action = torch.einsum("boi,bo->bi", ant.action_images[image], rows["action"])
    assert torch.equal(action, given["action"])
    angles = torch.atan2(rows["obs"][:, -1], rows["obs"][:, -2])
    assert angles.min() > -1e-6 and angles.max() < torch.pi / 4 + 1e-6
    angles = torch.atan2(goal[:, 1], goal[:, 0]) % (2 * torch.pi)
    distance = (angles[:, None] - torch.tensor(ANT_DIRECTIONS)).abs()
    assert distance.amin(-1).max() < 1e-5  # directions of the family
    exact = given["reward"] + (given["velocity"] * (goal - given["obs"][:, -2:])).sum(-1)
    error = (rows["reward"] - exact).square().mean().sqrt()
    moved = (given["reward"] - exact).square().mean().sqrt()
    assert error < 0.3 * moved, (error, moved)
