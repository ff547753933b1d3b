"""Resuming equals not stopping, bit for bit; and what may not be resumed says so."""

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rl_shift import checkpoint, cli, config, runs
from rl_shift.agent import Agent, Stage
from rl_shift.errors import UserError
from rl_shift.networks import MLP
from rl_shift.recording import record
from rl_shift.trainer import Trainer

pytestmark = pytest.mark.usefixtures("short_pendulum")
ENV = "ShortPendulum-v0"
SMALL = {"agent.hidden": [8], "agent.batch_size": 8}
FEW = {"eval_episodes": 2, "eval_lanes": 2, "eval_every": 4, "log_every": 3, "save_every": 6}


class Prepared(Agent):
    """Clones actions from observations that a network of a preparatory stage has denoised."""

    @dataclass(frozen=True)
    class Config:
        batch_size: int = 8
        hidden: tuple[int, ...] = (8,)

    def __init__(self, observation_space: Any, action_space: Any, config: Config) -> None:
        super().__init__(observation_space, action_space, config)
        obs, action = observation_space.shape[0], action_space.shape[0]
        self.actor, self.denoiser = MLP(obs, config.hidden, action), MLP(obs, config.hidden, obs)
        self.optimizer("actor", lr=1e-2, schedule="cosine")
        self.optimizer("denoiser", lr=1e-2)
        self.drawn = 0

    def stages(self, task: Any) -> list[Stage]:
        first = Stage("prepare", updates=12, counted=False)
        return [first, Stage("offline", updates=task.updates)]

    def denoiser_loss(self, obs: Any) -> Any:
        noise = torch.randn_like(obs)
        loss = (self.denoiser(obs + noise) - noise).square().mean()
        return loss, {"denoiser/loss": loss}

    def actor_loss(self, batch: Any) -> Any:
        obs = batch["obs"] - self.denoiser(batch["obs"])
        loss = (self.actor(obs) - batch["action"]).square().mean()
        return loss, {"actor/loss": loss}

    def act(self, obs: Any, explore: bool) -> Any:
        return torch.tanh(self.actor(obs - self.denoiser(obs)))

    def sample(self, buffer: Any) -> Any:
        self.drawn += 1
        return buffer.windows(4, 3) if self.stage == "prepare" else super().sample(buffer)

    def extra_state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self.drawn = extra["drawn"]

    def update(self, batch: Any) -> Any:
        if self.stage == "prepare":
            return self.learn("denoiser", self.denoiser_loss, batch["obs"])
        return self.learn("actor", self.actor_loss, batch)


PREPARED = f"{__name__}:Prepared"


class Headed(Agent):
    """Clones actions with a head per task on a shared trunk."""

    Config = Prepared.Config

    def __init__(self, observation_space: Any, action_space: Any, config: Any) -> None:
        super().__init__(observation_space, action_space, config)
        self.trunk = MLP(observation_space.shape[0], config.hidden, 6)
        self.heads = torch.nn.ModuleList()
        self.optimizer("trunk", lr=1e-2)
        self.head = 0

    def build(self, task: Any) -> None:
        self.heads.append(MLP(6, (5,), task.action_space.shape[0]))
        self.head = len(self.heads) - 1
        self.optimizer(f"heads.{self.head}", lr=1e-2)

    def focus(self, task: Any) -> None:
        self.head = [begun.name for begun in self.begun].index(task.name)

    def loss(self, batch: Any) -> Any:
        loss = (self.act(batch["obs"], False) - batch["action"]).square().mean()
        return loss, {"loss": loss}

    def act(self, obs: Any, explore: bool) -> Any:
        return self.heads[self.head](self.trunk(obs))

    def update(self, batch: Any) -> Any:
        names = ("trunk", f"heads.{self.head}") if self.head == 0 else f"heads.{self.head}"
        return self.learn(names, self.loss, batch)


class Killed(BaseException):
    """Ends a process' training like SIGKILL would, without ending the process."""


def train(folder: Path, agent: str, **overrides: Any) -> Path:
    values = SMALL | FEW | overrides | {"run_dir": str(folder)}
    return runs.train(config.make(agent, overrides=values), progress=False)


def train_and_kill(folder: Path, after: int, agent: str, **overrides: Any) -> None:
    """Train until `after` updates of any stage were made."""
    original = Trainer._update

    def update(trainer: Trainer, source: Any, stage: Stage) -> None:
        if trainer.clock.total_updates == after:
            raise Killed
        original(trainer, source, stage)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_update", update)
        train(folder, agent, **overrides)


def newest(folder: Path) -> dict[str, Any]:
    return checkpoint.load(checkpoint.latest(folder))[0]


def assert_same_run(whole: Path, resumed: Path, extended: bool = False) -> None:
    """Equal last checkpoints, logs and results, times apart."""
    states = [newest(folder) for folder in (whole, resumed)]
    for state in states:
        del state["seconds"], state["wall_s"]
        if extended:  # the agent remembers the budget with which it began
            del state["agent"]["agents"][""]["begun"][0]["updates"]
        if state["collector"] is not None:
            forget_spaces(state["collector"]["envs"])
    assert_equal(*states)
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if not k.startswith("time")}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (whole, resumed)
    ]
    assert logs[0] == logs[1]
    texts = [(folder / "config.yaml").read_text() for folder in (whole, resumed)]
    assert texts[0] == texts[1]
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, resumed)]
    for result in results:
        for key in ("wall_time_s", "updates_per_s"):
            del result[key]
    assert results[0] == results[1]
    assert results[0]["status"] == "finished"


def forget_spaces(nested: Any) -> None:
    """Gymnasium seeds an environment's spaces from the system; nobody draws from them."""
    if isinstance(nested, dict):
        for key in [key for key in nested if str(key).endswith("observation_space")]:
            del nested[key]
        for value in nested.values():
            forget_spaces(value)


def assert_equal(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{path}/{i}")
    else:
        assert a == b, path


# ---- n + resume + n equals 2n ------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("agent", ["bc", "td3_bc", "iql"])
def test_offline(agent: str, seeds: int, pendulum_sets: list[str], tmp_path: Path) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 12, "seeds": seeds}
    train(tmp_path / "whole", agent, **task)
    train_and_kill(tmp_path / "killed", 9, agent, **task)
    state = newest(tmp_path / "killed")
    assert state["clock"]["updates"] == 6
    assert next(iter(state["agent"]["module"].values())).shape[0] == (seeds if seeds > 1 else 3)
    runs.resume(tmp_path / "killed", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_10_percent_cloning_finds_its_episodes_again(
    pendulum_sets: list[str], tmp_path: Path
) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 12, "agent.fraction": 0.3}
    train(tmp_path / "whole", "bc", **task)
    train_and_kill(tmp_path / "killed", 8, "bc", **task)
    runs.resume(tmp_path / "killed", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(("after", "lanes"), [(4, 1), (23, 2)], ids=["just-warm", "ring-wrapped"])
def test_online(after: int, lanes: int, tmp_path: Path) -> None:
    """Warm-up for 4 steps, a ring of 16, a checkpoint every 6."""
    task = {"tasks.0.env": ENV, "tasks.0.env_steps": 30 * lanes, "lanes": lanes}
    values = {"agent.warmup_steps": 4 * lanes, "agent.buffer_capacity": 16 * lanes}
    values |= {"save_every": 6 * lanes, "eval_every": 10 * lanes, "log_every": 4 * lanes}
    train(tmp_path / "whole", "sac", **task, **values)
    train_and_kill(tmp_path / "killed", after, "sac", **task, **values)
    runs.resume(tmp_path / "killed", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    ("agent", "after"), [("sac", 5), ("iql", 8), ("sac", 20)], ids=["offline", "between", "online"]
)
def test_offline_to_online(
    agent: str, after: int, pendulum_sets: list[str], tmp_path: Path
) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 8, "tasks.0.env_steps": 16}
    values = {"save_every": 4, "eval_every": 8}
    train(tmp_path / "whole", agent, **task, **values)
    train_and_kill(tmp_path / "killed", after, agent, **task, **values)
    runs.resume(tmp_path / "killed", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("after", [8, 18, 33], ids=["preparing", "training", "second"])
def test_inside_every_stage_of_two_tasks(
    after: int, seeds: int, pendulum_sets: list[str], tmp_path: Path
) -> None:
    """Twelve preparatory and eight counted updates per task."""
    tasks = {f"tasks.{k}.dataset": pendulum_sets[k] for k in (0, 1)}
    tasks |= {f"tasks.{k}.updates": 8 for k in (0, 1)} | {"seeds": seeds, "save_every": 5}
    train(tmp_path / "whole", PREPARED, **tasks)
    train_and_kill(tmp_path / "killed", after, PREPARED, **tasks)
    state = newest(tmp_path / "killed")
    assert state["clock"]["task"] == (after > 20)
    assert state["stage"] == ("offline" if after == 18 else "prepare")
    runs.resume(tmp_path / "killed", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_heads_of_earlier_tasks_are_built_again(pendulum_sets: list[str], tmp_path: Path) -> None:
    tasks = {f"tasks.{k}.dataset": pendulum_sets[k] for k in (0, 1)}
    tasks |= {f"tasks.{k}.updates": 8 for k in (0, 1)}
    agent = f"{__name__}:Headed"
    train(tmp_path / "whole", agent, **tasks)
    train_and_kill(tmp_path / "killed", 15, agent, **tasks)
    before = newest(tmp_path / "killed")["agent"]["module"]
    runs.resume(tmp_path / "killed", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    after = newest(tmp_path / "killed")["agent"]["module"]
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert all((name in kept) == (not name.startswith("heads.1.")) for name in before)
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    row = {e["task"]: e["returns"] for e in results["evaluations"] if e["during"] == 1}
    assert row[0] != row[1]  # the same initial states, each task with its own head


def test_kill_after_kill(pendulum_sets: list[str], tmp_path: Path) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 12, "save_every": 2}
    train(tmp_path / "whole", "td3_bc", **task)
    train_and_kill(tmp_path / "killed", 3, "td3_bc", **task)
    for after in (5, 5, 9):  # once without any progress
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            original = Trainer._update

            def update(
                trainer: Trainer, source: Any, stage: Stage, at: int = after, go: Any = original
            ) -> None:
                if trainer.clock.total_updates == at:
                    raise Killed
                go(trainer, source, stage)

            patch.setattr(Trainer, "_update", update)
            runs.resume(tmp_path / "killed", progress=False)
    runs.resume(tmp_path / "killed", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_sigkill_at_random_times_through_the_command_line(tmp_path: Path) -> None:
    """The short form of `scripts/kill_test.py`."""
    data = record(["random"], "Pendulum-v1", 400, tmp_path / "data.hdf5", lanes=2)
    small = ["--agent.hidden", "[8]", "--agent.batch_size", "8", "--eval-episodes", "2"]
    budget = ["--updates", "100", "--save-every", "2"]
    script = load_script("kill_test")
    arguments = ["td3_bc", "--dataset", str(data), *small, *budget]
    outcome = script.kill_test(arguments, tmp_path, kills=2, seed=2)
    assert len(outcome.kills) == 2
    assert outcome.differences == []


def load_script(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- longer runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", ["td3_bc", "iql"])
def test_a_finished_run_goes_on_as_if_it_had_been_longer(
    agent: str, pendulum_sets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "eval_every": 3}
    schedule = {"agent.schedule_updates": 6} if agent == "iql" else {}
    train(tmp_path / "whole", agent, **task, **schedule, **{"tasks.0.updates": 12})
    train(tmp_path / "short", agent, **task, **schedule, **{"tasks.0.updates": 6})
    assert cli.main(["train", "--resume", str(tmp_path / "short"), "--updates", "12"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "short", extended=True)
    said = "the learning rate of 'actor' was scheduled over 6 updates and is 0 from there on"
    assert (said in capsys.readouterr().out) == (agent == "iql")


def test_an_extended_run_keeps_the_first_schedules_final_value(
    pendulum_sets: list[str], tmp_path: Path
) -> None:
    """`schedule_updates` 0 is the first budget, not the last."""
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 6}
    train(tmp_path / "run", "iql", **task)
    before = newest(tmp_path / "run")
    runs.resume(tmp_path / "run", updates=9, progress=False)
    after = newest(tmp_path / "run")
    assert after["clock"]["counted_updates"] == 9
    optimizers = after["agent"]["agents"][""]["optimizers"]
    assert float(optimizers["actor"]["lr"]) == 0
    assert float(optimizers["critic"]["lr"]) == pytest.approx(3e-4)
    module = before["agent"]["module"], after["agent"]["module"]
    frozen = {name for name in module[0] if torch.equal(module[0][name], module[1][name])}
    assert all(name in frozen for name in module[0] if name.startswith("actor."))
    assert not any(name in frozen for name in module[0] if name.startswith("critic."))


def test_a_finished_run_that_is_resumed_stays_as_it_is(
    pendulum_sets: list[str], tmp_path: Path
) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 6}
    train(tmp_path / "once", "bc", **task)
    train(tmp_path / "twice", "bc", **task)
    runs.resume(tmp_path / "twice", progress=False)
    assert_same_run(tmp_path / "once", tmp_path / "twice")


def test_an_extended_run_that_is_stopped_keeps_its_new_budget(
    pendulum_sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "save_every": 2}
    train(tmp_path / "whole", "bc", **task, **{"tasks.0.updates": 12})
    train(tmp_path / "run", "bc", **task, **{"tasks.0.updates": 4})
    original = Trainer._update

    def update(trainer: Trainer, source: Any, stage: Stage) -> None:
        if trainer.clock.total_updates == 9:
            raise Killed
        original(trainer, source, stage)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_update", update)
        runs.resume(tmp_path / "run", updates=12, progress=False)
    runs.resume(tmp_path / "run", progress=False)
    assert newest(tmp_path / "run")["clock"]["counted_updates"] == 12
    assert_same_run(tmp_path / "whole", tmp_path / "run", extended=True)


def test_budgets_that_cannot_change(pendulum_sets: list[str], tmp_path: Path) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 4, "tasks.0.env_steps": 4}
    folder = train(tmp_path / "both", "sac", **task)
    with pytest.raises(UserError, match=r"--updates 3 is less than the run's 4"):
        runs.resume(folder, updates=3, progress=False)
    with pytest.raises(UserError, match=r"in its stage 'online'.*extend --env-steps"):
        runs.resume(folder, updates=8, progress=False)
    assert "updates: 4\n" in (folder / "config.yaml").read_text()
    runs.resume(folder, env_steps=6, progress=False)
    assert newest(folder)["clock"]["total_env_steps"] == 6
    online = {"tasks.0.env": ENV, "tasks.0.env_steps": 4, "agent.warmup_steps": 2}
    train(tmp_path / "online", "sac", **online)
    with pytest.raises(UserError, match="extend --env-steps"):
        runs.resume(tmp_path / "online", updates=8, progress=False)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.fixture
def run_dir(pendulum_sets: list[str], tmp_path: Path) -> Path:
    data = Path(shutil.copy(pendulum_sets[0], tmp_path / "data.hdf5"))
    return train(tmp_path / "run", "bc", **{"tasks.0.dataset": str(data), "tasks.0.updates": 12})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """One line, exit code 2, and the folder is as it was."""
    before = contents(folder)
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(folder), "--updates", "20"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rl-shift: error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert contents(folder) == before


def test_changed_data(
    run_dir: Path, pendulum_sets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = run_dir.parent / "data.hdf5"
    shutil.copy(pendulum_sets[1], data)
    refused(run_dir, capsys, str(data), "is not the one that", "put the old file back")
    data.unlink()
    refused(run_dir, capsys, str(data))


def test_a_checkpoint_of_another_run(
    run_dir: Path, pendulum_sets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"tasks.0.dataset": str(run_dir.parent / "data.hdf5"), "tasks.0.updates": 12}
    other = train(run_dir.parent / "other", "td3_bc", **task)
    shutil.rmtree(run_dir / "checkpoints")
    shutil.copytree(other / "checkpoints", run_dir / "checkpoints")
    refused(run_dir, capsys, "was not written by the run that config.yaml describes")
    with pytest.raises(UserError, match="was not written by the run"):
        runs.load_agent(run_dir)


def test_a_checkpoint_of_something_else(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    checkpoint.save_step(run_dir, 7, {"weights": torch.ones(2)}, "", {})
    refused(run_dir, capsys, "was not written by the run", "KeyError")


@pytest.mark.parametrize("file", ["weights.safetensors", "train_state.safetensors"])
def test_a_damaged_checkpoint(file: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint.latest(run_dir) / file
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # one bit
    path.write_bytes(data)
    refused(run_dir, capsys, str(path), "damaged", "resume from the checkpoint before it")
    shutil.rmtree(path.parent)
    runs.resume(run_dir, progress=False)  # from the one before it
    assert newest(run_dir)["clock"]["updates"] == 12


def test_a_half_written_checkpoint_is_passed_over(run_dir: Path) -> None:
    (checkpoint.latest(run_dir) / "train_state.safetensors").write_bytes(b"")
    runs.resume(run_dir, progress=False)
    assert newest(run_dir)["clock"]["updates"] == 12


def test_an_unknown_format(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint.latest(run_dir) / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"format": 99}))
    refused(run_dir, capsys, "has format 99", "reads format 1")


def test_no_checkpoint_at_all(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    refused(run_dir, capsys, "no checkpoint to resume from", "--overwrite")
