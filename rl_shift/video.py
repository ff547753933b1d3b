"""Films of a policy: the first episode of an evaluation, written frame by frame as MP4."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch

from rl_shift import atomic, seeding
from rl_shift.envs import make_env
from rl_shift.errors import UserError

if TYPE_CHECKING:
    from rl_shift.agent import Agent
    from rl_shift.config import Task

MAX_STEPS = 100_000  # where an environment has no end of its own
RENDERER = (
    "MuJoCo needs MUJOCO_GL=egl (libEGL, with or without a GPU) or MUJOCO_GL=osmesa (libOSMesa) "
    "where there is no screen"
)


@dataclass(frozen=True)
class Film:
    """A file, and the episode that it shows."""

    path: Path
    total: float  # undiscounted return
    steps: int


def film(
    agent: Agent, task: Task, folder: Path, seed: int = 0, explore: bool = False, steps: int = 0
) -> list[Film]:
    """One file per stacked seed: episode 0 of `evaluate` with the same seed.

    Args:
        agent: focused on the task.
        task: with an environment that draws itself.
        folder: of the files, TASK.mp4 or TASK.seedK.mp4.
        seed: of the evaluation.
        explore: as in training; then the start is that of `evaluate`, but the draws are others.
        steps: of the episode at most; 0: all of it.

    Raises:
        UserError: no way to draw, or moviepy is missing.
    """
    assert task.env is not None
    films = []
    for k in range(agent.seeds):
        alone = agent.select(k).eval() if agent.seeds > 1 else agent.eval()
        alone.focus(task)
        name = task.name.replace("/", "-") + (f".seed{k}" if agent.seeds > 1 else "")
        path = folder / f"{name}.mp4"
        with seeding.forked(seeding.child(seed, "evaluation")):
            start = seeding.child(seed, "episode", 0)
            total, shown = _play(alone, task, path, start, explore, steps or MAX_STEPS)
        films.append(Film(path, total, shown))
    return films


def film_writer() -> Any:
    """Moviepy's class that writes frames.

    Raises:
        UserError: moviepy is missing.
    """
    try:
        from moviepy.video.io.ffmpeg_writer import (  # pyright: ignore[reportMissingImports]
            FFMPEG_VideoWriter,
        )
    except ImportError as error:
        raise UserError('a video needs moviepy: pip install "rl_shift[video]"') from error
    return FFMPEG_VideoWriter


def _play(
    agent: Agent, task: Task, path: Path, seed: int, explore: bool, most: int
) -> tuple[float, int]:
    env = _drawing(task)
    try:
        obs, _ = env.reset(seed=seed)
        first = _drawn(env, task)
        frames = int(env.metadata.get("render_fps", 30))
        total, steps, ended = 0.0, 0, False
        with _writer(path, first, frames) as write:
            write(first)
            device = agent.normalizer.mean.device
            while not ended and steps < most:
                rows = torch.from_numpy(np.asarray(obs)[None]).to(device)
                action = agent.run(agent.act, rows, explore).cpu().numpy()[0]
                obs, reward, terminated, truncated, info = env.step(action)
                total, steps, ended = total + float(reward), steps + 1, terminated or truncated
                if truncated and info.get("hidden_reset"):
                    obs, ended = env.reset()[0], False
                write(_drawn(env, task))
    finally:
        env.close()
    return total, steps


def _drawing(task: Task) -> gymnasium.Env[Any, Any]:
    shown = {"render_mode": "rgb_array"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the refusal below says it better
            env = make_env(str(task.env), shift=task.shift, obs_pad=task.obs_pad, **shown)
    except TypeError as error:  # its constructor has no such argument
        raise UserError(f"{task.env} cannot draw itself: it takes no render_mode") from error
    if "rgb_array" not in env.metadata.get("render_modes", ()):
        env.close()
        raise UserError(f"{task.env} cannot draw itself: it has no render mode rgb_array")
    return env


def _drawn(env: gymnasium.Env[Any, Any], task: Task) -> np.ndarray[Any, Any]:
    try:
        frame: Any = env.render()
    except Exception as error:  # each backend of OpenGL fails in its own way
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{task.env} cannot be drawn ({reason}): {RENDERER}") from error
    return np.asarray(frame, dtype=np.uint8)


@contextmanager
def _writer(path: Path, first: np.ndarray[Any, Any], frames: int) -> Iterator[Any]:
    """A function that takes frames; the file has its name once it is whole."""
    height, width = (n - n % 2 for n in first.shape[:2])  # the codec wants even numbers
    with atomic.replacing(path, "choose another folder") as partial:
        writer = film_writer()(str(partial), (width, height), frames, logfile=None)
        try:
            yield lambda frame: writer.write_frame(frame[:height, :width])
        finally:
            writer.close()
