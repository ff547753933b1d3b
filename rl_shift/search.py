"""Hyper-parameter search of a sweep: Optuna proposes, the sweep's backend trains.

The grid file's `search` names a space; every entry of `agents` is a study of its own. A trial
trains the entry's runs (all datasets and seeds) with the proposed values; its value is their mean
last score. Trials lie in a journal beside the runs, so that the same command goes on: finished ones
are known, interrupted ones are resumed. Needs the extra `optuna`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rl_shift import config, grid, separate_seeds
from rl_shift.errors import UserError
from rl_shift.grid import Planned
from rl_shift.launcher import Job, Launcher, Report

JOURNAL = "search.journal"
TABLE = "search.json"


@dataclass(frozen=True)
class Search:
    """The grid file's `search`.

    Attributes:
        trials: of each study, those of earlier commands included.
        space: setting -> a list of choices, or {low, high} with `log` or `step`.
        seed: of the proposals.
        parallel: trials of a study at a time; proposals know only of trials that have ended.
    """

    trials: int
    space: Mapping[str, Any]
    seed: int = 0
    parallel: int = 2


def parsed(data: Mapping[str, Any], where: str) -> Search:
    """The `search` of a grid file, checked.

    Raises:
        UserError: unknown keys, an empty space, or ranges that are none.
    """
    grid.check_keys(data, tuple(Search.__dataclass_fields__), f"search in {where}")
    space = data.get("space")
    if not isinstance(space, Mapping) or not space:
        raise UserError(f"search.space in {where} must hold settings and their ranges")
    checked: dict[str, Any] = {}
    for key, given in space.items():
        right = isinstance(given, list) and len(given) > 1
        if isinstance(given, Mapping) and {"low", "high"} <= given.keys():
            grid.check_keys(given, ("low", "high", "log", "step"), f"search.space.{key} in {where}")
            with suppress(TypeError, ValueError):  # YAML reads 1e-5 as a word
                given = {
                    **given,
                    **{k: _number(given[k]) for k in ("low", "high", "step") if k in given},
                }
                right = given["low"] < given["high"]
        checked[key] = given
        if not right:
            raise UserError(
                f"search.space.{key} in {where} must be a list of choices or "
                f"{{low: A, high: B, log: true}}, not {given!r}"
            )
    counts = {key: data[key] for key in ("trials", "seed", "parallel") if key in data}
    wrong = [k for k, v in counts.items() if not isinstance(v, int) or v < (k != "seed")]
    if "trials" not in counts or wrong:
        raise UserError(f"search in {where} needs trials, a number of 1 or more; so is parallel")
    return Search(space=checked, **counts)


def _number(given: Any) -> int | float:
    if isinstance(given, bool):
        raise TypeError
    return given if isinstance(given, int) else float(given)


def proposed(trial: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a trial of Optuna."""
    values = {}
    for key, given in space.items():
        if isinstance(given, list):
            values[key] = given[trial.suggest_int(key, 0, len(given) - 1)]
        elif isinstance(given["low"], int) and isinstance(given["high"], int):
            extra = {k: given[k] for k in ("log", "step") if k in given}
            values[key] = trial.suggest_int(key, given["low"], given["high"], **extra)
        else:
            extra = {k: given[k] for k in ("log", "step") if k in given}
            values[key] = trial.suggest_float(key, given["low"], given["high"], **extra)
    return values


def changed(plan: Planned, values: Mapping[str, Any], number: int) -> Planned:
    """A planned run with the values of a trial."""
    base = yaml.safe_load(config.dump(plan.run))
    flat = {f"tasks.0.{k}" if k in config.SHORT_FLAGS else k: v for k, v in values.items()}
    layers = [("the grid", base), ("search.space", config.nested(flat))]
    run = config.resolve(plan.run.agent_name, layers)
    return Planned(f"{plan.name}.trial{number:04d}", run)


@dataclass
class _Trial:
    """One proposal under way."""

    study: Any
    number: int
    values: dict[str, Any]
    jobs: list[Job]
    reports: list[Report] = field(default_factory=list)


class Searching:
    """Studies in a folder, fed by a launcher.

    Args:
        plans: of each entry of `agents` that is searched, by its label.
        search: what is searched.
        out: folder of the runs and of the journal.
    """

    def __init__(self, plans: Mapping[str, Sequence[Planned]], search: Search, out: Path) -> None:
        try:
            import optuna  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError('search needs Optuna: pip install "rl_shift[optuna]"') from error
        self.optuna, self.plans, self.search, self.out = optuna, plans, search, out
        for group in plans.values():  # a wrong key fails before anything starts
            first = {
                key: given[0] if isinstance(given, list) else given["low"]
                for key, given in search.space.items()
            }
            changed(group[0], first, 0)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        out.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the journal's file backend is called experimental
            backend = optuna.storages.journal.JournalFileBackend(str(out / JOURNAL))
            storage = optuna.storages.JournalStorage(backend)
            self.studies = {
                label: optuna.create_study(
                    storage=storage,
                    study_name=label,
                    direction="maximize",
                    load_if_exists=True,
                    sampler=optuna.samplers.TPESampler(seed=search.seed),
                )
                for label in plans
            }
        self._open: list[_Trial] = []

    def begin(self, launcher: Launcher) -> None:
        """Submit interrupted trials, and new ones up to the number that runs side by side."""
        running = self.optuna.trial.TrialState.RUNNING
        for label, study in self.studies.items():
            for old in study.get_trials(deepcopy=False, states=(running,)):
                self._submit(launcher, label, old.number, old.user_attrs["values"])
            while self._count(study, running) < self.search.parallel and self._next(
                launcher, label
            ):
                pass

    def ended(self, launcher: Launcher) -> Callable[[Report], None]:
        """What a launcher calls for every job that has ended: tells Optuna, submits the next."""

        def tell(report: Report) -> None:
            for trial in list(self._open):
                if report.job in trial.jobs:
                    trial.reports.append(report)
                    if len(trial.reports) == len(trial.jobs):
                        self._close(launcher, trial)

        return tell

    def table(self) -> list[str]:
        """The best trials of every study, for people; also written to search.json."""
        lines, document = [], {}
        done = self.optuna.trial.TrialState.COMPLETE
        for label, study in self.studies.items():
            trials = study.get_trials(deepcopy=False, states=(done,))
            ranked = sorted(trials, key=lambda t: t.value, reverse=True)
            document[label] = [
                {"trial": t.number, "value": t.value, "settings": t.user_attrs["values"]}
                for t in ranked
            ]
            lines.append(f"{label}: {len(trials)} trials")
            for t in ranked[:5]:
                values = ", ".join(f"{k}={_text(v)}" for k, v in t.user_attrs["values"].items())
                lines.append(f"  {t.value:9.2f}  trial {t.number}: {values}")
        (self.out / TABLE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return lines

    def _next(self, launcher: Launcher, label: str) -> bool:
        """Propose and submit a trial; False if there are enough."""
        study = self.studies[label]
        if len(study.get_trials(deepcopy=False)) >= self.search.trials:
            return False
        trial = study.ask()
        values = proposed(trial, self.search.space)
        trial.set_user_attr("values", values)
        self._submit(launcher, label, trial.number, values)
        return True

    def _submit(self, launcher: Launcher, label: str, number: int, values: dict[str, Any]) -> None:
        jobs: list[Job] = []
        for plan in self.plans[label]:
            made = grid.placed(changed(plan, values, number), self.out)
            for job in separate_seeds.jobs(made.run, self.out / made.name):
                name = made.name if job.name == made.name else f"{made.name}/{job.name}"
                jobs.append(replace(job, name=name))
        trial = _Trial(self.studies[label], number, values, jobs)
        self._open.append(trial)
        for job in jobs:
            if separate_seeds.finished(job):
                trial.reports.append(Report(job, "finished"))
            else:
                launcher.submit(job)
        if len(trial.reports) == len(jobs):
            self._close(launcher, trial)

    def _close(self, launcher: Launcher, trial: _Trial) -> None:
        self._open.remove(trial)
        if any(report.state == "stopped" for report in trial.reports):
            return  # it stays a running trial, and is resumed
        label = next(k for k, study in self.studies.items() if study is trial.study)
        failed = any(report.state == "failed" for report in trial.reports)
        value = None if failed else _value(trial.jobs)
        state = self.optuna.trial.TrialState.FAIL if value is None else None
        trial.study.tell(trial.number, value, state=state)
        self._next(launcher, label)

    @staticmethod
    def _count(study: Any, state: Any) -> int:
        return len(study.get_trials(deepcopy=False, states=(state,)))


def _value(jobs: Sequence[Job]) -> float | None:
    """Mean of the last scores, or returns, of all seeds; None where one has no evaluation."""
    from rl_shift.runs import merit

    values = []
    for job in jobs:
        results = separate_seeds.read_results(job.folder)
        if results is None or results["last"] is None:
            return None
        values.append(merit(results["last"]))
    return float(np.mean(values))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
