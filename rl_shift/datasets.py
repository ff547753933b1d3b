"""Datasets by id or path: their transitions as arrays, with rewards and columns derived from them.

Ids are the 148 of D4RL, names of files found in the dataset folders, the one bundled with the
package, and entry points of the group `rl_shift.datasets` (`dataset_lookup`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rl_shift import dataset_cache
from rl_shift.dataset_files import opened, read_raw
from rl_shift.dataset_lookup import DatasetInfo, env_for, resolve
from rl_shift.dataset_rows import (
    KEYS,
    Transitions,
    episode_ends,
    legacy_qlearning,
    mc_return,
    native,
    next_action,
)
from rl_shift.dataset_table import reference_scores_of, table
from rl_shift.errors import UserError

__all__ = [
    "COLUMNS",
    "MODES",
    "DatasetInfo",
    "env_for",
    "episode_ends",
    "episode_returns",
    "load",
    "reference_scores_of",
    "resolve",
    "reward_transform",
    "sha256",
    "statistics",
    "table",
]

Arrays = dict[str, np.ndarray]
Mode = Literal["native", "legacy_qlearning"]
MODES = ("native", "legacy_qlearning")
COLUMNS = ("next_action", "mc_return", "reward_mask", "next_obs_known")


def load(
    dataset: DatasetInfo | str | Path,
    columns: Sequence[str] = (),
    mode: Mode | str = "native",
    reward: str = "raw",
    action_space: Any = None,
    cache: bool = True,
    *,
    observation_space: Any = None,
    discount: float = 0.99,
) -> Arrays:
    """Transitions of a dataset: obs, action, reward, next_obs, terminated, truncated (K, ...).

    `truncated` marks the last transition of each episode that did not terminate. A timeout row
    whose successor the file does not hold is left out, and the row before it is marked; in that
    case `next_obs` of terminated rows is the row's own observation.

    Args:
        dataset: an id, a path or what `resolve` gave.
        columns: further columns: `next_action`, `mc_return`, `reward_mask` (ones), and
            `next_obs_known` (0 where `next_obs` is such a placeholder).
        mode: "native", or "legacy_qlearning" for D4RL's own transitions, bit for bit.
        reward: a transform for training, see `reward_transform`.
        action_space: the box the actions must lie in; [-1, 1] by default.
        cache: read and write the packed copy beside the file.
        observation_space: the environment's, compared with the data where given.
        discount: of `mc_return`.

    Raises:
        UserError: what is wrong with the file, where, and what to do.
    """
    info = dataset if isinstance(dataset, DatasetInfo) else resolve(dataset)
    unknown = [column for column in columns if column not in COLUMNS]
    if unknown:
        raise UserError(f"unknown data column {unknown[0]!r}; known are {', '.join(COLUMNS)}")
    transitions, bounds = _transitions(info, mode, cache)
    arrays = {key: transitions.arrays[key] for key in KEYS}
    _check_spaces(info, arrays, observation_space, action_space)
    arrays["action"] = _boxed(info, arrays["action"], bounds, action_space)
    transitions.arrays = arrays
    scale, shift = reward_transform(reward, arrays)
    if "mc_return" in columns:
        arrays["mc_return"] = mc_return(transitions, discount, scale, shift)
    if (scale, shift) != (1.0, 0.0):
        arrays["reward"] = (arrays["reward"] * scale + shift).astype(np.float32)
    if "next_action" in columns:
        arrays["next_action"] = next_action(transitions)
    if "reward_mask" in columns:
        arrays["reward_mask"] = np.ones(len(arrays["reward"]), dtype=np.float32)
    if "next_obs_known" in columns:
        known = (
            np.ones_like(arrays["terminated"]) if transitions.true_next else (~arrays["terminated"])
        )
        arrays["next_obs_known"] = known.astype(np.float32)
    return arrays


def _transitions(
    info: DatasetInfo, mode: str, cache: bool
) -> tuple[Transitions, tuple[list[float], list[float]]]:
    """Transitions from cache or file, and the lowest and highest value of each action dimension."""
    if mode not in MODES:
        raise UserError(f"unknown data mode {mode!r}; choose {' or '.join(MODES)}")
    if not info.path.is_file():
        raise UserError(f"dataset file {info.path} does not exist; check the path")
    settings = {"horizon": info.horizon, "continuous": info.family == "maze2d"}
    if cache:
        stored = dataset_cache.load(info.path, mode, settings)
        if stored is not None:
            return stored[0], tuple(stored[1])
    with opened(info.path) as source:
        raw = read_raw(source, next_observations=mode == "native")
    if mode == "native":
        transitions = native(raw, info.horizon, info.family == "maze2d")
    else:
        transitions = legacy_qlearning(raw, info.horizon)
    del raw
    action = transitions.arrays["action"]
    if not len(action):
        raise UserError(f"{info.path} holds no complete transition; give a longer file")
    wide = action.reshape(len(action), -1)
    bounds = wide.min(axis=0).tolist(), wide.max(axis=0).tolist()
    if cache:
        dataset_cache.save(info.path, mode, settings, transitions, bounds)
    return transitions, bounds


def _check_spaces(
    info: DatasetInfo, arrays: Arrays, observation_space: Any, action_space: Any
) -> None:
    """Shapes of the data against those of the environment it is meant for."""
    shape = arrays["obs"].shape[1:]
    wanted = getattr(observation_space, "shape", None)
    if wanted is not None and wanted != shape:
        padded = (wanted[0] + info.obs_pad, *wanted[1:])
        if padded != shape:
            raise UserError(
                f"dataset {info.id!r} has observations {shape}, the environment {wanted}; choose "
                f"the environment it was recorded in ({info.env_id or 'unknown'}) with --env"
            )
    shape = arrays["action"].shape[1:]
    wanted = getattr(action_space, "shape", None)
    if wanted is not None and wanted != shape:
        raise UserError(
            f"dataset {info.id!r} has actions {shape or 'discrete'}, the environment {wanted}; "
            f"choose the environment it was recorded in ({info.env_id or 'unknown'}) with --env"
        )


def _boxed(
    info: DatasetInfo,
    action: np.ndarray,
    bounds: tuple[list[float], list[float]],
    space: Any,
) -> np.ndarray:
    """The actions, refused if outside the box; float rounding at its edge is clipped."""
    if action.dtype.kind != "f":
        count = getattr(space, "n", None)
        if count is not None and (min(bounds[0]) < 0 or max(bounds[1]) >= count):
            raise UserError(
                f"{info.path}: actions reach {int(max(bounds[1]))}, the environment has {count}; "
                "choose the environment they belong to with --env"
            )
        return action
    low = np.asarray(getattr(space, "low", -1.0), dtype=np.float32)
    high = np.asarray(getattr(space, "high", 1.0), dtype=np.float32)
    if (np.array(bounds[0]) >= low).all() and (np.array(bounds[1]) <= high).all():
        return action
    outside = ((action < low - 1e-4) | (action > high + 1e-4)).any(axis=-1)
    # maze2d clips what its controller asks for; the file may hold what was asked.
    if outside.any() and info.family != "maze2d":
        row = int(np.argmax(outside))
        raise UserError(
            f"{info.path}: {int(outside.sum())} actions lie outside the box "
            f"[{low.min():g}, {high.max():g}], first in row {row} "
            f"(largest {np.abs(action[row]).max():g}); rescale the actions to the box"
        )
    clipped: np.ndarray = np.clip(action, low, high)
    return clipped


def reward_transform(spec: str, arrays: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """(scale, shift) of rewards for training; evaluation always uses raw rewards.

    Args:
        spec: "raw", "normalize" (1000 / (highest - lowest episode return), official IQL on MuJoCo),
            or "SCALE,SHIFT" such as "1,-1" (AntMaze) or "10,-5".
        arrays: transitions with raw rewards, for "normalize".
    """
    if spec == "raw":
        return 1.0, 0.0
    if spec == "normalize":
        returns = episode_returns(arrays)
        spread = float(returns.max() - returns.min())
        if spread <= 0:
            raise UserError(
                f"reward 'normalize' needs episodes of different returns, all {len(returns)} give "
                f"{returns.max():g}; use raw or SCALE,SHIFT"
            )
        return 1000.0 / spread, 0.0
    try:
        scale, shift = (float(part) for part in spec.split(","))
    except ValueError:
        raise UserError(
            f"reward transform {spec!r} is unknown; use raw, normalize or SCALE,SHIFT such as 1,-1"
        ) from None
    return scale, shift


def episode_returns(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(E,) float64 undiscounted returns of the episodes."""
    ends = episode_ends(dict(arrays))
    starts = np.concatenate([[0], ends[:-1] + 1])
    return np.add.reduceat(arrays["reward"].astype(np.float64), starts)


def statistics(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Numbers that describe transitions: episodes, returns, ranges, observation moments."""
    returns = episode_returns(arrays)
    lengths = np.diff(episode_ends(dict(arrays)), prepend=-1)
    obs = arrays["obs"].reshape(len(arrays["obs"]), -1)
    action, reward = arrays["action"], arrays["reward"]
    return {
        "transitions": len(reward),
        "episodes": len(returns),
        "terminated": int(arrays["terminated"].sum()),
        "truncated": int(arrays["truncated"].sum()),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        "length_mean": float(lengths.mean()),
        "length_min": int(lengths.min()),
        "length_max": int(lengths.max()),
        "reward_min": float(reward.min()),
        "reward_max": float(reward.max()),
        "action_min": float(action.min()),
        "action_max": float(action.max()),
        "obs_mean": obs.mean(axis=0, dtype=np.float64).tolist(),
        "obs_std": obs.std(axis=0, dtype=np.float64).tolist(),
    }


def sha256(path: str | Path) -> str:
    """Checksum of a dataset's file; kept beside the cache until the file changes."""
    return dataset_cache.sha256(Path(path))
