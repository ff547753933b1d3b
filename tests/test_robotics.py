"""D4RL's maze2d, antmaze and adroit tasks: conversions, rewards, ends, real data."""

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_shift import agents, datasets, envs
from rl_shift.buffer import Buffer
from rl_shift.compile import Updater
from rl_shift.config import Task
from rl_shift.envs import robotics
from rl_shift.errors import UserError
from rl_shift.evaluation import evaluate

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium_robotics") is None,
    reason="Gymnasium-Robotics is not installed (extra robotics)",
)
DATA = [Path(p) / "datasets" for p in os.environ.get("RL_SHIFT_DATA", "").split(os.pathsep) if p]


def file(name: str) -> Path:
    for folder in DATA:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is not in a folder of RL_SHIFT_DATA")


def made(id: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return envs.make_env(id)


def test_a_turned_map_puts_rows_along_x() -> None:
    cells = [[1, 2, 3], [4, 5, 6]]
    # the simulator counts columns along x and rows down y
    assert robotics.turned(cells) == [[3, 6], [2, 5], [1, 4]]


def test_kitchen_says_why_it_cannot_be_made() -> None:
    with pytest.raises(UserError, match="FrankaKitchen-v1.*MuJoCo 4"):
        envs.make_env("rl_shift/kitchen-mixed-v0")
    assert datasets.table()["kitchen-mixed-v0"].env_id is None


def test_every_maze_id_names_an_environment_with_its_horizon() -> None:
    import gymnasium

    for id, entry in datasets.table().items():
        if entry.family not in ("maze2d", "antmaze"):
            continue
        if "-eval-" in id:
            assert entry.env_id is None  # D4RL's evaluation mazes exist only there
            continue
        spec = gymnasium.spec(str(entry.env_id))
        assert spec.max_episode_steps == entry.horizon, id
        if entry.family == "maze2d":
            assert spec.kwargs["dense"] == (entry.notes["reward_type"] == "dense")


@pytest.mark.skipif(
    importlib.util.find_spec("gymnasium_robotics") is not None, reason="the extra is installed"
)
@pytest.mark.parametrize("id", ["rl_shift/maze2d-umaze-v1", "gymnasium_robotics:AdroitHandDoor-v1"])
def test_without_the_extra_its_name_is_told(id: str) -> None:
    with pytest.raises(UserError, match=r"rl_shift\[robotics\]"):
        envs.make_env(id)


@needs_extra
@pytest.mark.parametrize("maze", ["umaze", "medium"])
def test_recorded_positions_lie_in_free_cells(maze: str) -> None:
    """The file was made with D4RL's generator: its coordinates fix the conversion."""
    arrays = datasets.load(file(f"maze2d-{maze}-v1-sparse.hdf5"))
    cells = np.array(robotics.layout(maze))
    row, column = np.rint(arrays["obs"][:, :2] + robotics.OFFSET).astype(int).T
    assert (cells[row, column] == 0).all()
    rewarded = arrays["obs"][arrays["reward"] > 0, :2]
    assert (np.linalg.norm(rewarded - robotics.GOALS[maze], axis=1) <= 0.75).all()


@needs_extra
@pytest.mark.parametrize("maze", ["umaze", "open", "medium", "large"])
def test_maze2d_starts_in_free_cells_and_moves_along_d4rls_axes(maze: str) -> None:
    env = made(f"rl_shift/maze2d-{maze}-v1")
    cells, seen = np.array(robotics.layout(maze)), set()
    for seed in range(30):
        obs, _ = env.reset(seed=seed)
        assert obs.shape == (4,) and obs.dtype == np.float32
        cell = np.rint(obs[:2]).astype(int)
        assert np.abs(obs[:2] - cell).max() <= 0.1 + 1e-6 and cells[tuple(cell)] == 0
        assert tuple(cell) != robotics.GOALS[maze]
        seen.add(tuple(cell))
        following, _, terminated, _, _ = env.step(np.array([1.0, 0.0], np.float32))
        assert not terminated and following[2] > 0.1 and abs(following[3]) < 0.05
    assert len(seen) > 3
    env.close()


@needs_extra
def test_maze2d_rewards_and_never_ends() -> None:
    for id, dense in (
        ("rl_shift/maze2d-umaze-v1", False),
        ("rl_shift/maze2d-umaze-dense-v1", True),
    ):
        env = made(id)
        env.reset(seed=0)
        inner = env.unwrapped.point_env
        for d in (0.0, 0.4, 0.6):
            goal = np.array(robotics.GOALS["umaze"]) + [0.0, d]
            position = goal + robotics.OFFSET - np.array([2.0, 2.0])
            inner.set_state(position, np.zeros(2))
            obs, reward, terminated, _, _ = env.step(np.zeros(2, np.float32))
            assert obs[:2] == pytest.approx(goal, abs=0.02)
            distance = np.linalg.norm(obs[:2] - robotics.GOALS["umaze"])
            assert reward == pytest.approx(np.exp(-distance) if dense else float(d < 0.5), abs=1e-5)
            assert not terminated
        env.close()


@needs_extra
@pytest.mark.parametrize("maze", ["umaze", "medium"])
def test_antmaze_has_29_numbers_and_ends_at_the_goal(maze: str) -> None:
    env = made(f"rl_shift/antmaze-{maze}-v2")
    obs, _ = env.reset(seed=1)
    assert obs.shape == (29,) and np.abs(obs[:2]).max() <= 1.01
    assert env.spec.max_episode_steps == (700 if maze == "umaze" else 1000)
    obs, reward, terminated, _, _ = env.step(np.zeros(8, np.float32))
    assert (reward, terminated) == (0.0, False)
    body = env.unwrapped.ant_env
    assert obs[2:15] == pytest.approx(body.data.qpos[2:], abs=1e-5)
    goal = (np.array(robotics.ANT_GOALS[maze]) - robotics.ANT_START) * 4.0
    qpos = body.data.qpos.copy()
    qpos[:2] = env.unwrapped.goal
    body.set_state(qpos, np.zeros(14))
    obs, reward, terminated, _, _ = env.step(np.zeros(8, np.float32))
    assert (reward, terminated) == (1.0, True)
    assert np.abs(obs[:2] - goal).max() <= 1.6  # noise of the goal, and D4RL's scale of 4 per cell
    env.close()


@needs_extra
def test_the_human_demonstrations_of_door_train_and_evaluate() -> None:
    info = datasets.resolve(file("door-human-dapg.hdf5"))
    assert info.env_id == "gymnasium_robotics:AdroitHandDoor-v1"
    assert info.reference_scores is not None
    env = made(info.env_id)
    kind = agents.get("bc")
    torch.manual_seed(0)
    agent = kind(env.observation_space, env.action_space, kind.Config(hidden=(32,)))
    buffer = Buffer.from_arrays(datasets.load(info, action_space=env.action_space))
    agent.begin_task(Task(name="door", dataset="door", updates=20), buffer)
    updater = Updater(agent)
    first, *_, last = (updater(agent.sample(buffer))["actor/loss"].item() for _ in range(200))
    assert last < first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate(agent, info.env_id, 1, 0, lanes=1, reference_scores=info.reference_scores)
    assert result.lengths.tolist() == [[200]] and np.isfinite(result.score).all()
