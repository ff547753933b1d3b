"""Hyper-parameter search, and the backend of Ray Tune; each where its extra is installed."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rl_shift import cli, estimate, grid, search
from rl_shift.errors import UserError
from rl_shift.recording import record

needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="needs the extra optuna"
)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs the extra ray"
)
Told = pytest.CaptureFixture[str]
GRID = """
agents: [bc]
datasets: [pendulum.hdf5]
settings:
  updates: 20
  eval_every: 0
  eval_episodes: 2
  eval_lanes: 2
  log_every: 5
  agent: {hidden: [8], batch_size: 8}
"""
SEARCH = """
search:
  trials: 3
  parallel: 1
  space:
    agent.learning_rate: {low: 0.0001, high: 0.1, log: true}
    agent.hidden: [[8], [16]]
"""


@pytest.fixture
def folder(in_empty_folder: Path) -> Path:
    record(["random"], "Pendulum-v1", 400, in_empty_folder / "pendulum.hdf5", seed=0)
    return in_empty_folder


def results(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "results.json").read_text())
    return found


# ---- search ------------------------------------------------------------------------------------


class Asked:
    """Stands for a trial of Optuna: always the upper end."""

    def suggest_int(self, key: str, low: int, high: int, **extra: Any) -> int:
        return high

    def suggest_float(self, key: str, low: float, high: float, **extra: Any) -> float:
        return high


def test_proposals_keep_types() -> None:
    space = {"a": [[8], [16, 16]], "b": {"low": 1, "high": 4}, "c": {"low": 0.1, "high": 1}}
    assert search.proposed(Asked(), space) == {"a": [16, 16], "b": 4, "c": 1}


def test_small_numbers_that_yaml_reads_as_words_are_numbers() -> None:
    text = "{trials: 2, space: {agent.learning_rate: {low: 1e-5, high: 1e-3, log: true}}}"
    space = search.parsed(yaml.safe_load(text), "grid.yaml").space
    assert space["agent.learning_rate"] == {"low": 1e-5, "high": 1e-3, "log": True}


def test_a_trial_changes_only_what_is_searched(folder: Path) -> None:
    Path("grid.yaml").write_text(GRID)
    (plan,) = grid.read("grid.yaml")
    trial = search.changed(plan, {"agent.learning_rate": 0.5, "updates": 30}, 7)
    assert trial.name == "bc.pendulum.trial0007"
    assert trial.run.agent.learning_rate == 0.5
    assert trial.run.tasks[0].updates == 30
    assert trial.run.agent.hidden == plan.run.agent.hidden
    assert trial.run.eval_episodes == 2


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"trials": 2, "space": {}}, "must hold settings"),
        ({"trials": 0, "space": {"a": [1, 2]}}, "number of 1 or more"),
        ({"trials": 1, "space": {"a": [1]}}, "list of choices"),
        ({"trials": 1, "space": {"a": {"low": 2, "high": 1}}}, "list of choices"),
        ({"trials": 1, "space": {"a": {"low": 1, "hi": 2}}}, "list of choices"),
        ({"trial": 1, "space": {"a": [1, 2]}}, "did you mean 'trials'"),
    ],
)
def test_a_mistake_in_the_space_is_named(wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        search.parsed(wanted, "grid.yaml")


def test_search_names_its_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    Path("grid.yaml").write_text(GRID + SEARCH)
    assert cli.main(["sweep", "grid.yaml", "--dry-run"]) == 0
    assert "3 trials of each of bc" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(["sweep", "grid.yaml"]) == 2
    assert "rl_shift[optuna]" in capsys.readouterr().err


@needs_optuna
@pytest.mark.filterwarnings("ignore")
def test_a_search_trains_ranks_and_goes_on(folder: Path, capsys: Told) -> None:
    Path("grid.yaml").write_text(GRID + SEARCH)
    words = ["sweep", "grid.yaml", "--out", "out", "--processes", "1"]
    assert cli.main(words) == 0
    assert "bc: 3 trials" in capsys.readouterr().out
    ranked = json.loads(Path("out/search.json").read_text())["bc"]
    values = [trial["value"] for trial in ranked]
    assert values == sorted(values, reverse=True)
    best = results(f"out/bc.pendulum.trial{ranked[0]['trial']:04d}")
    returns = best["last"]["returns"][0]
    assert ranked[0]["value"] == pytest.approx(sum(returns) / len(returns))
    settings = ranked[0]["settings"]
    assert best["agent_config"]["learning_rate"] == settings["agent.learning_rate"]
    assert best["agent_config"]["hidden"] == settings["agent.hidden"]
    Path("grid.yaml").write_text(GRID + SEARCH.replace("trials: 3", "trials: 4"))
    assert cli.main(words) == 0
    assert len(json.loads(Path("out/search.json").read_text())["bc"]) == 4
    Path("grid.yaml").write_text(GRID + SEARCH.replace("agent.hidden", "agent.hiden"))
    assert cli.main(words) == 2
    assert "did you mean" in capsys.readouterr().err


# ---- estimates ---------------------------------------------------------------------------------


def test_a_compilation_is_no_speed() -> None:
    assert estimate._measured([]) is None
    found = estimate._measured([2.0, 100.0, 120.0, 110.0])
    assert found is not None and found.speed == 110.0
    assert found.once == pytest.approx(50 / 2 - 50 / 110)
    alone = estimate._measured([4.0])
    assert alone is not None and (alone.speed, alone.once) == (4.0, 0.0)


# ---- Ray ---------------------------------------------------------------------------------------


def test_ray_names_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Told) -> None:
    Path("grid.yaml").write_text(GRID)
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["sweep", "grid.yaml", "--backend", "ray", "--no-estimate"]
    assert cli.main([w for w in words if w != "--no-estimate"] + ["--estimate", "false"]) == 2
    assert "rl_shift[ray]" in capsys.readouterr().err


@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_both_backends_give_equal_results(folder: Path, capsys: Told) -> None:
    Path("grid.yaml").write_text(GRID + "overrides: {agent.learning_rate: [0.001, 0.01]}\n")
    for backend in ("local", "ray"):
        words = ["sweep", "grid.yaml", "--out", backend, "--backend", backend]
        assert cli.main([*words, "--estimate", "false", "--processes", "2"]) == 0
    assert "2 finished, 0 failed" in capsys.readouterr().out
    names = sorted(p.name for p in Path("local").iterdir() if (p / "results.json").is_file())
    assert len(names) == 2
    for name in names:
        one, other = (results(f"{backend}/{name}") for backend in ("local", "ray"))
        for key in ("wall_time_s", "updates_per_s"):
            assert one.pop(key) and other.pop(key)
        assert one == other
    assert cli.main(["sweep", "grid.yaml", "--out", "ray", "--backend", "ray"]) == 0
    assert "every run is finished" in capsys.readouterr().out


@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_ray_retries_a_killed_worker_and_reports_mistakes(folder: Path) -> None:
    from rl_shift.launcher import Job, wait
    from rl_shift.ray_launcher import RayTune

    Path("grid.yaml").write_text(GRID)
    (plan,) = grid.read("grid.yaml")
    script = Path("child.py")
    script.write_text(
        "import os, pathlib, signal, sys\n"
        "name = sys.argv[sys.argv.index('--run-dir') + 1]\n"
        "seen = pathlib.Path(name, 'seen')\n"
        "if 'bad' in name: sys.exit('no such thing')\n"
        "if 'lost' in name or not seen.exists():\n"
        "    seen.write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = (sys.executable, str(script.resolve()))
    with RayTune(2, retries=1, command=command) as pool:
        for name in ("once", "lost", "bad"):
            placed = grid.placed(plan, folder / "out")
            pool.submit(Job(name, placed.run, folder / "out" / name))
        reports = {report.job.name: report for report in wait(pool)}
    assert reports["once"].state == "finished"
    assert (reports["lost"].state, reports["bad"].state) == ("failed", "failed")
    assert "killed by signal 9" in reports["lost"].error
    assert "no such thing" in reports["bad"].error
