"""Datasets by id or path: where they lie, what they hold, and their transitions as arrays.

Ids are the 148 of D4RL, names of files found in the dataset folders, the one bundled with the
package, and entry points of the group `rl_shift.datasets`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rl_shift import dataset_cache
from rl_shift.dataset_files import SUFFIXES, check_layout, opened, read_raw
from rl_shift.dataset_rows import (
    KEYS,
    Transitions,
    episode_ends,
    legacy_qlearning,
    mc_return,
    native,
    next_action,
)
from rl_shift.dataset_table import Entry, family, family_of, reference_scores_of, table
from rl_shift.errors import UserError

Arrays = dict[str, np.ndarray]
Mode = Literal["native", "legacy_qlearning"]
MODES = ("native", "legacy_qlearning")
COLUMNS = ("next_action", "mc_return", "reward_mask", "next_obs_known")
BUNDLED = {"rl_shift/hopper-replay-v0": "hopper-replay-v0.hdf5"}
_ANT_WIDTHS = (111, 27)  # D4RL's observation and Gymnasium's, which has no contact forces


@dataclass(frozen=True)
class DatasetInfo:
    """Where a dataset lies and what it belongs to.

    Attributes:
        id: its name.
        path: its file.
        env_id: Gymnasium id to evaluate in; None where none is known.
        reference_scores: returns that score 0 and 100; None where none are known.
        horizon: longest episode, None where unknown.
        origin: who made the data, for tables.
        obs_pad: zeros that observations of `env_id` need to be as wide as the data's.
        family: D4RL's environment family, None for others.
    """

    id: str
    path: Path
    env_id: str | None
    reference_scores: tuple[float, float] | None
    horizon: int | None
    origin: str
    obs_pad: int = 0
    family: str | None = None


def folders() -> list[Path]:
    """The folders that are searched, in this order; `RL_SHIFT_DATA` may name several."""
    found: list[Path] = []
    for name in os.environ.get("RL_SHIFT_DATA", "").split(os.pathsep):
        if name:
            found += [Path(name).expanduser(), Path(name).expanduser() / "datasets"]
    if os.environ.get("D4RL_DATASET_DIR"):
        found.append(Path(os.environ["D4RL_DATASET_DIR"]).expanduser())
    found.append(Path.home() / ".d4rl" / "datasets")
    return found


def local_files() -> dict[str, Path]:
    """File stems found in the folders, an earlier folder's file before a later one's."""
    found: dict[str, Path] = {}
    for folder in folders():
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if path.suffix in SUFFIXES and not path.name.startswith("."):
                    found.setdefault(path.stem, path)
    return found


def registered() -> dict[str, EntryPoint]:
    """Datasets of installed packages: entry points that give a path or a `DatasetInfo`."""
    return {point.name: point for point in entry_points(group="rl_shift.datasets")}


def resolve(id_or_path: str | Path) -> DatasetInfo:
    """Finds a dataset.

    Raises:
        UserError: it is unknown (the nearest name is given) or its file is in none of the folders.
    """
    name = str(id_or_path)
    path = Path(name).expanduser()
    if path.suffix in SUFFIXES or path.is_file():
        return _described(path.stem, path)
    if name in BUNDLED:
        packaged = Path(str(files("rl_shift").joinpath(BUNDLED[name])))
        if not packaged.is_file():
            raise UserError(f"dataset {name!r}: {packaged} is missing; install the package again")
        return _described(name, packaged)
    if name in table():
        return _described(name, find(table()[name]))
    if name in registered():
        return _from_entry_point(name, registered()[name])
    here = local_files()
    if name in here:
        return _described(name, here[name])
    known = [*table(), *BUNDLED, *here, *registered()]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    nearest = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(
        f"unknown dataset {name!r}; {nearest}`rl-shift data list` shows all ids; files are looked "
        f"for in {_listed(folders())}"
    )


def find(entry: Entry) -> Path:
    """The local file of a D4RL id."""
    names = [entry.file, *(f"{entry.id}{suffix}" for suffix in SUFFIXES)]
    for folder in folders():
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise UserError(
        f"dataset {entry.id!r}: {entry.file} not found in {_listed(folders())}; put it there, or "
        f"`rl-shift data download {entry.id}`, or give --dataset PATH"
    )


def env_for(name: str) -> str | None:
    """Gymnasium id for a D4RL id, a family or a name that contains one."""
    if name in table():
        return table()[name].env_id
    of = family_of(name)
    return None if of is None else family(of)["env_id"]


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


def _described(id: str, path: Path) -> DatasetInfo:
    """What the table, the file's attributes and its name say about it."""
    with opened(path) as source:
        check_layout(source)
        attributes = source.attributes
        width = source.shapes["observations"][-1]
    entry = table().get(id) or _by_file_name(path)
    of = entry.family if entry is not None else family_of(path.stem)
    env_id = attributes.get("env_id") or (entry.env_id if entry else env_for(of or ""))
    scores: tuple[float, float] | None
    horizon: int | None
    if entry is not None:
        scores, horizon = entry.reference_scores, entry.horizon
    else:
        scores = reference_scores_of(of) if of else None
        horizon = family(of)["horizon"] if of and of != "maze2d" else None
    if "reference_min" in attributes and "reference_max" in attributes:
        scores = float(attributes["reference_min"]), float(attributes["reference_max"])
    if "horizon" in attributes:
        horizon = int(attributes["horizon"])
    ant = of == "ant" and width == _ANT_WIDTHS[0] and re.match(r"Ant-v\d$", str(env_id))
    return DatasetInfo(
        id=id,
        path=path.resolve(),
        env_id=env_id,
        reference_scores=scores,
        horizon=horizon,
        origin=_origin(entry, path, attributes),
        obs_pad=_ANT_WIDTHS[0] - _ANT_WIDTHS[1] if ant else 0,
        family=of,
    )


def _by_file_name(path: Path) -> Entry | None:
    """The D4RL id a file belongs to, by its name; the order of its words does not matter."""
    words = sorted(re.split(r"[^a-z0-9]+", path.stem.lower()))
    for entry in table().values():
        if path.name == entry.file or words == sorted(
            re.split(r"[^a-z0-9]+", Path(entry.file).stem.lower())
        ):
            return entry
    return None


def _origin(entry: Entry | None, path: Path, attributes: Mapping[str, Any]) -> str:
    if attributes.get("origin"):
        return str(attributes["origin"])
    if "Deep OPE" in str(attributes.get("metadata/algorithm", "")):
        return "D4RL-layout data regenerated from Deep OPE policies"
    if entry is not None and entry.size == path.stat().st_size:
        return f"D4RL ({entry.id})"
    if entry is not None and entry.size is None:
        return f"named like D4RL's {entry.id}, published size unknown"
    if entry is not None:
        return f"named like D4RL's {entry.id}, but of another size"
    return f"local file {path.name}"


def _from_entry_point(name: str, point: EntryPoint) -> DatasetInfo:
    try:
        value = point.load()
        value = value() if callable(value) else value
    except Exception as error:
        raise UserError(
            f"dataset {name!r}: entry point {point.value} failed ({error}); mend the package "
            "that provides it"
        ) from error
    if isinstance(value, DatasetInfo):
        return value
    return _described(name, Path(value))


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths)
