"""The YAML grid of a sweep: agents x datasets x overrides, as resolved runs.

    agents:
    - NAME                            # or module:Class
    - {agent: NAME, preset: NAME.gym_mujoco, label: tuned, seeds: 1}
    datasets: [ID, data/some.hdf5]    # and envs: [ID] for runs without data
    seeds: 3                          # every run holds all its seeds
    settings: {updates: 20000, eval_every: 5000}
    overrides: {agent.learning_rate: [0.001, 0.0003]}  # every combination is a run

An entry of `agents` may hold any of the other keys; its settings are added to those of the grid,
its other keys replace them. Settings are named as the flags of `rl-shift train`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl_shift import config
from rl_shift.config import SHORT_FLAGS, RunConfig
from rl_shift.errors import UserError, nearest

SHARED = ("preset", "datasets", "envs", "seeds", "seed", "settings", "overrides")
GRID_KEYS = ("agents", "search", *SHARED)
ENTRY_KEYS = ("agent", "label", *SHARED)


@dataclass(frozen=True)
class Planned:
    """One run of a sweep and its folder below the sweep's own; `entry` labels its agent."""

    name: str
    run: RunConfig
    entry: str = ""


def read(path: str | Path) -> list[Planned]:
    """Every run of a grid file, in its order.

    Raises:
        UserError: an unknown key anywhere, a value of the wrong type, or two runs of one name.
    """
    ((where, grid),) = config.layers_of(None, [path])
    check_keys(grid, GRID_KEYS, where)
    planned: dict[str, Planned] = {}
    for number, entry in enumerate(_listed(grid, "agents", where)):
        inside = f"agents.{number} in {where}"
        if not isinstance(entry, Mapping):
            entry = {"agent": str(entry)}
        check_keys(entry, ENTRY_KEYS, inside)
        settings = _flat(grid, "settings", where) | _flat(entry, "settings", inside)
        for plan in _runs_of({**grid, **entry}, settings, inside):
            if plan.name in planned:
                raise UserError(
                    f"two runs of {where} would be called {plan.name}: give one entry of agents a "
                    "label of its own"
                )
            planned[plan.name] = plan
    return list(planned.values())


def search_of(path: str | Path) -> Mapping[str, Any] | None:
    """The `search` of a grid file, unchecked; None where there is none."""
    ((where, grid),) = config.layers_of(None, [path])
    found = grid.get("search")
    if found is not None and not isinstance(found, Mapping):
        raise UserError(f"search in {where} must hold keys and values, not {found!r}")
    return found


def placed(planned: Planned, out: Path) -> Planned:
    """The run with its folder filled in."""
    return replace(planned, run=replace(planned.run, run_dir=str(out / planned.name)))


def _runs_of(entry: Mapping[str, Any], settings: dict[str, Any], where: str) -> Iterator[Planned]:
    """What one agent is trained on, in every variant."""
    agent, preset = entry.get("agent"), entry.get("preset")
    sources = [
        {key: str(value)}
        for name, key in (("datasets", "tasks.0.dataset"), ("envs", "tasks.0.env"))
        for value in (_listed(entry, name, where) if name in entry else [])
    ]
    given = {key: entry[key] for key in ("seeds", "seed") if key in entry}
    for source in sources or [{}]:
        for variant in _variants(entry, where):
            overrides = settings | given | source | variant
            try:
                run = config.make(agent, preset=preset, overrides=overrides)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            parts = [entry.get("label") or run.agent_name.rpartition(":")[2], run.tasks[0].name]
            parts += [f"{key.rpartition('.')[2]}={value}" for key, value in variant.items()]
            name = ".".join(re.sub(r"[^\w.=+-]+", "-", str(part)) for part in parts)
            yield Planned(name, run, str(parts[0]))


def _variants(entry: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Every combination of the values under `overrides`."""
    axes = _flat(entry, "overrides", where)
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"overrides.{key} in {where} must be a list of values, not {values!r}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _flat(data: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """A mapping of settings with dotted keys; the short names of the first task in full."""
    settings = data.get(name) or {}
    if not isinstance(settings, Mapping):
        raise UserError(f"{name} in {where} must hold keys and values, not {settings!r}")

    def leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, list) and prefix == "tasks.":
            value = {str(index): task for index, task in enumerate(value)}
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                yield from leaves(f"{prefix}{key}.", inner)
        else:
            yield prefix[:-1], value

    found = dict(leaves("", settings)) if settings else {}
    return {f"tasks.0.{k}" if k in SHORT_FLAGS else k: value for k, value in found.items()}


def _listed(data: Mapping[str, Any], name: str, where: str) -> list[Any]:
    values = data.get(name)
    if not isinstance(values, list) or not values:
        raise UserError(f"{name} in {where} must be a list, not {values!r}")
    return values


def check_keys(data: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raises a `UserError` that names the nearest key for one that is not known."""
    for key in data:
        if key not in known:
            raise UserError(
                f"unknown key {key!r} in {where}{nearest(str(key), known)}; its keys are "
                f"{', '.join(known)}"
            )
