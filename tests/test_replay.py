"""Replay buffers as datasets, and the dataset that comes with the package."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from rl_shift import config, datasets, runs
from rl_shift.errors import UserError
from rl_shift.replay import record_replay


@pytest.fixture(scope="module")
def online_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay") / "run"
    run = config.make(
        "sac",
        overrides={
            "tasks.0.env": "Pendulum-v1",
            "tasks.0.env_steps": 900,
            "agent.warmup_steps": 890,
            "agent.hidden": [8],
            "agent.buffer_capacity": 2000,
            "eval_every": 0,
            "eval_episodes": 1,
            "run_dir": str(folder),
        },
    )
    return runs.train(run, progress=False)


def test_whole_episodes_evenly_thinned(online_run: Path, tmp_path: Path) -> None:
    out = record_replay(online_run, tmp_path / "thin.hdf5", 450, "a test")
    data = datasets.load(out)
    # four whole episodes of 200 steps were played; two fit, from the two halves of the run
    assert len(data["reward"]) == 400
    assert np.flatnonzero(data["truncated"]).tolist() == [199, 399]
    assert not data["terminated"].any()
    np.testing.assert_array_equal(data["obs"][1:200], data["next_obs"][:199])
    everything = datasets.load(record_replay(online_run, tmp_path / "all.hdf5", 10_000, "a test"))
    assert len(everything["reward"]) == 800  # the unfinished fifth episode is left out
    np.testing.assert_array_equal(everything["obs"][:200], data["obs"][:200])
    np.testing.assert_array_equal(everything["obs"][400:600], data["obs"][200:])


def test_file_says_where_it_comes_from(online_run: Path, tmp_path: Path) -> None:
    info = datasets.resolve(record_replay(online_run, tmp_path / "thin.hdf5", 450, "a test"))
    assert (info.env_id, info.origin, info.horizon) == ("Pendulum-v1", "a test", 200)


def test_no_episode_fits(online_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no episode of .* fits into 100 rows"):
        record_replay(online_run, tmp_path / "none.hdf5", 100, "a test")


def test_bundled_dataset() -> None:
    file = files("rl_shift").joinpath("hopper-replay-v0.hdf5")
    assert len(file.read_bytes()) < 5_000_000
    info = datasets.resolve("rl_shift/hopper-replay-v0")
    assert info.env_id == "Hopper-v5"
    found = datasets.statistics(datasets.load(info))
    assert found["episodes"] == 287
    assert 400 < found["return_mean"] < 500
