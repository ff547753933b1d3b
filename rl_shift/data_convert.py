"""`rl-shift data convert`: the same transitions as an HDF5, NPZ or Minari dataset.

HDF5 is D4RL's v2 layout. NPZ is OGBench's: `terminals` marks the end of every episode and `masks`
is 0 where it terminated; rewards and successors are in the file as well. Facts about the
environment are kept as attributes (NPZ: arrays without dimensions).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rl_shift import atomic, datasets
from rl_shift.dataset_minari import PREFIX
from rl_shift.dataset_minari import write as write_minari
from rl_shift.errors import UserError
from rl_shift.recording import write_hdf5


def convert(source: str, target: str, compression: str | None = None) -> str:
    """Write a dataset in the format that `target` names.

    Args:
        source: an id, a path or minari:ID.
        target: OUT.hdf5, OUT.h5, OUT.npz or minari:ID.
        compression: of HDF5.

    Returns:
        What was written.

    Raises:
        UserError: an unknown format, or a place that cannot be written.
    """
    suffix = Path(target).suffix
    if not target.startswith(PREFIX) and suffix not in (".hdf5", ".h5", ".npz"):
        raise UserError(
            f"cannot tell the format of {target!r}: end it in .hdf5 or .npz, or minari:ID"
        )
    info = datasets.resolve(source)
    arrays, attributes = _arrays(info), _attributes(info)
    if target.startswith(PREFIX):
        return write_minari(target, arrays, attributes)
    if suffix == ".npz":
        return str(_write_npz(Path(target), arrays, attributes))
    return str(write_hdf5(target, arrays, attributes, compression))


def _arrays(info: datasets.DatasetInfo) -> dict[str, np.ndarray]:
    """Transitions that never cross an episode's end, in D4RL's words."""
    found = datasets.load(info)
    return {
        "observations": found["obs"],
        "actions": found["action"],
        "rewards": found["reward"],
        "next_observations": found["next_obs"],
        "terminals": found["terminated"],
        "timeouts": found["truncated"],
    }


def _attributes(info: datasets.DatasetInfo) -> dict[str, Any]:
    known: dict[str, Any] = {"origin": f"{info.origin}, converted", "env_id": info.env_id}
    known["horizon"] = info.horizon
    if info.reference_scores is not None:
        known["reference_min"], known["reference_max"] = info.reference_scores
    return {key: value for key, value in known.items() if value is not None}


def _write_npz(path: Path, arrays: dict[str, np.ndarray], attributes: dict[str, Any]) -> Path:
    content = {key: arrays[key] for key in ("observations", "actions", "rewards")}
    content["next_observations"] = arrays["next_observations"]
    content["terminals"] = (arrays["terminals"] | arrays["timeouts"]).astype(np.float32)
    content["masks"] = (~arrays["terminals"]).astype(np.float32)
    content |= {key: np.asarray(value) for key, value in attributes.items()}
    with atomic.replacing(path, "choose another place") as partial:
        np.savez(partial, allow_pickle=False, **content)
    return path
