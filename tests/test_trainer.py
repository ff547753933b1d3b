"""The loop: kinds of runs, what counts as an update, evaluation, divergence, interruption."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_shift import agents, checkpoint, cli, config, runs
from rl_shift.agent import Agent, Stage
from rl_shift.buffer import Mixture
from rl_shift.errors import TrainingDiverged, UserError
from rl_shift.networks import MLP
from rl_shift.trainer import Trainer

pytestmark = pytest.mark.usefixtures("short_pendulum")
ENV = "ShortPendulum-v0"
SMALL = {"agent.hidden": [8], "agent.batch_size": 8}
FEW = {"eval_episodes": 2, "eval_lanes": 2, "eval_every": 0, "log_every": 5, "save_every": 0}


class Prepared(Agent):
    """Clones actions after a preparatory stage of noise regression."""

    @dataclass(frozen=True)
    class Config:
        batch_size: int = 8
        hidden: tuple[int, ...] = (8,)
        prepare_updates: int = 6
        explode_after: int = 1_000_000  # updates
        poison: bool = False  # gradients instead of the loss
        check_every: int = 0
        turns: int = 0  # how often both stages take turns, without checks
        enough: int = 1_000_000  # updates after which the preparation has converged

    def __init__(self, observation_space: Any, action_space: Any, config: Config) -> None:
        super().__init__(observation_space, action_space, config)
        self.actor = MLP(observation_space.shape[0], config.hidden, action_space.shape[0])
        self.denoiser = MLP(observation_space.shape[0], config.hidden, observation_space.shape[0])
        self.optimizer("actor", "denoiser", lr=1e-2)
        self.checks: list[tuple[str, int]] = []

    def check(self, stage: Stage, updates: int, buffer: Any) -> bool:
        self.checks.append((stage.name, updates))
        return updates == self.config.enough

    def stages(self, task: Any) -> list[Stage]:
        if self.config.turns:
            first = Stage("prepare", self.config.prepare_updates, counted=False)
            return [first, Stage("offline", updates=task.updates)] * self.config.turns
        every = self.config.check_every
        first = Stage("prepare", self.config.prepare_updates, counted=False, check_every=every)
        return [first, Stage("offline", updates=task.updates)]

    def denoiser_loss(self, batch: Any) -> Any:
        noise = torch.randn_like(batch["obs"])
        loss = (self.denoiser(batch["obs"] + noise) - noise).square().mean()
        return loss, {"denoiser/loss": loss}

    def actor_loss(self, batch: Any) -> Any:
        loss = (self.actor(batch["obs"]) - batch["action"]).square().mean()
        if self.updates >= self.config.explode_after and not self.config.poison:
            loss = loss * torch.inf
        return loss, {"actor/loss": loss}

    def poisoned(self, gradients: Any) -> Any:
        if self.updates >= self.config.explode_after and self.config.poison:
            return {k: g * torch.nan for k, g in gradients.items()}
        return gradients

    def act(self, obs: Any, explore: bool) -> Any:
        return torch.tanh(self.actor(obs))

    def update(self, batch: Any) -> Any:
        if self.stage == "prepare":
            return self.learn("denoiser", self.denoiser_loss, batch)
        return self.learn("actor", self.actor_loss, batch, transform=self.poisoned)


PREPARED = f"{__name__}:Prepared"


def equal(a: Any, b: Any) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def trained(agent: str, **overrides: Any) -> Trainer:
    """A trainer that ran to its end, without a run folder."""
    run = config.make(agent, overrides=SMALL | FEW | overrides)
    tasks = runs.resolve(run)
    trainer = Trainer(runs.make_agent(run, tasks), tasks, run)
    trainer.run()
    return trainer


# ---- kinds of runs -----------------------------------------------------------------------------


def test_offline(pendulum_sets: list[str]) -> None:
    trainer = trained("td3_bc", **{"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 11})
    assert trainer.agent.updates == trainer.clock.counted_updates == 11
    assert trainer.ring is None and trainer.collector is None
    assert [(e["updates"], e["env_steps"]) for e in trainer.evaluations] == [(11, 0)]
    assert trainer.buffer.arrays()["task"].eq(0).all()
    assert trainer.seconds > 0


def test_rewards_are_scaled_for_training_only(pendulum_sets: list[str]) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 2}
    raw = trained("bc", **task)
    scaled = trained("bc", **task, **{"tasks.0.reward": "0.5,3"})
    expected = raw.buffer.arrays()["reward"] * 0.5 + 3
    assert torch.equal(scaled.buffer.arrays()["reward"], expected)
    assert scaled.evaluations[0]["returns"] == raw.evaluations[0]["returns"]


@pytest.mark.parametrize("lanes", [1, 2])
def test_online(lanes: int) -> None:
    task = {"tasks.0.env": ENV, "tasks.0.env_steps": 40, "lanes": lanes}
    cadence = {"agent.warmup_steps": 10, "agent.updates_per_collect": 2}
    trainer = trained("sac", **task, **cadence, eval_every=20)
    assert trainer.clock.total_env_steps == trainer.clock.env_steps == 40
    rounds = (40 - 10) // lanes + 1  # the first right after the warm-up
    assert trainer.agent.updates == trainer.clock.counted_updates == 2 * rounds
    assert trainer.buffer is trainer.ring
    assert len(trainer.buffer) == 40
    assert [e["env_steps"] for e in trainer.evaluations] == [20, 40]
    assert len(trainer._rollouts) == 2  # whole episodes of twenty steps
    assert all(length == 20 for _, length in trainer._rollouts)


@pytest.mark.parametrize("name", ["iql", "sac"])
def test_offline_to_online_mixes_data_and_collected_rows(
    name: str, pendulum_sets: list[str]
) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 5, "tasks.0.env_steps": 12}
    values = SMALL | FEW | task | {"tasks.0.offline_fraction": 0.25, "tasks.0.reward": "0.1,0"}
    run = config.make(name, overrides=values)
    tasks = runs.resolve(run)
    agent = runs.make_agent(run, tasks)
    trainer = Trainer(agent, tasks, run)
    seen: list[str] = []
    sample: Callable[[Any], Any] = agent.sample

    def watched(buffer: Any) -> Any:
        batch = sample(buffer)
        seen.append(type(buffer).__name__)
        if isinstance(buffer, Mixture):
            assert trainer.ring is not None
            old, new = batch["index"][:2], batch["index"][2:]
            assert torch.equal(batch["obs"][:2], trainer.buffer.take(old)["obs"])
            assert torch.equal(batch["obs"][2:], trainer.ring.take(new)["obs"])
            assert int(new.max()) < trainer.clock.env_steps
        return batch

    agent.sample = watched  # type: ignore[method-assign]
    trainer.run()
    assert seen == ["Buffer"] * 5 + ["Mixture"] * 12  # no warm-up: the data is there
    assert trainer.ring is not None
    assert len(trainer.ring) == 12
    assert len(trainer.buffer) == 200
    assert float(trainer.ring.arrays()["reward"].min()) > -2  # scaled as the data is
    assert [(e["updates"], e["env_steps"]) for e in trainer.evaluations] == [(5, 0), (17, 12)]


def test_a_continual_run_evaluates_every_task_begun_so_far(pendulum_sets: list[str]) -> None:
    tasks = {f"tasks.{k}.dataset": pendulum_sets[k] for k in (0, 1)}
    tasks |= {f"tasks.{k}.updates": 6 for k in (0, 1)}
    logged: list[str] = []
    run = config.make("td3_bc", overrides=SMALL | FEW | tasks | {"eval_every": 3})
    resolved = runs.resolve(run)
    agent = runs.make_agent(run, resolved)
    trainer = Trainer(agent, resolved, run, log=lambda clock, values: logged.extend(values))
    trainer.run()
    places = [(e["task"], e["during"], e["updates"]) for e in trainer.evaluations]
    first = [(0, 0, 3), (0, 0, 6)]  # the end of a task is played once
    second = [(k, 1, n) for n in (9, 12) for k in (0, 1)]
    assert places == first + second
    assert trainer.buffer.arrays()["task"].eq(1).all()  # a fresh one, of the second task
    assert [task.name for task in trainer.agent.begun] == ["random0", "random1"]
    assert {"eval/random0/mean_reward", "eval/random1/mean_reward"} <= set(logged)
    # tasks that are evaluated at the same time start from the same states
    assert trainer.evaluations[-1]["returns"] == trainer.evaluations[-2]["returns"]


def test_tasks_of_different_shapes_need_an_agent_that_builds_for_each(
    pendulum_sets: list[str],
) -> None:
    tasks = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 1}
    tasks |= {"tasks.1.env": "MountainCarContinuous-v0", "tasks.1.env_steps": 1}
    with pytest.raises(UserError, match=r"task 'MountainCarContinuous-v0'.*same networks"):
        trained("sac", **tasks)


def test_stacked_seeds_draw_their_own_batches(pendulum_sets: list[str]) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 3}
    both = trained("bc", **task, seeds=2).agent
    for k in (0, 1):
        alone = trained("bc", **task, seed=k).agent.state()["module"]
        chosen = both.select(k).state()["module"]
        assert all(torch.allclose(alone[name], chosen[name], atol=1e-5) for name in alone)


# ---- what counts, and what must not matter -----------------------------------------------------


def test_preparatory_updates_are_not_part_of_the_budget(
    pendulum_sets: list[str], tmp_path: Path
) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 10, "eval_every": 5}
    values = SMALL | FEW | task | {"log_every": 2, "run_dir": str(tmp_path / "run")}
    folder = runs.train(config.make(PREPARED, overrides=values), progress=False)
    results = json.loads((folder / "results.json").read_text())
    assert results["updates"] == 10
    assert [e["updates"] for e in results["evaluations"]] == [5, 10]  # none while it prepares
    state, _ = checkpoint.load(checkpoint.latest(folder))
    assert state["clock"]["total_updates"] == 16
    assert state["agent"]["agents"][""]["updates"] == 16
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "prepare/denoiser/loss" in line] == [2, 4, 6]
    trained = [line for line in lines if "train/actor/loss" in line]
    assert [(line["step"], line["updates"]) for line in trained] == [
        (6 + n, n) for n in (2, 4, 6, 8, 10)
    ]


def test_stages_that_take_turns_count_on(pendulum_sets: list[str]) -> None:
    """Three times 2 + 5 updates: intervals run through the stages of one name."""
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 5}
    fields = {"agent.prepare_updates": 2, "agent.turns": 3}
    intervals = {"log_every": 4, "eval_every": 7}
    run = config.make(PREPARED, overrides=SMALL | FEW | task | fields | intervals)
    tasks = runs.resolve(run)
    logged: list[tuple[int, str]] = []

    def log(clock: Any, values: dict[str, float]) -> None:
        names = {key.partition("/")[0] for key in values} & {"prepare", "train"}
        logged.extend((clock.total_updates, name) for name in names)

    trainer = Trainer(runs.make_agent(run, tasks), tasks, run, log)
    trainer.run()
    # Prepared at 2, 9 and 16, each logged at its end; trained at its own 4th, 8th and 12th update.
    expected = [(2, "prepare"), (6, "train"), (9, "prepare"), (12, "train"), (16, "prepare")]
    assert logged == [*expected, (18, "train")]
    assert [e["updates"] for e in trainer.evaluations] == [7, 14, 15]


@pytest.mark.parametrize(("enough", "checks"), [(4, [2, 4]), (100, [2, 4, 6, 7])])
def test_a_stage_ends_early_where_its_check_says_so(
    enough: int, checks: list[int], pendulum_sets: list[str]
) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 3}
    settings = {"agent.prepare_updates": 7, "agent.check_every": 2, "agent.enough": enough}
    trainer = trained(PREPARED, **task, **settings)
    assert trainer.agent.checks == [("prepare", n) for n in checks]
    assert trainer.clock.counted_updates == 3
    assert trainer.clock.total_updates == checks[-1] + 3


@pytest.mark.parametrize(
    "kind",
    [
        ("td3_bc", {"tasks.0.updates": 12}),
        ("sac", {"tasks.0.updates": 6, "tasks.0.env_steps": 12}),
        ("sac", {"tasks.0.env": ENV, "tasks.0.env_steps": 16, "agent.warmup_steps": 4}),
    ],
    ids=["offline", "offline-to-online", "online"],
)
def test_evaluation_never_disturbs_training(
    kind: tuple[str, dict[str, Any]], pendulum_sets: list[str]
) -> None:
    name, task = kind
    if "tasks.0.updates" in task:
        task = {"tasks.0.dataset": pendulum_sets[0], **task}
    never = trained(name, **task)
    often = trained(name, **task, eval_every=3, eval_episodes=3, eval_lanes=1)
    assert len(often.evaluations) > len(never.evaluations)
    for part in ("agent", "generators", "buffer", "ring"):
        assert equal(never.state()[part], often.state()[part]), part
    if never.collector is not None and often.collector is not None:
        assert equal(never.collector.state()["obs"], often.collector.state()["obs"])


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_speed_counts_training_time_only(log_every: int, pendulum_sets: list[str]) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 6, "log_every": log_every}
    run = config.make("bc", overrides=SMALL | FEW | task | {"save_every": 2, "eval_every": 2})
    tasks = runs.resolve(run)
    ticks = iter(range(10_000))
    values: list[float] = []
    trainer = Trainer(
        runs.make_agent(run, tasks),
        tasks,
        run,
        log=lambda clock, logged: values.extend(
            v for k, v in logged.items() if k == "time/updates_per_s"
        ),
        save=lambda clock, state: [next(ticks) for _ in range(500)],  # a slow disk
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rl_shift.trainer.time.perf_counter", lambda: float(next(ticks)))
        trainer.run()
    assert 0 < trainer.seconds < 100
    assert all(0.05 < value < 10 for value in values)
    assert len(values) == 6 // log_every


# ---- divergence --------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [False, True])
def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(
    poison: bool, pendulum_sets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    argv = ["train", PREPARED, "--dataset", pendulum_sets[0], "--updates", "30"]
    argv += ["--run-dir", str(folder), "--agent.poison", str(poison)]
    argv += ["--agent.explode_after", "25" if poison else "19"]
    few = ["--eval-episodes", "1", "--eval-every", "20", "--log-every", "100", "--save-every", "10"]
    assert cli.main([*argv, *few]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rl-shift: error: actor")
    assert ("actor/loss is" if not poison else "actor.layers.0.weight is") in captured.err
    assert "not finite after 26 updates" in captured.err  # found where the checkpoint was due
    assert captured.err.count("\n") == 1
    state, _ = checkpoint.load(checkpoint.latest(folder))
    assert state["clock"]["counted_updates"] == 10
    assert all(tensor.isfinite().all() for tensor in state["agent"]["module"].values())
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "failed"
    assert results["evaluations"] == []  # a policy of NaNs is not played


def test_a_run_that_diverges_before_its_first_checkpoint_keeps_its_logs(
    pendulum_sets: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 20, "run_dir": str(folder)}
    run = config.make(PREPARED, overrides=FEW | task | {"agent.explode_after": 11, "log_every": 2})
    with pytest.raises(TrainingDiverged):
        runs.train(run, progress=False)
    assert (folder / "metrics.jsonl").read_text()
    assert json.loads((folder / "results.json").read_text())["status"] == "failed"


def test_a_logged_value_that_is_not_finite_is_named(pendulum_sets: list[str]) -> None:
    task = {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 20}
    with pytest.raises(TrainingDiverged, match="actor/loss is not finite after 12 updates"):
        trained(PREPARED, **task, **{"agent.explode_after": 11, "log_every": 1})


# ---- interruption ------------------------------------------------------------------------------


def signals_at(monkeypatch: pytest.MonkeyPatch, update: int, *numbers: int) -> None:
    """The process receives signals right before that update of the run."""
    once = [*numbers]
    original = Trainer._update

    def interrupted(trainer: Trainer, source: Any, stage: Stage) -> None:
        if trainer.clock.total_updates == update:
            while once:
                os.kill(os.getpid(), once.pop())
        original(trainer, source, stage)

    monkeypatch.setattr(Trainer, "_update", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("at", [3, 11], ids=["preparing", "training"])
def test_a_stopped_run_saves_and_goes_on_bitwise(
    number: int,
    at: int,
    pendulum_sets: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(number)
    argv = ["train", PREPARED, "--dataset", pendulum_sets[0], "--updates", "10"]
    argv += ["--eval-episodes", "1", "--eval-every", "5"]
    assert cli.main([*argv, "--run-dir", str(tmp_path / "whole")]) == 0
    folder = tmp_path / "stopped"
    signals_at(monkeypatch, at, number)
    assert cli.main([*argv, "--run-dir", str(folder)]) == 130
    assert signal.getsignal(number) is before
    assert f"rl-shift train --resume {folder}" in capsys.readouterr().err
    assert checkpoint.latest(folder).name == f"step_{at + 1:09d}"  # the update was finished
    assert json.loads((folder / "results.json").read_text())["status"] == "stopped"
    assert cli.main(["train", "--resume", str(folder)]) == 0
    states = [checkpoint.load(checkpoint.latest(tmp_path / k))[0] for k in ("whole", "stopped")]
    for state in states:
        del state["seconds"], state["wall_s"]
    assert equal(*states)


def test_a_second_signal_stops_at_once(
    pendulum_sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {
        "tasks.0.dataset": pendulum_sets[0],
        "tasks.0.updates": 10,
        "run_dir": str(tmp_path / "run"),
    }
    signals_at(monkeypatch, 4, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        runs.train(config.make("bc", overrides=SMALL | FEW | task), progress=False)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_env_steps_without_an_environment_are_refused(pendulum_sets: list[str]) -> None:
    run = config.make(
        "sac", overrides=SMALL | FEW | {"tasks.0.dataset": pendulum_sets[0], "tasks.0.updates": 1}
    )
    [task] = runs.resolve(run)
    agent = agents.get("sac")(task.observation_space, task.action_space, run.agent)
    agent.stages = lambda task: [Stage("online", env_steps=5)]  # type: ignore[method-assign]
    with pytest.raises(UserError, match="give --env ID"):
        Trainer(agent, [task], run).run()
