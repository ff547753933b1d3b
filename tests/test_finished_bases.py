"""Wrappers around finished runs and submodules taken from runs: frozen, checked, self-contained."""

import copy
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_shift import cli, config, runs
from rl_shift.agent import Agent, Batch, Metrics, Stage, Wrapper
from rl_shift.config import Task
from rl_shift.errors import UserError
from rl_shift.networks import MLP

FEW = ["--eval-episodes", "1", "--eval-lanes", "1", "--eval-every", "0"]


class Echo(Wrapper):
    """Learns to repeat observations, beside a base that may be finished."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        base: str = "td3_bc"
        base_config: dict[str, Any] = dataclasses.field(default_factory=dict)
        base_run: str = ""
        echo: str = ""
        echo_updates: int = 6

    reusable = {"echo": ("decoder",)}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        width = self.observation_space.shape[0]  # type: ignore[index]
        self.decoder = MLP(width, (4,), width)
        self.optimizer("decoder", lr=1e-2)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss = (self.decoder(batch["obs"]) - batch["obs"]).square().mean()
        return loss, {"loss": loss}

    def stages(self, task: Task) -> list[Stage]:
        updates = 0 if self.config.echo else self.config.echo_updates
        return [Stage("echo", updates=updates, counted=False), *super().stages(task)]

    def update(self, batch: Batch) -> Metrics:
        if self.stage == "echo":
            return self.learn("decoder", self.loss, batch)
        return super().update(batch)


ECHO = f"{__name__}:Echo"


@pytest.fixture(scope="module", autouse=True)
def _findable() -> Any:
    """`module:Class` names import this file by its own name."""
    known = sys.modules.get(__name__)
    sys.modules[__name__] = known or sys.modules[Echo.__module__]
    yield


def collect(path: Path, env: str = "Pendulum-v1", steps: str = "60") -> str:
    argv = ["--policy", "random", "--env", env, "--steps", steps, "--out", str(path)]
    assert cli.main(["data", "collect", *argv]) == 0
    return str(path)


def train(folder: Path, name: str, data: str, *more: str) -> str:
    argv = ["train", name, "--dataset", data, "--run-dir", str(folder), *FEW, *more]
    assert cli.main(argv) == 0
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return collect(tmp_path_factory.mktemp("data") / "pendulum.hdf5")


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two stacked seeds with a scheduled learning rate."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return train(folder, "iql", data, "--updates", "5", "--seeds", "2", "--processes", "1",
                 "--agent.hidden", "[8]")  # fmt: skip


@pytest.fixture
def base(finished: str, tmp_path: Path) -> str:
    return shutil.copytree(finished, tmp_path / "base").as_posix()


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_a_finished_base_is_frozen_and_its_folder_is_needed_only_once(
    base: str, data: str, tmp_path: Path
) -> None:
    folder = train(tmp_path / "run", ECHO, data, "--agent.base", f"{base}#1", "--seeds", "2",
                   "--processes", "1", "--save-every", "3")  # fmt: skip
    original, _, _ = runs.load_agent(f"{base}#1")
    shutil.rmtree(base)
    settings = config.load(Path(folder, "config.yaml")).agent
    assert (settings.base, settings.base_run) == ("iql", f"{base}#1")
    assert settings.base_config["hidden"] == (8,)
    for spec in (f"{folder}#0", f"{folder}#1"):
        wrapper, _, _ = runs.load_agent(spec)
        assert wrapper.base.frozen and not wrapper.frozen
        assert wrapper.base.updates == original.updates == 5
        assert_equal(wrapper.base.tensors(), original.tensors())
        obs = torch.randn(3, 3)
        assert torch.equal(
            wrapper.run(wrapper.act, obs, False), original.run(original.act, obs, False)
        )
    # a run that goes on from the middle ends where the whole one ended
    whole, _, _ = runs.load_agent(f"{folder}#0")
    for step in Path(folder, "checkpoints").glob("step_*6"):
        shutil.rmtree(step)
    assert cli.main(["train", "--resume", folder]) == 0
    again, _, _ = runs.load_agent(f"{folder}#0")
    assert_equal(again.tensors(), whole.tensors())
    assert cli.main(["evaluate", f"{folder}#0", "--episodes", "1"]) == 0


def test_a_frozen_agent_refuses_to_learn(base: str, data: str) -> None:
    settings = {"agent.base": f"{base}#0", "tasks.0.dataset": data}
    run = config.make(ECHO, overrides=settings)
    wrapper = runs.make_agent(run, runs.resolve(run), fresh=True)
    before = copy.deepcopy(wrapper.base.state())
    inner = wrapper.base
    with pytest.raises(RuntimeError, match="frozen"):
        inner.learn("actor", lambda: None)
    wrapper.schedule()
    assert_equal(before["module"], wrapper.base.state()["module"])
    rates = [s["agents"][""]["optimizers"]["actor"]["lr"] for s in (before, inner.state())]
    assert rates[0] == rates[1]


def test_a_trained_submodule_serves_another_run(base: str, data: str, tmp_path: Path) -> None:
    first = train(tmp_path / "first", ECHO, data, "--agent.base", f"{base}#0")
    second = train(tmp_path / "second", ECHO, data, "--agent.base", f"{base}#1",
                   "--agent.echo", first, "--seed", "5")  # fmt: skip
    one, _, _ = runs.load_agent(first)
    shutil.rmtree(first)
    two, _, _ = runs.load_agent(second)
    assert_equal(one.decoder.state_dict(), two.decoder.state_dict())
    assert (one.updates, two.updates) == (6, 0)


def test_base_by_name_takes_checked_settings(data: str) -> None:
    settings = {"tasks.0.dataset": data, "tasks.0.updates": 3}
    run = config.make(ECHO, overrides=settings | {"agent.base_config": {"alpha": 1.0}})
    assert run.agent.base_config["alpha"] == 1.0
    assert config.make(ECHO, overrides=settings | {"agent": config.plain(run.agent)}) == run
    wrapper = runs.make_agent(run, runs.resolve(run), fresh=True)
    assert isinstance(wrapper, Agent) and not wrapper.base.frozen
    with pytest.raises(UserError, match="unknown key 'alpa'.*did you mean 'alpha'"):
        config.make(ECHO, overrides=settings | {"agent.base_config": {"alpa": 1.0}})
    with pytest.raises(UserError, match="--updates"):
        config.make(ECHO, overrides={"tasks.0.dataset": data})


def test_what_cannot_be_a_base(base: str, data: str, tmp_path: Path, capsys: Any) -> None:
    other = collect(tmp_path / "other.hdf5", steps="80")
    wide = collect(tmp_path / "wide.hdf5", "MountainCarContinuous-v0")
    cases = [
        (data, ["--agent.base", base], f"holds 2 seeds: name one, {base}#0 to {base}#1"),
        (data, ["--agent.base", f"{base}#2"], "the run has seeds #0 to #1"),
        (data, ["--agent.base", str(tmp_path)], "neither an agent"),
        (data, ["--agent.base", "td3bc"], "did you mean 'td3_bc'"),
        (data, ["--agent.base", f"{base}#0", "--agent.base_config", "{}"], ""),
        (data, ["--agent.base", f"{base}#0", "--agent.base_config", "{beta: 1}"], "leave it out"),
        (data, ["--agent.base", f"{base}#0", "--agent.echo", f"{base}#0"], "a run of IQL, not of"),
        (data, ["--agent.base", f"{base}#0", "--agent.echo", "nowhere"], "is no run folder"),
        (other, ["--agent.base", f"{base}#0"], "another sha256"),
        (wide, ["--agent.base", f"{base}#0"], "observation space"),
    ]
    for number, (dataset, flags, message) in enumerate(cases):
        argv = ["train", ECHO, "--dataset", dataset, "--run-dir", str(tmp_path / f"{number}")]
        assert cli.main([*argv, *FEW, *flags]) == (2 if message else 0), flags
        error = capsys.readouterr().err
        assert message in error and error.count("\n") <= 1, (flags, error)
        assert (tmp_path / f"{number}").exists() == (not message)
