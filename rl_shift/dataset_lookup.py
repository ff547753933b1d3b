"""Where datasets lie: D4RL ids, files in the dataset folders, the bundled one, entry points."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

from rl_shift.dataset_files import SUFFIXES, check_layout, opened
from rl_shift.dataset_table import Entry, family, family_of, reference_scores_of, table
from rl_shift.errors import UserError

BUNDLED = {"rl_shift/hopper-replay-v0": "hopper-replay-v0.hdf5"}
_MADE = {"deep-ope-": "deep-ope", "rlshift-": "family FAMILY --member K"}  # ours, by their start
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


def roots() -> list[Path]:
    """The folders that `RL_SHIFT_DATA` names, in this order."""
    names = os.environ.get("RL_SHIFT_DATA", "").split(os.pathsep)
    return [Path(name).expanduser() for name in names if name]


def folders() -> list[Path]:
    """The folders that are searched, in this order."""
    found = [folder for root in roots() for folder in (root, root / "datasets")]
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
    if name.startswith("minari:"):
        from rl_shift import dataset_minari

        return _described(name, dataset_minari.local_file(name))
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
    made = next((how for start, how in _MADE.items() if name.startswith(start)), None)
    if made is not None:
        nearest = f"sets of this name are made by `scripts/make_datasets.py {made}`; "
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


def _described(id: str, path: Path) -> DatasetInfo:
    """What the table, the file's attributes and its name say about it."""
    with opened(path) as source:
        check_layout(source)
        attributes = source.attributes
        width = source.shapes["observations"][-1]
        action_width = source.shapes["actions"][-1]
    entry = table().get(id) or _by_file_name(path)
    if entry is not None and (width, action_width) != (entry.obs_dim, entry.act_dim):
        raise UserError(
            f"{path}: observations and actions are {width} and {action_width} wide, those of "
            f"{entry.id} {entry.obs_dim} and {entry.act_dim}; put the right file there or rename it"
        )
    of = entry.family if entry is not None else family_of(path.stem)
    env_id = attributes.get("env_id") or (entry.env_id if entry else env_for(of or ""))
    scores: tuple[float, float] | None
    horizon: int | None
    if entry is not None:
        scores, horizon = entry.reference_scores, entry.horizon
    else:
        scores = reference_scores_of(of) if of else None
        horizon = family(of)["horizon"] if of and of != "maze2d" else None
    try:
        if "reference_min" in attributes and "reference_max" in attributes:
            scores = float(attributes["reference_min"]), float(attributes["reference_max"])
        if "horizon" in attributes:
            horizon = int(attributes["horizon"])
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its attributes horizon, reference_min and reference_max must be numbers "
            f"({error})"
        ) from error
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
