"""What `rl-shift data list`, `info` and `verify` say about datasets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rl_shift import dataset_lookup, datasets
from rl_shift.dataset_files import opened, read_raw
from rl_shift.dataset_table import table
from rl_shift.errors import UserError


def list_datasets() -> list[dict[str, Any]]:
    """One row per id: `id`, `kind`, `env_id`, `path` (None where no file is found), `size`."""
    here = dataset_lookup.local_files()
    by_name = {path.name: path for path in here.values()}
    rows = []
    for name, file in dataset_lookup.BUNDLED.items():
        packaged = Path(datasets.__file__).parent / file
        there = packaged if packaged.exists() else None
        rows.append(_row(name, "bundled", "Hopper-v5", there))
    claimed = set()
    for entry in table().values():
        path = by_name.get(entry.file) or here.get(entry.id)
        if path is not None:
            claimed.add(path)
        rows.append(_row(entry.id, "D4RL", entry.env_id, path, entry.size))
    for name, path in here.items():
        if path not in claimed:
            rows.append(_row(name, "local", datasets.env_for(name), path))
    for name in dataset_lookup.registered():
        rows.append(_row(name, "entry point", None, None))
    return rows


def _row(
    id: str, kind: str, env_id: str | None, path: Path | None, size: int | None = None
) -> dict[str, Any]:
    if path is not None:
        size = path.stat().st_size
    return {"id": id, "kind": kind, "env_id": env_id, "path": path, "size": size}


def info(id_or_path: str | Path) -> dict[str, Any]:
    """Everything about one dataset that a reader may want: file, mapping, scores, statistics."""
    from rl_shift.evaluation import normalized_score, normalized_spread

    found = datasets.resolve(id_or_path)
    arrays = datasets.load(found)
    numbers = datasets.statistics(arrays)
    report: dict[str, Any] = {
        "id": found.id,
        "path": str(found.path),
        "bytes": found.path.stat().st_size,
        "sha256": datasets.sha256(found.path),
        "origin": found.origin,
        "env_id": found.env_id,
        "horizon": found.horizon,
        "obs": list(arrays["obs"].shape[1:]),
        "action": list(arrays["action"].shape[1:]),
        "obs_pad": found.obs_pad,
        "reference_scores": found.reference_scores,
        "statistics": numbers,
        "notes": notes(found),
    }
    if found.reference_scores is not None:
        report["normalized_score_mean"] = float(
            normalized_score(numbers["return_mean"], *found.reference_scores)
        )
        report["normalized_score_std"] = float(
            normalized_spread(numbers["return_std"], *found.reference_scores)
        )
    return report


def notes(found: datasets.DatasetInfo) -> list[str]:
    """Known properties of a dataset's family that a user should know before training on it."""
    said = []
    entry = table().get(found.id)
    if found.env_id is None:
        said.append("no Gymnasium environment is known for it: give --env to evaluate")
    elif found.family in ("halfcheetah", "hopper", "walker2d", "ant"):
        said.append(
            f"evaluated in {found.env_id}; the simulator is newer than D4RL's, so scores are not "
            "exactly comparable with published ones"
        )
    if found.obs_pad:
        said.append(f"observations of {found.env_id} are padded with {found.obs_pad} zeros")
    if entry is not None and entry.domain == "gym-mujoco" and entry.version == "v0":
        said.append("version 0 of the MuJoCo sets has known defects; version 2 is the benchmark")
    elif entry is not None and entry.deprecated:
        said.append("D4RL has superseded this version")
    if found.family == "maze2d":
        said.append(
            "one continuous trajectory: goal switches (`terminals` or `timeouts`) are left out and "
            "nothing terminates; rewards are those of the current, not the next, state"
        )
    if found.family == "antmaze":
        said.append(
            "rewards and terminals were relabelled from the next state; several rows of an episode "
            "may be terminal, so terminals are not a count of episodes"
        )
    return said


def verify(id_or_path: str | Path) -> dict[str, Any]:
    """Reads a file anew and reports `problems` (training would refuse it) and `warnings`."""
    report: dict[str, Any] = {"id": str(id_or_path), "problems": [], "warnings": []}
    try:
        found = datasets.resolve(id_or_path)
        report |= {"id": found.id, "path": str(found.path)}
        with opened(found.path) as source:
            raw = read_raw(source)
        arrays = datasets.load(found, cache=False)
    except UserError as error:
        report["problems"].append(str(error))
        return report
    report["sha256"] = datasets.sha256(found.path)
    report["transitions"] = len(arrays["reward"])
    report["episodes"] = len(datasets.episode_returns(arrays))
    entry = table().get(found.id)
    size = found.path.stat().st_size
    if entry is not None and entry.size not in (None, size):
        report["warnings"].append(
            f"{size} bytes, the published {entry.file} has {entry.size}: not the same file"
        )
    if found.family == "maze2d":
        return report  # its marks are goal switches, not ends
    if raw.timeouts is None:
        report["warnings"].append(
            "no `timeouts`: episodes are cut "
            + (f"every {found.horizon} steps" if found.horizon else "at terminals only")
        )
    elif (raw.timeouts & raw.terminals).any():
        both = int((raw.timeouts & raw.terminals).sum())
        report["warnings"].append(f"{both} rows are terminal and timeout: taken as terminal")
    if raw.next_observations is None:
        report["warnings"].append("no `next_observations`: rows that end in a timeout are left out")
    else:
        within = ~(raw.terminals if raw.timeouts is None else raw.terminals | raw.timeouts)[:-1]
        gap = np.abs(raw.next_observations[:-1] - raw.observations[1:])
        wrong = int((gap[within] > 1e-5).any(axis=tuple(range(1, gap.ndim))).sum())
        if wrong:
            report["warnings"].append(
                f"{wrong} rows inside episodes whose next_observations differ from the next row"
            )
    return report


def against_d4rl(id_or_path: str | Path) -> tuple[int, list[str]]:
    """Legacy mode beside the package d4rl's own function: transitions, and what differs.

    Of d4rl only `qlearning_dataset` is called, with the arrays of the file: its environments and
    `get_dataset` need mujoco-py, which is no longer built for current Pythons.

    Raises:
        UserError: d4rl cannot be imported.
    """
    try:
        from d4rl import qlearning_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"d4rl cannot be imported ({error}): it needs gym and mujoco-py, which current Pythons "
            'and MuJoCo no longer have; where they are: pip install "rl_shift[d4rl]"'
        ) from error
    found = datasets.resolve(id_or_path)
    with opened(found.path) as source:
        raw = read_raw(source, next_observations=False)
    arrays = {
        "observations": raw.observations,
        "actions": raw.actions,
        "rewards": raw.rewards,
        "terminals": raw.terminals,
    }
    if raw.timeouts is not None:
        arrays["timeouts"] = raw.timeouts
    theirs = qlearning_dataset(SimpleNamespace(_max_episode_steps=found.horizon), dataset=arrays)
    ours = datasets.load(found, mode="legacy_qlearning", cache=False)
    names = {
        "observations": "obs",
        "actions": "action",
        "rewards": "reward",
        "next_observations": "next_obs",
        "terminals": "terminated",
    }
    differing = [
        name
        for name, own in names.items()
        if theirs[name].shape != ours[own].shape or not np.array_equal(theirs[name], ours[own])
    ]
    return len(ours["reward"]), differing
