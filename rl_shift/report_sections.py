"""Which runs of a report stand together, and which are not comparable."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rl_shift.report_cells import Cell, Chain, Section, last_of, scored
from rl_shift.report_runs import Gathered, Run

NO_DATA = "Trained in the environment, without a dataset"


def sections(found: Gathered) -> list[Section]:
    """The runs of one task, each in its place."""
    groups: defaultdict[tuple[str, str], list[Run]] = defaultdict(list)
    for label, run in _labelled(found):
        if len(run.legs) == 1:
            groups[run.legs[0].title, label].append(run)
    titles = _titles([group[0] for group in groups.values()], found)
    made: dict[tuple[str, str], Section] = {}
    for (_, label), group in sorted(groups.items()):
        leg, row = group[0].legs[0], titles[_identity(group[0])]
        cell = Cell(label, row, *_averaged(f"{label} on {row}", group, found))
        if cell.counts is False and not cell.refused:
            found.notes.append(f"{label} on {row} is unfinished: {cell.standing}")
        unit = "return" if leg.reference_scores is None else "D4RL-normalised score"
        origin = NO_DATA if leg.data is None else leg.origin or "Data of unknown origin"
        section = made.setdefault((origin, unit), Section(origin, unit))
        section.cells[row, label] = cell
    return [made[key] for key in sorted(made, key=lambda key: (key[0] == NO_DATA, key))]


def chains(found: Gathered) -> list[Chain]:
    """The runs of several tasks."""
    groups: defaultdict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for label, run in _labelled(found, quiet=True):
        if len(run.legs) > 1:
            groups[label, *(leg.title for leg in run.legs)].append(run)
    return [
        Chain(label, *_averaged(f"{label} on {', '.join(names)}", group, found))
        for (label, *names), group in sorted(groups.items())
    ]


def _labelled(found: Gathered, quiet: bool = False) -> list[tuple[str, Run]]:
    """Runs that were evaluated; the others are named."""
    label, named = labels(found.runs), []
    for run in found.runs:
        if run.evaluations or run.final is not None:
            named.append((label(run), run))
        elif not quiet:
            found.notes.append(f"{run.folder.name} has no evaluation ({run.standing})")
    return named


def _averaged(title: str, group: Sequence[Run], found: Gathered) -> tuple[tuple[Run, ...], str]:
    """Runs that shall be averaged, and why they are not."""
    if any(run.final is None for run in group) and any(run.final for run in group):
        group = [replace(run, final=None) for run in group]
        found.notes.append(f"{title}: not every run has a final evaluation, so none is used")
    refused = differences(group)
    if refused:
        found.problems.append(f"{title} is not averaged: {refused}")
    for run in group:
        found.notes += [f"{run.folder.name}/{k} failed: {e}" for k, e in run.errors.items()]
    return tuple(group), refused


def labels(runs: Sequence[Run]) -> Callable[[Run], str]:
    """Names of agents: variants that were trained on the same task show what differs."""
    short: defaultdict[str, set[str]] = defaultdict(set)
    tried: defaultdict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        short[run.agent.rpartition(":")[2]].add(run.agent)
        tried[run.agent, *(leg.title for leg in run.legs)].append(run)
    shown: defaultdict[str, set[str]] = defaultdict(set)
    for (agent, *_), same in tried.items():
        keys = {key for run in same for key in run.settings}
        shown[agent] |= {
            key for key in keys if len({repr(run.settings.get(key)) for run in same}) > 1
        }

    def label(run: Run) -> str:
        name = run.agent.rpartition(":")[2]
        parts = [name if len(short[name]) == 1 else run.agent]
        parts += [f"{key}={run.settings.get(key)}" for key in sorted(shown[run.agent])]
        return " ".join(parts)

    return label


def _identity(run: Run) -> tuple[Any, ...]:
    """What must be equal for scores of two agents to stand in one row."""
    leg = run.legs[0]
    return (leg.name, leg.sha256, leg.env, leg.reference_scores, leg.shift, run.data_mode)


def _titles(runs: Sequence[Run], found: Gathered) -> dict[tuple[Any, ...], str]:
    """A title for each identity: the task's name, and what differs if it stands for several."""
    names = ("", "sha256", "environment", "reference scores", "shift", "data mode")
    same: defaultdict[str, dict[tuple[Any, ...], None]] = defaultdict(dict)
    for run in runs:
        same[run.legs[0].name].setdefault(_identity(run))
    titles = {}
    for name, identities in same.items():
        differing = [i for i in range(1, len(names)) if len({key[i] for key in identities}) > 1]
        for key in identities:
            told = [f"{names[i]} {str(key[i])[: 12 if i == 1 else 60]}" for i in differing]
            titles[key] = f"{name} ({', '.join(told)})" if told else name
        if differing:
            listed = ", ".join(names[i] for i in differing)
            found.notes.append(
                f"{name} is not the same for all agents ({listed}): each has a row of its own"
            )
    return titles


def differences(runs: Sequence[Run]) -> str:
    """Why runs are not comparable; "" if they are."""
    for facts in (_trained, _evaluated):
        told = []
        found = [facts(run) for run in runs]
        for name in dict.fromkeys(name for fact in found for name in fact):
            holders: defaultdict[str, list[str]] = defaultdict(list)
            for run, fact in zip(runs, found, strict=True):
                holders[str(fact.get(name))].append(run.folder.name)
            if len(holders) > 1:
                values = [f"{value} in {_few(names)}" for value, names in holders.items()]
                told.append(f"{name} {', but '.join(values)}")
        if told:
            return "; ".join(told)
    seeds = [seed for run in runs for seed in run.seeds]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if not twice:
        return ""
    where = [run.folder.name for run in runs if set(twice) & set(run.seeds)]
    return f"seed {_few([str(seed) for seed in twice])} occurs more than once, in {_few(where)}"


def _trained(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"data mode": run.data_mode}
    for number, leg in enumerate(run.legs):
        of = f" of task {number}" if len(run.legs) > 1 else ""
        found |= {
            f"environment{of}": leg.env,
            f"reference scores{of}": leg.reference_scores,
            f"sha256 of the data{of}": leg.sha256,
            f"budget of updates{of}": leg.updates,
            f"budget of env steps{of}": leg.env_steps,
            f"reward{of}": leg.reward,
            f"shift{of}": leg.shift,
        }
    return found


def _evaluated(run: Run) -> dict[str, Any]:
    last = last_of(run)
    return {
        "last evaluation": f"after {last.updates:,} updates and {last.env_steps:,} env steps",
        "episodes": last.returns.shape[1],
        "seed of the episodes": last.seed,
    }


def _few(words: Sequence[str]) -> str:
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


# ---- the score of the data ---------------------------------------------------------------------


def add_data_scores(made: Iterable[Section]) -> None:
    """Mean scores of the datasets that are here and are, by their checksum, those of the runs."""
    from rl_shift import datasets
    from rl_shift.errors import UserError
    from rl_shift.runs import data_score

    for section in made:
        for row in section.rows:
            leg = section.leg(row)
            try:
                info = datasets.resolve(leg.data) if leg.data is not None else None
                if info is None or datasets.sha256(info.path) != leg.sha256:
                    continue
                mean, _ = data_score(info)
            except UserError:
                continue  # the data are not needed for a report
            section.data[row] = float(scored(leg, np.asarray(mean)))
