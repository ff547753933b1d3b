"""`rl-shift data report`: datasets side by side as a table and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_shift import plotting
from rl_shift.data_quality import Quality, Settings, qualities
from rl_shift.errors import UserError
from rl_shift.report_document import Block, Heading, Paragraph, Picture, Table, markdown

if TYPE_CHECKING:
    from rl_shift.data_commands import ReportSettings

NAME = "data-report"


def report(ids: Sequence[str], settings: ReportSettings) -> int:
    """Describe, write and print; returns the exit code."""
    from rl_shift import report_pictures
    from rl_shift.runs import write

    asked = Settings(settings.rows, settings.queries, settings.k, settings.radius, settings.seed)
    found = qualities(ids, asked)
    out = Path(settings.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror}; choose another --out") from error
    table = _table(found, asked)
    blocks: list[Block] = [Heading("Datasets", 1), table]
    if report_pictures.available():
        picture(found, out / f"{NAME}.png")
        blocks.append(Picture(out / f"{NAME}.png", "Returns, lengths and states of each dataset"))
    else:
        print('no picture: it needs matplotlib: pip install "rl_shift[report]"')
    order = [one.id for one in sorted(found, key=lambda one: one.action_variance)]
    if len(found) > 1:
        blocks.append(Paragraph(f"By action variance, lowest first: {', '.join(order)}."))
    write(out / f"{NAME}.md", markdown(blocks))
    widths = [max(len(row[k]) for row in (table.head, *table.rows)) for k in range(len(table.head))]
    for row in (table.head, *table.rows):
        print("  ".join(f"{text:>{w}}" for text, w in zip(row, widths, strict=True)))
    print(f"report: {out / f'{NAME}.md'}")
    return 0


def _table(found: Sequence[Quality], settings: Settings) -> Table:
    head = ["dataset", "transitions", "episodes", "return", "score", "length"]
    head += ["action variance", "state similarity", "transition diversity", "coverage"]
    rows = [
        [
            one.id,
            f"{one.transitions:,}",
            f"{len(one.returns):,}",
            f"{one.returns.mean():.1f} ± {one.returns.std():.1f}",
            "" if one.score is None else f"{one.score:.1f}",
            f"{one.lengths.mean():.0f} ({one.lengths.min()} to {one.lengths.max()})",
            f"{one.action_variance:.3f}",
            f"{one.state_similarity:.4f}",
            f"{one.transition_diversity:.3f}",
            f"{one.coverage:.0%}",
        ]
        for one in found
    ]
    caption = (
        f"k = {settings.k} neighbours from other episodes of {settings.queries} states among "
        f"{settings.rows} rows at random, radius {settings.radius:g}, observations normalised over "
        "all datasets shown. Return: mean ± standard deviation over the episodes. Action variance "
        "stands for action divergence: low where the state decides the action. Coverage: share of "
        "the cells of the common map."
    )
    return Table(caption, head, rows)


def picture(found: Sequence[Quality], path: Path) -> None:
    """One row per dataset: returns, lengths, and the map of its states."""
    import numpy as np

    figure = plotting.figure(9.5, 2.1 * len(found) + 0.5)
    grid: Any = figure.subplots(len(found), 3, squeeze=False)
    every = np.concatenate([one.returns for one in found])
    longest = max(int(one.lengths.max()) for one in found)
    bins = np.linspace(every.min(), max(every.max(), every.min() + 1), 41)
    for (returns, lengths, states), one in zip(grid, found, strict=True):
        returns.hist(one.returns, bins=bins, color="#0b5cad")
        returns.set_ylabel(f"{one.id}\nepisodes", fontsize=8)
        lengths.hist(one.lengths, bins=np.linspace(0, longest + 1, 41), color="#2e8b57")
        states.imshow(np.log1p(one.map.T), origin="lower", cmap="Blues", aspect="auto")
        states.set_xticks([])
        states.set_yticks([])
        facts = f"action variance {one.action_variance:.3f}, coverage {one.coverage:.0%}"
        states.set_title(facts, fontsize=8)
        for axes in (returns, lengths):
            axes.tick_params(labelsize=7)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    for axes, text in zip(grid[-1], ("return", "length", "states: first two axes"), strict=True):
        axes.set_xlabel(text, fontsize=8)
    plotting.save(figure, path)
