"""Settings that every test shares: one thread per process, data that may be absent."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

from rl_shift.cli import limit_threads

limit_threads(1)  # before numpy and torch are imported

import gymnasium  # noqa: E402
import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# Times vary too much on a shared machine for hypothesis to judge them.
hypothesis.settings.register_profile("rl_shift", deadline=None, database=None)
hypothesis.settings.load_profile("rl_shift")


@pytest.fixture(autouse=True)
def _unlimited_threads_stay_out() -> Iterator[None]:
    """A test that changes torch's thread count must not slow the others down."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The first folder of `$RL_SHIFT_DATA`, of real datasets and policies; else skips."""
    value = os.environ.get("RL_SHIFT_DATA", "").split(os.pathsep)[0]
    if not value:
        pytest.skip("RL_SHIFT_DATA is not set: it names the folder of real datasets and policies")
    folder = Path(value)
    if not folder.is_dir():
        pytest.skip(f"RL_SHIFT_DATA={value} is no folder")
    return folder


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is empty, so nothing is written into the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def short_pendulum() -> Iterator[str]:
    """An environment of twenty steps per episode, so that evaluations cost nothing."""
    name = "ShortPendulum-v0"
    gymnasium.register(
        name, "gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=20
    )
    yield name
    gymnasium.registry.pop(name)


@pytest.fixture(scope="session")
def pendulum_sets(short_pendulum: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two datasets of it, 200 random steps each."""
    from rl_shift.recording import record

    folder = tmp_path_factory.mktemp("data")
    return [
        str(record(["random"], short_pendulum, 200, folder / f"random{k}.hdf5", seed=k, lanes=2))
        for k in (0, 1)
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say why they are skipped."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_sessionfinish() -> None:
    """Files and environments that tests left to the collector are closed before warnings end."""
    gc.collect()
