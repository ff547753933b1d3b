"""The table of the 148 D4RL ids: files, dimensions, reference scores, environments."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One D4RL dataset id."""

    id: str
    family: str
    domain: str
    env_id: str | None  # Gymnasium id to evaluate in; None where Gymnasium has no equal task
    folder: str  # on the download server only
    file: str
    size: int | None  # bytes, where known
    reference_scores: tuple[float, float]
    horizon: int
    obs_dim: int
    act_dim: int
    version: str
    deprecated: bool
    notes: dict[str, Any]


@cache
def _document() -> dict[str, Any]:
    text = files("rl_shift").joinpath("d4rl_scores.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


@cache
def table() -> dict[str, Entry]:
    """All ids, sorted by name."""
    document = _document()
    return {
        id: _entry(id, document["families"][row["family"]] | row)
        for id, row in document["datasets"].items()
    }


def _entry(id: str, row: dict[str, Any]) -> Entry:
    known = {"in_infos_py", "reward_type", "maze_spec", "maze_map"}
    return Entry(
        id=id,
        family=row["family"],
        domain=row["domain"],
        env_id=row["env_id"],
        folder=row["dir"],
        file=row["file"],
        size=row["size"],
        reference_scores=(row["ref_min"], row["ref_max"]),
        horizon=row["horizon"],
        obs_dim=row["obs_dim"],
        act_dim=row["act_dim"],
        version=id.rpartition("-")[2],
        deprecated=row.get("deprecated", False),
        notes={key: row[key] for key in known & set(row)},
    )


def family_of(name: str) -> str | None:
    """Family of a file stem or environment id: "deep-ope-hopper-medium-500k", "Hopper-v5"."""
    words = re.split(r"[^a-z0-9]+", name.rpartition(":")[2].rpartition("/")[2].lower())
    for word in words:
        stem = word.removeprefix("adroithand")
        if stem in _document()["families"]:
            return stem
    return None


def family(name: str) -> dict[str, Any]:
    """env_id, domain, horizon and dimensions of a family."""
    row: dict[str, Any] = _document()["families"][name]
    return row


def reference_scores_of(env_id: str) -> tuple[float, float] | None:
    """Reference returns of the D4RL family an environment belongs to, whatever its version.

    maze2d has none: its scores belong to a maze and a reward type, not to the family.
    """
    name = family_of(env_id)
    if name is None or name == "maze2d":
        return None
    return family(name)["ref_min"], family(name)["ref_max"]
