"""Raw arrays of D4RL's layout out of HDF5 and NPZ files, each checked where it is read.

Nothing is ever unpickled, and every complaint names the file, the key and what to do.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rl_shift.errors import UserError

SUFFIXES = (".hdf5", ".h5", ".npz")
REQUIRED = ("observations", "actions", "rewards", "terminals")
# NPZ files made by hand often carry Gymnasium's words.
_ALIASES = {
    "observations": "obs",
    "actions": "action",
    "rewards": "reward",
    "next_observations": "next_obs",
    "terminals": "terminated",
    "timeouts": "truncated",
}


class Source(Protocol):
    """An open file: shapes of its arrays, attributes, and arrays on demand."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    kinds: dict[str, str]  # NumPy's letter for the kind of number: b, i, u, f, ...
    attributes: dict[str, Any]

    def read(self, key: str, dtype: type[np.generic]) -> np.ndarray:
        """The whole array as `dtype`."""
        ...


@dataclass
class RawArrays:
    """One row per step, episodes concatenated, as the file has them.

    Attributes:
        observations: (N, obs) float32, or uint8 images.
        actions: (N, action) float32, or (N,) int64.
        rewards: (N,) float32.
        terminals: (N,) bool.
        timeouts: (N,) bool where the file has them.
        next_observations: (N, obs) where the file has them.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray
    timeouts: np.ndarray | None
    next_observations: np.ndarray | None


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """Opens a dataset file; damage found while it is read becomes a `UserError` too."""
    if not path.is_file():
        raise UserError(f"dataset file {path} does not exist; check the path")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                yield _Npz(path, file)
        else:
            import h5py

            with h5py.File(path, "r") as file:
                yield _Hdf5(path, file)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        kind = "NPZ" if path.suffix == ".npz" else "HDF5"
        reason = _one_line(error)
        if "pickle" in reason:  # NumPy's advice for what is no array file; nothing is unpickled
            reason = "it holds no arrays"
        raise UserError(
            f"{path} is not a readable {kind} file, damaged or cut short ({reason}); download or "
            "make it again"
        ) from error


class _Hdf5:
    def __init__(self, path: Path, file: Any) -> None:
        import h5py

        self.path = path
        self._file = file
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, str] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                self.shapes[name] = tuple(item.shape or ())
                self.kinds[name] = item.dtype.kind

        file.visititems(visit)
        self.attributes = {key: _plain(value) for key, value in file.attrs.items()}
        for key in ("metadata/algorithm", "metadata/note", "metadata/env"):
            if self.shapes.get(key) == () and self.kinds[key] in "OSU":
                self.attributes.setdefault(key, _plain(file[key][()]))

    def read(self, key: str, dtype: type[np.generic]) -> np.ndarray:
        dataset = self._file[key]
        out = np.empty(dataset.shape, dtype=dtype)
        if out.size:
            # HDF5 converts while it reads: no second copy in another precision.
            dataset.read_direct(out)
        return out


class _Npz:
    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self._file = file
        self.shapes = {}
        self.kinds = {}
        self.attributes = {}
        self._names: dict[str, str] = {}
        self._made: dict[str, np.ndarray] = {}
        words = {short: long for long, short in _ALIASES.items()}
        for name in map(str, file.files):
            array = file[name]
            if array.dtype.kind == "O":
                raise ValueError(f"{name} holds Python objects")
            key = words.get(name, name)
            self._names[key] = name
            if array.ndim:
                self.shapes[key], self.kinds[key] = array.shape, array.dtype.kind
            else:
                self.attributes[key] = _plain(array[()])
        if {"masks", "terminals"} <= self.shapes.keys():
            # OGBench: `terminals` ends every episode, and `masks` is 0 where it terminated.
            ended, going = (np.asarray(file[self._names[k]]) != 0 for k in ("terminals", "masks"))
            self._made = {"terminals": ~going, "timeouts": ended & going}
            self.shapes["timeouts"] = ended.shape
            self.kinds |= dict.fromkeys(self._made, "b")

    def read(self, key: str, dtype: type[np.generic]) -> np.ndarray:
        if key in self._made:
            return self._made[key].astype(dtype)
        return np.asarray(self._file[self._names[key]]).astype(dtype)


def read_raw(source: Source, next_observations: bool = True) -> RawArrays:
    """Reads and checks the arrays of D4RL's layout.

    Args:
        source: an open file.
        next_observations: whether to read these where the file has them.

    Raises:
        UserError: a required key is missing, shapes disagree, or numbers are NaN or infinite.
    """
    check_layout(source)
    image = len(source.shapes["observations"]) > 2 and source.kinds["observations"] == "u"
    obs_type: type[np.generic] = np.uint8 if image else np.float32
    discrete = source.kinds["actions"] in "iu" and len(source.shapes["actions"]) == 1
    wanted = next_observations and "next_observations" in source.shapes
    raw = RawArrays(
        observations=source.read("observations", obs_type),
        actions=source.read("actions", np.int64 if discrete else np.float32),
        rewards=source.read("rewards", np.float32).reshape(-1),
        terminals=_flags(source, "terminals"),
        timeouts=_flags(source, "timeouts") if "timeouts" in source.shapes else None,
        next_observations=source.read("next_observations", obs_type) if wanted else None,
    )
    for key in ("observations", "actions", "rewards", "next_observations"):
        array = getattr(raw, key)
        if array is not None:
            _check_finite(array, key, source.path)
    return raw


def check_layout(source: Source) -> None:
    """Raises a `UserError` unless the keys are there and their shapes agree."""
    shapes, path = source.shapes, source.path
    if any(key.startswith("virtual/") for key in shapes):
        raise UserError(
            f"{path}: chunked file not supported (keys virtual/<chunk>/...); merge its chunks into "
            "one file with the arrays at the top level"
        )
    for key, kind in source.kinds.items():
        if key in (*REQUIRED, "timeouts", "next_observations") and kind not in "biuf":
            raise UserError(f"{path}: {key} holds no numbers; write it as floats and try again")
    missing = [key for key in REQUIRED if key not in shapes]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; D4RL's layout needs {', '.join(REQUIRED)}, and "
            f"the file has {', '.join(sorted(shapes)[:12]) or 'no arrays'}"
        )
    rows = shapes["observations"][:1]
    if rows in ((), (0,)):
        raise UserError(f"{path}: observations of shape {shapes['observations']} hold no rows")
    for key in (*REQUIRED, "timeouts", "next_observations"):
        shape = shapes.get(key)
        if shape is None:
            continue
        flat = key in ("rewards", "terminals", "timeouts")
        right = shape in (rows, (*rows, 1)) if flat else shape[:1] == rows
        if not right:
            wanted = f"({rows[0]},) or ({rows[0]}, 1)" if flat else f"({rows[0]}, ...)"
            raise UserError(
                f"{path}: {key} has shape {shape}, expected {wanted} like observations; "
                "make the file again with one row per step"
            )
    if shapes.get("next_observations", shapes["observations"]) != shapes["observations"]:
        raise UserError(
            f"{path}: next_observations has shape {shapes['next_observations']}, observations "
            f"{shapes['observations']}; they must agree"
        )
    if len(shapes["observations"]) < 2 or len(shapes["actions"]) > 2:
        raise UserError(
            f"{path}: observations {shapes['observations']} and actions {shapes['actions']} "
            "must have the shapes (N, obs) and (N, action)"
        )


def _flags(source: Source, key: str) -> np.ndarray:
    """(N,) bool from bool, integer or float columns of shape (N,) or (N, 1)."""
    if source.kinds[key] == "b":
        return source.read(key, np.bool_).reshape(-1)
    found = source.read(key, np.float32).reshape(-1)
    _check_finite(found, key, source.path)
    flags: np.ndarray = found != 0
    return flags


def _check_finite(array: np.ndarray, key: str, path: Path) -> None:
    if array.dtype.kind != "f":
        return
    with np.errstate(invalid="ignore"):
        # Minimum and maximum carry NaN and inf along and need no array of flags.
        fine = np.isfinite(array.min()) and np.isfinite(array.max())
    if not fine:
        bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        raise UserError(
            f"{path}: {key} holds NaN or infinite values in {int(bad.sum())} rows, first in row "
            f"{int(np.argmax(bad))}; remove those rows or make the file again"
        )


def _plain(value: Any) -> Any:
    """Attributes as Python values."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
