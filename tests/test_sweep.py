"""The grid file, what a sweep skips, resumes and reports, and its estimate."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rl_shift import cli, config, estimate, grid, launcher, runs
from rl_shift.errors import UserError
from rl_shift.launcher import Job, Report
from rl_shift.recording import record

TINY = """
settings:
  eval_every: 0
  eval_episodes: 2
  eval_lanes: 2
  log_every: 5
  agent: {hidden: [8], batch_size: 8}
"""


@pytest.fixture
def data(in_empty_folder: Path) -> Path:
    return record(["random"], "Pendulum-v1", 400, in_empty_folder / "pendulum.hdf5", seed=0)


def written(text: str, name: str = "grid.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def read(text: str) -> list[grid.Planned]:
    return grid.read(written(text))


# ---- the grid ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_empty_folder")
def test_every_combination_is_a_run() -> None:
    planned = read(
        """
        agents:
        - bc
        - {agent: td3_bc, label: tuned, seeds: 1, settings: {agent.alpha: 1.0},
           overrides: {agent.tau: [0.1, 0.2], eval_every: [7]}}
        - {preset: iql.gym_mujoco, datasets: [three]}
        datasets: [one, folder/two.hdf5]
        seeds: 3
        seed: 5
        settings: {updates: 20, tasks: [{reward: normalize}]}
        """
    )
    names = [plan.name for plan in planned]
    assert names == [
        "bc.one",
        "bc.two",
        "tuned.one.tau=0.1.eval_every=7",
        "tuned.one.tau=0.2.eval_every=7",
        "tuned.two.tau=0.1.eval_every=7",
        "tuned.two.tau=0.2.eval_every=7",
        "iql.three",
    ]
    first, tuned, preset = planned[0].run, planned[3].run, planned[-1].run
    assert (first.seed, first.seeds, first.tasks[0].updates) == (5, 3, 20)
    assert first.tasks[0].reward == "normalize"
    assert (tuned.seeds, tuned.eval_every, tuned.agent.alpha, tuned.agent.tau) == (1, 7, 1.0, 0.2)
    assert (preset.agent_name, preset.tasks[0].updates) == ("iql", 20)
    assert grid.placed(planned[0], Path("out")).run.run_dir == str(Path("out", "bc.one"))


@pytest.mark.usefixtures("in_empty_folder")
def test_environments_instead_of_datasets() -> None:
    planned = read("agents: [sac]\nenvs: [Hopper-v5, Ant-v5]\nsettings: {env_steps: 9}")
    assert [plan.name for plan in planned] == ["sac.Hopper-v5", "sac.Ant-v5"]
    assert planned[1].run.tasks[0].env == "Ant-v5"
    assert planned[1].run.tasks[0].env_steps == 9


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agents: [bc]\ndatasts: [d]", "unknown key 'datasts' .* did you mean 'datasets'"),
        ("agents: [{agent: bc, lable: x}]\ndatasets: [d]", "'lable' in agents.0"),
        ("agents: [bc]\ndatasets: [d]\nsettings: {updates: 1, agent.alhpa: 2}", "agents.0.*alhpa"),
        ("agents: [bc]\ndatasets: [d]\nsettings: {updates: 1}\noverrides: {sed: [1]}", "'sed'"),
        ("agents: [bc]\ndatasets: [d]\noverrides: {seed: 1}", "overrides.seed .* a list"),
        ("agents: [bcc]\ndatasets: [d]", "did you mean 'bc'"),
        ("agents: bc\ndatasets: [d]", "agents .* must be a list"),
        ("agents: [bc]\nsettings: {updates: 1}", "nothing to learn from"),
        ("agents: [bc]\ndatasets: [d]\nseeds: many\nsettings: {updates: 1}", "seeds .* int"),
        ("agents: [bc, bc]\ndatasets: [d]\nsettings: {updates: 1}", "bc.d: give one .* label"),
        ("agents: [bc", "not valid YAML"),
    ],
)
def test_a_mistake_in_the_grid_fails_before_anything_starts(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        cli._dispatch(["sweep", written(text)])
    assert [path.name for path in Path.cwd().iterdir()] == ["grid.yaml"]


# ---- running -----------------------------------------------------------------------------------


@dataclass
class Here:
    """A launcher that runs its jobs in this process, one after the other."""

    processes: int | None = None
    failing: tuple[str, ...] = ()
    seen: list[str] = field(default_factory=list)
    done: list[Report] = field(default_factory=list)

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error: object) -> None: ...

    def submit(self, job: Job) -> None:
        self.done.append(Report(job))
        self.seen.append(job.name)

    def cancel(self, at_once: bool = False) -> None: ...

    def reports(self) -> list[Report]:
        for report in self.done:
            if report.state == "waiting" and report.job.name in self.failing:
                report.state, report.error, report.code = "failed", "no such luck", 1
            elif report.state == "waiting":
                last = report.job.run.tasks[-1]
                if launcher.has_checkpoint(report.job.folder):
                    runs.resume(report.job.folder, last.updates, last.env_steps, progress=False)
                else:
                    runs.train(report.job.run, progress=False)
                report.state = "finished"
        return self.done


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all jobs that are submitted; nothing runs in other processes."""
    names: list[str] = []
    monkeypatch.setattr(launcher, "Local", lambda processes: Here(processes, seen=names))
    return names


def read_json(path: str) -> dict[str, Any]:
    return dict(json.loads(Path(path).read_text(encoding="utf-8")))


def test_a_sweep_skips_resumes_and_lists_failures(
    data: Path,
    seen: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = f"""
agents: [bc, {{agent: bc, label: two, seeds: 3, overrides: {{processes: [2]}}}}]
datasets: [{data.name}]
{TINY}  updates: 10
"""
    argv = ["sweep", written(text), "--out", "out", "--estimate=false"]
    bad = "two.pendulum.processes=2/seeds1-2"
    monkeypatch.setattr(launcher, "Local", lambda n: Here(n, failing=(bad,), seen=seen))
    assert cli.main(argv) == 1
    out = capsys.readouterr().out
    assert "2 runs, 3 processes in all: 0 finished, 0 to go on with, 3 new" in out
    assert "2 finished, 1 failed" in out
    assert f"{bad}: failed: no such luck" in out
    merged = read_json("out/two.pendulum.processes=2/results.json")
    assert (merged["status"], merged["seeds"]) == ("failed", [0])
    assert merged["errors"] == {"seeds1-2": "no such luck"}

    seen.clear()
    monkeypatch.setattr(launcher, "Local", lambda n: Here(n, seen=seen))
    assert cli.main(argv) == 0  # the same command tries only what failed
    assert seen == [bad]
    merged = read_json("out/two.pendulum.processes=2/results.json")
    assert (merged["status"], merged["seeds"], merged["errors"]) == ("finished", [0, 1, 2], {})
    agent, _, _ = runs.load_agent("out/two.pendulum.processes=2")
    assert agent.seeds == 3

    seen.clear()
    assert cli.main(argv) == 0
    assert seen == []
    assert "every run is finished" in capsys.readouterr().out

    longer = ["sweep", written(text.replace("updates: 10", "updates: 15")), *argv[2:]]
    assert cli.main(longer) == 0
    assert len(seen) == 3
    assert read_json("out/bc.pendulum/results.json")["updates"] == 15
    assert read_json("out/two.pendulum.processes=2/results.json")["updates"] == 15
    assert cli.main([*longer, "--dry-run"]) == 0
    assert "bc.pendulum: finished" in capsys.readouterr().out

    for old, new in (("[8]", "[9]"), ("updates: 10", "updates: 12")):
        other = written(text.replace(old, new), "other.yaml")
        assert cli.main(["sweep", other, *argv[2:]]) == 2
        assert "holds a run with other settings" in capsys.readouterr().err
    assert len(seen) == 3


def test_missing_data_and_unfit_spaces_fail_before_anything_starts(
    data: Path, seen: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"agents: [bc]\ndatasets: [{data.name}, missing.hdf5]\nsettings: {{updates: 5}}"
    assert cli.main(["sweep", written(text), "--out", "out"]) == 2
    assert "bc.missing" in capsys.readouterr().err
    text = "agents: [sac]\nenvs: [CartPole-v1]\nsettings: {env_steps: 5}"
    assert cli.main(["sweep", written(text), "--out", "out"]) == 2
    assert "sac.CartPole-v1" in capsys.readouterr().err
    assert seen == []
    assert not Path("out").exists()


def test_help_and_bad_flags(capsys: pytest.CaptureFixture[str], in_empty_folder: Path) -> None:
    assert cli.main(["sweep", "--help"]) == 0
    assert "--dry-run" in capsys.readouterr().out
    assert cli.main(["sweep"]) == 2
    assert cli.main(["sweep", "missing.yaml"]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert cli.main(["sweep", "missing.yaml", "--processes", "0"]) == 2


# ---- the estimate ------------------------------------------------------------------------------


def sized(run: config.RunConfig, folder: Path = Path("nowhere")) -> estimate.Work:
    tasks = runs.resolve(run)
    agent = runs.make_agent(replace(run, seeds=1), tasks)
    return estimate.work(Job("a", run, folder), agent, tasks)


def test_work_counts_updates_steps_and_episodes(data: Path) -> None:
    offline = {"tasks.0.dataset": str(data), "tasks.0.updates": 100, "eval_every": 30, "seeds": 2}
    work = sized(config.make("bc", overrides=offline | {"eval_episodes": 5}))
    assert (work.updates, work.env_steps, work.env_id) == (100, 0, "Pendulum-v1")
    assert work.episodes == (1 + 100 // 30) * 5 * 2
    online = {"tasks.0.env": "Pendulum-v1", "tasks.0.env_steps": 1000, "eval_every": 0}
    online |= {"agent.warmup_steps": 200, "agent.collect_every": 2, "lanes": 4}
    work = sized(config.make("sac", overrides=online))
    assert (work.updates, work.env_steps, work.episodes) == (100, 1000, 10)


def test_speeds_come_from_earlier_runs_else_from_a_measurement(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"tasks.0.dataset": str(data), "tasks.0.updates": 4000, "agent.hidden": [8]}
    given |= {"agent.batch_size": 8}
    run = config.make("bc", overrides=given)
    monkeypatch.setattr(estimate, "PROBE_UPDATES", 100)
    monkeypatch.setattr(estimate, "Local", Here)
    said: list[str] = []
    works = [sized(run), sized(run)]
    cost, again = estimate.costs(works, lambda work: None, probe=True, say=said.append)
    assert said == [f"measuring the speed of {works[0].job.name}, 1 of 1"]  # one for both
    assert again.speed == cost.speed
    assert cost.speed is not None
    assert cost.updating == pytest.approx(4000 / cost.speed)
    assert cost.evaluating > 0
    lines = estimate.table([cost, cost], processes=2)
    assert lines[1].split()[:3] == ["bc", "2", "8,000"]
    assert "core-hours" in lines[-1]
    (unknown,) = estimate.costs([sized(run)], lambda work: None, probe=False)
    assert "too low" in estimate.table([unknown], 1)[-1]

    folder = Path("earlier")
    folder.mkdir()
    (folder / "config.yaml").write_text(config.dump(run), encoding="utf-8")
    entries: Sequence[dict[str, Any]] = [
        {"step": k, "updates": k, "env_steps": 0, "time/updates_per_s": speed}
        for k, speed in ((1000, 10.0), (2000, 50.0), (3000, 60.0))
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    past = estimate.past_speeds([folder])
    assert past(sized(run)) == 50.0
    assert past(sized(replace(run, compile="on"))) is None
    begun = sized(run, folder)
    assert begun.updates == pytest.approx(1000)  # 3000 of 4000 are done


def test_options_without_effect_are_refused_and_the_sample_can_be_read(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sweep", "--help"]) == 0
    shown = capsys.readouterr().out
    lines = shown[shown.index("agents: [") : shown.index("With `search")]
    assert set(yaml.safe_load(lines)) == {"agents", "datasets", "seeds", "settings", "overrides"}
    Path("grid.yaml").write_text(
        "agents: [bc]\ndatasets: [rl_shift/hopper-replay-v0]\nsettings: {updates: 1}\n"
        "overrides: {agent.learning_rate: [1.0e+16, 1.0e-16]}\n"
    )
    Path("bad.yaml").write_text(
        "agents: [td3_bc]\ndatasets: [rl_shift/hopper-replay-v0]\nsettings: {updates: 1}\n"
        "overrides: {agent.batch_size: [64, 0]}\n"
    )
    assert cli.main(["sweep", "bad.yaml"]) == 2
    assert "batch_size must be at least 1, not 0" in capsys.readouterr().err
    assert not Path("sweeps").exists()
    for flags, said in ((["--address", "x"], "give --backend ray"), (["--retries", "-1"], "-1")):
        assert cli.main(["sweep", "grid.yaml", *flags]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["sweep", "grid.yaml", "--dry-run", "true"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate=1e+16" in shown and "learning_rate=1e-16" in shown
