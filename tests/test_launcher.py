"""Child processes: how many, with which threads, how they end, and seeds divided over them."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_shift import config, launch_view, launcher, runs, separate_seeds
from rl_shift.config import RunConfig
from rl_shift.errors import UserError
from rl_shift.launcher import Job, Local, Report, wait

# Stands in for the command line: what it does is in the name of the run folder.
STUB = """
import json, os, signal, sys, time
from pathlib import Path

flag = "--run-dir" if "--run-dir" in sys.argv else "--resume"
folder = Path(sys.argv[sys.argv.index(flag) + 1])
kind = folder.name.partition("_")[0]
threads = {k: v for k, v in os.environ.items() if k.endswith("_THREADS")}
note = {"argv": sys.argv[1:], "threads": threads, "began": time.time(), "group": os.getpgid(0)}
if kind == "save":
    signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(130)))
if kind == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / "note.json").write_text(json.dumps(note))
print("at work")
if kind in ("save", "deaf"):
    time.sleep(60)
if kind == "mistake":
    print("rl-shift: error: no such data", file=sys.stderr)
    print("a late word")
    sys.exit(2)
if kind == "crash":
    raise ValueError("boom")
if kind == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.3)
(folder / "ended").write_text(str(time.time()))
"""


@pytest.fixture
def stub(tmp_path: Path) -> list[str]:
    path = tmp_path / "stub.py"
    path.write_text(STUB, encoding="utf-8")
    return [sys.executable, "-S", str(path)]


def made(agent: str = "bc", **overrides: Any) -> RunConfig:
    tasks = {"tasks.0.dataset": "some-set", "tasks.0.updates": 10}
    return config.make(agent, overrides=tasks | overrides)


def job(folder: Path, **overrides: Any) -> Job:
    return Job(folder.name, made(**overrides), folder)


def note(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "note.json").read_text(encoding="utf-8")))


def by_name(reports: Sequence[Report]) -> dict[str, Report]:
    return {report.job.name: report for report in reports}


# ---- the pool ----------------------------------------------------------------------------------


def test_failures_are_reported_and_stop_nobody(tmp_path: Path, stub: list[str]) -> None:
    kinds = ("mistake", "ok", "crash", "killed", "ok_2")
    told: list[str] = []
    with Local(2, stub) as pool:
        for kind in kinds:
            pool.submit(job(tmp_path / kind))
        reports = by_name(wait(pool, ended=lambda report: told.append(report.job.name)))
    assert [reports[kind].state for kind in kinds] == [
        "failed", "finished", "failed", "failed", "finished",
    ]  # fmt: skip
    assert sorted(told) == sorted(kinds)
    assert reports["mistake"].error == "no such data"
    assert reports["mistake"].code == 2
    assert reports["crash"].error == "ValueError: boom"
    assert "SIGKILL" in reports["killed"].error
    assert "at work" in reports["killed"].error
    log = (tmp_path / "mistake" / launcher.LOG).read_text(encoding="utf-8")
    assert log.splitlines() == ["at work", "rl-shift: error: no such data", "a late word"]


def test_never_more_than_the_given_number_at_a_time(tmp_path: Path, stub: list[str]) -> None:
    most = 0

    def look(reports: Sequence[Report]) -> None:
        nonlocal most
        most = max(most, sum(report.state == "running" for report in reports))

    with Local(2, stub) as pool:
        for k in range(5):
            pool.submit(job(tmp_path / f"ok_{k}"))
        wait(pool, look)
    assert most == 2
    events = []
    for k in range(5):
        events.append((note(tmp_path / f"ok_{k}")["began"], 1))
        events.append((float((tmp_path / f"ok_{k}" / "ended").read_text()), -1))
    assert np.cumsum([change for _, change in sorted(events)]).max() == 2


def test_thread_counts_are_set_before_the_child_starts(tmp_path: Path, stub: list[str]) -> None:
    with Local(2, stub) as pool:
        pool.submit(job(tmp_path / "ok_1"))
        pool.submit(job(tmp_path / "ok_3", threads=3))
        wait(pool)
    for threads in (1, 3):
        seen = note(tmp_path / f"ok_{threads}")["threads"]
        assert {f"{lib}_NUM_THREADS" for lib in ("OMP", "MKL", "OPENBLAS")} <= seen.keys()
        assert set(seen.values()) == {str(threads)}


def test_the_default_is_one_run_per_usable_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "usable_cores", lambda: 8)
    for threads, room in ((1, 8), (3, 2), (16, 1)):
        assert Local()._room(job(Path("x"), threads=threads)) == room
    assert Local(5)._room(job(Path("x"))) == 5
    monkeypatch.undo()
    assert 1 <= launcher.usable_cores() <= (os.cpu_count() or 1)


def test_a_child_is_told_where_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(**{"tasks.0.env_steps": 7})
    fresh = Job("a", run, tmp_path / "a").arguments()
    assert fresh[:2] == ["train", "--config"]
    assert "--overwrite" in fresh
    monkeypatch.setattr(launcher, "has_checkpoint", lambda folder: True)
    again = Job("a", run, tmp_path / "a").arguments()
    assert again == [
        "train",
        "--resume",
        str(tmp_path / "a"),
        "--updates",
        "10",
        "--env-steps",
        "7",
    ]


def test_a_folder_that_cannot_be_made_fails_alone(tmp_path: Path, stub: list[str]) -> None:
    (tmp_path / "file").touch()
    with Local(1, stub) as pool:
        pool.submit(job(tmp_path / "file" / "x"))
        pool.submit(job(tmp_path / "ok"))
        states = [report.state for report in wait(pool)]
    assert states == ["failed", "finished"]


def test_two_jobs_of_one_name_are_refused(tmp_path: Path) -> None:
    pool = Local(1)
    pool.submit(job(tmp_path / "a"))
    with pytest.raises(ValueError, match="two jobs"):
        pool.submit(job(tmp_path / "a"))


# ---- stopping ----------------------------------------------------------------------------------


def interrupting(folders: Sequence[Path], number: int, times: int = 1) -> Callable[[Any], None]:
    """A `show` that sends this process a signal, `times` times, once the folders' runs are up."""
    left = [times]

    def look(reports: Sequence[Report]) -> None:
        if left[0] and all((folder / "note.json").exists() for folder in folders):
            left[0] -= 1
            os.kill(os.getpid(), number)

    return look


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_children_save(tmp_path: Path, stub: list[str], number: int) -> None:
    before = signal.getsignal(number)
    names = ("save_0", "save_1", "ok")
    with Local(2, stub) as pool:
        for name in names:
            pool.submit(job(tmp_path / name))
        look = interrupting([tmp_path / name for name in names[:2]], number)
        reports = by_name(wait(pool, look))
    assert {report.state for report in reports.values()} == {"stopped"}
    for name in names[:2]:
        assert launcher.last_words(tmp_path / name / launcher.LOG) == "saved"
        assert note(tmp_path / name)["group"] != os.getpgid(0)  # Ctrl-C reaches it only once
    assert not (tmp_path / "ok").exists()
    assert signal.getsignal(number) == before


def test_a_second_signal_kills(tmp_path: Path, stub: list[str]) -> None:
    began = time.monotonic()
    with Local(1, stub) as pool:
        pool.submit(job(tmp_path / "deaf"))
        reports = wait(pool, interrupting([tmp_path / "deaf"], signal.SIGINT, times=2))
    assert reports[0].state == "stopped"
    assert time.monotonic() - began < 20


def test_no_child_outlives_the_pool(
    tmp_path: Path, stub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "GRACE_S", 0.3)

    def fail(reports: Sequence[Report]) -> None:
        if (tmp_path / "deaf" / "note.json").exists():
            raise RuntimeError("the parent failed")

    with pytest.raises(RuntimeError, match="parent failed"), Local(1, stub) as pool:
        pool.submit(job(tmp_path / "deaf"))
        wait(pool, fail)
    report = pool.reports()[0]
    assert report.state == "stopped"
    assert report.code == -signal.SIGKILL


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Even one that was killed: the parent of the child is a process that gets SIGKILL."""
    child = (
        "import os, sys, time; from pathlib import Path; from rl_shift import worker\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "worker.end_with_parent(); Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys; "
        "subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE, "
        "start_new_session=True).wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, child], cwd=tmp_path)
    path = tmp_path / "pid"
    until(lambda: path.exists() and path.read_text() != "")
    process.kill()
    process.wait()
    until(lambda: not alive(int(path.read_text())))


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and is not yet collected does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False


# ---- what is shown -----------------------------------------------------------------------------


def test_lines_without_a_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "seed0"
    folder.mkdir()
    entries = [
        {"step": 5, "updates": 5, "env_steps": 0, "eval/mean_reward": 7.0},
        {"step": 6, "updates": 6, "env_steps": 0, "time/updates_per_s": 50.0},
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "metrics.jsonl").write_text(lines + '{"half', encoding="utf-8")
    reports = [
        Report(Job("seed0", made(), folder), "running", began=1.0, seconds=3.0),
        Report(Job("seed1", made(), tmp_path / "seed1"), "waiting"),
    ]
    stream = io.StringIO()
    view = launch_view.View("run", stream=stream)
    view(reports)
    view(reports)  # too early for another line
    reports[0].state, reports[1].state = "finished", "failed"
    reports[1].error = "no such data"
    view(reports)
    view.close()
    assert stream.getvalue().splitlines() == [
        "run: 1 waiting, 1 running; seed0 6/10 50 updates/s return 7.0",
        "seed0: finished after 00:03, return 7.0",
        f"seed1: failed: no such data (see {tmp_path / 'seed1' / 'log.txt'})",
    ]


def test_a_table_on_a_terminal(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    view = launch_view.View("run", stream=stream)
    report = Report(Job("seed0", made(), tmp_path), "running", began=1.0, seconds=3.0)
    view([report])
    report.state = "finished"
    view([report])
    view.close()
    for text in ("run: 1 running", "0/10", "seed0: finished after 00:03", "run: 1 finished"):
        assert text in stream.getvalue()


def test_nothing_is_shown_if_nothing_shall_be(capsys: pytest.CaptureFixture[str]) -> None:
    view = launch_view.View("run", active=False)
    view([Report(Job("seed0", made(), Path("x")), "finished")])
    view.close()
    assert capsys.readouterr().out == ""


# ---- which seeds go where ----------------------------------------------------------------------

OWN_AGENTS = """
from dataclasses import dataclass, field
from typing import Any

from rl_shift.agent import Wrapper
from rl_shift.agents.bc import BC


class Alone(BC):
    stackable = False


class Around(Wrapper):
    @dataclass(frozen=True)
    class Config:
        base: str = "bc"
        base_config: dict[str, Any] = field(default_factory=dict)
"""


@pytest.fixture
def own_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "launched_agents.py").write_text(OWN_AGENTS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("own_agents")
@pytest.mark.parametrize(
    ("agent", "overrides", "expected"),
    [
        ("bc", {"seeds": 1, "processes": 4}, False),
        ("bc", {"seeds": 4}, False),
        ("bc", {"seeds": 4, "processes": 1}, False),
        ("bc", {"seeds": 4, "processes": 2}, True),
        ("sac", {"seeds": 4, "tasks.0.env": "Pendulum-v1", "tasks.0.env_steps": 5}, True),
        ("sac", {"seeds": 4, "tasks.1.env": "Pendulum-v1", "tasks.1.env_steps": 5}, True),
        ("launched_agents:Alone", {"seeds": 4}, True),
        ("launched_agents:Alone", {"seeds": 4, "processes": 1}, True),
        ("launched_agents:Around", {"seeds": 4}, False),
        ("launched_agents:Around", {"seeds": 4, "agent.base": "launched_agents:Alone"}, True),
    ],
)
def test_apart(agent: str, overrides: dict[str, Any], expected: bool) -> None:
    assert separate_seeds.apart(made(agent, **overrides)) is expected


@pytest.mark.parametrize(("seeds", "processes"), [(3, 2), (10, 4), (2, 5), (7, 7)])
def test_groups_of_stacked_seeds(seeds: int, processes: int, tmp_path: Path) -> None:
    run = made(seed=5, seeds=seeds, processes=processes)
    groups = separate_seeds.groups(run)
    assert [k for group in groups for k in group] == list(range(seeds))
    assert len(groups) == min(seeds, processes)
    sizes = {len(group) for group in groups}
    assert max(sizes) - min(sizes) <= 1
    children = separate_seeds.jobs(run, tmp_path)
    assert not any(separate_seeds.apart(child.run) for child in children)
    for group, child in zip(groups, children, strict=True):
        assert (child.run.seed, child.run.seeds) == (5 + group.start, len(group))
    if (seeds, processes) == (3, 2):
        assert [child.folder.name for child in children] == ["seed5", "seeds6-7"]


# ---- merged results ----------------------------------------------------------------------------


def results(seeds: list[int], points: Sequence[int], status: str = "finished") -> dict[str, Any]:
    evaluations = [
        {
            "task": 0,
            "during": 0,
            "updates": updates,
            "env_steps": 0,
            "returns": [[100.0 * seed + updates] for seed in seeds],
            "lengths": [[9] for _ in seeds],
            "score": [1.0 * seed for seed in seeds],
        }
        for updates in points
    ]
    return {
        "format": 1,
        "status": status,
        "agent": "bc",
        "tasks": [{"updates": max(points), "env_steps": 0}],
        "seeds": seeds,
        "evaluations": evaluations,
        "last": evaluations[-1],
        "best": evaluations[0],
        "updates": max(points),
        "env_steps": 0,
        "wall_time_s": 1.0,
        "updates_per_s": 10.0 * len(seeds),
    }


def test_merged_results_hold_one_row_per_seed(tmp_path: Path) -> None:
    children = separate_seeds.jobs(made(seeds=5, processes=3), tmp_path)  # groups of 1, 2, 2
    parts = [results([0], [5, 10]), results([1, 2], [5, 10]), results([3, 4], [5], "stopped")]
    for child, part in zip(children, parts, strict=True):
        child.folder.mkdir()
        (child.folder / "results.json").write_text(json.dumps(part), encoding="utf-8")
    merged = separate_seeds.merged(children, {})
    assert merged is not None
    assert merged["seeds"] == [0, 1, 2, 3, 4]
    assert merged["updates"] == 5
    assert [e["updates"] for e in merged["evaluations"]] == [5]  # what all of them have
    assert merged["last"]["returns"] == [[5.0], [105.0], [205.0], [305.0], [405.0]]
    assert merged["last"]["score"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    without = separate_seeds.merged(children, {"seeds3-4": "boom"})
    assert without is not None
    assert without["seeds"] == [0, 1, 2]
    assert [e["updates"] for e in without["evaluations"]] == [5, 10]
    assert without["errors"] == {"seeds3-4": "boom"}
    assert [separate_seeds.finished(child) for child in children] == [True, True, False]
    longer = replace(children[0], run=made(**{"tasks.0.updates": 11}))
    assert not separate_seeds.finished(longer)


def test_a_task_evaluated_twice_at_one_point_stays_twice() -> None:
    twice = results([0], [5, 5])["evaluations"]
    other = results([1], [5, 5])["evaluations"]
    twice[1]["returns"], other[1]["returns"] = [[1.0]], [[2.0]]
    merged = separate_seeds._aligned([twice, other])
    assert [e["returns"] for e in merged] == [[[5.0], [105.0]], [[1.0], [2.0]]]


# ---- whole runs --------------------------------------------------------------------------------


@dataclass
class Here:
    """A launcher that runs its jobs in this process, one after the other."""

    processes: int | None = None
    failing: tuple[str, ...] = ()
    done: list[Report] = field(default_factory=list)

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error: object) -> None: ...

    def submit(self, job: Job) -> None:
        self.done.append(Report(job))

    def cancel(self, at_once: bool = False) -> None: ...

    def reports(self) -> list[Report]:
        for report in self.done:
            if report.state == "waiting" and report.job.name in self.failing:
                report.state, report.code, report.error = "failed", 2, "no such luck"
            elif report.state == "waiting":
                last = report.job.run.tasks[-1]
                if launcher.has_checkpoint(report.job.folder):
                    runs.resume(report.job.folder, last.updates, last.env_steps, progress=False)
                else:
                    runs.train(report.job.run, progress=False)
                report.state = "finished"
        return self.done


TINY = {
    "log_every": 5,
    "eval_every": 0,
    "eval_episodes": 2,
    "eval_lanes": 2,
    "agent.hidden": [8],
    "agent.batch_size": 8,
}


def online(folder: Path, steps: int = 12, seeds: int = 3) -> RunConfig:
    given = {"tasks.0.env": "Pendulum-v1", "tasks.0.env_steps": steps, "agent.warmup_steps": 6}
    more = {"agent.buffer_capacity": 100, "seeds": seeds, "seed": 4, "run_dir": str(folder)}
    return config.make("sac", overrides=TINY | given | more)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    from rl_shift.recording import record

    return record(["random"], "Pendulum-v1", 400, tmp_path / "pendulum.hdf5", seed=0)


def test_online_seeds_train_resume_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(separate_seeds, "Local", Here)
    folder = runs.train(online(tmp_path / "run"), progress=False)
    merged = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert merged["status"] == "finished"
    assert merged["seeds"] == [4, 5, 6]
    assert np.shape(merged["last"]["returns"]) == (3, 2)
    alone = runs.train(replace(online(tmp_path / "alone"), seed=5, seeds=1), progress=False)
    same = json.loads((alone / "results.json").read_text(encoding="utf-8"))
    assert merged["last"]["returns"][1] == same["last"]["returns"][0]

    with pytest.raises(UserError, match="can only become longer"):
        runs.resume(folder, env_steps=5, progress=False)
    runs.resume(folder, env_steps=20, progress=False)
    longer = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert longer["env_steps"] == 20
    assert longer["tasks"][0]["env_steps"] == 20
    assert longer["seeds"] == [4, 5, 6]
    assert config.load(folder / "config.yaml").tasks[0].env_steps == 20

    every, run, tasks = runs.load_agent(folder)
    assert (every.seeds, run.seeds, tasks[0].env) == (3, 3, "Pendulum-v1")
    obs = torch.randn(3, 7, 3)
    actions = every.run(every.act, obs, False)
    for k in range(3):
        one, _, _ = runs.load_agent(f"{folder}#{k}")
        assert one.seeds == 1
        torch.testing.assert_close(one.run(one.act, obs[k], False), actions[k])
    with pytest.raises(UserError, match="#0 to #2"):
        runs.load_agent(f"{folder}#3")


def test_failed_seeds_are_named_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(separate_seeds, "Local", lambda n: Here(n, failing=("seed5",)))
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"1 of 3 .* seed5: no such luck .* --resume"):
        runs.train(online(folder), progress=False)
    merged = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert merged["status"] == "failed"
    assert merged["seeds"] == [4, 6]
    assert merged["errors"] == {"seed5": "no such luck"}
    with pytest.raises(UserError, match="seed #1 .* has no checkpoint"):
        runs.load_agent(folder)
    before = (folder / "seed4" / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(separate_seeds, "Local", Here)
    runs.resume(folder, progress=False)
    merged = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (merged["status"], merged["seeds"], merged["errors"]) == ("finished", [4, 5, 6], {})
    assert (folder / "seed4" / "results.json").stat().st_mtime_ns == before  # was finished


def test_a_mistake_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    run = online(folder)
    with pytest.raises(UserError, match="cannot be used here|continuous|vector"):
        task = replace(run.tasks[0], env="CartPole-v1")  # discrete actions
        runs.train(replace(run, tasks=(task,)), progress=False)
    assert not folder.exists()
    everyone = ("seed4", "seed5", "seed6")
    monkeypatch.setattr(separate_seeds, "Local", lambda n: Here(n, failing=everyone))
    with pytest.raises(UserError, match="^no such luck$"):
        runs.train(run, progress=False)
    assert not folder.exists()


def test_real_processes_with_stacked_seeds_inside(tmp_path: Path, data: Path) -> None:
    """Three seeds in two processes; #k names seed k whatever the grouping."""
    given = {"tasks.0.dataset": str(data), "tasks.0.updates": 20, "seeds": 3, "processes": 2}
    run = config.make("bc", overrides=TINY | given | {"run_dir": str(tmp_path / "run")})
    folder = runs.train(run, progress=False)
    merged = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (merged["status"], merged["seeds"]) == ("finished", [0, 1, 2])
    assert np.shape(merged["last"]["returns"]) == (3, 2)
    assert {child.name for child in folder.glob("seed*")} == {"seed0", "seeds1-2"}
    assert "20/20 updates" in (folder / "seed0" / launcher.LOG).read_text(encoding="utf-8")

    stacked = runs.train(
        replace(run, processes=None, run_dir=str(tmp_path / "stacked")), progress=False
    )
    obs = torch.randn(5, 3)
    for k in range(3):
        here, _, _ = runs.load_agent(f"{folder}#{k}")
        there, _, _ = runs.load_agent(f"{stacked}#{k}")
        torch.testing.assert_close(
            here.run(here.act, obs, False), there.run(there.act, obs, False), atol=1e-4, rtol=1e-4
        )
    every, _, _ = runs.load_agent(folder)
    assert every.seeds == 3
