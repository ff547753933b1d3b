"""Datasets larger than memory: the same Buffer over a packed file that is mapped, not read.

The transitions of an HDF5 file are packed once, some rows at a time, into a matrix beside it (or in
the user's cache folder); the system keeps in memory what is sampled often. It is chosen by itself
where the rows would take more than half of the memory that is free, and says so.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rl_shift import atomic, dataset_cache, datasets
from rl_shift.buffer import Buffer
from rl_shift.dataset_files import check_layout, opened
from rl_shift.errors import UserError

Memory = Literal["auto", "ram", "disk"]
SHARE = 0.5  # of the free memory that rows may take before they are mapped
CHUNK = 2**16  # rows packed at a time
COPIES = 2  # of the rows, while they are loaded into memory: the file's arrays, and the packed ones
FORMAT = 1


class Mapped(Buffer):
    """A Buffer whose rows the system reads from a file when they are drawn."""

    def watch(self, mapping: mmap.mmap) -> None:
        """Take the mapping of the rows; from now on they are drawn at random."""
        self._mapping = mapping
        self._advise("MADV_RANDOM")

    def statistics(self, key: str) -> tuple[Tensor, Tensor]:
        """As `Buffer.statistics`, reading ahead."""
        self._advise("MADV_SEQUENTIAL")
        found = super().statistics(key)
        self._advise("MADV_RANDOM")
        return found

    def _advise(self, advice: str) -> None:
        """Say how rows will be read: pages around a random row only push others out of memory."""
        if hasattr(mmap, advice):  # not on every system
            self._mapping.madvise(getattr(mmap, advice))


def _limits() -> Iterator[tuple[Path, Path]]:
    """Files with the limit and the use of memory of this process's control groups."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    groups = {(v1, "/"), (v2, "/")}
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kind, group = line.split(":", 2)
            if kind == "" or "memory" in kind.split(","):
                groups.add((v1 if kind else v2, group))
    for root, group in sorted(groups):
        folder = root / group.lstrip("/")
        names = ("limit_in_bytes", "usage_in_bytes") if root == v1 else ("max", "current")
        yield folder / f"memory.{names[0]}", folder / f"memory.{names[1]}"


def free_memory() -> int:
    """Bytes that this process can still use: what the system has free, cut to the container's."""
    found = [2**62]
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found.append(1024 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]))
    for limit, used in _limits():
        with suppress(OSError, ValueError):
            found.append(int(limit.read_text()) - int(used.read_text()))
    return max(0, min(found))


def rows_bytes(info: datasets.DatasetInfo) -> int:
    """Bytes of the packed transitions of a file."""
    with opened(info.path) as source:
        check_layout(source)
        shapes = source.shapes
        rows, obs = shapes["observations"][0], int(np.prod(shapes["observations"][1:]))
        action = int(np.prod(shapes["actions"][1:]))
    return 4 * rows * (2 * obs + action + 3)


def mapped_where_needed(
    info: datasets.DatasetInfo,
    task: int,
    columns: Sequence[str],
    mode: str,
    reward: str,
    memory: Memory | str,
    device: str | torch.device,
    seeds: Sequence[int],
) -> Buffer | None:
    """A mapped Buffer where the rows do not fit, or where it is asked for; None: load them.

    What is done is told. Where rows do not seem to fit and cannot be mapped, loading is tried.

    Raises:
        UserError: `memory` is "disk", and it cannot be.
    """
    told = wanted(info, memory)
    if told is None:
        return None
    refusal = _refusal(info, columns, mode, torch.device(device))
    if refusal and memory == "auto":
        print(f"note: {info.id} may not fit into memory, and cannot be read from disk: {refusal}")
        return None
    print(f"note: {told}")
    return mapped_buffer(info, task, columns, mode, reward, device, seeds)


def wanted(info: datasets.DatasetInfo, memory: Memory | str) -> str | None:
    """None if the rows fit into memory, else what is told the user."""
    if memory == "ram":
        return None
    size, free = COPIES * rows_bytes(info), free_memory()
    if memory == "auto" and size <= SHARE * free:
        return None
    why = "as asked" if memory == "disk" else f"{free / 2**30:.1f} GiB of memory are free"
    return (
        f"{info.id} takes {size / 2**30:.1f} GiB to load and is read from disk while training "
        f"({why}); --data-memory ram loads it all the same"
    )


def mapped_buffer(
    info: datasets.DatasetInfo,
    task: int,
    columns: Sequence[str] = (),
    mode: str = "native",
    reward: str = "raw",
    device: str | torch.device = "cpu",
    seeds: Sequence[int] = (0,),
) -> Buffer:
    """A flat Buffer over the packed file, which is made if need be.

    Args:
        info: an HDF5 file with `timeouts` and `next_observations`, as D4RL's v2 files are.
        task: value of the column `task`.
        columns: must be empty; what is derived from the data needs them in memory.
        mode: must be native.
        reward: a transform, see `datasets.reward_transform`.
        device: must be the CPU.
        seeds: see `Buffer`.

    Raises:
        UserError: something of this is not so, or there is no room on the disk.
    """
    refusal = _refusal(info, columns, mode, torch.device(device))
    if refusal:
        raise UserError(
            f"{info.id} cannot be read from disk while training: {refusal}; use --data-memory ram"
        )
    path = _packed(info, reward)
    mapped = np.load(path, mmap_mode="c")
    matrix = mapped.view(np.ndarray)
    shapes = _shapes(info)
    flat = ((), torch.float32)
    spec: dict[str, Any] = {
        "obs": (shapes["obs"], torch.float32),
        "action": (shapes["action"], torch.float32),
        "reward": flat,
        "next_obs": (shapes["obs"], torch.float32),
        "terminated": ((), torch.bool),
        "truncated": ((), torch.bool),
        "task": ((), torch.int64),
    }
    tasks = {"task": np.full(len(matrix), task, dtype=np.int64)}
    buffer = Mapped.from_packed(spec, matrix, tasks, device, seeds)
    buffer.watch(mapped._mmap)
    return buffer


def _refusal(
    info: datasets.DatasetInfo, columns: Sequence[str], mode: str, device: torch.device
) -> str | None:
    if columns:
        return f"the agent needs the columns {', '.join(columns)}, made from all rows"
    if mode != "native":
        return f"data mode {mode} needs all rows at once"
    if device.type != "cpu":
        return "it is mapped into the memory of the CPU only"
    if info.path.suffix == ".npz" or info.family == "maze2d":
        return "only HDF5 files of whole episodes are packed in parts"
    with opened(info.path) as source:
        missing = [k for k in ("timeouts", "next_observations") if k not in source.shapes]
        if missing:
            return f"the file has no {missing[0]}"
        if len(source.shapes["actions"]) != 2 or len(source.shapes["observations"]) != 2:
            return "its rows are no vectors"
    return None


def _shapes(info: datasets.DatasetInfo) -> dict[str, tuple[int, ...]]:
    with opened(info.path) as source:
        return {"obs": source.shapes["observations"][1:], "action": source.shapes["actions"][1:]}


def _packed(info: datasets.DatasetInfo, reward: str) -> Path:
    """The packed file of this state of the source and this reward, made if need be."""
    import h5py

    status = info.path.stat()
    facts = {
        "format": FORMAT,
        "bytes": status.st_size,
        "time": status.st_mtime_ns,
        "reward": reward,
    }
    path = dataset_cache.place(info.path, "packed.npy")
    note = path.with_name(f"{path.name}.json")
    with suppress(OSError, ValueError):
        if json.loads(note.read_text(encoding="utf-8")) == facts and path.is_file():
            return path
    with atomic.replacing(path, "make room") as partial:
        with opened(info.path), h5py.File(info.path, "r") as file:
            _pack(info, file, partial, reward)
        note.unlink(missing_ok=True)
    atomic.write_text(note, json.dumps(facts), "make room")
    return path


def _pack(info: datasets.DatasetInfo, file: Any, path: Path, reward: str) -> None:
    """Columns obs, action, reward, next_obs, terminated, truncated side by side, row by row."""
    rows = len(file["observations"])
    obs, action = file["observations"].shape[1], file["actions"].shape[1]
    terminated = np.asarray(file["terminals"]).reshape(-1) != 0
    truncated = (np.asarray(file["timeouts"]).reshape(-1) != 0) & ~terminated
    truncated[-1] = not terminated[-1]
    rewards = np.asarray(file["rewards"], dtype=np.float32).reshape(-1)
    ends = {"reward": rewards, "terminated": terminated, "truncated": truncated}
    scale, shift = datasets.reward_transform(reward, ends)
    if (scale, shift) != (1.0, 0.0):
        rewards = (rewards * scale + shift).astype(np.float32)
    matrix = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float32, shape=(rows, 2 * obs + action + 3)
    )
    for start in range(0, rows, CHUNK):
        part = slice(start, min(start + CHUNK, rows))
        chosen = np.asarray(file["actions"][part], dtype=np.float32)
        if np.abs(chosen).max() > 1 + 1e-4:
            raise UserError(
                f"{info.path}: actions between rows {part.start} and {part.stop} lie outside "
                "[-1, 1]; rescale the actions to the box"
            )
        block = np.concatenate(
            [
                file["observations"][part],
                np.clip(chosen, -1, 1),
                rewards[part, None],
                file["next_observations"][part],
                terminated[part, None],
                truncated[part, None],
            ],
            axis=1,
            dtype=np.float32,
        )
        if not np.isfinite(block).all():
            raise UserError(
                f"{info.path}: NaN or infinite values between rows {part.start} and {part.stop}; "
                "remove those rows or make the file again"
            )
        matrix[part] = block
    matrix.flush()
