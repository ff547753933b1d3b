"""D4RL's maze2d, antmaze and kitchen tasks on Gymnasium-Robotics (extra `robotics`).

Observations, rewards, ends and coordinates are D4RL's; bodies and simulator are those of
Gymnasium-Robotics, so scores are not comparable with published ones. D4RL counts a maze's rows
along x and its columns along y; the maps are turned accordingly, so that positions, velocities and
actions need no rotation. AntMaze runs on `AntMaze_*-v4`, whose ant has Gymnasium's own gear.

    maze2d  : [x, y, vx, vy], x = row - 0.2 at the centre of a cell (D4RL's own offset); reward 1
              within 0.5 of the goal (dense: exp(-distance)); never terminates
    antmaze : [x, y, 27 numbers of the ant], start at (0, 0); reward 1 and the end within 0.5
    kitchen : FrankaKitchen-v1 asserts on MuJoCo 4 and cannot be made there
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rl_shift.errors import UserError

GOALS = {"umaze": (1, 1), "open": (2, 3), "medium": (6, 6), "large": (7, 9)}  # of maze2d
ANT_GOALS = {"umaze": (3, 1), "medium": (6, 6), "large": (7, 9)}
ANT_START = (1, 1)
OPEN = [[1] * 7, *([1, 0, 0, 0, 0, 0, 1] for _ in range(3)), [1] * 7]
OFFSET = 0.2  # D4RL's particle starts at 1.2 while its cells have centres at whole numbers
RADIUS = 0.5  # of a goal


def layout(maze: str) -> list[list[int]]:
    """D4RL's map of a maze by rows, 1 for walls."""
    if maze == "open":
        return OPEN
    maps = _robotics("gymnasium_robotics.envs.maze.maps")
    name = {"umaze": "U_MAZE", "medium": "MEDIUM_MAZE", "large": "LARGE_MAZE"}[maze]
    found: list[list[int]] = getattr(maps, name)
    return found


def turned(cells: list[list[Any]]) -> list[list[Any]]:
    """The map whose x axis runs along the given rows and whose y axis along their columns."""
    return [list(column) for column in reversed(list(zip(*cells, strict=True)))]


class Maze2d(gymnasium.Wrapper[Any, Any, Any, Any]):
    """PointMaze with D4RL's coordinates, starts, goal and reward."""

    def __init__(self, maze: str, dense: bool = False, render_mode: str | None = None) -> None:
        """A fixed goal; starts at any free cell."""
        point_maze = _robotics("gymnasium_robotics.envs.maze.point_maze")
        cells: list[list[Any]] = [["r" if c == 0 else c for c in row] for row in layout(maze)]
        cells[GOALS[maze][0]][GOALS[maze][1]] = "g"
        env = point_maze.PointMazeEnv(maze_map=turned(cells), render_mode=render_mode)
        super().__init__(env)
        env.position_noise_range = 0.1
        self.dense, self.goal = dense, np.array(GOALS[maze], dtype=np.float64)
        self.origin = np.array([len(cells), len(cells[0])]) / 2 - 0.5  # of the simulator, in cells
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Any free cell, D4RL's offset included."""
        _, info = self.env.reset(seed=seed, options=options)
        body = self.unwrapped.point_env  # type: ignore[attr-defined]
        body.set_state(body.data.qpos + OFFSET, np.zeros(2))
        return self._seen(np.concatenate([body.data.qpos, body.data.qvel])), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Reward by the distance after the step; no termination."""
        found, _, _, truncated, info = self.env.step(action)
        obs = self._seen(found["observation"])
        distance = float(np.linalg.norm(obs[:2] - self.goal))
        reward = np.exp(-distance) if self.dense else float(distance <= RADIUS)
        return obs, float(reward), False, truncated, info | {"success": distance <= RADIUS}

    def _seen(self, state: Any) -> Any:
        """Position in the simulator -> D4RL's; velocities are the same."""
        return np.concatenate([state[:2] + self.origin - OFFSET, state[2:]])


class AntMaze(gymnasium.Wrapper[Any, Any, Any, Any]):
    """AntMaze with the ant's position in its observation and D4RL's reward and end."""

    def __init__(self, maze: str, render_mode: str | None = None) -> None:
        """One start, one goal."""
        ant_maze = _robotics("gymnasium_robotics.envs.maze.ant_maze_v4")
        cells: list[list[Any]] = [list(row) for row in layout(maze)]
        cells[ANT_START[0]][ANT_START[1]] = "r"
        cells[ANT_GOALS[maze][0]][ANT_GOALS[maze][1]] = "g"
        env = ant_maze.AntMazeEnv(
            maze_map=turned(cells), continuing_task=False, render_mode=render_mode
        )
        super().__init__(env)
        size = env.maze.maze_size_scaling
        centre = np.array([len(cells), len(cells[0])]) / 2 - 0.5
        self.start = (np.array(ANT_START) - centre) * size
        self.observation_space = spaces.Box(-np.inf, np.inf, (29,), np.float64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Near (0, 0)."""
        found, info = self.env.reset(seed=seed, options=options)
        return self._seen(found), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """1 and the end within 0.5 of the goal."""
        found, _, _, truncated, info = self.env.step(action)
        distance = np.linalg.norm(found["achieved_goal"] - found["desired_goal"])
        arrived = bool(distance <= RADIUS)
        return self._seen(found), float(arrived), arrived, truncated, info | {"success": arrived}

    def _seen(self, found: dict[str, Any]) -> Any:
        return np.concatenate([found["achieved_goal"] - self.start, found["observation"]])


def kitchen(tasks: str, render_mode: str | None = None) -> gymnasium.Env[Any, Any]:
    """Says why there is none."""
    raise UserError(
        f"kitchen-{tasks}: FrankaKitchen-v1 of Gymnasium-Robotics asserts on MuJoCo 4 (its joint "
        "types no longer compare) and cannot be made; training on the dataset needs no environment"
    )


def _robotics(module: str) -> Any:
    """A module of the extra."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            'this task needs Gymnasium-Robotics: pip install "rl_shift[robotics]"'
        ) from error


def register() -> None:
    """D4RL's names: `rl_shift/maze2d-umaze-v1`, `rl_shift/antmaze-medium-v2` and so on."""
    here = "rl_shift.envs.robotics"
    steps = {"open": (150, 150), "umaze": (150, 300), "medium": (250, 600), "large": (600, 800)}
    for maze, limits in steps.items():
        for version, limit in enumerate(limits):
            for dense in (False, True):
                gymnasium.register(
                    f"rl_shift/maze2d-{maze}{'-dense' * dense}-v{version}",
                    entry_point=f"{here}:Maze2d",
                    max_episode_steps=limit,
                    kwargs={"maze": maze, "dense": dense},
                )
    for maze, limit in {"umaze": 700, "medium": 1000, "large": 1000}.items():
        gymnasium.register(
            f"rl_shift/antmaze-{maze}-v2",
            entry_point=f"{here}:AntMaze",
            max_episode_steps=limit,
            kwargs={"maze": maze},
        )
    for tasks in ("complete", "partial", "mixed"):
        gymnasium.register(
            f"rl_shift/kitchen-{tasks}-v0",
            entry_point=f"{here}:kitchen",
            max_episode_steps=280,
            kwargs={"tasks": tasks},
        )
