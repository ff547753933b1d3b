"""The D4RL reader: transitions at episode ends, lookup, cache, derived columns, bad files."""

import http.server
import importlib.metadata
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from rl_shift import dataset_lookup, datasets
from rl_shift.dataset_files import RawArrays
from rl_shift.dataset_reports import info, list_datasets, verify
from rl_shift.dataset_rows import Transitions, legacy_qlearning, mc_return, native
from rl_shift.downloading import download
from rl_shift.errors import UserError

KEYS = ("obs", "action", "reward", "next_obs", "terminated")


# Read before`folder` replaces it for every test.
SHARED = os.environ.get("RL_SHIFT_DATA", "").split(os.pathsep)[0]


@pytest.fixture
def shared_data_file(shared_data: Path) -> Path:
    path = shared_data / "datasets" / "hopper-medium-regen50k.hdf5"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture
def shared_data() -> Path:
    value = SHARED
    if not value or not Path(value).is_dir():
        pytest.skip("RL_SHIFT_DATA is not set to the folder of real datasets")
    return Path(value)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset folder of its own; nothing is found in, or written to, the user's."""
    for name in ("D4RL_DATASET_DIR", "D4RL_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RL_SHIFT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def rows(count: int, obs: int = 3, act: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "observations": generator.standard_normal((count, obs)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (count, act)).astype(np.float32),
        "rewards": generator.standard_normal(count).astype(np.float32),
        "terminals": np.zeros(count, dtype=np.bool_),
        "timeouts": np.zeros(count, dtype=np.bool_),
    }


def episodes() -> dict[str, np.ndarray]:
    """Rows 0-3 terminate, rows 4-8 end in a timeout, rows 9-11 are an unfinished tail."""
    arrays = rows(12)
    arrays["terminals"][3] = True
    arrays["timeouts"][8] = True
    return arrays


def with_next(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    following = np.roll(arrays["observations"], -1, axis=0)
    ends = arrays["terminals"] | arrays["timeouts"]
    ends[-1] = True
    following[ends] = 100 + np.arange(ends.sum())[:, None]
    return arrays | {"next_observations": following}


def write(path: Path, arrays: dict[str, Any], **attributes: Any) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
        for key, value in attributes.items():
            file.attrs[key] = value
    return path


def raw(arrays: dict[str, np.ndarray]) -> RawArrays:
    return RawArrays(
        *(arrays[key].copy() for key in ("observations", "actions", "rewards", "terminals")),
        arrays.get("timeouts"),
        arrays.get("next_observations"),
    )


def d4rl_loop(arrays: dict[str, np.ndarray], horizon: int) -> dict[str, np.ndarray]:
    """D4RL's `qlearning_dataset` as its rules say, one row at a time."""
    kept: list[int] = []
    counter = 0
    for i in range(len(arrays["rewards"]) - 1):
        final = arrays["timeouts"][i] if "timeouts" in arrays else counter == horizon - 1
        if final:
            counter = 0
            continue
        # The counter grows after its restart at a terminal row.
        counter = 1 if arrays["terminals"][i] else counter + 1
        kept.append(i)
    index = np.array(kept, dtype=np.int64)
    return {
        "obs": arrays["observations"][index],
        "action": arrays["actions"][index],
        "reward": arrays["rewards"][index],
        "next_obs": arrays["observations"][index + 1],
        "terminated": arrays["terminals"][index],
    }


# ---- transitions -----------------------------------------------------------------------------


def test_native_row_by_row(folder: Path) -> None:
    source = episodes()
    arrays = datasets.load(write(folder / "x.hdf5", source), cache=False)
    kept = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]
    assert np.array_equal(arrays["obs"], source["observations"][kept])
    assert np.array_equal(arrays["action"], source["actions"][kept])
    assert np.array_equal(arrays["reward"], source["rewards"][kept])
    # The terminal row's successor is unknown: its own observation stands in, nobody else's.
    assert np.array_equal(
        arrays["next_obs"], source["observations"][[1, 2, 3, 3, 5, 6, 7, 8, 10, 11]]
    )
    assert np.flatnonzero(arrays["terminated"]).tolist() == [3]
    assert np.flatnonzero(arrays["truncated"]).tolist() == [7, 9]
    assert arrays["obs"].dtype == np.float32 and arrays["terminated"].dtype == np.bool_
    assert set(arrays) == {*KEYS, "truncated"}


def test_native_keeps_every_row_where_the_file_knows_the_successor(folder: Path) -> None:
    source = with_next(episodes())
    arrays = datasets.load(write(folder / "x.hdf5", source), ("next_obs_known",), cache=False)
    assert np.array_equal(arrays["next_obs"], source["next_observations"])
    assert np.array_equal(arrays["reward"], source["rewards"])
    assert np.flatnonzero(arrays["terminated"]).tolist() == [3]
    assert np.flatnonzero(arrays["truncated"]).tolist() == [8, 11]
    assert arrays["next_obs_known"].all()
    assert datasets.statistics(arrays)["episodes"] == 3


def test_without_timeouts_the_horizon_cuts(folder: Path) -> None:
    source = episodes()
    del source["timeouts"]
    path = write(folder / "x.hdf5", source, horizon=5)
    arrays = datasets.load(path, cache=False)
    kept = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]  # the second episode fills five steps in row 8
    assert np.array_equal(arrays["obs"], source["observations"][kept])
    assert np.flatnonzero(arrays["truncated"]).tolist() == [7, 9]
    # D4RL counts one step too many after a terminal row and cuts in row 7.
    arrays = datasets.load(path, mode="legacy_qlearning", cache=False)
    assert np.array_equal(arrays["obs"], source["observations"][[0, 1, 2, 3, 4, 5, 6, 8, 9, 10]])


def test_without_timeouts_and_horizon_jumps_cut(folder: Path) -> None:
    source = with_next(episodes())
    del source["timeouts"]
    arrays = datasets.load(write(folder / "x.hdf5", source), cache=False)
    assert np.flatnonzero(arrays["truncated"]).tolist() == [8, 11]


def test_columns_of_shape_n_1_are_squeezed(folder: Path) -> None:
    source = episodes()
    tall = {key: value[:, None] if value.ndim == 1 else value for key, value in source.items()}
    tall["terminals"] = tall["terminals"].astype(np.float64)
    expected = datasets.load(write(folder / "flat.hdf5", source), cache=False)
    for key, value in datasets.load(write(folder / "tall.hdf5", tall), cache=False).items():
        assert np.array_equal(value, expected[key]) and value.dtype == expected[key].dtype


def test_float64_files_load_as_float32(folder: Path) -> None:
    source = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in episodes().items()}
    arrays = datasets.load(write(folder / "x.hdf5", source), cache=False)
    assert {arrays[key].dtype for key in ("obs", "action", "reward", "next_obs")} == {
        np.dtype(np.float32)
    }


flags = st.lists(st.sampled_from(["", "", "", "terminal", "timeout", "both"]), min_size=2)


@given(flags, st.booleans(), st.integers(2, 9))
def test_legacy_is_d4rl_bit_for_bit(marks: list[str], timeouts: bool, horizon: int) -> None:
    source = marked(marks)
    if not timeouts:
        del source["timeouts"]
    expected = d4rl_loop(source, horizon)
    got = legacy_qlearning(raw(source), horizon).arrays
    for key in KEYS:
        assert np.array_equal(got[key], expected[key]), key


@given(flags, st.booleans())
def test_native_never_crosses_an_episode(marks: list[str], successors: bool) -> None:
    source = marked(marks)
    episode = np.cumsum(np.append(False, (source["terminals"] | source["timeouts"])[:-1]))
    source["observations"][:, 0] = episode
    if successors:
        source = with_next(source)
        source["next_observations"][:, 0] = episode
    transitions = native(raw(source))
    arrays = transitions.arrays
    assert np.array_equal(arrays["obs"][:, 0], arrays["next_obs"][:, 0])
    assert not (arrays["terminated"] & arrays["truncated"]).any()
    if len(arrays["reward"]):
        ends = datasets.episode_ends(arrays)
        assert (np.diff(arrays["obs"][:, 0]) != 0).sum() <= len(ends) - 1
        inner = np.ones(len(arrays["reward"]), bool)
        inner[ends] = False
        later = arrays["obs"][1:][inner[:-1], 0]
        assert np.array_equal(later, arrays["obs"][:-1][inner[:-1], 0])
    assert arrays["terminated"].sum() == source["terminals"].sum()
    check_returns(source, transitions, episode)


def check_returns(
    source: dict[str, np.ndarray], transitions: Transitions, episode: np.ndarray
) -> None:
    """The undiscounted return of each episode equals that of the file's rows."""
    arrays = transitions.arrays
    if not len(arrays["reward"]):
        return
    returns = mc_return(transitions, 1.0)
    starts = np.append(0, datasets.episode_ends(arrays)[:-1] + 1)
    for start in starts:
        number = arrays["obs"][start, 0]
        assert np.isclose(returns[start], source["rewards"][episode == number].sum(), atol=1e-4)


def marked(marks: list[str]) -> dict[str, np.ndarray]:
    source = rows(len(marks), obs=2, act=1)
    source["terminals"] = np.array([mark in ("terminal", "both") for mark in marks])
    source["timeouts"] = np.array([mark in ("timeout", "both") for mark in marks])
    return source


def test_legacy_equals_the_d4rl_package(shared_data_file: Path) -> None:
    d4rl = pytest.importorskip("d4rl", reason="the d4rl package is not installed")
    with h5py.File(shared_data_file) as file:
        source = {key: file[key][()] for key in ("observations", "actions", "rewards")}
        source |= {key: file[key][()] for key in ("terminals", "timeouts")}
    expected = d4rl.qlearning_dataset(None, dataset=source)
    got = legacy_qlearning(raw(source)).arrays
    for ours, theirs in (("obs", "observations"), ("next_obs", "next_observations")):
        assert np.array_equal(got[ours], expected[theirs])


# ---- derived columns, rewards ----------------------------------------------------------------


@given(flags, st.sampled_from([0.0, 0.9, 1.0]))
def test_mc_return_is_the_discounted_sum(marks: list[str], discount: float) -> None:
    transitions = native(raw(with_next(marked(marks))))
    arrays = transitions.arrays
    expected = np.zeros(len(marks))
    ends = set(datasets.episode_ends(arrays).tolist())
    for i in reversed(range(len(marks))):
        expected[i] = arrays["reward"][i]
        if i not in ends:
            expected[i] += discount * expected[i + 1]
    assert np.allclose(mc_return(transitions, discount), expected, atol=1e-5)


def test_next_action_and_the_reward_of_left_out_rows(folder: Path) -> None:
    source = episodes()
    columns = ("next_action", "mc_return", "reward_mask", "next_obs_known")
    arrays = datasets.load(write(folder / "x.hdf5", source), columns, cache=False, discount=0.5)
    follows = [1, 2, 3, 3, 5, 6, 7, 8, 10, 11]  # row 8 was left out, but its action was taken
    assert np.array_equal(arrays["next_action"], source["actions"][follows])
    assert np.isclose(arrays["mc_return"][7], source["rewards"][7] + 0.5 * source["rewards"][8])
    assert np.array_equal(arrays["reward_mask"], np.ones(10, np.float32))
    assert np.flatnonzero(arrays["next_obs_known"] == 0).tolist() == [3]


def test_reward_transforms(folder: Path) -> None:
    path = write(folder / "x.hdf5", with_next(episodes()))
    plain = datasets.load(path, ("mc_return",), discount=1.0)
    returns = datasets.episode_returns(plain)
    scale, shift = datasets.reward_transform("normalize", plain)
    assert np.isclose(scale, 1000 / (returns.max() - returns.min())) and shift == 0
    scaled = datasets.load(path, ("mc_return",), reward="2,-1", discount=1.0)
    assert np.allclose(scaled["reward"], 2 * plain["reward"] - 1)
    assert np.isclose(scaled["mc_return"][0], 2 * plain["mc_return"][0] - 4, atol=1e-5)
    assert np.array_equal(datasets.load(path)["reward"], plain["reward"]), "the cache was changed"
    with pytest.raises(UserError, match="SCALE,SHIFT"):
        datasets.reward_transform("double", plain)
    same = {"reward": np.ones(4), "terminated": np.ones(4, bool), "truncated": np.zeros(4, bool)}
    with pytest.raises(UserError, match="different returns"):
        datasets.reward_transform("normalize", same)


def test_statistics(folder: Path) -> None:
    source = with_next(episodes())
    numbers = datasets.statistics(datasets.load(write(folder / "x.hdf5", source)))
    returns = [source["rewards"][part].sum() for part in (slice(0, 4), slice(4, 9), slice(9, 12))]
    assert numbers["transitions"] == 12 and numbers["length_max"] == 5
    assert np.isclose(numbers["return_mean"], np.mean(returns))
    assert np.isclose(numbers["return_std"], np.std(returns))
    assert np.allclose(numbers["obs_mean"], source["observations"].mean(0), atol=1e-6)
    json.dumps(numbers)


# ---- families --------------------------------------------------------------------------------


def test_maze2d_is_one_trajectory(folder: Path) -> None:
    source = rows(10, obs=4)
    source["timeouts"][[3, 6]] = True
    source["observations"][4] = source["observations"][3]
    source["observations"][7] = source["observations"][6]
    source["actions"] *= 3  # the environment clips
    arrays = datasets.load(write(folder / "maze2d-umaze-sparse-v1.hdf5", source), cache=False)
    assert not arrays["terminated"].any()
    assert np.flatnonzero(arrays["truncated"]).tolist() == [6]
    assert np.array_equal(arrays["next_obs"][:-1], arrays["obs"][1:])
    assert (arrays["obs"] != arrays["next_obs"]).any(axis=1).all()
    assert np.abs(arrays["action"]).max() == 1


def test_the_real_maze2d_file(shared_data: Path) -> None:
    path = shared_data / "datasets" / "maze2d-umaze-v1-sparse.hdf5"
    found = datasets.resolve(path)
    assert (found.family, found.horizon) == ("maze2d", 300)
    assert found.env_id == "rl_shift/maze2d-umaze-v1"
    assert found.reference_scores == (23.85, 161.86)
    arrays = datasets.load(found, cache=False)
    with h5py.File(path) as file:
        assert len(arrays["reward"]) == 10_000 - file["terminals"][:-1].sum() - 1
    assert np.array_equal(arrays["next_obs"][:-1], arrays["obs"][1:])


def test_ant_is_padded(folder: Path) -> None:
    source = rows(8, obs=111, act=8)
    found = datasets.resolve(write(folder / "ant_medium-v2.hdf5", source))
    assert (found.env_id, found.obs_pad) == ("Ant-v4", 84)
    box = spaces.Box(-1, 1, (8,))
    for width in (27, 111):
        space = spaces.Box(-np.inf, np.inf, (width,))
        datasets.load(found, observation_space=space, action_space=box)
    write(folder / "my-ant.hdf5", rows(8, obs=27, act=8), env_id="Ant-v4")
    assert datasets.resolve("my-ant").obs_pad == 0


def test_the_table_has_148_ids() -> None:
    table = datasets.table()
    assert len(table) == 148
    entry = table["hopper-medium-v2"]
    assert (entry.file, entry.size, entry.horizon) == ("hopper_medium-v2.hdf5", 152756557, 1000)
    assert (entry.env_id, entry.obs_dim, entry.act_dim) == ("Hopper-v4", 11, 3)


def test_reference_scores_are_the_published_ones(shared_data: Path) -> None:
    text = (shared_data / "d4rl_reference_scores.json").read_text()
    reference = json.loads(text)
    common = set(reference) & set(datasets.table())
    assert len(common) > 100
    for id in common:
        assert list(datasets.table()[id].reference_scores) == reference[id]


def test_environments_by_name() -> None:
    assert datasets.env_for("walker2d-medium-replay-v2") == "Walker2d-v4"
    assert datasets.env_for("deep-ope-halfcheetah-mixed-500k") == "HalfCheetah-v4"
    assert datasets.env_for("maze2d-umaze-v1") == "rl_shift/maze2d-umaze-v1"
    assert datasets.env_for("nothing") is None
    assert datasets.reference_scores_of("Hopper-v5") == (-20.272305, 3234.3)
    assert datasets.reference_scores_of("AdroitHandDoor-v1") == (-56.512833, 2880.5693087298737)
    assert datasets.reference_scores_of("CartPole-v1") is None


# ---- lookup ----------------------------------------------------------------------------------


def hopper(path: Path, **attributes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, with_next(rows(6, obs=11, act=3)), **attributes)


def test_lookup_order(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    name = "hopper_medium-v2.hdf5"
    places = [
        tmp_path / "home" / ".d4rl" / "datasets",
        tmp_path / "d4rl",
        folder / "datasets",
        folder,
    ]
    for place in places:  # from the last looked at to the first
        expected = hopper(place / name)
        assert datasets.resolve("hopper-medium-v2").path == expected.resolve()
    found = datasets.resolve("hopper-medium-v2")
    assert found.env_id == "Hopper-v4" and found.reference_scores == (-20.272305, 3234.3)
    assert "another size" in found.origin
    elsewhere = hopper(tmp_path / "other" / name)
    assert datasets.resolve(elsewhere).path == elsewhere.resolve()


def test_stems_are_ids(folder: Path) -> None:
    hopper(folder / "datasets" / "deep-ope-hopper-medium-500k.hdf5", origin="ours", horizon=77)
    found = datasets.resolve("deep-ope-hopper-medium-500k")
    assert (found.env_id, found.origin, found.horizon) == ("Hopper-v4", "ours", 77)
    hopper(folder / "mine.hdf5", env_id="Hopper-v5", reference_min=1.0, reference_max=2.0)
    found = datasets.resolve("mine")
    assert (found.env_id, found.reference_scores) == ("Hopper-v5", (1.0, 2.0))
    assert {"mine", "deep-ope-hopper-medium-500k"} <= {row["id"] for row in list_datasets()}


def test_several_folders(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RL_SHIFT_DATA", os.pathsep.join([str(folder), str(tmp_path / "more")]))
    hopper(tmp_path / "more" / "second-hopper.hdf5")
    assert datasets.resolve("second-hopper").family == "hopper"


def test_entry_points(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hopper(folder / "elsewhere" / "x.hdf5")

    class Point:
        name, value = "my/data-v0", "my.module:path"

        def load(self) -> Any:
            return lambda: str(path)

    monkeypatch.setattr(dataset_lookup, "entry_points", lambda group: [Point()])
    assert datasets.resolve("my/data-v0").path == path.resolve()
    assert importlib.metadata.entry_points(group="rl_shift.datasets") is not None


def test_unknown_and_absent_datasets(folder: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'hopper-medium-v2'"):
        datasets.resolve("hopper-medum-v2")
    hopper(folder / "my-own-hopper.hdf5")
    with pytest.raises(UserError, match="did you mean 'my-own-hopper'"):
        datasets.resolve("my-own-hoper")
    with pytest.raises(UserError, match="data list") as unknown:
        datasets.resolve("qqqq")
    with pytest.raises(UserError, match="hopper_medium-v2.hdf5 not found in") as absent:
        datasets.resolve("hopper-medium-v2")
    for caught in (unknown, absent):
        assert str(folder) in str(caught.value) and ".d4rl" in str(caught.value)
    with pytest.raises(UserError, match=r"nowhere.hdf5 does not exist"):
        datasets.resolve("/tmp/nowhere.hdf5")


# ---- cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", datasets.MODES)
def test_the_cache_gives_the_same_arrays(folder: Path, mode: str) -> None:
    path = write(folder / "x.hdf5", episodes())
    columns = datasets.COLUMNS
    first = datasets.load(path, columns, mode)
    assert (folder / f"x.hdf5.{mode}.npy").is_file()
    hidden = path.rename(folder / "hidden")
    path.write_bytes(b"x" * hidden.stat().st_size)  # same size and time, but nothing to read
    os.utime(path, ns=(hidden.stat().st_atime_ns, hidden.stat().st_mtime_ns))
    found = datasets.DatasetInfo("x", path, None, None, None, "")
    second = datasets.load(found, columns, mode)
    assert list(first) == list(second)
    for key in first:
        assert np.array_equal(first[key], second[key]) and first[key].dtype == second[key].dtype
    second["obs"][:] = 0  # copied on write
    assert np.array_equal(datasets.load(found, (), mode)["obs"], first["obs"])
    assert not list(folder.glob("*.partial*"))


def test_a_changed_file_is_read_again(folder: Path) -> None:
    path = write(folder / "x.hdf5", rows(8))
    datasets.load(path)
    before = datasets.sha256(path)
    write(path, rows(8, seed=1))
    os.utime(path, ns=(0, 123))
    assert np.array_equal(datasets.load(path)["obs"], rows(8, seed=1)["observations"][:-1])
    assert datasets.sha256(path) != before


def test_a_damaged_cache_is_made_again(folder: Path) -> None:
    path = write(folder / "x.hdf5", episodes())
    expected = datasets.load(path)
    cache = folder / "x.hdf5.native.npy"
    for damage in (b"", cache.read_bytes()[:-40], b"\x00" * 200):
        cache.write_bytes(damage)
        assert np.array_equal(datasets.load(path)["obs"], expected["obs"])
    (folder / "x.hdf5.cache.json").write_text("{")
    assert np.array_equal(datasets.load(path)["obs"], expected["obs"])


def test_a_read_only_folder_is_left_alone(tmp_path: Path, folder: Path) -> None:
    path = write(folder / "x.hdf5", episodes())
    folder.chmod(0o555)
    try:
        first = datasets.load(path)
        assert [found.name for found in folder.iterdir()] == ["x.hdf5"]
        cached = list((tmp_path / "cache" / "rl_shift").glob("*x.hdf5.native.npy"))
        assert len(cached) == 1
        assert np.array_equal(datasets.load(path)["obs"], first["obs"])
    finally:
        folder.chmod(0o755)


def test_sha256_is_that_of_the_file(folder: Path) -> None:
    import hashlib

    path = write(folder / "x.hdf5", rows(5))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert datasets.sha256(path) == expected == datasets.sha256(path)
    datasets.load(path)
    assert datasets.sha256(path) == expected


# ---- npz -------------------------------------------------------------------------------------


def test_npz_files_in_either_vocabulary(folder: Path) -> None:
    source = with_next(episodes())
    expected = datasets.load(write(folder / "x.hdf5", source), cache=False)
    np.savez(folder / "a.npz", **source)
    words = {
        "obs": source["observations"],
        "action": source["actions"],
        "reward": source["rewards"],
        "next_obs": source["next_observations"],
        "terminated": source["terminals"],
        "truncated": source["timeouts"],
        "env_id": np.array("Hopper-v5"),
    }
    np.savez(folder / "b.npz", **words)
    assert datasets.resolve("b").env_id == "Hopper-v5"
    for name in ("a", "b"):
        for key, value in datasets.load(name, cache=False).items():
            assert np.array_equal(value, expected[key])


def test_nothing_is_unpickled(folder: Path) -> None:
    np.savez(folder / "x.npz", observations=np.array([object()], dtype=object))
    with pytest.raises(UserError, match="not a readable NPZ"):
        datasets.load(folder / "x.npz")


def test_discrete_actions_and_images(folder: Path) -> None:
    source: dict[str, Any] = episodes()
    source["actions"] = np.arange(12) % 3
    source["observations"] = np.zeros((12, 4, 4, 3), np.uint8)
    path = write(folder / "x.hdf5", source)
    arrays = datasets.load(path, action_space=spaces.Discrete(3))
    assert arrays["action"].dtype == np.int64 and arrays["obs"].dtype == np.uint8
    with pytest.raises(UserError, match="the environment has 2"):
        datasets.load(path, action_space=spaces.Discrete(2))


# ---- bad input -------------------------------------------------------------------------------


def damaged(**changes: Any) -> dict[str, Any]:
    arrays: dict[str, Any] = episodes()
    for key, value in changes.items():
        if value is None:
            del arrays[key]
        else:
            arrays[key] = value
    return arrays


def poisoned(key: str, value: float) -> dict[str, Any]:
    arrays = with_next(episodes())
    arrays[key].flat[arrays[key].size // 2] = value
    return arrays


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (damaged(rewards=None), ["lacks rewards", "observations, actions, rewards, terminals"]),
        ({"virtual/0/observations": np.zeros(3)}, ["chunked file not supported", "merge"]),
        (damaged(rewards=np.full(12, b"1")), ["rewards holds no numbers"]),
        (damaged(rewards=np.zeros(11)), ["rewards has shape (11,)", "(12,)"]),
        (damaged(actions=np.zeros((5, 2))), ["actions has shape (5, 2)", "(12, ...)"]),
        (damaged(timeouts=np.zeros((12, 2))), ["timeouts has shape (12, 2)"]),
        (damaged(next_observations=np.zeros((12, 4))), ["next_observations", "agree"]),
        (damaged(observations=np.zeros(12)), ["(N, obs)"]),
        (damaged(observations=np.zeros((0, 3))), ["no rows"]),
        (poisoned("observations", np.nan), ["observations holds NaN", "row 6"]),
        (poisoned("rewards", np.inf), ["rewards holds NaN or infinite", "1 rows"]),
        (poisoned("next_observations", -np.inf), ["next_observations holds"]),
        (damaged(terminals=np.full(12, np.nan)), ["terminals holds NaN", "row 0"]),
        (poisoned("actions", 1.5), ["outside the box", "row 6", "1.5", "rescale"]),
    ],
)
def test_bad_files_say_what_and_where(
    folder: Path, arrays: dict[str, Any], words: list[str]
) -> None:
    path = write(folder / "x.hdf5", arrays)
    with pytest.raises(UserError) as caught:
        datasets.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert all(word in message for word in words), message
    assert verify(path)["problems"] == [message]


def test_truncated_and_foreign_files(folder: Path) -> None:
    path = write(folder / "x.hdf5", rows(4000))
    content = path.read_bytes()
    (folder / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match="not a readable NPZ file.*again") as caught:
        datasets.load(folder / "text.npz")
    assert "pickle" not in str(caught.value)
    for damage in (content[: len(content) // 2], b"<html>not found</html>", b""):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="not a readable HDF5 file.*again"):
            datasets.load(path)
    (folder / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="not a readable NPZ"):
        datasets.load(folder / "x.npz")


def test_rounding_at_the_edge_of_the_box_is_clipped(folder: Path) -> None:
    source = episodes()
    source["actions"][0, 0] = np.float32(1.00001)
    assert datasets.load(write(folder / "x.hdf5", source))["action"].max() == 1


def test_spaces_are_compared(folder: Path) -> None:
    path = write(folder / "x.hdf5", episodes())
    with pytest.raises(UserError, match=r"observations \(3,\), the environment \(4,\)"):
        datasets.load(path, observation_space=spaces.Box(-1, 1, (4,)))
    with pytest.raises(UserError, match=r"actions \(2,\), the environment \(6,\)"):
        datasets.load(path, action_space=spaces.Box(-1, 1, (6,)))
    with pytest.raises(UserError, match="unknown data column 'q'"):
        datasets.load(path, ("q",))
    with pytest.raises(UserError, match="unknown data mode"):
        datasets.load(path, mode="wild")


def test_a_d4rl_id_with_another_files_shapes_is_refused(folder: Path) -> None:
    write(folder / "hopper_medium-v2.hdf5", rows(5))
    with pytest.raises(UserError, match="3 and 2 wide, those of hopper-medium-v2 11 and 3"):
        datasets.resolve("hopper-medium-v2")


def test_verify_and_info(folder: Path) -> None:
    path = hopper(folder / "hopper_medium-v2.hdf5")
    report = verify("hopper-medium-v2")
    assert report["problems"] == [] and report["transitions"] == 6
    assert any("152756557" in warning for warning in report["warnings"])
    details = info("hopper-medium-v2")
    assert details["sha256"] == datasets.sha256(path) and details["obs"] == [11]
    assert any("Hopper-v4" in note for note in details["notes"])
    expected = 100 * (details["statistics"]["return_mean"] + 20.272305) / (3234.3 + 20.272305)
    assert np.isclose(details["normalized_score_mean"], expected)
    json.dumps(details)
    source = with_next(rows(6, obs=11, act=3))
    source["next_observations"][2] += 1
    source["timeouts"][4] = source["terminals"][4] = True
    warnings = verify(write(folder / "hopper-x.hdf5", source))["warnings"]
    assert any("1 rows inside episodes" in warning for warning in warnings)
    assert any("terminal and timeout" in warning for warning in warnings)


# ---- download --------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    root = tmp_path / "server"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, directory=str(root), **keywords)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}", root
        made.shutdown()
        thread.join()


def test_download(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, root = server
    entry = datasets.table()["kitchen-mixed-v0"]  # one whose size is not published
    served = root / "datasets" / "offline_rl" / entry.folder / entry.file
    served.parent.mkdir(parents=True)
    write(served, rows(4, obs=60, act=9))
    seen: list[int] = []
    target = download(entry.id, url, progress=seen.append)
    assert target == tmp_path / "home" / ".d4rl" / "datasets" / entry.file
    assert target.read_bytes() == served.read_bytes() and seen[-1] == served.stat().st_size
    assert datasets.resolve(entry.id).path == target.resolve()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("D4RL_BASE_URL", f"{url}/datasets/offline_rl/")
    assert download(entry.id).parent == tmp_path / "d4rl"
    served.write_bytes(b"<html>moved</html>")
    with pytest.raises(UserError, match="not a readable HDF5"):
        download("kitchen-mixed-v0")
    served.unlink()
    with pytest.raises(UserError, match="404|not found"):
        download("kitchen-mixed-v0")
    small = root / "datasets" / "offline_rl" / "gym_mujoco_v2" / "hopper_medium-v2.hdf5"
    hopper(small)
    with pytest.raises(UserError, match="expected 152756557"):
        download("hopper-medium-v2")
    names = {path.name for path in (tmp_path / "d4rl").iterdir()}
    assert names == {entry.file}, "something half-written stayed"


def test_download_without_network_or_server_fails_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="no server is set.*gym_mujoco_v2/hopper_medium-v2.hdf5"):
        download("hopper-medium-v2")
    with pytest.raises(UserError, match=r"could not be fetched .*\.d4rl/datasets/hopper_medium"):
        download("hopper-medium-v2", "http://127.0.0.1:9", timeout=2)
    with pytest.raises(UserError, match="did you mean"):
        download("hopper-medium-v3", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="no http"):
        download("hopper-medium-v2", "ftp://127.0.0.1")
    assert time.monotonic() - start < 5


# ---- genuine files ---------------------------------------------------------------------------


def test_a_genuine_file(shared_data_file: Path) -> None:
    found = datasets.resolve(shared_data_file)
    assert (found.env_id, found.horizon, found.family) == ("Hopper-v4", 1000, "hopper")
    assert found.origin == "D4RL-layout data regenerated from Deep OPE policies"
    arrays = datasets.load(found, cache=False)
    numbers = datasets.statistics(arrays)
    assert numbers["episodes"] == 120 and numbers["transitions"] == 50_000
    # Published with the file: 1347 over 120 episodes, the last of which it holds only in part.
    assert abs(numbers["return_mean"] - 1347) < 12 and abs(numbers["return_std"] - 376) < 20
    legacy = datasets.load(found, mode="legacy_qlearning", cache=False)
    with h5py.File(shared_data_file) as file:
        source = {
            key: file[key][()]
            for key in ("observations", "actions", "rewards", "terminals", "timeouts")
        }
    for key, value in d4rl_loop(source, 1000).items():
        assert np.array_equal(legacy[key], value)


def test_the_genuine_human_demonstrations(shared_data: Path) -> None:
    found = datasets.resolve(shared_data / "datasets" / "door-human-dapg.hdf5")
    assert found.env_id == "gymnasium_robotics:AdroitHandDoor-v1"
    columns = ("next_action", "mc_return")
    arrays = datasets.load(found, columns, cache=False)
    assert datasets.statistics(arrays)["episodes"] == 25
    assert arrays["obs"].shape == (6729 - 25, 39)  # the file lacks each episode's last successor
