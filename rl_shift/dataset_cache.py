"""Packed float32 copies of datasets, so that a second load is a memory map.

Beside a file `x.hdf5` lie `x.hdf5.native.npy`, all arrays one after the other in one float32 file,
and `x.hdf5.cache.json`, which says what they are and holds the file's sha256. A cache belongs to
one size and modification time of its source. Where the folder is read-only, both go to
`~/.cache/rl_shift` (or `$XDG_CACHE_HOME/rl_shift`).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from rl_shift import atomic
from rl_shift.dataset_rows import Transitions

FORMAT = 1
_FLAGS = ("terminated", "truncated")


def sha256(path: Path) -> str:
    """Checksum of a file, computed once per size and modification time."""
    known = _read_index(path).get("sha256")
    if isinstance(known, str):
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _update_index(path, {"sha256": digest})
    return digest


def load(path: Path, mode: str, settings: dict[str, Any]) -> tuple[Transitions, Any] | None:
    """Memory-mapped transitions and their notes; None unless a matching cache lies there.

    Pages are copied on write, so callers may change what they get.
    """
    entry = _read_index(path).get(mode)
    if not isinstance(entry, dict) or entry.get("settings") != settings:
        return None
    try:
        # The memory map is handed out as plain arrays: every slice of a memmap object is slow.
        flat = np.load(place(path, f"{mode}.npy"), mmap_mode="c", allow_pickle=False).view(
            np.ndarray
        )
        if flat.dtype != np.float32 or flat.size != sum(
            int(np.prod(shape)) for _, shape in entry["blocks"]
        ):
            return None
    except (OSError, ValueError, EOFError):
        return None
    blocks: dict[str, np.ndarray] = {}
    start = 0
    for key, shape in entry["blocks"]:
        size = int(np.prod(shape))
        block = flat[start : start + size].reshape(shape)
        blocks[key] = block != 0 if key in _FLAGS else block
        start += size
    tails = blocks.pop("tail_reward"), blocks.pop("tail_action")
    return Transitions(blocks, entry["true_next"], *tails), entry["notes"]


def save(
    path: Path, mode: str, settings: dict[str, Any], transitions: Transitions, notes: Any
) -> None:
    """Writes a cache where that is possible; images and discrete actions have none."""
    blocks = dict(transitions.arrays)
    blocks |= {"tail_reward": transitions.tail_reward, "tail_action": transitions.tail_action}
    if any(block.dtype not in (np.float32, np.bool_) for block in blocks.values()):
        return
    target = place(path, f"{mode}.npy")
    header = {
        "descr": "<f4",
        "fortran_order": False,
        "shape": (sum(block.size for block in blocks.values()),),
    }
    try:
        with atomic.replacing(target) as partial, partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks.values():
                np.ascontiguousarray(block, dtype="<f4").tofile(file)
    except OSError:
        # A cache is a convenience: without room for it the next load reads the source again.
        return
    entry = {
        "settings": settings,
        "blocks": [[key, list(block.shape)] for key, block in blocks.items()],
        "true_next": transitions.true_next,
        "notes": notes,
    }
    _update_index(path, {mode: entry})


def _read_index(path: Path) -> dict[str, Any]:
    """The index of `path`, empty if there is none or it belongs to another state of the file."""
    try:
        index = json.loads(place(path, "cache.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(index, dict) or index.get("source") != _fingerprint(path):
        return {}
    return index


def _update_index(path: Path, entries: dict[str, Any]) -> None:
    index = _read_index(path) | {"source": _fingerprint(path)} | entries
    with suppress(OSError):
        atomic.write_text(place(path, "cache.json"), json.dumps(index))


def _fingerprint(path: Path) -> list[Any]:
    status = path.stat()
    return [FORMAT, status.st_size, status.st_mtime_ns]


def place(path: Path, ending: str) -> Path:
    """Where a cache file of `path` lies: beside it, or in the user's cache folder.

    The installed package counts as read-only: a dataset that comes with it leaves no files there.
    """
    folder = path.resolve().parent
    # Mode bits as well as access: a superuser may write anywhere, yet read-only is meant so.
    writable = bool(folder.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    package = Path(__file__).resolve().parent
    if writable and folder != package and os.access(folder, os.W_OK):
        return folder / f"{path.name}.{ending}"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    crc = zlib.crc32(str(folder).encode())
    return Path(base) / "rl_shift" / f"{crc:08x}-{path.name}.{ending}"
