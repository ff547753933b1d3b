"""What a launcher's parent process shows: a live table on a terminal, else a line now and then."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args

from rl_shift.launcher import LOG, Job, Report, State
from rl_shift.loggers import METRICS, clock_text, rate_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

TAIL = 16384  # bytes of metrics.jsonl that are looked at


@dataclass(frozen=True)
class Standing:
    """Where a run stands, by its metrics.jsonl."""

    updates: int = 0
    env_steps: int = 0
    rate: float | None = None  # updates/s
    result: str = ""  # last evaluation, as text

    @classmethod
    def of(cls, folder: Path) -> Standing:
        """Read from the end of the file; a run that logged nothing stands at 0."""
        try:
            with (folder / METRICS).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - TAIL))
                lines = file.read().decode("utf-8", errors="replace").splitlines()
        except OSError:
            return cls()
        entries: list[dict[str, Any]] = []
        for line in lines:
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and "updates" in entry:
                    entries.append(entry)
        if not entries:
            return cls()
        latest: dict[str, Any] = {}
        for entry in entries:
            latest |= entry
        return cls(
            updates=int(latest["updates"]),
            env_steps=int(latest["env_steps"]),
            rate=latest.get("time/updates_per_s"),
            result=_result(latest),
        )


def _result(latest: dict[str, Any]) -> str:
    """The last normalised score, else the last return."""
    for ending, word in (("normalized_score", "score"), ("mean_reward", "return")):
        found = [
            value
            for name, value in latest.items()
            if name.startswith("eval/") and name.endswith(f"/{ending}") and value is not None
        ]
        if found:
            return f"{word} {found[-1]:.1f}"
    return ""


class View:
    """Shows reports, however often it is called.

    Args:
        title: stands above the table and before every line.
        active: False shows nothing.
        stream: where to; standard output by default.
        every_s: seconds between two lines, where the stream is no terminal.
    """

    def __init__(
        self,
        title: str,
        active: bool = True,
        stream: TextIO | None = None,
        every_s: float = 30.0,
    ) -> None:
        """On a terminal this takes the last lines of the screen."""
        self.title, self.active, self.every_s = title, active, every_s
        self._stream = sys.stdout if stream is None else stream
        self._live: Live | None = None
        self._told: set[str] = set()
        self._at = -every_s  # the first look shows something
        if active and self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream)
            live = Live(console=console, auto_refresh=False, redirect_stdout=False)
            live.start()
            self._live = live

    def __call__(self, reports: Sequence[Report]) -> None:
        """One look."""
        if not self.active:
            return
        now, last = time.monotonic(), all(report.ended for report in reports)
        for report in reports:
            if report.ended and report.job.name not in self._told:
                self._told.add(report.job.name)
                self._print(told(report))
        if self._live is not None:
            if last or now - self._at >= 1.0:
                self._live.update(self._screen(reports), refresh=True)
                self._at = now
        elif not last and now - self._at >= self.every_s:
            self._print(f"{self.title}: {summary(reports)}")
            self._at = now

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self._live.stop()

    def _print(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def _screen(self, reports: Sequence[Report]) -> RenderableType:
        """A line about all, and a row for each that runs."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        heading = Text(f"{self.title}: {counts(reports)}")
        if not any(report.state == "running" for report in reports):
            return heading
        table = Table(box=None)
        for column in ("run", "done", "updates/s", "time", "left", "last evaluation"):
            table.add_column(column, justify="left" if column == "run" else "right")
        for report in reports:
            if report.state == "running":
                standing = Standing.of(report.job.folder)
                table.add_row(
                    Text(report.job.name),
                    done(report.job, standing),
                    "" if standing.rate is None else rate_text(standing.rate),
                    clock_text(report.seconds),
                    left(report.job, standing),
                    standing.result,
                )
        return Group(heading, table)


def told(report: Report) -> str:
    """One line about a job that has ended."""
    text = f"{report.job.name}: {report.state}"
    if report.began:
        text += f" after {clock_text(report.seconds)}"
    if report.state == "failed":
        return f"{text}: {report.error} (see {report.job.folder / LOG})"
    result = Standing.of(report.job.folder).result
    return f"{text}, {result}" if result else text


def summary(reports: Sequence[Report]) -> str:
    """One line about all jobs."""
    running = []
    for report in reports:
        if report.state == "running":
            standing = Standing.of(report.job.folder)
            parts = [f"{report.job.name} {done(report.job, standing)}", standing.result]
            if standing.rate is not None:
                parts.insert(1, f"{rate_text(standing.rate)} updates/s")
            running.append(" ".join(part for part in parts if part))
    return "; ".join([counts(reports), *running])


def counts(reports: Sequence[Report]) -> str:
    """Such as "2 running, 1 finished"."""
    found = Counter(report.state for report in reports)
    return ", ".join(f"{found[s]} {s}" for s in get_args(State) if found[s])


def done(job: Job, standing: Standing) -> str:
    """Progress in the unit in which the run is counted."""
    steps = sum(task.env_steps for task in job.run.tasks)
    if steps and standing.env_steps:
        return f"{standing.env_steps:,}/{steps:,} env steps"
    total = sum(task.updates for task in job.run.tasks)
    return f"{standing.updates:,}/{total or steps:,}"


def left(job: Job, standing: Standing) -> str:
    """Time until the last update of an offline run, evaluations not counted."""
    total = sum(task.updates for task in job.run.tasks)
    if not standing.rate or any(task.env_steps for task in job.run.tasks):
        return ""
    return clock_text(max(0, total - standing.updates) / standing.rate)
