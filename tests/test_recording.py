"""Rollouts written in D4RL's layout, from npz policies, random actions and trained agents."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from gymnasium import spaces

import rl_shift
from rl_shift import datasets, policies, runs
from rl_shift.envs import make_env
from rl_shift.errors import UserError
from rl_shift.policies import TanhGaussianPolicy, load_policy
from rl_shift.recording import record


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def npz(path: Path, obs: int, act: int, hidden: int = 8, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    sizes = {
        "fc0": (hidden, obs),
        "fc1": (hidden, hidden),
        "last_fc": (act, hidden),
        "last_fc_log_std": (act, hidden),
    }
    weights = {f"{k}.weight": generator.standard_normal(v) / 4 for k, v in sizes.items()}
    biases = {f"{k}.bias": generator.standard_normal(v[0]) / 4 for k, v in sizes.items()}
    np.savez(path, **weights, **biases, nonlinearity="relu", output_distribution="tanh_gaussian")
    return path


def contents(path: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        )
    return arrays


def test_layout_and_attributes(tmp_path: Path) -> None:
    policy = npz(tmp_path / "p.npz", 11, 3)
    out = record([policy], "Hopper-v4", 150, tmp_path / "new" / "hopper-x.hdf5", seed=3, lanes=4)
    arrays = contents(out)
    shapes = {
        "observations": (150, 11),
        "next_observations": (150, 11),
        "actions": (150, 3),
        "rewards": (150,),
        "terminals": (150,),
        "timeouts": (150,),
        "infos/qpos": (150, 6),
        "infos/qvel": (150, 6),
        "infos/action_log_probs": (150,),
    }
    for key, shape in shapes.items():
        kind = np.bool_ if key in ("terminals", "timeouts") else np.float32
        assert (arrays[key].shape, arrays[key].dtype) == (shape, np.dtype(kind)), key
    with h5py.File(out) as file:
        assert file.attrs["env_id"] == "Hopper-v4" and file.attrs["horizon"] == 1000
        assert list(file.attrs["policies"]) == ["p"] and file.attrs["seed"] == 3
        assert file["observations"].compression is None and file["observations"].chunks is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == [out.name]
    found = datasets.resolve(out)
    assert (found.env_id, found.horizon, found.origin) == (
        "Hopper-v4",
        1000,
        "recorded by rl-shift data collect",
    )
    assert found.reference_scores == (-20.272305, 3234.3)
    loaded = datasets.load(found, cache=False)
    assert len(loaded["reward"]) == 150 and np.array_equal(loaded["obs"], arrays["observations"])


def test_rows_are_what_the_simulator_does(tmp_path: Path) -> None:
    policy = npz(tmp_path / "p.npz", 11, 3)
    arrays = contents(record([policy], "Hopper-v4", 60, tmp_path / "x.hdf5", lanes=3))
    ends = arrays["terminals"] | arrays["timeouts"]
    inner = ~ends[:-1]
    assert np.array_equal(
        arrays["next_observations"][:-1][inner], arrays["observations"][1:][inner]
    )
    # qpos and qvel belong to the row's own observation; Hopper hides the x position.
    assert np.allclose(arrays["infos/qpos"][:, 1:], arrays["observations"][:, :5])
    env = make_env("Hopper-v4")
    env.reset(seed=0)
    for row in (0, 7, 31):
        env.unwrapped.set_state(  # type: ignore[attr-defined]
            arrays["infos/qpos"][row].astype(float), arrays["infos/qvel"][row].astype(float)
        )
        obs, reward, terminated, _, _ = env.step(arrays["actions"][row])
        assert np.allclose(obs, arrays["next_observations"][row], atol=1e-3)
        assert np.isclose(reward, arrays["rewards"][row], atol=1e-3)
        assert terminated == arrays["terminals"][row]


def test_log_densities_are_those_of_the_stored_policy(tmp_path: Path) -> None:
    path = npz(tmp_path / "p.npz", 11, 3)
    arrays = contents(record([path], "Hopper-v4", 40, tmp_path / "x.hdf5", lanes=2))
    policy = TanhGaussianPolicy.load(path)
    weight = arrays["metadata/policy/last_fc_log_std/weight"]
    assert np.array_equal(weight, policy.weights["last_fc_log_std.weight"])
    mean, log_std = policy.distribution(arrays["observations"])
    action = torch.from_numpy(arrays["actions"]).double()
    normal = torch.distributions.Normal(
        torch.from_numpy(mean).double(), torch.from_numpy(np.exp(log_std)).double()
    )
    expected = normal.log_prob(torch.atanh(action)) - torch.log1p(-action.square())
    assert np.allclose(expected.sum(1), arrays["infos/action_log_probs"], atol=1e-3)


def test_equal_arguments_give_equal_files(tmp_path: Path) -> None:
    policy = npz(tmp_path / "p.npz", 11, 3)
    files = [
        record([policy, "random"], "Hopper-v4", 90, tmp_path / f"{i}.hdf5", seed=seed, noise=0.1)
        for i, seed in enumerate((1, 1, 2))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()


def test_policies_share_the_steps(tmp_path: Path) -> None:
    policy = npz(tmp_path / "p.npz", 11, 3)
    out = record([policy, "random", policy], "Hopper-v4", 100, tmp_path / "x.hdf5", lanes=4)
    with h5py.File(out) as file:
        assert file.attrs["steps_per_policy"].tolist() == [34, 33, 33]
        ends = np.logical_or(file["timeouts"][()], file["terminals"][()])
        log_density = file["infos/action_log_probs"][()]
        assert "metadata" not in file
    assert ends[33] and ends[66] and ends[99], "a policy's last episode runs into the next one"
    assert np.allclose(log_density[34:67], -3 * np.log(2))


def test_episodes_are_whole_in_order_and_independent_of_the_lanes(tmp_path: Path) -> None:
    """No bias towards short episodes: episode i is the same, however many run beside it."""
    lengths = []
    for lanes in (1, 7):
        out = record(["random"], "Hopper-v4", 200, tmp_path / f"{lanes}.hdf5", lanes=lanes)
        arrays = contents(out)
        lengths.append(np.flatnonzero(arrays["terminals"] | arrays["timeouts"]))
    assert np.array_equal(*lengths) and len(lengths[0]) > 5
    assert (tmp_path / "1.hdf5").stat().st_size == (tmp_path / "7.hdf5").stat().st_size
    one, seven = contents(tmp_path / "1.hdf5"), contents(tmp_path / "7.hdf5")
    assert all(np.array_equal(one[key], seven[key]) for key in one)


def test_time_limits_and_the_cut(tmp_path: Path) -> None:
    out = record(["random"], "Pendulum-v1", 450, tmp_path / "x.hdf5", lanes=2)
    arrays = contents(out)
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [199, 399, 449]
    assert not arrays["terminals"].any() and "infos/qpos" not in arrays
    assert np.abs(arrays["actions"]).max() <= 1, "actions are those of the unit box"
    assert datasets.resolve(out).reference_scores is None


def test_noise_replaces_the_density(tmp_path: Path) -> None:
    policy = npz(tmp_path / "p.npz", 11, 3)
    arrays = contents(record([policy], "Hopper-v4", 50, tmp_path / "x.hdf5", noise=5.0))
    assert "infos/action_log_probs" not in arrays
    assert np.abs(arrays["actions"]).max() == 1


def test_a_trained_agent_can_be_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Agent:
        seeds = 1
        observation_space = spaces.Box(-1, 1, (3,))

        def cpu(self) -> "Agent":
            return self

        def act(self, obs: torch.Tensor, explore: bool) -> torch.Tensor:
            return torch.tanh(obs[:, :1] + explore * torch.randn(len(obs), 1))

        def run(self, act: Any, *data: Any) -> Any:
            return act(*data)

    monkeypatch.setattr(runs, "load_agent", lambda spec: (Agent(), None, []))
    before = torch.get_rng_state()
    files = [record(["run#0"], "Pendulum-v1", 30, tmp_path / f"{i}.hdf5") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.equal(before, torch.get_rng_state())
    assert contents(files[0])["actions"].std() > 0.1
    with pytest.raises(UserError, match="choose the matching --env"):
        record(["run"], "Hopper-v4", 30, tmp_path / "x.hdf5")
    Agent.seeds = 2
    with pytest.raises(UserError, match="run#0"):
        record(["run"], "Pendulum-v1", 30, tmp_path / "x.hdf5")


def test_bad_arguments_say_what_to_do(tmp_path: Path) -> None:
    good = npz(tmp_path / "p.npz", 11, 3)
    out = tmp_path / "x.hdf5"
    with pytest.raises(UserError, match=r"nowhere.npz does not exist"):
        record([tmp_path / "nowhere.npz"], "Hopper-v4", 10, out)
    with pytest.raises(UserError, match="maps 11 observations to 3 actions"):
        record([good], "HalfCheetah-v4", 10, out)
    (tmp_path / "text.npz").write_text("no policy")
    with pytest.raises(UserError, match="not a readable npz"):
        record([tmp_path / "text.npz"], "Hopper-v4", 10, out)
    np.savez(tmp_path / "half.npz", **{"fc0.weight": np.zeros((4, 11))})
    with pytest.raises(UserError, match=r"lacks the array 'fc0.bias'"):
        record([tmp_path / "half.npz"], "Hopper-v4", 10, out)
    with np.load(good) as file:
        weights = {key: file[key] for key in file} | {"fc1.weight": np.zeros((8, 5))}
    np.savez(tmp_path / "bent.npz", **weights)
    with pytest.raises(UserError, match=r"fc1 has weight \(8, 5\)"):
        load_policy(tmp_path / "bent.npz", 11, 3)
    with pytest.raises(UserError, match="too small for 2 policies"):
        record([good, good], "Hopper-v4", 1, out)
    with pytest.raises(UserError, match="negative"):
        record([good], "Hopper-v4", 10, out, noise=-1.0)
    with pytest.raises(UserError, match="continuous"):
        record(["random"], "CartPole-v1", 10, out)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        record(["random"], "Pendulum-v1", 10, tmp_path / "file" / "x.hdf5")
    assert not out.exists() and not list(tmp_path.glob(".*partial"))


def test_a_policy_npz_is_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", **{"fc0.weight": np.array([object()], dtype=object)})
    with pytest.raises(UserError):
        TanhGaussianPolicy.load(tmp_path / "p.npz")
    assert policies.load_policy("random", 4, 2).name == "random"


@pytest.fixture
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "make_datasets.py"
    spec = importlib.util.spec_from_file_location("make_datasets", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_deep_ope_sets(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for index in (3, 6):
        npz(tmp_path / f"hopper_online_{index}.npz", 11, 3, seed=index)
    command = ["make_datasets.py", "deep-ope", "--env", "hopper", "--set", "medium-expert"]
    command += ["--steps", "60", "--out", str(tmp_path), "--policies", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert script.main() == 0
    out = tmp_path / "deep-ope-hopper-medium-expert-60.hdf5"
    with h5py.File(out) as file:
        assert list(file.attrs["policies"]) == ["hopper_online_3", "hopper_online_6"]
        assert file.attrs["origin"] == "D4RL-layout data regenerated from Deep OPE policies"
    time = out.stat().st_mtime_ns
    assert script.main() == 0 and out.stat().st_mtime_ns == time
    assert "exists" in capsys.readouterr().out
    out.rename(out.with_suffix(".first"))
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "deep_ope").symlink_to(tmp_path)
    monkeypatch.setenv("RL_SHIFT_DATA", os.pathsep.join([str(tmp_path / "other"), str(tmp_path)]))
    monkeypatch.setattr(sys, "argv", command[:-2])
    assert script.main() == 0 and out.exists()
    out.unlink()
    monkeypatch.setattr(sys, "argv", [*command[:-1], str(tmp_path / "nowhere"), "--seed", "1"])
    assert script.main() == 2
    assert "--policies DIR" in capsys.readouterr().err
    assert script.file_name("walker2d", "mixed", 500_000) == "deep-ope-walker2d-mixed-500k.hdf5"


def test_a_family_from_one_goal_conditioned_agent(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = rl_shift.train
    sac = {"hidden": [8], "warmup_steps": 8, "batch_size": 8}
    tiny = {"agent_config": sac, "eval_episodes": 1, "compile": "off"}
    monkeypatch.setattr("rl_shift.api.train", lambda agent, **asked: train(agent, **asked | tiny))
    told: list[np.ndarray] = []
    act = policies.RunPolicy.act

    def watched(self: policies.RunPolicy, obs: np.ndarray, noise: np.ndarray) -> object:
        told.append(self.context)
        return act(self, obs, noise)

    monkeypatch.setattr(policies.RunPolicy, "act", watched)
    command = ["make_datasets.py", "family", "CheetahVel", "--steps", "40", "--out", str(tmp_path)]
    command += ["--medium-steps", "24", "--env-steps", "48", "--member"]
    monkeypatch.setattr(sys, "argv", [*command, "7"])
    assert script.main() == 0
    np.testing.assert_allclose(np.unique(told), [0.6])
    table = json.loads((tmp_path / "CheetahVel.returns.json").read_text())
    returns = table["rl_shift/CheetahVel-7-v0"]
    assert set(returns) == {"random", "medium", "expert"}
    made = [tmp_path / f"rlshift-cheetahvel-7-{quality}-v0.hdf5" for quality in returns]
    info = datasets.resolve(made[0])
    assert info.env_id == "rl_shift/CheetahVel-7-v0"
    assert info.reference_scores == (returns["random"], returns["expert"])
    assert not list(tmp_path.glob("tmp*")) and not list(tmp_path.glob("*partial"))
    times = [path.stat().st_mtime_ns for path in made]
    monkeypatch.setattr(sys, "argv", [*command, "7", "--member", "9"])  # one more member
    assert script.main() == 0 and times == [path.stat().st_mtime_ns for path in made]
    assert "exists" in capsys.readouterr().out
    assert (tmp_path / "rlshift-cheetahvel-9-expert-v0.hdf5").exists()


def test_a_family_of_bodies_from_policies_of_the_unchanged_one(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for snapshot in ("3", "9"):
        npz(tmp_path / f"walker_online_{snapshot}.npz", 17, 6)
    command = ["make_datasets.py", "family", "WalkerRandParams", "--member", "2"]
    command += ["--steps", "20", "--out", str(tmp_path), "--policies", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert script.main() == 0
    table = json.loads((tmp_path / "WalkerRandParams.returns.json").read_text())
    assert script.sequence("WalkerRandParams", "four") == (0, 1, 2, 3)
    made = tmp_path / "rlshift-walkerrandparams-2-medium-v0.hdf5"
    with h5py.File(made) as file:
        assert list(file.attrs["policies"]) == ["walker_online_3"]
        made_by = "medium policy of Deep OPE, trained on another body"
        assert file.attrs["origin"] == f"rl_shift: WalkerRandParams, {made_by}"
    found = datasets.resolve(made)
    assert found.env_id == "rl_shift/WalkerRandParams-2-v0"
    assert found.reference_scores == pytest.approx(
        [table["rl_shift/WalkerRandParams-2-v0"][k] for k in ("random", "expert")]
    )


def test_the_genuine_policies(shared_data: Path, tmp_path: Path) -> None:
    policy = shared_data / "policies" / "deep_ope" / "hopper_online_3.npz"
    if not policy.is_file():
        pytest.skip(f"{policy} is absent")
    out = record([policy], "Hopper-v4", 3000, tmp_path / "x.hdf5", lanes=4)
    mean = datasets.statistics(datasets.load(out))["return_mean"]
    assert 900 < mean < 1800, "published: 1347 +- 376"
    with h5py.File(shared_data / "datasets" / "hopper-medium-regen50k.hdf5") as file:
        weight = file["metadata/policy/fc0/weight"][()]
    assert np.array_equal(weight, TanhGaussianPolicy.load(policy).weights["fc0.weight"])
