"""Minari datasets, read and written through the package `minari` (extra `minari`).

A dataset `minari:ID` is read once into a file of D4RL's layout in the user's cache folder, with the
actions mapped onto [-1, 1]; from there on it is a dataset like any other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rl_shift.errors import UserError

PREFIX = "minari:"
Arrays = dict[str, np.ndarray]


def _minari() -> Any:
    try:
        import minari  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError('Minari datasets need minari: pip install "rl_shift[minari]"') from error
    return minari


def local_file(name: str) -> Path:
    """The file of D4RL's layout that stands for `minari:ID`; it is made anew when the data change.

    Raises:
        UserError: minari or the dataset is missing, or it has no vectors.
    """
    minari, id = _minari(), name.removeprefix(PREFIX)
    try:
        dataset = minari.load_dataset(id)
    except Exception as error:  # minari raises its storage's own errors
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"no Minari dataset {id!r} is here ({reason}): `minari list local` shows them, "
            f"`minari download {id}` fetches one"
        ) from error
    storage = Path(dataset.storage.data_path)
    stamp = max(path.stat().st_mtime_ns for path in [storage, *storage.rglob("*")])
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "rl_shift" / "minari" / f"{id.replace('/', '-')}.{stamp:x}.hdf5"
    if not path.is_file():
        from rl_shift.recording import write_hdf5

        write_hdf5(path, *read(dataset, id))
    return path


def read(dataset: Any, id: str) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and attributes of D4RL's layout.

    Args:
        dataset: what `minari.load_dataset` gives.
        id: its name, for messages and the origin.
    """
    scale, centre = _box(dataset.action_space)
    parts: list[Arrays] = []
    for episode in dataset.iterate_episodes():
        obs, action = np.asarray(episode.observations), np.asarray(episode.actions)
        if obs.dtype.kind not in "fiu" or obs.ndim != 2:
            raise UserError(
                f"Minari dataset {id!r} has observations {dataset.observation_space}: only vectors "
                "are read"
            )
        if action.dtype.kind == "f":
            action = (action - centre) / scale
        terminated = np.asarray(episode.terminations, bool)
        ended = np.asarray(episode.truncations, bool) & ~terminated
        ended[-1] = not terminated[-1]  # an episode that was cut while it was recorded
        parts.append(
            {
                "observations": obs[:-1].astype(np.float32),
                "actions": action.astype(np.float32) if action.dtype.kind == "f" else action,
                "rewards": np.asarray(episode.rewards, np.float32),
                "next_observations": obs[1:].astype(np.float32),
                "terminals": terminated,
                "timeouts": ended,
            }
        )
    if not parts:
        raise UserError(f"Minari dataset {id!r} holds no episode")
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    attributes: dict[str, Any] = {"origin": f"Minari ({id})"}
    spec = dataset.spec.env_spec
    if spec is not None:
        attributes["env_id"] = spec.id
        if spec.max_episode_steps is not None:
            attributes["horizon"] = spec.max_episode_steps
    low, high = (dataset.storage.metadata.get(f"ref_{end}_score") for end in ("min", "max"))
    if low is not None and high is not None:
        attributes |= {"reference_min": float(low), "reference_max": float(high)}
    return arrays, attributes


def write(id: str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> str:
    """Write arrays of D4RL's layout with `next_observations` as the Minari dataset `id`.

    Returns:
        Its name, `minari:ID`.

    Raises:
        UserError: minari is missing, the dataset exists, or the environment cannot be made.
    """
    minari = _minari()
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer  # pyright: ignore[reportMissingImports]

    obs, action = arrays["observations"], arrays["actions"]
    env_id = attributes.get("env_id")
    space = Box(-1.0, 1.0, action.shape[1:], np.float32)
    given: dict[str, Any] = {"action_space": space}
    if env_id:
        import gymnasium

        from rl_shift.envs import make_env

        given = {"env": gymnasium.spec(str(env_id)), "action_space": _bare(make_env(str(env_id)))}
    scale, centre = _box(given["action_space"])
    action = (action * scale + centre).astype(given["action_space"].dtype)
    observation_space = Box(-np.inf, np.inf, obs.shape[1:], np.float32)
    scores = [attributes.get(f"reference_{end}") for end in ("min", "max")]
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"]) + 1
    bounds = np.unique(np.concatenate([[0], ends, [len(obs)]]))
    episodes = [
        EpisodeBuffer(
            id=number,
            observations=np.concatenate([obs[a:b], arrays["next_observations"][b - 1 : b]]),
            actions=action[a:b],
            rewards=arrays["rewards"][a:b],
            terminations=arrays["terminals"][a:b],
            truncations=arrays["timeouts"][a:b],
        )
        for number, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    name = id.removeprefix(PREFIX)
    try:
        minari.create_dataset_from_buffers(
            name,
            episodes,
            observation_space=observation_space,
            algorithm_name=str(attributes.get("origin", "unknown")),
            description=f"Written by rl_shift; {attributes.get('origin', 'origin unknown')}",
            ref_min_score=scores[0],
            ref_max_score=scores[1],
            **given,
        )
    except Exception as error:  # minari raises its storage's own errors
        raise UserError(
            f"cannot write Minari dataset {name!r}: {' '.join(str(error).split())[:160]}"
        ) from error
    return PREFIX + name


def _bare(env: Any) -> Any:
    space = env.unwrapped.action_space
    env.close()
    return space


def _box(space: Any) -> tuple[Any, Any]:
    """Scale and centre that map [-1, 1] onto the bounded dimensions of a box."""
    from gymnasium.spaces import Box

    if not isinstance(space, Box):
        return 1.0, 0.0
    bounded = np.isfinite(space.low) & np.isfinite(space.high)
    scale = np.where(bounded, (space.high - space.low) / 2, 1.0)
    return scale, np.where(bounded, (space.high + space.low) / 2, 0.0)
