"""Where a run's numbers go: TensorBoard, metrics.jsonl and the progress shown to the user."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rl_shift import atomic
from rl_shift.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"


class Loggers:
    """Writes every logged value to TensorBoard and to metrics.jsonl.

    Each call adds one line {"step", "updates", "env_steps", "time_s", value name: number, ...}; a
    value that is NaN or infinite becomes null there, because JSON has no word for it. Names are
    TensorBoard tags as the field has them: "train/critic/loss", "eval/mean_reward",
    "eval/normalized_score", "rollout/ep_rew_mean", "time/updates_per_s".

    Args:
        run_dir: the run folder.
        resume_step: continue the logs of a run that resumes from its checkpoint at this step; what
            the killed process had logged beyond it is dropped, for it happens again.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        self.run_dir = run_dir
        self._tensorboard: SummaryWriter | None = None
        self._purge = None if resume_step is None else resume_step + 1
        path = run_dir / METRICS
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            spent = 0.0 if resume_step is None else _truncate(path, resume_step)
            self._lines = path.open("w" if resume_step is None else "a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; choose another --run-dir"
            ) from error
        self._began = time.monotonic() - spent

    def log(
        self,
        step: int,
        values: Mapping[str, float],
        updates: int | None = None,
        env_steps: int = 0,
    ) -> None:
        """Record `values` at `step`, the run's own count of progress that resuming goes by.

        Args:
            step: x axis in TensorBoard; must not fall within a run.
            values: numbers by tag.
            updates: the agent's updates so far; `step` if not given.
            env_steps: environment steps so far.

        Raises:
            UserError: the disk is full, or the run folder is no longer where it was.
        """
        clock = {
            "step": step,
            "updates": step if updates is None else updates,
            "env_steps": env_steps,
            "time_s": round(time.monotonic() - self._began, 3),
        }
        numbers = {name: float(value) for name, value in values.items()}
        safe = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        path = self.run_dir / METRICS
        if not path.exists():
            raise UserError(
                f"{path} was moved or deleted while the run was writing to it; put {self.run_dir} "
                "back and resume, or resume it under its new name"
            )
        try:
            self._lines.write(json.dumps(clock | safe) + "\n")
            self._lines.flush()
            writer = self._writer()
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; make room and resume"
            ) from error

    def flush(self) -> None:
        """Hand everything to the system; called with every checkpoint, so a kill loses nothing."""
        if self._tensorboard is not None:  # metrics.jsonl is flushed line by line
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close both logs."""
        with suppress(OSError):  # reported by `log`
            self._lines.close()
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.close()

    def _writer(self) -> SummaryWriter:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # half a second

            self._tensorboard = SummaryWriter(
                str(self.run_dir / EVENTS), purge_step=self._purge, flush_secs=10
            )
        return self._tensorboard


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; one that a kill cut short is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                lines.append(entry)
    return lines


def _truncate(path: Path, step: int) -> float:
    """Drop the lines beyond `step` in one atomic replacement; returns the seconds spent so far."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    with atomic.replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    return float(kept[-1].get("time_s", 0.0)) if kept else 0.0


class Progress:
    """How far a stage is: a tqdm bar on a terminal, a line now and then elsewhere.

    Args:
        total: steps of the stage.
        label: the stage's name.
        initial: steps done before (a resumed run); they do not count into the rate.
        unit: what is counted.
        stream: where to show it, stdout by default.
        show: False shows nothing.
    """

    every_s = 10.0  # a line after this many seconds,
    every_fraction = 0.05  # or after this share of the total, but at most one a second

    def __init__(
        self,
        total: int,
        label: str = "",
        initial: int = 0,
        unit: str = "updates",
        stream: TextIO | None = None,
        show: bool = True,
    ) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done = self._shown = self._initial = initial
        self.score: float | None = None
        self._stream = sys.stdout if stream is None else stream
        self._began = self._at = time.monotonic()
        self._bar: Any = None
        self._show = show
        if show and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=label or None,
                unit=f" {unit}",
                file=self._stream,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    def advance(self, steps: int = 1) -> None:
        """`steps` more are done."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(steps)
        elif self._show:
            now = time.monotonic()
            fresh, waited = self.done - self._shown, now - self._at
            if waited >= 1.0 and (
                waited >= self.every_s or fresh >= self.every_fraction * self.total
            ):
                self._line(now)

    def set_score(self, score: float) -> None:
        """The last evaluation's score, shown from now on."""
        self.score = score
        if self._bar is not None:
            self._bar.set_postfix_str(f"score {score:.1f}")

    def write(self, text: str) -> None:
        """A message of its own line that leaves the bar whole."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._show:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the final state on the screen."""
        if self._bar is not None:
            self._bar.close()
        elif self._show and self.done != self._shown:
            self._line(time.monotonic())

    def _line(self, now: float) -> None:
        rate = (self.done - self._initial) / max(now - self._began, 1e-9)
        parts = [
            f"{self.label + ': ' if self.label else ''}{self.done}/{self.total} {self.unit}",
            f"{100 * self.done / max(self.total, 1):.0f}%",
            f"{rate:.1f} {self.unit}/s",
        ]
        if self.score is not None:
            parts.append(f"score {self.score:.1f}")
        if rate > 0 and self.done < self.total:
            parts.append(f"{clock_text((self.total - self.done) / rate)} left")
        print(", ".join(parts), file=self._stream, flush=True)
        self._shown, self._at = self.done, now


def clock_text(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def rate_text(rate: float) -> str:
    """Events per second: whole numbers, and two digits of what is below ten."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
