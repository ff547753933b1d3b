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

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl_shift.errors import UserError
from rl_shift.lock import Lock
from rl_shift.state_tree import TENSORS, WEIGHTS, Encoder, decode

__all__ = ["Lock", "latest", "load", "save", "save_step", "versions"]

FORMAT = 1
STRUCTURE = "train_state.json"
ASIDE = ".overwritten"  # in a run folder: what it held before, until the new run has begun
_STEP = re.compile(r"step_(\d+)(\.replaced)?")
log = logging.getLogger(__name__)
_PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "safetensors", "h5py")


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
    encoder = Encoder()
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
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {folder}: {_reason(error)}; earlier checkpoints are "
            "intact; make room (or the folder writable) and resume"
        ) from error
    except BaseException:  # an interrupt
        shutil.rmtree(temporary, ignore_errors=True)
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
        state = decode(json.loads(path.read_text(encoding="utf-8")), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__} {error}") from error
    if not isinstance(state, dict):
        raise _damaged(path, "its top is no mapping")
    return state, meta


def latest(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run; a damaged newer one is named and passed over."""
    found = _complete(run_dir)
    for path in (run_dir / "checkpoints").glob("step_*"):
        newer = _step(path) > (_step(found[-1]) if found else -1)
        if newer and not _is_complete(path):
            log.warning(
                "note: the checkpoint %s is damaged (a file is missing or cut short): %s",
                path,
                f"taking {found[-1].name}, which is older" if found else "there is no older one",
            )
    if not found:
        aside = run_dir / ASIDE
        kept = f"; what it was to overwrite lies in {aside}" if aside.is_dir() else ""
        raise UserError(
            f"no checkpoint to resume from in {run_dir / 'checkpoints'}: give the folder of a run, "
            f"or start it anew with --overwrite{kept}"
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


def _step(folder: Path) -> int:
    """The number in a checkpoint's name; -1 for what is none."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else -1


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
    return UserError(
        f"damaged checkpoint file {path} ({why}): delete {path.parent} to resume from the "
        "checkpoint before it"
    )


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
