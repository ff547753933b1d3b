"""Runs in processes of their own: submitted, watched and stopped through one small interface.

A `Launcher` takes resolved configurations and says how they fare; results lie in the run folders.
`Local` is a pool of child processes on this machine. What runs in the children is the ordinary
command `train`, so a run folder does not depend on who started it. Our design.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Literal, Self

from rl_shift import checkpoint, config
from rl_shift.config import RunConfig
from rl_shift.errors import UserError

LOG = "log.txt"  # what a child printed, in its run folder
COMMAND = (sys.executable, "-m", "rl_shift.worker")
POLL_S = 0.2
GRACE_S = 10.0  # for children to save when the parent fails

State = Literal["waiting", "running", "finished", "stopped", "failed"]
ENDED = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Job:
    """A run to be done: from its newest checkpoint if it has one, else from the start.

    Attributes:
        name: unique among the jobs of a launcher.
        run: the resolved configuration.
        folder: the run folder; without a checkpoint in it, what it holds is replaced.
    """

    name: str
    run: RunConfig
    folder: Path

    def arguments(self) -> list[str]:
        """The command line of `rl-shift` that does it."""
        if not has_checkpoint(self.folder):
            path = self.folder / "config.yaml"
            return ["train", "--config", f"{path}", "--run-dir", f"{self.folder}", "--overwrite"]
        last = self.run.tasks[-1]
        budget = ["--updates", f"{last.updates}", "--env-steps", f"{last.env_steps}"]
        return ["train", "--resume", f"{self.folder}", *budget]


@dataclass
class Report:
    """How a job fares.

    Attributes:
        job: the job.
        state: waiting, running, finished, stopped (it can be resumed) or failed.
        error: the last line that a failed process wrote.
        code: its exit code; 2 is a user's mistake, negative a signal.
        began: moment of its start on the monotonic clock.
        seconds: how long it has run, or ran.
    """

    job: Job
    state: State = "waiting"
    error: str = ""
    code: int | None = None
    began: float = 0.0
    seconds: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ENDED


class Launcher:
    """What every backend does; used as a context manager, so that nothing outlives it."""

    def __init__(self) -> None:
        self._reports: list[Report] = []

    def __enter__(self) -> Self:
        """Nothing starts yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop what still runs."""
        self.close()

    def submit(self, job: Job) -> None:
        """Take a job; it starts as soon as there is room.

        Raises:
            ValueError: a job of that name was submitted before.
        """
        if any(report.job.name == job.name for report in self._reports):
            raise ValueError(f"two jobs are called {job.name}")
        self._reports.append(Report(job))

    def reports(self) -> list[Report]:
        """Every job, in the order of submission; also starts what there is room for."""
        raise NotImplementedError

    def cancel(self, at_once: bool = False) -> None:
        """Stop everything; running jobs save a checkpoint first, unless `at_once`."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop what still runs, by force if need be."""
        raise NotImplementedError


class Local(Launcher):
    """Child processes on this machine, each with its own thread counts.

    The children lead process groups of their own, so that Ctrl-C reaches them once, through
    `cancel`; they stop by themselves when this process dies. What they print goes to `log.txt` in
    their run folder.

    Args:
        processes: how many at a time; default: usable cores / threads of a run.
        command: the program, for tests.
    """

    def __init__(self, processes: int | None = None, command: Sequence[str] = COMMAND) -> None:
        """Nothing starts before `reports`."""
        super().__init__()
        self.processes, self.command = processes, list(command)
        self._children: dict[str, _Child] = {}
        self._cancelled = False

    def reports(self) -> list[Report]:
        """Every job as it is now."""
        for report in self._reports:
            child = self._children.get(report.job.name)
            if report.state == "running" and child is not None:
                report.seconds = time.monotonic() - report.began
                code = child.process.poll()
                if code is not None:
                    self._end(report, child, code)
        for report in self._reports:
            if report.state == "waiting" and len(self._children) < self._room(report.job):
                self._start(report)
        return list(self._reports)

    def cancel(self, at_once: bool = False) -> None:
        """Ask every child to save and stop; those that wait never start."""
        self._cancelled = True
        for report in self._reports:
            if report.state == "waiting":
                report.state = "stopped"
        for child in self._children.values():
            if at_once:
                child.process.kill()
            else:
                child.process.terminate()

    def close(self) -> None:
        """Stop what still runs, by force if need be."""
        if self._children:
            self.cancel()
            deadline = time.monotonic() + GRACE_S
            while self._children and time.monotonic() < deadline:
                time.sleep(POLL_S)
                self.reports()
            self.cancel(at_once=True)
            for child in self._children.values():
                child.process.wait()
            self.reports()

    def _room(self, job: Job) -> int:
        return self.processes or max(1, usable_cores() // job.run.threads)

    def _start(self, report: Report) -> None:
        job = report.job
        report.state, report.began = "running", time.monotonic()
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            if not has_checkpoint(job.folder):
                text = config.dump(job.run)
                (job.folder / "config.yaml").write_text(text, encoding="utf-8")
            log = (job.folder / LOG).open("ab")
            self._children[job.name] = _Child(
                subprocess.Popen(
                    [*self.command, *job.arguments()],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment(job.run.threads),
                    start_new_session=True,
                ),
                log,
                log.tell(),
            )
        except OSError as error:
            report.state, report.error = "failed", f"cannot start in {job.folder}: {error.strerror}"

    def _end(self, report: Report, child: _Child, code: int) -> None:
        child.close()
        del self._children[report.job.name]
        report.code = code
        if code == 0:
            report.state = "finished"
        elif code == 130 or self._cancelled:
            report.state = "stopped"
        else:
            report.state = "failed"
            report.error = last_words(report.job.folder / LOG, child.start)
            if code < 0:
                report.error = f"killed by {_signal_name(-code)}; its last words: {report.error}"


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    start: int  # where this attempt begins in the log

    def close(self) -> None:
        self.log.close()
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()


def has_checkpoint(folder: Path) -> bool:
    """Whether a run can be resumed."""
    try:
        checkpoint.latest(folder)
    except UserError:
        return False
    return True


def usable_cores() -> int:
    """Cores that this process may use: its affinity, cut to the container's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def environment(threads: int) -> dict[str, str]:
    """The variables of a child: its BLAS and OpenMP libraries read theirs when they are loaded."""
    libraries = ("OMP_NUM", "MKL_NUM", "OPENBLAS_NUM", "NUMEXPR_NUM", "VECLIB_MAXIMUM")
    counts = {f"{library}_THREADS": str(threads) for library in libraries}
    return {**os.environ, **counts, "PYTHONUNBUFFERED": "1"}  # so the last line is the last


def last_words(path: Path, start: int = 0) -> str:
    """The error of a log: what the command line said last, else the last line of all."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - 65536))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return f"its log {path} cannot be read"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marker = "rl-shift: error: "
    said = [line.removeprefix(marker) for line in lines if line.startswith(marker)]
    return (said or lines or ["nothing was printed"])[-1]


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


# ---- waiting -----------------------------------------------------------------------------------


def wait(
    launcher: Launcher,
    show: Callable[[Sequence[Report]], None] = lambda reports: None,
    ended: Callable[[Report], object] = lambda report: None,
) -> list[Report]:
    """Wait until every job has ended.

    Ctrl-C or SIGTERM stops the jobs, which save first; a second one kills them.

    Args:
        launcher: with its jobs submitted.
        show: called at every look with all reports.
        ended: called once for every job that has ended.
    """
    told: set[str] = set()
    answered = 0
    with _signals() as received:
        while True:
            reports = launcher.reports()
            for report in reports:
                if report.ended and report.job.name not in told:
                    told.add(report.job.name)
                    ended(report)
            show(reports)
            if all(report.job.name in told for report in launcher.reports()):  # none was added
                return launcher.reports()
            if len(received) > answered:
                answered = len(received)
                launcher.cancel(at_once=answered > 1)
            time.sleep(POLL_S)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted instead of obeyed; only a main thread may do that."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
