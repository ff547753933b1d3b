"""The command `report`: tables and pictures of many runs as Markdown and one HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rl_shift.errors import UserError, nearest
from rl_shift.options import Parser, options_of, split, taken

if TYPE_CHECKING:
    from rl_shift.report_cells import Section
    from rl_shift.report_document import Block
    from rl_shift.report_runs import Gathered, Run

USAGE = """rl-shift report RUN_DIR... [--evaluations FILE.json...] [options]
       rl-shift report bandit --pool DIR [options]"""
TEXT = """Compares runs by their results.json files alone. A RUN_DIR may also be a folder that
holds run folders, such as that of a sweep. --evaluations gives files of `rl-shift evaluate RUN_DIR
--json FILE`, which then take the place of the last evaluation of training. Runs that are not
comparable are not averaged, and corrupt files are skipped; both are named and make the exit code 1.
Pictures need matplotlib: pip install "rl_shift[report]"."""


# Chapters about runs of a special kind, "module:function", in their order in the document. Each is
# called with what was gathered and the folder for its pictures (None without matplotlib); it gives
# its blocks, none where no run is of its kind, and may add to the notes.
CHAPTERS: tuple[str, ...] = (
    "rl_shift.report_published:chapter",
    "rl_shift.report_continual:chapter",
    "rl_shift.report_lifelong:chapter",
)


@dataclass(frozen=True)
class ReportSettings:
    """Flags of `rl-shift report`."""

    out: str = "report"  # folder of report.md, report.html and the pictures
    baseline: str | None = None  # agent the others are compared with; default: the first by name
    title: str = "Report"  # first line of the report


def report(argv: list[str]) -> int:
    """`rl-shift report`."""
    if argv[:1] == ["bandit"]:
        from rl_shift.bandit import bandit

        return bandit(argv[1:])
    words, flags = split(argv, ("--help", "-h"))
    parser = Parser(options_of(ReportSettings), usage=USAGE, description=TEXT)
    if {"--help", "-h"} & set(flags):
        parser.parser.add_argument("--evaluations", metavar="FILE.json...")
        parser.parser.print_help()
        return 0
    files = taken(flags, "--evaluations")
    files += [
        word for word in words if word.endswith(".json") and Path(word).name != "results.json"
    ]
    settings = ReportSettings(**(parser.defaults() | parser.flags(flags)))
    folders = [word for word in words if word not in files]
    if not folders:
        raise UserError(f"give at least one RUN_DIR: {USAGE}")
    from rl_shift.report_runs import add_evaluations, gather

    found = gather(folders)
    add_evaluations(found, files)
    if not found.runs:
        raise UserError("there is nothing to report: " + "; ".join(found.problems + found.notes))
    return _report(found, settings)


def _report(found: Gathered, settings: ReportSettings) -> int:
    """Write and show the report; 1 if something was left out."""
    from rl_shift import report_pictures
    from rl_shift.report_document import markdown, page
    from rl_shift.report_sections import labels
    from rl_shift.runs import write

    label = labels(found.runs)
    labelled = sorted(((label(run), run) for run in found.runs), key=lambda pair: pair[0])
    known = list(dict.fromkeys(name for name, _ in labelled))
    if settings.baseline is not None and settings.baseline not in known:
        raise UserError(
            f"--baseline {settings.baseline!r} is none of the agents"
            f"{nearest(settings.baseline, known)}; they are {', '.join(known)}"
        )
    out = Path(settings.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror}; choose another --out") from error
    drawing = report_pictures.available()
    blocks = _blocks(found, labelled, settings, out if drawing else None)
    for name, text in (("report.md", markdown(blocks)), ("report.html", page(blocks))):
        write(out / name, text)
    _show(blocks, found)
    if not drawing:
        print('no pictures: they need matplotlib: pip install "rl_shift[report]"')
    print(f"report: {out / 'report.md'}\n        {out / 'report.html'}")
    return 1 if found.problems else 0


def _blocks(
    found: Gathered,
    labelled: list[tuple[str, Run]],
    settings: ReportSettings,
    pictures: Path | None,
) -> list[Block]:
    """The whole document."""
    from rl_shift import report_tables as tables
    from rl_shift.report_document import Heading, Listing, Paragraph
    from rl_shift.report_sections import add_data_scores, chains, sections

    made, sequences = sections(found), chains(found)
    add_data_scores(made)
    body: list[Block] = []
    for number, section in enumerate(made):
        body += _section(section, number, found, settings.baseline, pictures)
    if sequences:
        body.append(Heading("Sequences of tasks"))
        body += [tables.chain(one) for one in sequences if not one.refused]
    for chapter in CHAPTERS:
        module, _, function = chapter.partition(":")
        body += getattr(import_module(module), function)(found, pictures)
    body += [Heading("Cost"), tables.cost(labelled), tables.costs(labelled)]
    body.append(Heading("Data and versions"))
    body += [tables.data(made)] if made else []
    body.append(tables.versions(found.runs))
    finished = sum(run.status == "finished" for run in found.runs)
    seeds = sum(len(run.seeds) for run in found.runs)
    agents = ", ".join(dict.fromkeys(name for name, _ in labelled))
    top: list[Block] = [
        Heading(settings.title, 1),
        Paragraph(
            f"{len(found.runs)} runs with {seeds} seeds; {finished} runs are finished; agents: "
            f"{agents}. Made from results.json files with `rl-shift report`."
        ),
    ]
    if found.problems:
        top.append(Listing("Left out", found.problems))
    if found.notes:
        top.append(Listing("To know", list(dict.fromkeys(found.notes))))
    return top + body


def _section(
    section: Section, number: int, found: Gathered, baseline: str | None, pictures: Path | None
) -> list[Block]:
    """Everything about data of one origin."""
    from rl_shift import report_pictures as draw
    from rl_shift import report_tables as tables
    from rl_shift.report_document import Heading, Paragraph, Picture
    from rl_shift.report_statistics import aggregate

    def picture(name: str) -> Path:
        assert pictures is not None
        return pictures / f"{name}{f'-{number + 1}' if number else ''}.png"

    blocks: list[Block] = [Heading(section.origin)]
    if section.regenerated:
        blocks.append(
            Paragraph(
                "These are not D4RL's own files: the numbers can be compared with each other, not "
                "with published D4RL results."
            )
        )
    blocks.append(tables.overview(section))
    over = aggregate(section)
    if over is not None:
        found.notes += over.notes
    if over is not None and (len(over.scores) > 1 or len(over.rows) > 1):
        versus = (baseline or min(over.scores)) if len(over.scores) > 1 else None
        versus = versus if versus in over.scores else None
        blocks += [Heading("Over the common datasets", 3), tables.aggregates(section, over, versus)]
        if pictures is not None:
            path = picture("aggregates")
            draw.aggregates(over, section.labels, section.unit, path)
            said = "Aggregates over the common datasets; bands: stratified bootstrap 95 % intervals"
            blocks.append(Picture(path, said))
            path = picture("performance-profile")
            draw.performance_profiles(over, section.labels, section.unit, path)
            said = "Performance profile: share of runs above a score; bands: 95 % bootstrap"
            blocks.append(Picture(path, said))
    if pictures is not None:
        path = picture("learning-curves")
        if draw.learning_curves(section, path):
            said = "Learning curves: mean over the seeds, band from the lowest to the highest seed"
            blocks += [Heading("Learning curves", 3), Picture(path, said)]
    return [*blocks, Heading("Every dataset and agent", 3), tables.details(section)]


def _show(blocks: list[Block], found: Gathered) -> None:
    """The overviews, and what was left out, on the terminal."""
    from rl_shift.report_document import Table

    for block in blocks:
        if isinstance(block, Table) and block.told:
            rows = [block.head, *block.rows]
            widths = [max(len(row[k]) for row in rows) for k in range(len(block.head))]
            print(block.caption)
            for row in rows:
                first, *others = [text.replace("**", "") for text in row]
                padded = [f"{t:>{w}}" for t, w in zip(others, widths[1:], strict=True)]
                print("  ".join([f"{first:{widths[0]}}", *padded]).rstrip())
            print()
    for text in found.problems:
        print(f"left out: {text}")
    for text in dict.fromkeys(found.notes):
        print(f"note: {text}")
