"""The tables of a report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from rl_shift.loggers import clock_text, rate_text
from rl_shift.metrics import Interval, iqm, mean, mean_interval, median, optimality_gap
from rl_shift.report_cells import CVAR, Cell, Chain, Section
from rl_shift.report_document import Table
from rl_shift.report_runs import Run
from rl_shift.report_statistics import Aggregate, bootstrapped, improvement

UNFINISHED = "†"
FEW = 5  # seeds; bootstrap intervals of fewer cover clearly less than 95 %


def overview(section: Section) -> Table:
    """Datasets by agents: the last policies."""
    known = bool(section.data)
    rows = []
    for row in section.rows:
        cells = {n: c for n in section.labels if (c := section.cells.get((row, n))) is not None}
        counted = {n: cell.interval().value for n, cell in cells.items() if cell.counts}
        top = max(counted, key=lambda n: counted[n]) if len(counted) > 1 else None
        texts = [_spread(cells[n], n == top) if n in cells else "" for n in section.labels]
        rows.append([row, *([_score(section.data.get(row))] if known else []), *texts])
    caption = (
        f"{section.origin}: {section.unit} of the last policy, mean over the seeds ± half the "
        "width of its 95 % t interval."
    )
    if any(not cell.counts for cell in section.cells.values()):
        caption += f" {UNFINISHED}: not finished."
    head = [_source(section), *(["the data"] if known else []), *section.labels]
    return Table(caption, head, rows, told=True)


def _source(section: Section) -> str:
    return "environment" if section.leg(section.rows[0]).data is None else "dataset"


def _spread(cell: Cell, top: bool) -> str:
    if cell.refused:
        return "not averaged"
    value, low, high = cell.interval()
    text = f"**{value:.1f}**" if top else f"{value:.1f}"
    if math.isfinite(low):
        text += f" ± {(high - low) / 2:.1f}"
    return text if cell.finished else f"{text} {UNFINISHED}"


def details(section: Section) -> Table:
    """One row per dataset and agent; columns without a number are left out."""
    head = [_source(section), "agent", "last", "95 % interval", f"worst {CVAR:.0%}"]
    head += ["best while training", "the data", "seeds", "updates", "env steps", "episodes"]
    head += ["evaluated", "status"]
    rows = []
    for (row, label), cell in sorted(section.cells.items()):
        seed, runs = cell.last[0].seed, cell.runs
        status = ", ".join(dict.fromkeys(run.status for run in runs))
        texts = [row, label, *_numbers(cell), _score(section.data.get(row)), f"{len(cell.seeds)}"]
        texts += [_counts(run.updates for run in runs), _counts(run.env_steps for run in runs)]
        texts += [_counts(episodes.returns.shape[1] for episodes in cell.last)]
        texts += ["in training" if seed is None else f"after, seed {seed}"]
        rows.append([*texts, "not comparable" if cell.refused else status])
    shown = [k for k in range(len(head)) if any(row[k] for row in rows)]
    head, rows = [head[k] for k in shown], [[row[k] for k in shown] for row in rows]
    caption = (
        f"{section.origin}: {section.unit}. Last: the policy as training left it. Worst "
        f"{CVAR:.0%}: mean of its worst episodes (CVaR), averaged over the seeds. Best while "
        "training: the highest mean over the seeds of all evaluations, an optimistic number, "
        "because it is chosen by looking. Episodes: of the last evaluation, per seed."
    )
    return Table(caption, head, rows, words=2)


def _numbers(cell: Cell) -> list[str]:
    if cell.refused:
        return ["", "", "", ""]
    value, low, high = cell.interval()
    between = f"[{low:.1f}, {high:.1f}]" if math.isfinite(low) else ""
    return [f"{value:.1f}", between, _score(float(cell.risk().mean())), _score(cell.best())]


def aggregates(section: Section, found: Aggregate, baseline: str | None) -> Table:
    """One row per agent over the common datasets."""
    head = ["agent", "seeds", "mean", "median", "IQM", "optimality gap", f"worst {CVAR:.0%}"]
    head += [f"P(better than {baseline})"] if baseline else []
    rows = []
    for label, scores in found.scores.items():
        statistics = [bootstrapped(scores, f) for f in (mean, median, iqm, optimality_gap)]
        statistics.append(bootstrapped(found.risks[label], mean))
        texts = [label, f"{len(scores)}", *(_interval(found) for found in statistics)]
        if baseline is not None:
            better = improvement(scores, found.scores[baseline])
            texts.append("" if label == baseline else _interval(better, digits=2))
        rows.append(texts)
    caption = (
        f"{section.origin}: {section.unit} over {len(found.rows)} common datasets "
        f"({', '.join(found.rows)}), with stratified bootstrap 95 % intervals. IQM: mean of the "
        "middle half of all runs. Optimality gap: mean shortfall from 100, lower is better."
    )
    few = [len(scores) for scores in found.scores.values() if 1 < len(scores) < FEW]
    if few:
        caption += f" With {min(few)} seeds to redraw from, these intervals are too narrow."
    return Table(caption.replace("over 1 common datasets", "over 1 common dataset"), head, rows)


def chain(found: Chain) -> Table:
    """The task matrix: what each task's training left of the tasks before it."""
    names = [leg.name for leg in found.runs[0].legs]
    scores = found.matrix()
    known = [k for k in range(len(names)) if np.isfinite(scores[k]).any()]
    rows = [[names[k], *(_cell(scores[k, j]) for j in range(len(names)))] for k in known]
    unit = "D4RL-normalised score" if found.normalised else "return"
    origins = dict.fromkeys(leg.origin or "no dataset" for leg in found.runs[0].legs)
    caption = (
        f"{found.label} on {len(names)} tasks in turn ({'; '.join(origins)}): {unit}, mean over "
        f"{scores.shape[-1]} seeds ± half the width of its 95 % t interval. Status: "
        f"{'; '.join(dict.fromkeys(run.standing for run in found.runs))}."
    )
    return Table(caption, ["after training on", *names], rows)


def _cell(seeds: np.ndarray) -> str:
    if not np.isfinite(seeds).all():
        return ""
    return mean_interval(seeds).text()


# ---- cost, data, versions ----------------------------------------------------------------------

SETTINGS = ("compile", "precision", "threads", "device")


def cost(runs: Sequence[tuple[str, Run]]) -> Table:
    """One row per agent."""
    head = ["agent", "runs", "seeds", "updates/s of a run", "wall time of all (h:min:s)", *SETTINGS]
    groups: defaultdict[str, list[Run]] = defaultdict(list)
    for label, run in runs:
        groups[label].append(run)
    rows = []
    for label, same in sorted(groups.items()):
        speeds = [run.cost["updates_per_s"] for run in same]
        texts = [label, f"{len(same)}", f"{sum(len(run.seeds) for run in same)}"]
        texts.append(" to ".join(dict.fromkeys(rate_text(f(speeds)) for f in (min, max))))
        texts.append(clock_text(sum(run.cost["wall_time_s"] for run in same)))
        texts += [", ".join(sorted({run.cost[key] for run in same})) for key in SETTINGS]
        rows.append(texts)
    caption = (
        "A run trains all its seeds; an update of a run is one of every seed it holds. Wall "
        "time includes the evaluations, and whatever else the machine did."
    )
    return Table(caption, head, rows)


def costs(runs: Sequence[tuple[str, Run]]) -> Table:
    """One row per run."""
    head = ["run", "agent", "seeds", "updates", "env steps", "updates/s", "wall time (h:min:s)"]
    rows = [
        [
            run.folder.name,
            label,
            ", ".join(map(str, run.seeds)),
            f"{run.updates:,}",
            f"{run.env_steps:,}",
            rate_text(run.cost["updates_per_s"]),
            clock_text(run.cost["wall_time_s"]),
            *(run.cost[key] for key in SETTINGS),
            run.standing,
        ]
        for label, run in runs
    ]
    return Table("Every run", [*head, *SETTINGS, "status"], rows, words=2, folded=True)


def data(made: Sequence[Section]) -> Table:
    """Where the data come from."""
    head = ["dataset", "origin", "environment", "data mode", "sha256", "score 0", "score 100"]
    rows = []
    for section in made:
        for row in section.rows:
            leg = section.leg(row)
            modes = {c.runs[0].data_mode for (of, _), c in section.cells.items() if of == row}
            low, high = leg.reference_scores or (None, None)
            texts = [row, section.origin, leg.env or "none", ", ".join(sorted(modes))]
            texts += [f"`{leg.sha256[:12]}`" if leg.sha256 else "", _score(low), _score(high)]
            rows.append(texts)
    return Table("Origins of the data. Scores 0 and 100: their returns.", head, rows, words=5)


def versions(runs: Sequence[Run]) -> Table:
    """What the runs were made with."""
    found: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for run in runs:
        for name, version in run.versions.items():
            found[name][version] = found[name].get(version, 0) + 1
    rows = []
    for name, counts in found.items():
        short = {(v[:12] if name == "git" else v): n for v, n in counts.items()}
        several = len(short) > 1
        told = [f"{v} (in {n})" if several else v for v, n in sorted(short.items())]
        rows.append([name, ", ".join(told)])
    return Table("Versions, and in how many runs where they differ", ["", "version"], rows, words=2)


def _interval(found: Interval, digits: int = 1) -> str:
    text = f"{found.value:.{digits}f}"
    if math.isfinite(found.low):
        text += f" [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return text


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _counts(numbers: Iterable[int]) -> str:
    """Different numbers; nothing where all are 0."""
    return ", ".join(f"{n:,}" for n in dict.fromkeys(numbers) if n)
