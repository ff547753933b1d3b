"""Checkpoint folders: safetensors for numbers, JSON for the rest, never a pickle.

A checkpoint is written beside its place under a temporary name, flushed to the disk and renamed,
so a folder with the final name is always whole, wherever the process was killed:

    weights.safetensors      tensors of state["agent"]["module"], named as in the module
    train_state.safetensors  every other tensor and NumPy array, named by its path in the state
    train_state.json         the structure: plain values, and a reference wherever a tensor stood
    config.yaml              the resolved configuration, for people
    meta.json                format, versions, size and sha256 of the three files above
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl_shift.errors import UserError

FORMAT = 1
WEIGHTS, TENSORS, STRUCTURE = "weights.safetensors", "train_state.safetensors", "train_state.json"
_WEIGHTS_PREFIX = "agent/module/"
_STEP = re.compile(r"step_(\d+)(\.replaced)?")
_PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "safetensors", "h5py")


# ---- structure <-> plain JSON ----------------------------------------------------------------


class _Encoder:
    """Turns a nested state into JSON values and collects its tensors per file."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Tensor]] = {WEIGHTS: {}, TENSORS: {}}

    def encode(self, value: Any, path: str = "") -> Any:
        """JSON form of `value`; a mapping with one key starting with "$" stands for the rest."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            # Python's float text is exact; JSON has no word for the other three values
            return value if math.isfinite(value) else {"$float": str(value)}
        if isinstance(value, Tensor):
            return {"$tensor": self._store(path, self._plain(value, path))}
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value, path)
        if kind is list:
            return [self.encode(item, f"{path}/{i}") for i, item in enumerate(value)]
        if kind in (tuple, torch.Size):
            return {"$tuple": [self.encode(item, f"{path}/{i}") for i, item in enumerate(value)]}
        if kind in (dict, OrderedDict):
            return self._mapping(value, path)
        raise _foreign(path, kind.__module__ + "." + kind.__qualname__)

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        for key in value:
            if type(key) not in (str, int):
                raise _foreign(path, f"a key of type {type(key).__name__}")
        items = [
            (key, self.encode(item, f"{path}/{key}".lstrip("/"))) for key, item in value.items()
        ]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$dict": [list(item) for item in items]}

    def _array(self, value: np.ndarray[Any, Any] | np.generic, path: str) -> Any:
        if value.dtype.kind not in "biufc":
            raise _foreign(path, f"a NumPy array of type {value.dtype}")
        # raw bytes: NumPy has types (and byte orders) that torch lacks
        raw = torch.from_numpy(np.array(value, order="C").reshape(-1).view(np.uint8))
        word = "$array" if isinstance(value, np.ndarray) else "$scalar"
        return {word: self._store(path, raw), "dtype": value.dtype.str, "shape": list(value.shape)}

    @staticmethod
    def _plain(value: Tensor, path: str) -> Tensor:
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise _foreign(path, f"a tensor of layout {value.layout} on {value.device}")
        return value.detach().cpu().contiguous()

    def _store(self, path: str, value: Tensor) -> str:
        """File a tensor under a unique name and return it; the file is told by the prefix."""
        file, name = TENSORS, path
        if path.startswith(_WEIGHTS_PREFIX):
            file, name = WEIGHTS, path.removeprefix(_WEIGHTS_PREFIX)
        tensors = self.files[file]
        while name in tensors or name in ("", "__metadata__"):
            name += "'"  # {"a/b": t} and {"a": {"b": t}} have equal paths
        tensors[name] = value
        return f"{file}:{name}"

    def unshared(self, file: str) -> dict[str, Tensor]:
        """The tensors of one file, each with memory of its own, as safetensors demands."""
        seen: set[int] = set()
        for name, tensor in self.files[file].items():
            address = tensor.untyped_storage().data_ptr()
            if address in seen:
                self.files[file][name] = tensor.clone()
            seen.add(address)
        return self.files[file]


def _decode(node: Any, tensors: Mapping[str, Tensor], path: str = "") -> Any:
    """The value that `_Encoder.encode` saw."""
    if isinstance(node, list):
        return [_decode(item, tensors, f"{path}/{i}") for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    word = next((key for key in node if key.startswith("$")), None)
    if word is None:
        return {
            key: _decode(item, tensors, f"{path}/{key}".lstrip("/")) for key, item in node.items()
        }
    content = node[word]
    if word == "$float":
        return float(content)
    if word == "$tuple":
        return tuple(_decode(content, tensors, path))
    if word == "$dict":
        return {key: _decode(item, tensors, f"{path}/{key}".lstrip("/")) for key, item in content}
    if word == "$tensor":
        return tensors[content]
    if word in ("$array", "$scalar"):
        flat = np.frombuffer(tensors[content].numpy().tobytes(), dtype=np.dtype(node["dtype"]))
        array = flat.reshape(node["shape"]).copy()
        return array if word == "$array" else array[()]
    raise _foreign(path, f"{word!r}")


def _foreign(path: str, what: str) -> UserError:
    return UserError(
        f"the state holds {what} at {path or 'its top'!r}: checkpoints hold only tensors, NumPy "
        "arrays, numbers, strings, None, lists, tuples and dicts; convert it in state()"
    )


# ---- writing ---------------------------------------------------------------------------------


def save(folder: Path, state: Mapping[str, Any], config_yaml: str, meta: Mapping[str, Any]) -> Path:
    """Write a checkpoint folder in one atomic step, replacing one of the same name.

    Args:
        folder: where the checkpoint shall stand.
        state: nested dicts, lists and tuples of tensors, NumPy arrays and plain values.
        config_yaml: the resolved configuration as text.
        meta: what to record about the run (device, precision, compile mode); format, versions and
            check sums are added.

    Raises:
        UserError: the state holds a foreign object, or the disk refused; what stood at `folder`
            before is untouched then, and nothing is left behind.
    """
    encoder = _Encoder()
    structure = encoder.encode(dict(state))
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for file in (WEIGHTS, TENSORS):
            save_file(encoder.unshared(file), temporary / file)
        _write(temporary / STRUCTURE, json.dumps(structure))
        _write(temporary / "config.yaml", config_yaml)
        files = {name: _fingerprint(temporary / name) for name in (WEIGHTS, TENSORS, STRUCTURE)}
        record = {"versions": versions(), **meta, "format": FORMAT, "files": files}
        _write(temporary / "meta.json", json.dumps(record, indent=2))
        for name in os.listdir(temporary):
            _flush(temporary / name)
        _flush(temporary)
        _put(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(
                f"cannot write the checkpoint {folder}: {_reason(error)}; earlier checkpoints are "
                "intact; make room (or the folder writable) and resume"
            ) from error
        raise
    return folder


def save_step(
    run_dir: Path,
    step: int,
    state: Mapping[str, Any],
    config_yaml: str,
    meta: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Save `run_dir`/checkpoints/step_000000123, then drop all but the newest `keep`.

    The caller holds the run's `Lock`: leftovers of a killed process are removed.
    """
    folder = run_dir / "checkpoints"
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    saved = save(folder / f"step_{step:09d}", state, config_yaml, meta)
    kept = {saved, *_complete(run_dir)[-max(keep, 1) :]}
    for path in folder.iterdir():
        if _STEP.fullmatch(path.name) and path not in kept and _is_complete(path):
            _remove(path)
    return saved


def _put(temporary: Path, folder: Path) -> None:
    """Rename into place. A folder cannot be renamed over another, so the old one steps aside."""
    aside = folder.with_name(f"{folder.name}.replaced")
    if folder.exists():
        _remove(aside)
        folder.rename(aside)  # killed here: `load` and `latest` look aside
    try:
        temporary.rename(folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        raise
    _flush(folder.parent)
    _remove(aside)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; renamed first, so that no half of it keeps a checkpoint's name."""
    with suppress(OSError):
        grave = folder.with_name(f".tmp-removed-{folder.name}-{os.getpid()}")
        folder.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _reason(error: Exception) -> str:
    """What the system said: safetensors hides the error number in its text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os error (\d+)", str(error))
    return os.strerror(int(code[1])) if code else str(error)


# ---- reading ---------------------------------------------------------------------------------


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """State (tensors on the CPU) and meta of a checkpoint folder.

    Raises:
        UserError: no checkpoint, another format, a damaged file (named), or a foreign object.
    """
    aside = folder.with_name(f"{folder.name}.replaced")
    if not folder.exists() and aside.exists():
        folder = aside
    meta = _meta(folder)
    if meta.get("format") != FORMAT:
        raise UserError(
            f"the checkpoint {folder} has format {meta.get('format')}, this rl_shift "
            f"({versions()['rl_shift']}) reads format {FORMAT}: use the version that wrote it"
            f" ({dict(meta.get('versions') or {}).get('rl_shift', 'unknown')}) or train anew"
        )
    tensors: dict[str, Tensor] = {}
    for file in (WEIGHTS, TENSORS, STRUCTURE):
        path = folder / file
        try:
            intact = _fingerprint(path) == meta["files"][file]
        except (OSError, KeyError, TypeError) as error:
            raise _damaged(path, str(error)) from error
        if not intact:
            raise _damaged(path, "its check sum does not fit")
        if file != STRUCTURE:
            try:
                tensors |= {f"{file}:{name}": value for name, value in load_file(path).items()}
            except (SafetensorError, OSError) as error:
                raise _damaged(path, str(error)) from error
    path = folder / STRUCTURE
    try:
        state = _decode(json.loads(path.read_text(encoding="utf-8")), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__} {error}") from error
    if not isinstance(state, dict):
        raise _damaged(path, "its top is no mapping")
    return state, meta


def latest(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run; half-written folders are passed over."""
    found = _complete(run_dir)
    if not found:
        raise UserError(
            f"no checkpoint to resume from in {run_dir / 'checkpoints'}: give the folder of a run, "
            "or start it anew with --overwrite"
        )
    return found[-1]


def _complete(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first; a replaced one counts only where its successor is absent."""
    found: dict[int, Path] = {}
    folder = run_dir / "checkpoints"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:  # "step_1" sorts before "step_1.replaced"
        match = _STEP.fullmatch(name)
        if match and _is_complete(folder / name):
            found.setdefault(int(match[1]), folder / name)
    return [found[step] for step in sorted(found)]


def _is_complete(folder: Path) -> bool:
    try:
        meta = _meta(folder)
        if meta.get("format") != FORMAT:
            return True  # for `load` to refuse with the reason
        return all(
            (folder / name).stat().st_size == file["bytes"] for name, file in meta["files"].items()
        )
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return False


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} is no checkpoint: it has no meta.json") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(meta, dict):
        raise _damaged(path, "it holds no mapping")
    return meta


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"damaged checkpoint file {path} ({why}): resume from an earlier checkpoint")


# ---- what ran --------------------------------------------------------------------------------


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, this package and its libraries; in a checkout also the git hash."""
    found = {"python": platform.python_version()}
    for name in ("rl_shift", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown" if name == "rl_shift" else "absent"
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            found["git"] = subprocess.run(
                ["git", "-C", str(root), "rev-parse", "HEAD"],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
    return found


# ---- one process per run ---------------------------------------------------------------------


class Lock:
    """Keeps a second process out of a run folder: `with Lock(run_dir): ...`.

    The file names its owner (pid, host, start time). A lock whose process is gone is taken over; a
    pid that the system gave to another process since is told apart by its start time.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "lock"
        self._owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "start": _started(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }

    def __enter__(self) -> Lock:
        """Take the lock, or raise a UserError that names the process that holds it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.path.parent):
                self._take()
        except OSError as error:
            raise UserError(
                f"cannot write to the run folder {self.path.parent}: {error.strerror}; choose "
                "another with --run-dir"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock, if it is still ours."""
        with suppress(OSError):
            if _owner(self.path) == self._owner:
                self.path.unlink()

    def _take(self) -> None:
        holder = _owner(self.path)
        if holder is not None:
            if _alive(holder):
                raise UserError(
                    f"the run folder {self.path.parent} is in use by process {holder.get('pid')} on"
                    f" {holder.get('host')} since {holder.get('since')}: wait for it, stop it or "
                    f"choose another --run-dir (if that process is gone, delete {self.path})"
                )
            self.path.unlink()
        descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(self._owner))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time may judge and replace a stale lock; the system frees this one."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no flock
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _owner(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; {} where its process died before it had signed."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _alive(owner: Mapping[str, Any]) -> bool:
    """Whether the owner still runs, as far as this process can tell."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if owner.get("host") != socket.gethostname() or os.name == "nt":
        return True  # out of reach; on Windows signal 0 would not ask but interrupt
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # another user's process
    start = _started(pid)
    return start is None or owner.get("start") in (None, start)


def _started(pid: int) -> str | None:
    """Boot and tick at which a process began; "" for one that ended, None where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # the name, in brackets, may hold spaces; state and start time are fields 3 and 22
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"
