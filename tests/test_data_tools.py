"""Datasets compared, converted, and read from disk where they do not fit into memory."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rl_shift import cli, config, data_mapping, datasets, runs
from rl_shift.buffer import Buffer
from rl_shift.data_convert import convert
from rl_shift.data_quality import Settings, qualities
from rl_shift.errors import UserError
from rl_shift.recording import write_hdf5
from rl_shift.trainer import Trainer

Told = pytest.CaptureFixture[str]


def made(path: Path, noise: float, episodes: int = 30, length: int = 20, seed: int = 0) -> str:
    """Episodes on a plane; the action follows from the state, but for the noise."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(episodes, 1, 3)) + np.zeros((1, length + 1, 1))
    obs = obs + 0.1 * rng.normal(size=obs.shape).cumsum(axis=1)
    rows = obs[:, :-1].reshape(-1, 3)
    action = np.tanh(rows[:, :2]) * 0.5 + noise * rng.uniform(-1, 1, (len(rows), 2))
    last = np.arange(len(rows)) % length == length - 1
    falls = last & (np.arange(len(rows)) // length % 3 == 0)
    arrays = {
        "observations": rows.astype(np.float32),
        "actions": np.clip(action, -1, 1).astype(np.float32),
        "rewards": rng.normal(size=len(rows)).astype(np.float32),
        "next_observations": obs[:, 1:].reshape(-1, 3).astype(np.float32),
        "terminals": falls,
        "timeouts": last & ~falls,
    }
    facts = {"horizon": length, "reference_min": -5.0, "reference_max": 5.0, "origin": "a test"}
    return str(write_hdf5(path, arrays, facts))


# ---- quality -----------------------------------------------------------------------------------


def test_noise_on_actions_is_found(tmp_path: Path) -> None:
    ids = [made(tmp_path / f"{n}.hdf5", n) for n in (0.05, 0.2, 0.45)]
    small = Settings(rows=600, queries=300, k=5)
    found = qualities(ids, small)
    variances = [one.action_variance for one in found]
    assert variances == sorted(variances)
    # uniform noise of width w adds w^2 / 3 in each of two dimensions, times (k - 1) / k
    added = (variances[2] - variances[0]) / (2 * (0.45**2 - 0.05**2) / 3)
    assert added == pytest.approx(0.8, rel=0.2)
    assert found[0].score == pytest.approx(100 * (found[0].returns.mean() + 5) / 10)
    assert found[0].coverage == found[1].coverage  # the same states
    assert (found[0].lengths == 20).all() and len(found[0].returns) == 30


def test_neighbours_of_the_same_episode_do_not_count(tmp_path: Path) -> None:
    """Two episodes far apart: all neighbours are in the other one."""
    rows = np.repeat([[0.0], [10.0]], 30, axis=0).astype(np.float32)
    action = np.where(rows > 5, 0.5, -0.5) * np.where(np.arange(60)[:, None] % 2, 1, 0.6)
    arrays = {
        "observations": rows,
        "actions": action.astype(np.float32),
        "rewards": np.zeros(60, np.float32),
        "next_observations": rows,
        "terminals": np.zeros(60, bool),
        "timeouts": np.arange(60) % 30 == 29,
    }
    path = str(write_hdf5(tmp_path / "two.hdf5", arrays, {}))
    (one,) = qualities([path], Settings(rows=60, queries=60, k=30))
    assert one.action_variance == pytest.approx(0.1**2, rel=1e-3)  # of 0.5 and 0.3 in turn
    assert one.state_similarity == 0
    assert one.transition_diversity == pytest.approx(2**2, rel=1e-3)  # 10 are two deviations
    with pytest.raises(UserError, match="smaller --k"):
        qualities([path], Settings(rows=60, queries=60, k=31))


def test_the_report_orders_and_draws(tmp_path: Path, in_empty_folder: Path, capsys: Told) -> None:
    ids = [made(tmp_path / f"noise{k}.hdf5", n) for k, n in enumerate((0.4, 0.1))]
    words = ["data", "report", *ids, "--rows", "400", "--queries", "100", "--out", "shown"]
    assert cli.main(words) == 0
    text = Path("shown/data-report.md").read_text(encoding="utf-8")
    assert "lowest first: noise1, noise0." in text
    assert "noise1" in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        assert Path("shown/data-report.png").read_bytes()[:4] == b"\x89PNG"
    wide = made(tmp_path / "wide.hdf5", 0.1)
    assert cli.main(["data", "report", wide, "rl_shift/hopper-replay-v0"]) == 2
    assert "compare datasets of one environment" in capsys.readouterr().err
    for flag, value in (("--threads", "0"), ("--seed", "-1")):
        assert cli.main(["data", "report", ids[0], flag, value]) == 2
        assert flag in capsys.readouterr().err


# ---- conversion --------------------------------------------------------------------------------


def equal(first: str, second: str) -> None:
    one, other = datasets.load(first), datasets.load(second)
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_hdf5_and_npz_hold_the_same(tmp_path: Path, capsys: Told) -> None:
    start = made(tmp_path / "start.hdf5", 0.1)
    npz, back = str(tmp_path / "ogbench.npz"), str(tmp_path / "back.hdf5")
    assert cli.main(["data", "convert", start, npz]) == 0
    assert f"saved {npz}" in capsys.readouterr().out
    assert convert(npz, back) == back
    equal(start, npz)
    equal(start, back)
    with np.load(npz, allow_pickle=False) as file:
        assert file["terminals"].sum() == 30  # OGBench: the ends of all episodes
        assert (file["masks"] == 0).sum() == 10
    info = datasets.resolve(back)
    assert (info.horizon, info.reference_scores) == (20, (-5.0, 5.0))
    assert info.origin.startswith("a test, converted")


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="end it in .hdf5 or .npz"):
        convert("rl_shift/hopper-replay-v0", str(tmp_path / "x.csv"))


def test_minari_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: Told) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    assert cli.main(["data", "info", "minari:mujoco/hopper/medium-v0"]) == 2
    assert "rl_shift[minari]" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("minari") is None, reason="needs the extra minari")
@pytest.mark.filterwarnings("ignore")
def test_minari_holds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    start = made(tmp_path / "start.hdf5", 0.1)
    assert convert(start, "minari:rl_shift/plane-v0") == "minari:rl_shift/plane-v0"
    equal(start, "minari:rl_shift/plane-v0")
    info = datasets.resolve("minari:rl_shift/plane-v0")
    assert info.origin == "Minari (rl_shift/plane-v0)"
    with pytest.raises(UserError, match="minari download"):
        datasets.resolve("minari:nobody/none-v0")
    with pytest.raises(UserError, match="cannot write Minari"):
        convert(start, "minari:rl_shift/plane-v0")  # it is there already
    hopper = "minari:rl_shift/hopper-v0"
    convert("rl_shift/hopper-replay-v0", hopper)
    assert datasets.resolve(hopper).env_id == "Hopper-v5"
    one, other = (datasets.load(name) for name in ("rl_shift/hopper-replay-v0", hopper))
    np.testing.assert_allclose(one["action"], other["action"], atol=1e-6)
    np.testing.assert_array_equal(one["next_obs"], other["next_obs"])


# ---- larger than memory ------------------------------------------------------------------------

MORE: dict[str, Any] = {"agent.hidden": [8], "agent.batch_size": 16, "eval_every": 0}


def trained(path: str, memory: str, **changes: Any) -> Trainer:
    overrides = {"tasks.0.dataset": path, "tasks.0.updates": 40, "data_memory": memory}
    run = config.make(changes.pop("agent", "td3_bc"), overrides=overrides | MORE | changes)
    tasks = runs.resolve(run)
    trainer = Trainer(runs.make_agent(run, tasks), tasks, run)
    trainer.run()
    return trainer


@pytest.mark.parametrize("reward", ["raw", "normalize", "0.5,-1"])
def test_mapped_rows_train_bitwise_as_loaded_ones(
    tmp_path: Path, capsys: Told, reward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path / "data.hdf5", 0.1)
    monkeypatch.setattr(data_mapping, "CHUNK", 70)
    settings = {"tasks.0.reward": reward}
    ram, disk = (trained(path, memory, **settings) for memory in ("ram", "disk"))
    assert "read from disk while training (as asked)" in capsys.readouterr().out
    for name, tensor in ram.agent.state_dict().items():
        assert torch.equal(tensor, disk.agent.state_dict()[name]), name
    one, other = ram.buffer.arrays(), disk.buffer.arrays()
    for key in one:
        assert torch.equal(one[key], other[key]), key
    assert torch.equal(ram.buffer.episodes(), disk.buffer.episodes())
    assert isinstance(disk.buffer, Buffer)


def test_it_is_chosen_where_memory_is_short(
    tmp_path: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = datasets.resolve(made(tmp_path / "data.hdf5", 0.1))
    size = data_mapping.rows_bytes(info)
    assert 0 < data_mapping.free_memory() < 2**62
    assert size == 600 * 4 * (3 + 2 + 3 + 3)
    monkeypatch.setattr(data_mapping, "free_memory", lambda: 4 * size)
    given = (info, 0, (), "native", "raw", "auto", "cpu", (0,))
    assert data_mapping.mapped_where_needed(*given) is None
    monkeypatch.setattr(data_mapping, "free_memory", lambda: 4 * size - 1)
    mapped = data_mapping.mapped_where_needed(*given)
    assert mapped is not None and len(mapped) == 600
    assert "GiB of memory are free" in capsys.readouterr().out
    packed = tmp_path / "data.hdf5.packed.npy"
    before = packed.stat().st_mtime_ns
    data_mapping.mapped_where_needed(*given)
    assert packed.stat().st_mtime_ns == before  # made once
    other = data_mapping.mapped_where_needed(info, 0, ("next_action",), *given[3:])
    assert other is None
    assert "cannot be read from disk" in capsys.readouterr().out


def test_rows_are_read_ahead_for_statistics_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[str] = []
    monkeypatch.setattr(data_mapping.Mapped, "_advise", lambda self, how: advised.append(how))
    info = datasets.resolve(made(tmp_path / "data.hdf5", 0.1))
    buffer = data_mapping.mapped_buffer(info, 0)
    buffer.statistics("obs")
    assert advised == ["MADV_RANDOM", "MADV_SEQUENTIAL", "MADV_RANDOM"]


def test_the_limit_of_the_own_control_group_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in {"limit": 5000, "use": 2000}.items():
        (tmp_path / name).write_text(f"{content}\n")
    limits = [(tmp_path / "limit", tmp_path / "use"), (tmp_path / "absent", tmp_path / "absent")]
    assert list(data_mapping._limits())
    monkeypatch.setattr(data_mapping, "_limits", lambda: limits)
    assert data_mapping.free_memory() == 3000


def test_what_cannot_be_mapped_says_so(tmp_path: Path) -> None:
    path = made(tmp_path / "data.hdf5", 0.1)
    with pytest.raises(UserError, match="data mode legacy_qlearning needs all rows"):
        trained(path, "disk", data_mode="legacy_qlearning")
    npz = convert(path, str(tmp_path / "data.npz"))
    with pytest.raises(UserError, match="only HDF5"):
        trained(npz, "disk")


# ---- d4rl --------------------------------------------------------------------------------------


def theirs(env: Any, dataset: dict[str, Any], terminate_on_end: bool = False) -> dict[str, Any]:
    """D4RL's qlearning_dataset as the specification describes it, one row at a time."""
    rows: dict[str, list[Any]] = {key: [] for key in ("o", "a", "r", "n", "d")}
    step = 0
    for i in range(len(dataset["rewards"]) - 1):
        done = bool(dataset["terminals"][i])
        final = (
            bool(dataset["timeouts"][i])
            if "timeouts" in dataset
            else step == env._max_episode_steps - 1
        )
        if final and not terminate_on_end:
            step = 0
            continue
        if done or final:
            step = 0
        for key, value in (
            ("o", dataset["observations"][i]),
            ("a", dataset["actions"][i]),
            ("r", dataset["rewards"][i]),
            ("n", dataset["observations"][i + 1]),
            ("d", done),
        ):
            rows[key].append(value)
        step += 1
    names = {"observations": "o", "actions": "a", "rewards": "r", "next_observations": "n"}
    found = {name: np.array(rows[key], np.float32) for name, key in names.items()}
    return found | {"terminals": np.array(rows["d"])}


def test_legacy_mode_is_compared_with_d4rl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    path = made(tmp_path / "data.hdf5", 0.1)
    words = ["data", "verify", path, "--against", "d4rl"]
    monkeypatch.setitem(sys.modules, "d4rl", None)
    assert cli.main(words) == 2
    assert "mujoco-py" in capsys.readouterr().err
    module = ModuleType("d4rl")
    module.__dict__["qlearning_dataset"] = theirs
    monkeypatch.setitem(sys.modules, "d4rl", module)
    assert cli.main(words) == 0
    assert "equal to d4rl's qlearning_dataset in all" in capsys.readouterr().out
    module.__dict__["qlearning_dataset"] = lambda env, dataset: {
        k: v + (k == "rewards") for k, v in theirs(env, dataset).items()
    }
    assert cli.main(words) == 2
    assert "rewards differ" in capsys.readouterr().err
