"""Off-policy evaluation: exact values where they are known, the ladder's interface, mistakes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from rl_shift import cli, ope
from rl_shift.errors import UserError
from rl_shift.policies import TanhGaussianPolicy
from rl_shift.recording import write_hdf5

ENV = "OpeLine-v0"
Told = pytest.CaptureFixture[str]
DISCOUNT = 0.9


class Line(gymnasium.Env[Any, Any]):
    """Each step earns the action; with it grows the position. Ends after ten steps."""

    observation_space = gymnasium.spaces.Box(-20, 20, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place = np.array([self.np_random.normal(), 0.0], np.float32)
        return self.place.copy(), {}

    def step(self, action: Any) -> Any:
        self.place += np.array([action[0], 1.0], np.float32)
        return self.place.copy(), float(action[0]), False, self.place[1] >= 10, {}


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    gymnasium.register(ENV, Line)
    yield
    gymnasium.registry.pop(ENV)


def policy_file(path: Path, action: float, std: float = 1e-4) -> str:
    """A tanh-Gaussian policy whose action is the same everywhere."""
    shapes = {"fc0": (4, 2), "fc1": (4, 4), "last_fc": (1, 4), "last_fc_log_std": (1, 4)}
    arrays = {f"{k}.weight": np.zeros(v, np.float32) for k, v in shapes.items()}
    arrays |= {f"{k}.bias": np.zeros(v[0], np.float32) for k, v in shapes.items()}
    arrays["last_fc.bias"] += np.float32(np.arctanh(action))
    arrays["last_fc_log_std.bias"] += np.float32(np.log(std))
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random actions, each earning itself, between states that mean nothing."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, (600, 1)).astype(np.float32)
    states = rng.normal(size=(2, 600, 2)).astype(np.float32)
    arrays = {
        "observations": states[0],
        "actions": action,
        "rewards": action[:, 0],
        "next_observations": states[1],
        "terminals": np.zeros(600, bool),
        "timeouts": np.arange(600) % 10 == 9,
    }
    path = tmp_path_factory.mktemp("line") / "line.hdf5"
    return str(write_hdf5(path, arrays, {"env_id": ENV, "horizon": 10}))


SETTINGS = {
    "discount": DISCOUNT, "hidden": [32], "batch_size": 64, "learning_rate": 3e-3, "tau": 0.2,
}  # fmt: skip


def test_the_value_of_a_constant_policy_is_a_geometric_sum(line: str, tmp_path: Path) -> None:
    policies = [policy_file(tmp_path / f"p{k}.npz", a) for k, a in enumerate((-0.5, 0.5))]
    for policy, action in zip(policies, (-0.5, 0.5), strict=True):
        (one,) = ope.estimate([policy], line, 400, SETTINGS)
        assert one.value == pytest.approx(action / (1 - DISCOUNT), abs=0.7)
        assert one.spread < 0.3


def test_stacked_policies_are_estimated_as_alone(line: str, tmp_path: Path) -> None:
    policies = [policy_file(tmp_path / f"p{k}.npz", a) for k, a in enumerate((-0.5, 0.1, 0.5))]
    found = ope.estimate(policies, line, 150, SETTINGS)
    assert [one.policy for one in found] == policies
    values = [one.value for one in found]
    assert values == sorted(values)
    assert values[2] - values[0] > 4
    (alone,) = ope.estimate(policies[1:2], line, 150, SETTINGS)
    assert alone.value == pytest.approx(values[1], abs=0.5)  # other noise, the same start


def test_terminated_rows_earn_nothing_after(tmp_path: Path) -> None:
    """One step, reward 1, ended: the value is 1, whatever the discount."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(200, 2)).astype(np.float32)
    arrays = {
        "observations": obs,
        "actions": np.full((200, 1), 0.5, np.float32),
        "rewards": np.ones(200, np.float32),
        "next_observations": obs,
        "terminals": np.ones(200, bool),
        "timeouts": np.zeros(200, bool),
    }
    data = str(write_hdf5(tmp_path / "ends.hdf5", arrays, {"env_id": ENV}))
    (one,) = ope.estimate([policy_file(tmp_path / "p.npz", 0.5)], data, 300, SETTINGS)
    assert one.value == pytest.approx(1.0, abs=0.05)


def test_the_torch_policy_is_the_file(tmp_path: Path) -> None:
    path = policy_file(tmp_path / "p.npz", 0.3)
    rng = np.random.default_rng(1)
    with np.load(path) as file:
        arrays = {k: rng.normal(size=file[k].shape).astype(np.float32) / 2 for k in file.files}
    np.savez(path, **arrays)
    module = ope.policy_module(path, 2, 1)
    obs = rng.normal(size=(50, 2)).astype(np.float32)
    mean, log_std = TanhGaussianPolicy.load(Path(path)).distribution(obs)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.stack([module(torch.from_numpy(obs)) for _ in range(2000)]).atanh()
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.15 * np.exp(log_std).max())
    np.testing.assert_allclose(drawn.std(0), np.exp(log_std), rtol=0.15)


def test_rollouts_are_discounted(tmp_path: Path) -> None:
    policy = policy_file(tmp_path / "p.npz", 0.5)
    discounted, plain = ope.discounted_returns(policy, ENV, DISCOUNT, 3)
    np.testing.assert_allclose(plain, 5.0, atol=1e-2)
    np.testing.assert_allclose(discounted, 0.5 * (1 - DISCOUNT**10) / (1 - DISCOUNT), atol=1e-2)


def test_judgements() -> None:
    verdict = ope.judge([3.0, 1.0, 2.0], [10.0, 20.0, 30.0])
    assert verdict.rank_correlation == pytest.approx(-0.5)
    assert verdict.absolute_error == pytest.approx(18.0)
    assert verdict.regret == 20.0 and verdict.relative_regret == 1.0
    right = ope.judge([1.0, 2.0], [5.0, 9.0])
    assert right.rank_correlation == pytest.approx(1.0)
    assert (right.absolute_error, right.regret, right.relative_regret) == (5.5, 0.0, 0.0)
    assert ope.judge([1.0, 1.0], [5.0, 9.0]).rank_correlation == 0.0
    with pytest.raises(ValueError, match="two or more"):
        ope.judge([1.0], [1.0])


def test_the_command_judges_and_goes_on(line: str, tmp_path: Path, capsys: Told) -> None:
    policies = [policy_file(tmp_path / f"p{k}.npz", a) for k, a in enumerate((-0.5, 0.5))]
    truth, out = tmp_path / "truth.json", tmp_path / "ope.json"
    truth.write_text(json.dumps({f"x/p{k}.pkl": {"return_mean": k} for k in (0, 1)}))
    words = ["--ope", "fqe", "--dataset", line, "--updates", "40", "--discount", "0.9"]
    words += ["--truth", str(truth), "--rollouts", "2", "--json", str(out)]
    assert cli.main(["evaluate", policies[0], *words]) == 0
    first = json.loads(out.read_text())["policies"][0]
    assert cli.main(["evaluate", *policies, *words]) == 0
    said = capsys.readouterr().out
    assert "against own rollouts, discounted: rank correlation 1.00" in said
    assert "against the given returns" in said
    document = json.loads(out.read_text())
    assert document["policies"][0]["value"] == first["value"]
    assert [row["published_return"] for row in document["policies"]] == [0.0, 1.0]
    assert len(document["judgements"]) == 2
    assert cli.main(["evaluate", *policies, *words, "--updates", "50"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_mistakes_are_named(line: str, tmp_path: Path, capsys: Told) -> None:
    policy = policy_file(tmp_path / "p.npz", 0.5)
    base = ["evaluate", policy, "--ope", "fqe"]
    truth = tmp_path / "truth.json"
    truth.write_text('{"other": {"return_mean": 1}}')
    for words, said in (
        (base, "and --dataset"),
        ([*base, "--dataset", line, "--discount", "1"], "between 0 and 1"),
        ([*base, "--dataset", line, "--truth", str(truth)], "knows nothing of p"),
        ([*base, "--dataset", line, "--truth", str(tmp_path)], "is no table of returns"),
        ([*base, "--dataset", "rl_shift/hopper-replay-v0"], "maps 2 numbers to 1"),
    ):
        assert cli.main(words) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="say which policy"):
        ope.policy_module("", 2, 1)
