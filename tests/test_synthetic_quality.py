"""Quality of generated trajectories: exact replay of real ones, reports over the strength."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_shift import cli, envs, runs, synthetic_quality
from rl_shift.agent import Policy
from rl_shift.dynamics import GaussianEnsemble
from rl_shift.envs import termination
from rl_shift.errors import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "diagnose.py"
DATA = "rl_shift/hopper-replay-v0"
TINY = ["--updates", "2", "--eval-episodes", "1", "--eval_every", "0", "--log_every", "50",
        "--agent.base_config", "{hidden: [8], batch_size: 8}"]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A trajectory denoiser and an ensemble on the bundled hopper data, learnt for a moment."""
    folder = tmp_path_factory.mktemp("quality")
    folders = [str(folder / "pgd"), str(folder / "mopo")]
    argv = ["--preset", "pgd.td3_bc", "--agent.window", "8", "--agent.width", "64",
            "--agent.depth", "2",
            "--agent.denoiser_updates", "150", "--agent.average", "0.05",
            "--agent.windows", "64"]  # fmt: skip
    assert cli.main(["train", *argv, "--dataset", DATA, *TINY, "--run-dir", folders[0]]) == 0
    argv = ["mopo", "--agent.base", "td3_bc", "--agent.model_hidden", "[32, 32]",
            "--agent.dynamics_updates", "150", "--agent.starts", "50"]  # fmt: skip
    assert cli.main(["train", *argv, "--dataset", DATA, *TINY, "--run-dir", folders[1]]) == 0
    return folders


def test_a_denoiser_is_trained_once_per_dataset(found: list[str], tmp_path: Path) -> None:
    argv = ["train", "--preset", "pgd.td3_bc", "--agent.window", "8", "--agent.width", "64"]
    argv += ["--agent.depth", "2"]
    argv += ["--agent.windows", "64", "--agent.denoiser", found[0], "--dataset", DATA, *TINY]
    assert cli.main([*argv, "--run-dir", str(tmp_path / "second"), "--seed", "1"]) == 0
    first, second = (runs.load_agent(spec)[0] for spec in (found[0], tmp_path / "second"))
    theirs, mine = (agent.get_submodule("averaged").state_dict() for agent in (first, second))
    assert all(torch.equal(value, mine[key]) for key, value in theirs.items())


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Walker2d-v5", "HalfCheetah-v5"])
def test_replay_is_exact_on_real_steps(env_id: str) -> None:
    env = envs.make_env(env_id)
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=3)
    rows: list[tuple[Any, Any, Any]] = []
    ends = termination.of(env_id)
    assert ends is not None
    for _ in range(40):
        action = rng.uniform(-0.2, 0.2, env.action_space.shape).astype(np.float32)
        following, _, terminated, _, _ = env.step(action)
        tensors = [torch.as_tensor(x)[None] for x in (obs, action, following)]
        assert bool(ends(*tensors)) == terminated
        rows.append((obs, action, following))
        obs = env.reset()[0] if terminated else following
    start, action, following = (
        np.stack(column).astype(np.float64) for column in zip(*rows, strict=True)
    )
    replay = synthetic_quality.Replay(env_id)
    usable = replay.usable(start, following)
    assert usable.mean() > 0.5
    true = replay.next_obs(start[usable], action[usable])
    np.testing.assert_allclose(true, following[usable], atol=1e-3)
    assert termination.of("CartPole-v1") is None


def test_other_tasks_are_refused() -> None:
    with pytest.raises(UserError, match="choose Hopper, Walker2d, HalfCheetah"):
        synthetic_quality.Replay("Ant-v5")


def test_an_ensemble_is_rolled_until_it_ends() -> None:
    model = GaussianEnsemble(11, 3, (8,), 2, 2)
    obs = torch.zeros(6, 11)
    obs[:, 0] = 1.25
    obs[:3, 0] = 0.1  # fallen at once
    policy = Policy(torch.zeros(6, 3))
    rows = synthetic_quality.model_windows(
        model, lambda obs: policy.mean, termination.hopper, obs, 4
    )
    assert rows["obs"].shape == (6, 4, 11)
    assert rows["alive"][:, 0].all() and not rows["alive"][:3, 1:].any()


def test_the_script_compares_strengths(
    found: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("diagnose", SCRIPT)
    assert spec is not None and spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / "tradeoff.png"
    argv = ["synthetic", found[0], "--coefficients", "0", "16", "--model", found[1]]
    argv += ["--windows", "24", "--moves", "60", "--picture", str(path)]
    argv += ["--json", str(tmp_path / "rows.json")]
    assert script.main(argv) == 0
    out = capsys.readouterr().out
    assert "coefficient 16" in out and "ensemble" in out
    assert path.stat().st_size > 5000
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["coefficient"] for row in rows["guided"]] == [0, 16]
    assert f"{rows['model']['dynamics_mse']:.4f}" in out
    synthetic_quality.picture(rows | {"window": 2}, path)  # one step each: nothing over the step
    assert path.stat().st_size > 5000
    assert script.main(["synthetic", found[1]]) == 2
    assert "no run that learnt to generate trajectories" in capsys.readouterr().err
    for flags, message in (
        (["--windows", "0"], "0 windows, 2000 moves: give at least 1"),
        (["--moves", "0"], "256 windows, 0 moves: give at least 1"),
        (["--coefficients", "0", "-1"], "coefficient -1: give 0 (unguided) or more"),
        (["--coefficients", "nan"], "coefficient nan: give 0 (unguided) or more"),
    ):
        assert script.main(["synthetic", found[0], *flags]) == 2
        assert message in capsys.readouterr().err
    assert script.main(["cost", "--timed", "-1"]) == 2
    assert "-1 windows cannot be timed" in capsys.readouterr().err
    assert script.main(["cost"]) == 0
    assert "pgd.paper  177656857   511      253952" in capsys.readouterr().out
    result = synthetic_quality.compare(found[0], [0.0, 16.0], None, found[1], 24, 60)
    unguided, guided = result["guided"]
    assert result["data"]["dynamics_mse"] < 1e-5 < unguided["dynamics_mse"]
    assert guided["log_likelihood"] > unguided["log_likelihood"]
    assert guided["spread"] < unguided["spread"]
    assert len(guided["by_step"]) == 7
    assert 0.0 <= guided["left_out"] < 1.0
    assert 0.001 < result["data"]["terminated"] < 0.1 and result["data"]["ending"] > 0
    assert 0.0 <= unguided["terminated"] < 0.3


def test_one_seed_of_several_must_be_named(found: list[str], tmp_path: Path) -> None:
    argv = ["train", "td3_bc", "--dataset", DATA, "--seeds", "2", "--agent.hidden", "[8]"]
    argv += [*TINY[:-2], "--run-dir", str(tmp_path / "two")]
    assert cli.main(argv) == 0
    with pytest.raises(UserError, match="holds 2 seeds: name one"):
        synthetic_quality.compare(found[0], [0.0], str(tmp_path / "two"), None, 4, 4)
    assert synthetic_quality.compare(found[0], [0.0], str(tmp_path / "two#1"), None, 4, 4)


def test_costs_are_the_spec_s() -> None:
    presets = ("pgd.td3_bc", "pgd.gpu", "pgd.paper")
    cpu, gpu, paper = synthetic_quality.costs(presets, 17, 6)
    assert gpu["flop"] == pytest.approx(3.8e13, rel=0.01)
    assert paper["flop"] == pytest.approx(2e16, rel=0.03)
    for row in (cpu, gpu):  # at least a hundred times cheaper, at no more than the error of 1.0300
        assert row["flop_per_transition"] * 100 < paper["flop_per_transition"]
        assert abs(row["toy_std"] - 1) < 0.03
    assert cpu["held_bytes"] == 4 * (4 * 905_010 + 14_336 * 41)
    (timed,) = synthetic_quality.costs(presets[:1], 17, 6, timed=2)
    assert timed.pop("seconds") > 0 and timed == cpu
