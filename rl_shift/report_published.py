"""The chapter of a report that puts runs on D4RL's own files beside CORL's published scores."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from rl_shift.report_document import Block, Heading, Listing, Paragraph, Table
from rl_shift.report_runs import Gathered
from rl_shift.report_sections import sections


@cache
def table() -> dict[str, Any]:
    """`source`, `columns`, and under `last` and `best` per dataset id mean and std per column."""
    text = files("rl_shift").joinpath("published_scores.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def published(dataset: str, agent: str, which: str = "last") -> tuple[float, float] | None:
    """Published mean and standard deviation over the seeds; None where there is none.

    Args:
        dataset: D4RL id.
        agent: its name here; case and signs do not matter.
        which: "last" for the final evaluation, "best" for the highest of a run.
    """
    names = [_folded(name) for name in table()["columns"]]
    row = table()[which].get(dataset)
    if row is None or _folded(agent) not in names:
        return None
    value, spread = row[names.index(_folded(agent))]
    return float(value), float(spread)


def _folded(name: str) -> str:
    return re.sub(r"[^a-z0-9%]", "", name.lower())


def chapter(found: Gathered, pictures: Path | None) -> list[Block]:
    """Our last scores and theirs, on the datasets whose files are D4RL's own.

    A run counts if its results.json says `D4RL (ID)` for the origin of its data, which is written
    only where the file has the published number of bytes. Data that are merely named like D4RL's
    are listed as not compared.
    """
    rows, passed = [], []
    quiet = Gathered(found.runs)  # what is not comparable has been told already
    for section in sections(quiet):
        for (row, label), cell in sorted(section.cells.items()):
            data, agent = cell.leg.data, cell.runs[0].agent.rpartition(":")[2]
            theirs = published(str(data), agent)
            if theirs is None:
                continue
            if cell.leg.origin != f"D4RL ({data})":
                passed.append(f"{label} on {row}: {cell.leg.origin or 'data of unknown origin'}")
            elif cell.counts:
                rows.append(_row(row, label, cell, theirs, published(str(data), agent, "best")))
    if not rows and not passed:
        return []
    blocks: list[Block] = [Heading("Beside published scores")]
    if rows:
        head = ["dataset", "agent", "last", "95 % interval", "CORL last", "difference"]
        head += ["best", "CORL best", "seeds", "updates"]
        caption = (
            f"D4RL-normalised scores beside {table()['source']}, mean ± standard deviation over an "
            "unstated number of seeds after 1,000,000 updates (other budgets: SAC-N, EDAC, DT), in "
            "an older simulator. Best: the highest evaluation, chosen by looking."
        )
        blocks.append(Table(caption, head, rows, words=2))
    else:
        blocks.append(Paragraph("No run is on a file of D4RL's own."))
    if passed:
        title = "Not compared, because the data are not D4RL's own files"
        blocks.append(Listing(title, passed))
    return blocks


def _row(
    row: str, label: str, cell: Any, last: tuple[float, float], best: tuple[float, float] | None
) -> list[str]:
    value, low, high = cell.interval()
    own = cell.best()
    updates = sorted({run.updates for run in cell.runs})
    return [
        row,
        label,
        f"{value:.1f}",
        f"[{low:.1f}, {high:.1f}]" if low == low else "",
        f"{last[0]:.1f} ± {last[1]:.1f}",
        f"{value - last[0]:+.1f}",
        "" if own is None else f"{own:.1f}",
        "" if best is None else f"{best[0]:.1f} ± {best[1]:.1f}",
        f"{len(cell.seeds)}",
        ", ".join(f"{n:,}" for n in updates),
    ]
