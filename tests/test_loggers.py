"""Logs that survive a kill, and progress for terminals and files."""

import errno
import io
import json
import math
import os
import subprocess
import sys

import pytest

from rl_shift import loggers
from rl_shift.errors import UserError
from rl_shift.loggers import Loggers, Progress, read_metrics


def scalars(run_dir):
    """{tag: [(step, value), ...]} as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_every_value_is_in_both_logs(tmp_path):
    log = Loggers(tmp_path / "run")
    log.log(10, {"train/critic/loss": 0.5, "time/updates_per_s": 100}, updates=7, env_steps=3)
    log.log(20, {"eval/normalized_score": 12.25})
    log.close()
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first.pop("time_s") >= 0
    assert first == {
        "step": 10,
        "updates": 7,
        "env_steps": 3,
        "train/critic/loss": 0.5,
        "time/updates_per_s": 100.0,
    }
    assert (second["step"], second["updates"], second["env_steps"]) == (20, 20, 0)
    assert scalars(tmp_path / "run") == {
        "train/critic/loss": [(10, 0.5)],
        "time/updates_per_s": [(10, 100.0)],
        "eval/normalized_score": [(20, 12.25)],
    }


def test_resume_drops_what_happens_again(tmp_path):
    log = Loggers(tmp_path)
    for step in (1, 2, 3, 4):
        log.log(step, {"train/x": float(step)})
    log.flush()  # what a kill at this point leaves behind
    log.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 5, "updates"')  # killed while writing
    log = Loggers(tmp_path, resume_step=2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    log.log(3, {"train/x": 30.0})
    log.close()
    assert [line["train/x"] for line in read_metrics(path)] == [1.0, 2.0, 30.0]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert scalars(tmp_path)["train/x"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert not list(tmp_path.glob(".tmp*"))


def test_time_goes_on_over_a_resume(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now[0])
    log = Loggers(tmp_path)
    now[0] += 50
    log.log(1, {})
    now[0] += 1000  # lost with the process
    log.close()
    log = Loggers(tmp_path, resume_step=1)
    now[0] += 5
    log.log(2, {})
    log.close()
    assert [x["time_s"] for x in read_metrics(tmp_path / "metrics.jsonl")] == [50.0, 55.0]


def test_resume_without_a_log(tmp_path):
    log = Loggers(tmp_path, resume_step=100)
    log.log(101, {"a": 1.0})
    log.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_fresh_run_starts_a_fresh_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    Loggers(tmp_path).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_not_finite_becomes_null(tmp_path):
    log = Loggers(tmp_path)
    log.log(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"a": null, "b": null, "c": 1.0' in text


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl.*--run-dir"):
        Loggers(tmp_path / "file" / "run")


def test_full_disk(tmp_path, monkeypatch):
    log = Loggers(tmp_path)
    log.log(1, {"a": 1.0})

    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        close = flush

    log._lines.close()
    monkeypatch.setattr(log, "_lines", Full())
    with pytest.raises(UserError, match="No space left.*resume"):
        log.log(2, {"a": 1.0})
    log.close()

    def fail(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        Loggers(tmp_path, resume_step=1)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1  # the old log is whole
    assert not list(tmp_path.glob(".tmp*"))


def test_import_is_light():
    code = "import sys, rl_shift.loggers; print({'torch', 'tensorboard', 'tqdm'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- progress --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loggers.time, "monotonic", lambda: clock[0])
    return clock


def test_lines_where_there_is_no_terminal(now):
    out = io.StringIO()
    progress = Progress(1000, "offline", stream=out)
    for _ in range(1000):
        now[0] += 0.1
        progress.advance()
        if progress.done == 420:
            progress.set_score(57.25)
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 20  # every 5 %: sooner than every 10 s
    assert lines[0] == "offline: 50/1000 updates, 5%, 10.0 updates/s, 01:35 left"
    assert lines[8].endswith("45%, 10.0 updates/s, score 57.2, 00:55 left")
    assert lines[-1] == "offline: 1000/1000 updates, 100%, 10.0 updates/s, score 57.2"


def test_lines_of_a_slow_stage(now):
    out = io.StringIO()
    progress = Progress(10_000_000, stream=out, unit="env steps")
    for _ in range(60):
        now[0] += 1.0
        progress.advance(10)
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 6  # every 10 s
    assert lines[0] == "100/10000000 env steps, 0%, 10.0 env steps/s, 277:46:30 left"


def test_lines_of_a_fast_stage_stay_few(now):
    out = io.StringIO()
    progress = Progress(100, stream=out)
    for _ in range(100):
        now[0] += 0.001
        progress.advance()
    progress.close()
    assert out.getvalue() == "100/100 updates, 100%, 1000.0 updates/s\n"


def test_resumed_steps_are_no_speed(now):
    out = io.StringIO()
    progress = Progress(1000, stream=out, initial=900)
    now[0] += 10
    progress.advance(50)
    assert out.getvalue() == "950/1000 updates, 95%, 5.0 updates/s, 00:10 left\n"


def test_a_bar_on_a_terminal():
    out = Terminal()
    progress = Progress(100, "offline", initial=40, stream=out)
    progress.advance(10)
    progress.set_score(12.34)
    progress.write("a message")
    progress.advance(50)
    progress.close()
    text = out.getvalue()
    assert "offline" in text and "40/100" in text and "100/100" in text
    assert "updates/s" in text and "score 12.3" in text and "a message\n" in text
    assert progress.done == 100


def test_silence():
    for out in (Terminal(), io.StringIO()):
        progress = Progress(10, stream=out, show=False)
        progress.advance(10)
        progress.set_score(1.0)
        progress.write("x")
        progress.close()
        assert out.getvalue() == ""


def test_message_without_a_terminal():
    out = io.StringIO()
    Progress(10, stream=out).write("a message")
    assert out.getvalue() == "a message\n"


@pytest.mark.parametrize(
    ("rate", "text"), [(0.423, "0.42"), (9.96, "10"), (12.6, "13"), (12345.6, "12,346")]
)
def test_slow_rates_keep_two_digits(rate, text):
    assert loggers.rate_text(rate) == text


def test_a_folder_that_is_renamed_while_it_is_written(tmp_path):
    log = Loggers(tmp_path / "run")
    log.log(1, {"a": 1.0})
    log.flush()
    (tmp_path / "run").rename(tmp_path / "other")
    with pytest.raises(UserError, match=r"run.* moved or deleted .*resume"):
        log.log(2, {"a": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()
    assert len(read_metrics(tmp_path / "other" / "metrics.jsonl")) == 1
