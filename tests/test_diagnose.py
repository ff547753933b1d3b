"""scripts/diagnose.py: the learnt score against the closed form, on a small recorded set."""

import importlib.util
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from rl_shift import cli, tanh_gaussian
from rl_shift.policies import TanhGaussianPolicy

SCRIPT = Path(__file__).parents[1] / "scripts" / "diagnose.py"


@pytest.fixture(scope="module")
def diagnose() -> Any:
    spec = importlib.util.spec_from_file_location("diagnose", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A score model of a tanh-Gaussian policy on Pendulum, learnt for a moment."""
    folder = tmp_path_factory.mktemp("diagnose")
    rng = np.random.default_rng(0)
    sizes = {"fc0": (8, 3), "fc1": (8, 8), "last_fc": (1, 8), "last_fc_log_std": (1, 8)}
    weights = {f"{k}.weight": rng.normal(0, 0.3, s).astype(np.float32) for k, s in sizes.items()}
    weights |= {f"{k}.bias": np.full(s[0], -0.5, np.float32) for k, s in sizes.items()}
    np.savez(folder / "policy.npz", **weights)
    data, run = str(folder / "data.hdf5"), str(folder / "run")
    assert cli.main(["data", "collect", "--policy", str(folder / "policy.npz"), "--env",
                     "Pendulum-v1", "--steps", "6000", "--out", data]) == 0  # fmt: skip
    argv = ["train", "cdsa", "--dataset", data, "--agent.base", "bc", "--updates", "1",
            "--agent.mode", "conditional", "--agent.hidden", "[32]", "--agent.batch_size", "128",
            "--agent.score_updates", "300", "--agent.learning_rate", "1e-2", "--run-dir", run,
            "--eval-episodes", "1", "--agent.check_every", "100"]  # fmt: skip
    assert cli.main(argv) == 0
    return run


def test_score(
    diagnose: Any, run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "score.png"
    assert diagnose.main(["score", run_dir, "--rows", "100", "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 5000
    assert "corrections raise the exact density" in capsys.readouterr().out
    result = diagnose.score(run_dir, 100, None)
    assert [round(row["sigma"], 2) for row in result["levels"]][::9] == [0.02, 0.5]
    assert result["levels"][-1]["mean cosine"] > 0.8
    assert result["levels"][-1]["explained share"] > 0.5
    assert result["raised"] > 0.65  # three hundred updates; the direct score gives 99 %


def test_mistakes(
    diagnose: Any, run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diagnose.main(["score", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_scores_that_were_never_learnt_are_not_judged(
    diagnose: Any, run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = str(Path(run_dir).parent / "data.hdf5"), str(tmp_path / "states")
    argv = ["train", "cdsa", "--dataset", data, "--agent.base", "bc", "--updates", "1",
            "--agent.mode", "state", "--agent.hidden", "[8]", "--agent.model_hidden", "[8]",
            "--agent.score_updates", "2", "--agent.inverse_updates", "2", "--run-dir", run,
            "--agent.forward_updates", "2", "--eval-episodes", "1"]  # fmt: skip
    assert cli.main(argv) == 0
    assert diagnose.main(["score", run]) == 2
    assert "learnt scores of states alone" in capsys.readouterr().err
    assert diagnose.main(["score", run_dir, "--rows", "0"]) == 2
    assert "--rows 0: give at least 1" in capsys.readouterr().err


def test_a_recorded_policy_is_read_back_from_its_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    layers = {"fc0": (4, 2), "fc1": (4, 4), "last_fc": (2, 4), "last_fc_log_std": (2, 4)}
    weights = {}
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for name, shape in layers.items():
            for part, size in (("weight", shape), ("bias", shape[:1])):
                weights[f"{name}.{part}"] = rng.normal(size=size).astype(np.float32)
                file[f"metadata/policy/{name}/{part}"] = weights[f"{name}.{part}"]
    obs = rng.normal(size=(5, 2))
    read = tanh_gaussian.moments(tanh_gaussian.behaviour_policy(tmp_path / "data.hdf5"), obs)
    mean, log_std = TanhGaussianPolicy(weights, "known").distribution(obs)
    assert np.allclose(read[0], mean) and np.allclose(read[1], np.exp(log_std))
    action = torch.tanh(torch.from_numpy(mean + np.exp(log_std)))
    assert np.isfinite(tanh_gaussian.log_density(action.numpy(), *read)).all()
