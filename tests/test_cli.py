"""The command itself: start-up, help, threads, errors in one line, and whole runs through it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from rl_shift import agents, cli, config_source
from rl_shift.commands import train
from rl_shift.options import options_of

HEAVY = ("torch", "numpy", "gymnasium", "jsonargparse", "yaml", "h5py")
FEW = ["--log-every", "5", "--eval-every", "0", "--eval-episodes", "2", "--eval-lanes", "2"]


def rl_shift(*argv: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "rl_shift", *argv], capture_output=True, text=True, **kwargs
    )


# ---- start-up ----------------------------------------------------------------------------------


def test_importing_the_command_leaves_heavy_packages_alone() -> None:
    code = f"import rl_shift.cli, sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_listing_agents_and_presets_leaves_torch_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from rl_shift.cli import main; main(['list', 'agents']); "
        "main(['list', 'presets']); main(['train', '--help']); "
        "main(['train', 'cdsa', '--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
    assert "td3_bc.gym_mujoco" in done.stdout
    assert "validated: " in done.stdout
    assert "Behaviour cloning" in done.stdout and "--agent.sigma_min" in done.stdout


@pytest.mark.parametrize("name", agents.names())
def test_help_shows_the_fields_of_the_real_agent(name: str) -> None:
    bare = config_source.config_class(name)
    assert bare is not None and bare.__module__ != agents.get(name).Config.__module__
    assert options_of(bare) == options_of(agents.get(name).Config)


@pytest.mark.parametrize("argv", [["--help"], ["train", "iql", "--help"]])
def test_help_answers_within_half_a_second(argv: list[str]) -> None:
    def spent() -> float:  # by processes of ours that ended; the machine may be busy with others
        times = os.times()
        return times.children_user + times.children_system

    before = spent()
    done = rl_shift(*argv)
    assert done.returncode == 0
    words = cli.COMMANDS if len(argv) == 1 else ("--agent.expectile", "--updates")
    assert all(word in done.stdout for word in words)
    assert spent() - before < 0.5


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["train", "--help"], "--tasks.0.dataset"),
        (["train", "td3_bc", "--help"], "--agent.alpha"),
        (["train", "--preset", "iql.gym_mujoco", "-h"], "--agent.expectile"),
        (["evaluate", "--help"], "--compare"),
        (["data", "--help"], "collect --policy"),
        (["data", "list", "--help"], "data list"),
        (["data", "info", "--help"], "ID|PATH"),
        (["data", "verify", "--help"], "ID|PATH"),
        (["data", "download", "--help"], "--base-url"),
        (["data", "collect", "--help"], "--noise"),
        (["list", "--help"], "agents|envs|datasets|presets"),
        (["demo", "--help"], "--updates"),
        ([], "usage: rl-shift COMMAND"),
        (["--version"], "rl-shift 0."),
    ],
)
def test_every_command_has_help(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 0
    assert text in capsys.readouterr().out


def test_help_shows_what_a_field_means(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "td3_bc", "--help"])
    assert "weight of the value term (type: float, default: 2.5)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "text"),
    [("agents", "td3_bc"), ("envs", "Hopper-v5"), ("datasets", "hopper-medium-v2")],
)
def test_lists(kind: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", kind]) == 0
    assert text in capsys.readouterr().out


# ---- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "count"),
    [
        (["train", "bc"], 1),
        (["train", "bc", "--threads", "3"], 3),
        (["train", "bc", "--threads=2"], 2),
        (["train", "--config", "a.yaml"], 4),
        (["train", "--config", "a.yaml", "--threads", "2"], 2),
        (["train", "--resume", "run"], 5),
        (["train", "--config", "missing.yaml"], 1),
        (["train", "bc", "--threads"], 1),
    ],
)
def test_threads_are_known_before_anything_is_imported(
    argv: list[str], count: int, in_empty_folder: Path
) -> None:
    Path("a.yaml").write_text("seed: 1\nthreads: 4\n", encoding="utf-8")
    Path("run").mkdir()
    Path("run/config.yaml").write_text("threads: 5\n", encoding="utf-8")
    assert cli.requested_threads(argv) == count


def test_thread_counts_reach_torch_and_blas() -> None:
    code = (
        "import sys; from rl_shift import cli; "
        "cli.limit_threads(cli.requested_threads(['--threads', '2'])); "
        "from rl_shift.commands import limit_torch; limit_torch(2); "
        "import os, torch; print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'], "
        "os.environ['OPENBLAS_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"] * 4


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian', did you mean 'train'?"),
        (["train"], "say which agent to train"),
        (["train", "bc", "--dataset", "missing.hdf5", "--updates", "1"], "missing.hdf5"),
        (["train", "bc", "--env", "Hoper-v5", "--env-steps", "1"], "Hopper-v"),
        (["train", "--resume", "nowhere"], "nowhere is no run folder"),
        (["train", "--resume", "nowhere", "--seed", "1"], "takes only"),
        (["train", "bc", "--resume", "nowhere"], "takes only"),
        (["train", "--resume"], "--resume needs a value"),
        (["evaluate"], "give one RUN_DIR"),
        (["evaluate", "nowhere"], "nowhere is no run folder"),
        (["evaluate", "nowhere", "--episdes", "1"], "did you mean '--episodes'?"),
        (["list"], "agents, envs, datasets, presets"),
        (["list", "agent"], "did you mean 'agents'?"),
        (["data"], "list, info, verify, report, convert, download, collect"),
        (["data", "lst"], "did you mean 'list'?"),
        (["data", "info"], "takes ID|PATH, not nothing"),
        (["data", "info", "hoper-medium-v2"], "hopper-medium-v2"),
        (["data", "collect", "--policy", "random"], "needs --policy, --env, --steps and --out"),
        (["data", "download", "hopper-medium-v2"], "--base-url"),
        (["demo", "now"], "takes no argument 'now'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str],
    message: str,
    in_empty_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("D4RL_BASE_URL", raising=False)
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rl-shift: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not any(in_empty_folder.iterdir())


def test_a_truncated_output_is_no_error() -> None:
    command = f"{sys.executable} -m rl_shift list datasets | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""


# ---- whole runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "pendulum.hdf5"
    assert cli.main(["data", "collect", "--policy", "random", "--env", "Pendulum-v1",
                     "--steps", "600", "--out", str(path)]) == 0  # fmt: skip
    return str(path)


@pytest.fixture(scope="module")
def run_dir(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("runs") / "first")
    argv = ["train", "td3_bc", "--dataset", dataset, "--updates", "20", "--run-dir", folder]
    assert cli.main([*argv, "--agent.hidden", "[16]", *FEW]) == 0
    return folder


def test_a_recorded_file_is_not_replaced_unasked(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "collect", "--policy", "random", "--env", "Pendulum-v1", "--steps", "5"]
    path = tmp_path / "a.hdf5"
    assert cli.main([*argv, "--out", str(path)]) == 0
    before = path.read_bytes()
    assert cli.main([*argv, "--seed", "1", "--out", str(path)]) == 2
    assert "exists" in capsys.readouterr().err and path.read_bytes() == before
    assert cli.main([*argv, "--seed", "1", "--out", str(path), "--overwrite", "true"]) == 0
    assert path.read_bytes() != before
    assert cli.main([*argv, "--out", str(tmp_path / "a.foo")]) == 2
    assert "must end in .hdf5" in capsys.readouterr().err


def test_data_info_and_verify(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "info", dataset]) == 0
    out = capsys.readouterr().out
    assert "Pendulum-v1" in out
    assert "episodes" in out
    assert cli.main(["data", "verify", dataset]) == 0
    assert capsys.readouterr().out.endswith("ok\n")


def test_verify_reports_damage(dataset: str, tmp_path: Path, capsys: Any) -> None:
    damaged = tmp_path / "damaged.hdf5"
    damaged.write_bytes(Path(dataset).read_bytes()[:2000])
    assert cli.main(["data", "verify", str(damaged)]) == 2
    assert "damaged.hdf5" in capsys.readouterr().err


def test_train_then_resume_then_evaluate(
    run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads(Path(run_dir, "results.json").read_text())["updates"] == 20
    assert cli.main(["train", "--resume", run_dir, "--updates", "30"]) == 0
    out = capsys.readouterr().out
    assert f"run folder: {run_dir}" in out
    assert f"rl-shift train --resume {run_dir}" in out
    assert json.loads(Path(run_dir, "results.json").read_text())["updates"] == 30
    report = tmp_path / "report.json"
    argv = ["evaluate", run_dir, "--episodes", "3", "--lanes", "2", "--json", str(report)]
    assert cli.main(argv) == 0
    assert "Pendulum-v1" in capsys.readouterr().out
    [evaluation] = json.loads(report.read_text())["evaluations"]
    assert np.shape(evaluation["returns"]) == (1, 3)
    assert cli.main(["evaluate", run_dir, "--agent.alpha", "1"]) == 2
    assert "evaluation-time fields: none" in capsys.readouterr().err


def test_config_yaml_reproduces_the_run(run_dir: str, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    text = Path(run_dir, "config.yaml").read_text(encoding="utf-8")
    copy = tmp_path / "config.yaml"
    copy.write_text(text, encoding="utf-8")
    assert cli.main(["train", "--config", str(copy), "--run-dir", str(folder)]) == 0
    assert (folder / "config.yaml").read_text(encoding="utf-8") == text


def test_a_non_empty_folder_is_refused(
    run_dir: str, dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path(run_dir).rglob("*"))
    argv = ["train", "bc", "--dataset", dataset, "--updates", "5", "--run-dir", run_dir, *FEW]
    assert cli.main(argv) == 2
    assert "resume it with --resume" in capsys.readouterr().err
    assert sorted(Path(run_dir).rglob("*")) == before


def test_an_overwritten_run_comes_back_if_the_new_one_cannot_begin(
    run_dir: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run_dir, folder)
    before = sorted(folder.rglob("*"))
    argv = ["train", "bc", "--dataset", "", "--updates", "5", "--run-dir", str(folder), *FEW]
    lost = tmp_path / "lost.hdf5"
    with h5py.File(dataset) as old, h5py.File(lost, "w") as file:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            file[key] = old[key][()]
        file["rewards"][3] = np.nan
    argv[3] = str(lost)  # found to be bad only after the folder was emptied
    assert cli.main([*argv, "--env", "Pendulum-v1", "--overwrite"]) == 2
    assert "rewards holds NaN" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
    argv[3] = dataset
    assert cli.main([*argv, "--overwrite"]) == 0
    assert json.loads((folder / "results.json").read_text())["updates"] == 5
    assert not (folder / ".overwritten").exists()


def test_overwriting_loses_nothing_that_is_no_run(
    run_dir: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years")
    argv = ["train", "bc", "--dataset", dataset, "--updates", "5", *FEW, "--overwrite", "--run-dir"]
    assert cli.main([*argv, str(tmp_path)]) == 2
    assert "is none (it holds thesis.txt)" in capsys.readouterr().err
    assert thesis.read_text() == "years"
    folder = tmp_path / "killed"  # by SIGKILL, while it was to replace a finished run
    shutil.copytree(run_dir, folder / ".overwritten")
    shutil.copy(Path(run_dir) / "config.yaml", folder)
    assert cli.main(["train", "--resume", str(folder)]) == 2
    assert "what it was to overwrite lies in" in capsys.readouterr().err
    assert cli.main([*argv, str(folder), "--agent.learning_rate", "1e30"]) == 2  # diverges
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder), "--episodes", "1"]) == 0  # the finished run is back
    begun = tmp_path / "begun"  # as a sweep makes it: there is nothing to give back
    begun.mkdir()
    shutil.copy(Path(run_dir) / "config.yaml", begun)
    assert cli.main([*argv, str(begun), "--agent.learning_rate", "1e30"]) == 2
    assert json.loads((begun / "results.json").read_text())["status"] == "failed"


def test_a_run_that_fails_late_keeps_its_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "late_agent.py").write_text(
        "from rl_shift.agents.bc import BC\n\n\nclass Late(BC):\n"
        "    def act(self, obs, explore):\n        raise RuntimeError('late')\n"
    )
    argv = ["train", "late_agent:Late", "--dataset", dataset, "--updates", "20", *FEW]
    with pytest.raises(RuntimeError, match="late"):
        cli.main([*argv, "--run-dir", "late"])
    assert Path("late/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: null", "seed"),
        ("seed: 1\nseed: 2", "line 2 is not valid YAML: the key 'seed' is given twice"),
        ("agent: {hidden: [-3]}", "has a layer without units"),
        ("seed: 9223372036854775808", "seed must be less than"),
    ],
)
def test_settings_that_mean_nothing_are_told(
    text: str, told: str, tmp_path: Path, dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    argv = ["train", "bc", "--dataset", dataset, "--updates", "5", "--config", str(path)]
    assert cli.main([*argv, "--run-dir", str(tmp_path / "r")]) == 2
    assert told in capsys.readouterr().err


def test_a_file_of_another_kind_is_not_replaced(
    run_dir: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept.hdf5"
    shutil.copy(dataset, kept)
    before = kept.read_bytes()
    assert cli.main(["data", "convert", dataset, str(kept)]) == 2
    assert "exists: choose another name" in capsys.readouterr().err
    assert cli.main(["evaluate", run_dir, "--episodes", "1", "--json", str(kept)]) == 2
    assert "is no JSON file" in capsys.readouterr().err
    assert kept.read_bytes() == before
    assert cli.main(["data", "convert", dataset, str(kept), "--overwrite", "true"]) == 0


def test_an_agent_file_with_an_error_names_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_agent.py").write_text("class A:\n    def f(:\n")
    assert cli.main(["train", "broken_agent:A", "--env", "Pendulum-v1", "--env-steps", "5"]) == 2
    assert "broken_agent.py, line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["pgd", "--env", "Pendulum-v1", "--env-steps", "50", "--agent.network", "mlp",
         "--agent.window", "2"],
        ["synther", "--env", "Pendulum-v1", "--env-steps", "50", "--agent.width", "8"],
    ],
    ids=["pgd", "synther"],
)  # fmt: skip
def test_generators_say_that_they_need_data(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *argv, "--run-dir", str(tmp_path / "r")]) == 2
    assert "generated data need a dataset" in capsys.readouterr().err


def test_what_stopped_before_its_first_checkpoint_is_not_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("")
    argv = ["train", "bc", "--dataset", "rl_shift/hopper-replay-v0", "--updates", "1"]
    assert cli.main([*argv, "--run-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "--resume" not in said and "--overwrite" in said


def test_interrupt_says_how_to_go_on(
    run_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rl_shift import runs

    def stopped(*args: Any, **kwargs: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "resume", stopped)
    assert cli.main(["train", "--resume", run_dir]) == 130
    assert f"rl-shift train --resume {run_dir}" in capsys.readouterr().err
    monkeypatch.setattr(runs, "train", stopped)
    assert cli.main(["train", "sac", "--env", "Pendulum-v1", "--env-steps", "5"]) == 130
    assert "before the first checkpoint" in capsys.readouterr().err


AGENT_OF_A_USER = '''
from dataclasses import dataclass, field
import torch
from rl_shift.agent import Agent
from rl_shift.networks import MLP

class Pusher(Agent):
    """Pushes with a constant force that may be chosen at evaluation."""

    @dataclass(frozen=True)
    class Config:
        batch_size: int = 8  # ours
        force: float = field(default=0.0, metadata={"evaluation": True})  # ours

    def __init__(self, observation_space, action_space, config):
        super().__init__(observation_space, action_space, config)
        self.actor = MLP(observation_space.shape[0], (4,), action_space.shape[0])
        self.optimizer("actor", lr=1e-3)

    def loss(self, batch):
        value = (self.actor(batch["obs"]) - batch["action"]).square().mean()
        return value, {"actor/loss": value}

    def act(self, obs, explore):
        return 0 * self.actor(obs) + self.config.force

    def diagnostics(self, obs):
        return {"force": self.act(obs, False).abs().sum(-1)}

    def update(self, batch):
        return self.learn("actor", self.loss, batch)
'''


def test_compare_evaluation_time_values_of_a_users_own_agent(
    dataset: str, in_empty_folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    Path("pusher.py").write_text(AGENT_OF_A_USER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(in_empty_folder))
    argv = ["train", "pusher:Pusher", "--dataset", dataset, "--updates", "5", "--seeds", "2"]
    assert cli.main([*argv, "--run-dir", "run", *FEW]) == 0
    argv = ["evaluate", "run", "--episodes", "4", "--json", "r.json"]
    assert cli.main([*argv, "--compare", "agent.force=0,1,0.0"]) == 0
    out = capsys.readouterr().out
    assert "force=1.0 minus force=0.0: " in out
    report = json.loads(Path("r.json").read_text())
    first, second, third = report["evaluations"]
    assert np.shape(first["returns"]) == (2, 4)
    assert first["returns"] == third["returns"]  # the same episodes
    expected = np.mean(second["returns"]) - np.mean(first["returns"])
    change, none = report["differences"]
    assert change["mean"] == pytest.approx(expected)
    means = [np.mean(e["returns"], axis=1) for e in (first, second)]
    half = 12.7062 * np.std(means[1] - means[0], ddof=1) / np.sqrt(2)  # t of one degree of freedom
    assert change["interval"] == pytest.approx([expected - half, expected + half], rel=1e-4)
    assert "over the means of 2 seeds, 4 paired episodes each" in out
    assert none["mean"] == 0.0
    worst = [np.min(e["returns"]) for e in (first, second)]  # 5 % of eight episodes
    tail = change["tails"]["CVaR 5 %"]
    assert tail["difference"] == pytest.approx(worst[1] - worst[0])
    assert tail["interval"][0] <= tail["difference"] <= tail["interval"][1]
    assert tail["interval"][0] < tail["interval"][1]
    assert f"CVaR 5 % {tail['difference']:+.2f} [{tail['interval'][0]:+.2f}, " in out
    assert "95 % bootstrap intervals of the pairs" in out
    assert [np.mean(e["diagnostics"]["force"]) for e in report["evaluations"]] == [0, 1, 0]
    assert first["risk"]["VaR 5 %"] == first["risk"]["CVaR 5 %"] == np.min(first["returns"])
    assert "CVaR 10 %" in out and "force 1" in out
    assert cli.main(["evaluate", "run", "--agent.batch_size", "4"]) == 2
    assert "evaluation-time fields: force" in capsys.readouterr().err
    assert cli.main(["evaluate", "run", "--compare", "force=1"]) == 2
    assert "FIELD=A,B" in capsys.readouterr().err
    Path("folder").mkdir()
    for flag, value, said in (
        ("--lanes", "0", "at least 1"),
        ("--threads", "0", "at least 1"),
        ("--episodes", "0", "at least 1"),
        ("--seed", "-3", "must lie in"),
        ("--json", "folder", "it is a folder"),
        ("--json", "pusher.py/r.json", "cannot write"),
    ):
        assert cli.main(["evaluate", "run", flag, value]) == 2
        assert said in capsys.readouterr().err
    argv = ["data", "collect", "--policy", "random", "--env", "Pendulum-v1", "--steps", "5"]
    assert cli.main([*argv, "--out", "a.hdf5", "--seed", "-1"]) == 2
    assert "--seed must lie in" in capsys.readouterr().err
    sys.modules.pop("pusher")


def test_environment_of_the_process_is_left_usable() -> None:
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert train  # the command's body can be imported


def test_ctrl_c_saves_and_says_how_to_go_on(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    argv = ["train", "bc", "--dataset", dataset, "--updates", "1000000", "--run-dir", str(folder)]
    child = subprocess.Popen(
        [sys.executable, "-m", "rl_shift", *argv, *FEW, "--agent.hidden", "[8]"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.splitlines()[-1].endswith(f"go on with: rl-shift train --resume {folder}")
    assert json.loads((folder / "results.json").read_text())["status"] == "stopped"
    done = json.loads((folder / "results.json").read_text())["updates"]
    assert 0 < done < 1_000_000
    assert cli.main(["train", "--resume", str(folder), "--updates", "10"]) == 2
    assert "less than the run's 1000000" in capsys.readouterr().err


def test_demo(
    dataset: str, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The demo's own steps, on another dataset and with few updates."""
    from rl_shift import config

    preset = in_empty_folder / "presets" / "td3_bc.demo.yaml"
    preset.parent.mkdir()
    preset.write_text(f"tasks:\n- dataset: {dataset}\n  updates: 10\neval_every: 5\n")
    monkeypatch.setattr(config, "files", lambda package: preset.parent)
    assert cli.main(["demo", "--episodes", "2", "--run-dir", "shown"]) == 0
    out = capsys.readouterr().out
    assert "the data" in out
    assert "the policy" in out
    for line, place in (("learning curve", "learning_curve.png"), ("checkpoint", "step_")):
        assert re.search(rf"^{line}: +\S*{place}", out, re.MULTILINE)
    assert (in_empty_folder / "shown" / "learning_curve.png").stat().st_size > 1000
    assert any((in_empty_folder / "shown" / "tensorboard").iterdir())
    # without matplotlib there is no picture, and a word about it
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["demo", "--episodes", "2", "--run-dir", "plain"]) == 0
    assert 'none: a picture needs matplotlib: pip install "rl_shift[report]"' in (
        capsys.readouterr().out
    )
