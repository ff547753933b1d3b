"""The backend `ray` of a sweep: jobs as trials of Ray Tune, on this machine or on a cluster.

Ray Tune queues the jobs, places them by their CPU threads and retries those whose worker was lost;
a retried job goes on from its newest checkpoint. A trial starts the same process as the backend
`local` does. Run folders must lie where every machine sees them. Needs the extra `ray`; our design.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl_shift import atomic, config
from rl_shift.errors import UserError
from rl_shift.launcher import (
    COMMAND,
    GRACE_S,
    LOG,
    POLL_S,
    Job,
    Launcher,
    Report,
    environment,
    has_checkpoint,
    last_words,
    usable_cores,
)

STATE, STOP = ".launcher.json", ".launcher-stop"  # files in a run folder: how it fares, what to do


def _tune() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray import tune  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError('--backend ray needs Ray Tune: pip install "rl_shift[ray]"') from error
    return ray, tune


class RayTune(Launcher):
    """Jobs as trials of Ray Tune.

    Args:
        processes: trials at a time; default: as many as the machines have room for.
        address: of a running cluster; default: Ray on this machine alone.
        retries: of a job whose process was killed or whose machine was lost.
        command: the program, for tests.
    """

    def __init__(
        self,
        processes: int | None = None,
        address: str | None = None,
        retries: int = 1,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """Connects at once, so that a wrong address is an error before anything is prepared."""
        super().__init__()
        self.processes, self.retries, self.command = processes, retries, list(command)
        self._ray, self._tune = _tune()
        self._waiting = _Queue()
        self._thread: threading.Thread | None = None
        self._error = ""
        self._own = not self._ray.is_initialized()
        if self._own:
            given: dict[str, Any] = (
                {"address": address} if address else {"num_cpus": usable_cores()}
            )
            if not address:
                given |= {"include_dashboard": False, "object_store_memory": 100 * 2**20}
            try:
                self._ray.init(log_to_driver=False, logging_level="ERROR", **given)
            except Exception as error:  # Ray raises bare ones when its processes do not come up
                reason = " ".join(str(error).split())[:160]
                raise UserError(
                    f"cannot connect to Ray at {address or 'home'}: {reason}"
                ) from error

    def submit(self, job: Job) -> None:
        """Take a job."""
        super().submit(job)
        job.folder.mkdir(parents=True, exist_ok=True)
        for name in (STATE, STOP):
            (job.folder / name).unlink(missing_ok=True)
        there = replace(job, folder=job.folder.resolve())  # trials run in folders of their own
        self._waiting.put(_Order(there, self.command, self.retries, os.getcwd()))

    def reports(self) -> list[Report]:
        """Every job as it is now; starts Ray Tune when there is the first one."""
        if self._thread is None and self._reports:
            self._thread = threading.Thread(target=self._fit, daemon=True)
            self._thread.start()
        lost = self._thread is not None and not self._thread.is_alive()
        for report in self._reports:
            if report.ended:
                continue
            with suppress(OSError, ValueError):
                told = json.loads((report.job.folder / STATE).read_text(encoding="utf-8"))
                report.state, report.error, report.code = told["state"], told["error"], told["code"]
                report.seconds = told["seconds"] or time.time() - told["began"]
            if lost and not report.ended:
                report.state = "failed"
                report.error = self._error or "Ray Tune ended before it was done"
        return list(self._reports)

    def cancel(self, at_once: bool = False) -> None:
        """Ask every trial to save and stop; those that wait never start."""
        for order in self._waiting.drained():
            _tell(order.job.folder, "stopped")
        for report in self._reports:
            if not report.ended:
                text = "kill" if at_once else "stop"
                (report.job.folder / STOP).write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Stop what still runs, by force if need be."""
        self._waiting.closed = True
        if self._thread is not None:
            if any(not report.ended for report in self.reports()):
                self.cancel()
            self._thread.join(GRACE_S + 5)
            if self._thread.is_alive():
                self.cancel(at_once=True)
                self._thread.join(GRACE_S)
        for report in self._reports:
            for name in (STATE, STOP):
                with suppress(OSError):
                    (report.job.folder / name).unlink(missing_ok=True)
        if self._own:
            self._ray.shutdown()

    def _fit(self) -> None:
        """Ray Tune's own loop, until the queue is closed."""
        tune = self._tune
        threads = max(report.job.run.threads for report in self._reports)
        place = self._reports[0].job.folder.resolve().parent / ".ray"
        try:
            tune.Tuner(
                tune.with_resources(_work, {"cpu": threads}),
                tune_config=tune.TuneConfig(
                    search_alg=_searcher(self._waiting),
                    num_samples=-1,
                    max_concurrent_trials=self.processes,
                    trial_name_creator=_name,
                    trial_dirname_creator=_name,
                ),
                run_config=tune.RunConfig(
                    storage_path=str(place),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=self.retries),
                ),
            ).fit()
        except Exception as error:  # whatever Ray fails with is told for every job
            self._error = f"Ray Tune failed: {' '.join(str(error).split())[:200]}"


@dataclass(frozen=True)
class _Order:
    """What a trial does."""

    job: Job
    command: list[str]
    retries: int
    place: str  # where relative paths of the run, to its data for instance, begin


class _Queue:
    """Orders that wait for a trial; Ray Tune's records of it are empty ones."""

    def __init__(self) -> None:
        self.orders: deque[_Order] = deque()
        self.closed = False

    def __reduce__(self) -> tuple[type[_Queue], tuple[()]]:
        return _Queue, ()

    def __deepcopy__(self, memo: object) -> _Queue:
        return self

    def put(self, order: _Order) -> None:
        self.orders.append(order)

    def get(self) -> _Order | None:
        with suppress(IndexError):
            return self.orders.popleft()
        return None

    def drained(self) -> list[_Order]:
        found = list(self.orders)
        self.orders.clear()
        return found


def _searcher(waiting: _Queue) -> Any:
    """The queue as a search algorithm: it suggests the next job, whenever there is one."""
    from ray.tune.search import Searcher  # pyright: ignore[reportMissingImports]

    class Suggested(Searcher):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(metric="code", mode="min")
            self.folders: dict[str, Path] = {}

        def suggest(self, trial_id: str) -> Any:
            order = waiting.get()
            if order is not None:
                self.folders[trial_id] = order.job.folder
                return {"order": order}
            return Searcher.FINISHED if waiting.closed else None

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            if error and trial_id in self.folders:
                _tell(self.folders[trial_id], "failed", "its trial failed in Ray, retries included")

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).write_text("{}", encoding="utf-8")

        def restore(self, checkpoint_path: str) -> None:
            pass

    return Suggested()


def _name(trial: Any) -> str:
    """Of a trial and its folder; the default would spell out the whole job."""
    return f"job_{trial.trial_id}"


# ---- in the trial ------------------------------------------------------------------------------


def _work(settings: dict[str, Any]) -> dict[str, int]:
    """Run the job's process to its end; a killed one raises, so that Ray Tune tries again."""
    order: _Order = settings["order"]
    job = order.job
    began = time.time()
    if (job.folder / STOP).is_file():
        _tell(job.folder, "stopped")
        return {"code": 130}
    _tell(job.folder, "running", began=began)
    if not has_checkpoint(job.folder):
        (job.folder / "config.yaml").write_text(config.dump(job.run), encoding="utf-8")
    command = [sys.executable, *order.command[1:]]  # of this machine
    with (job.folder / LOG).open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            [*command, *job.arguments()],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(job.run.threads),
            start_new_session=True,
            cwd=order.place,
        )
        code = _ended(process, job.folder)
    facts: dict[str, Any] = {"began": began, "seconds": time.time() - began, "code": code}
    if code == 0:
        _tell(job.folder, "finished", **facts)
    elif code == 130 or (job.folder / STOP).is_file():
        _tell(job.folder, "stopped", **facts)
    else:
        words = last_words(job.folder / LOG, start)
        tries = _tries(job.folder) if code < 0 else order.retries + 1
        if tries <= order.retries:
            raise RuntimeError(f"{job.name} was killed by signal {-code}")
        text = f"killed by signal {-code}; its last words: {words}" if code < 0 else words
        _tell(job.folder, "failed", text, **facts)
    return {"code": code}


def _ended(process: subprocess.Popen[bytes], folder: Path) -> int:
    """The exit code, once there is one; a stop that is asked for is passed on."""
    asked = ""
    while (code := process.poll()) is None:
        with suppress(OSError):
            wish = (folder / STOP).read_text(encoding="utf-8")
            if wish and wish != asked:
                asked = wish
                process.kill() if wish == "kill" else process.terminate()
        time.sleep(POLL_S)
    return code


def _tries(folder: Path) -> int:
    """How often the job was begun, this time included."""
    path = folder / ".launcher-tries"
    with suppress(OSError, ValueError):
        count = int(path.read_text(encoding="utf-8")) + 1
        path.write_text(str(count), encoding="utf-8")
        return count
    path.write_text("1", encoding="utf-8")
    return 1


def _tell(
    folder: Path,
    state: str,
    error: str = "",
    code: int | None = None,
    began: float = 0.0,
    seconds: float = 0.0,
) -> None:
    """Write how the job fares, in one step."""
    told = {"state": state, "error": error, "code": code, "began": began, "seconds": seconds}
    atomic.write_text(folder / STATE, json.dumps(told))
