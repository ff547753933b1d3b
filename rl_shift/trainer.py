"""The one loop: tasks, their stages, updates, interaction, and what falls due in between.

Offline, online, offline-to-online and continual runs are lists of tasks; the trainer walks their
stages and calls the same hooks for every agent, knowing none by name. Our design.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rl_shift import data_mapping, datasets, envs, seeding
from rl_shift.buffer import Buffer, Mixture, transition_spec
from rl_shift.collector import Collector
from rl_shift.compile import Updater
from rl_shift.errors import TrainingDiverged, UserError
from rl_shift.evaluation import Evaluator
from rl_shift.life import Life
from rl_shift.value_check import ValueCheck

if TYPE_CHECKING:
    from rl_shift.agent import Agent, Metrics, Stage
    from rl_shift.config import RunConfig, Task

Scalars = dict[str, float]


@dataclass
class Clock:
    """Where a run stands; the first four count within the whole run, the rest within the stage."""

    task: int = 0
    stage: int = 0
    total_updates: int = 0  # preparatory stages included: the axis of the logs
    counted_updates: int = 0  # those of the user's budget
    total_env_steps: int = 0
    updates: int = 0
    env_steps: int = 0


class Trainer:
    """Trains one agent (S stacked seeds of it) on a list of resolved tasks.

    Args:
        agent: on its device, stacked if several seeds share this process.
        tasks: with spaces and dataset information filled in.
        config: intervals, seeds, compile mode.
        log: called with (clock, values) whenever values are due.
        save: called with (clock, state) whenever a checkpoint is due.
        tick: called after every update or collection with (clock, stage, last score).
        evaluated: called with the list of evaluations whenever it grew.
    """

    def __init__(
        self,
        agent: Agent,
        tasks: Sequence[Task],
        config: RunConfig,
        log: Callable[[Clock, Scalars], None] = lambda clock, values: None,
        save: Callable[[Clock, dict[str, Any]], None] = lambda clock, state: None,
        tick: Callable[[Clock, Stage, float | None], None] = lambda clock, stage, score: None,
        evaluated: Callable[[list[dict[str, Any]]], None] = lambda evaluations: None,
    ) -> None:
        """Nothing is opened before `run`."""
        self.agent, self.tasks, self.config = agent, list(tasks), config
        self.log, self.save, self.tick, self.evaluated = log, save, tick, evaluated
        self.clock = Clock()
        self.evaluations: list[dict[str, Any]] = []
        self._lives: list[dict[str, Any]] = []  # of the tasks that ended
        self.score: float | None = None  # mean over seeds of the last evaluation that has one
        self.seconds = 0.0  # spent in updates and interaction, evaluation excluded
        self.buffer: Buffer  # the task's data, or its ring where it has none
        self.ring: Buffer | None = None
        self.collector: Collector | None = None
        self.warnings: list[str] = []
        self._updater = Updater(agent, config.compile)
        self._evaluators: dict[int, Evaluator] = {}
        self._rollouts: deque[tuple[float, float]] = deque(maxlen=100)
        self._metrics: Metrics = {}
        self._value_check: ValueCheck | None = None  # of the task's data
        self._resumed: Mapping[str, Any] | None = None
        self._saved = False  # whether there is a checkpoint to go on from
        self._stop = False
        self._since = time.perf_counter()  # the stopwatch behind `seconds` runs from here
        self._marks = (0.0, 0)  # seconds and updates at the last log
        self._passed = 0  # updates of earlier stages that this one, by its name, goes on with

    # ---- walking -----------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, or to Ctrl-C (which saves first).

        Raises:
            KeyboardInterrupt: after a checkpoint was saved on SIGINT or SIGTERM.
            TrainingDiverged: a logged value is not finite.
        """
        for _ in self.steps():
            pass

    def steps(self) -> Generator[Clock]:
        """`run` as an iterator: the clock after every update or round of interaction.

        Leaving the loop, or closing the iterator, saves a checkpoint. Between two steps the agent,
        the buffer and the metrics may be looked at; whoever changes the agent or draws from torch's
        default generator changes the run.
        """
        with _Interrupts(self):
            if self._resumed is None:
                seeding.seed_default(seeding.child(self.config.seed, "learner"))
            try:
                for k in range(self.clock.task, len(self.tasks)):
                    self.clock.task = k
                    yield from self._run_task(self.tasks[k])
            except GeneratorExit:
                self._save()
                raise
            finally:
                for evaluator in self._evaluators.values():
                    evaluator.close()

    def _run_task(self, task: Task) -> Iterator[Clock]:
        clock, last = self.clock, self.clock.task == len(self.tasks) - 1
        self._open(task)
        if self._resumed is None:
            self.agent.begin_task(task, self.buffer)
        else:
            self._restore(self._resumed)
            self._resumed = None
        stages = self.agent.stages(task)
        for k in range(clock.stage, len(stages)):
            clock.stage, stage = k, stages[k]
            self.agent.enter(stage.name)
            self._passed = sum(s.updates for s in stages[:k] if s.name == stage.name)
            yield from self._run_stage(task, stage)
            goes_on = any(s.name == stage.name for s in stages[k + 1 :])
            if stage.counted and not goes_on and not self._is_evaluated():
                self._evaluate(stage)
            final = clock.stage == len(stages) - 1
            if final and last:
                self._save()
            if not final:
                clock.updates = clock.env_steps = 0
        self.agent.end_task(task, self.buffer)
        if len(self.tasks) > 1 and not self._is_evaluated():
            self._evaluate(stages[-1])  # a row of the task matrix
        if not last:
            clock.stage = clock.updates = clock.env_steps = 0

    def _run_stage(self, task: Task, stage: Stage) -> Iterator[Clock]:
        self._since = time.perf_counter()
        self._marks = (self.seconds, self.clock.total_updates)
        if stage.env_steps:
            yield from self._interact(task, stage)
        else:
            while self.clock.updates < stage.updates:
                self._update(self.buffer, stage)
                self.clock.updates += 1
                if self._converged(stage):
                    self.clock.updates = stage.updates
                if self.clock.updates == stage.updates:
                    self._metrics = {**self._metrics, **self.agent.outcome(stage)}
                self._after(stage, self._passed + self.clock.updates, 1)
                yield self.clock
            if not stage.counted and self._marks[1] != self.clock.total_updates:
                self._log(stage)  # what a preparation ended with
        self._stop_watch()

    def _converged(self, stage: Stage) -> bool:
        """What the agent says, where the stage asks for a check here."""
        done, every = self.clock.updates, stage.check_every
        if not every or (done % every and done < stage.updates):
            return False
        return self.agent.check(stage, done, self.buffer)

    def _interact(self, task: Task, stage: Stage) -> Iterator[Clock]:
        agent, clock, collector = self.agent, self.clock, self.collector
        if collector is None or self.ring is None:
            raise UserError(f"task {task.name}: env_steps need an environment; give --env ID")
        source: Buffer | Mixture = self.ring
        if task.dataset is not None:
            f = task.offline_fraction
            source = Mixture([(self.buffer, f), (self.ring, 1 - f)])
        warmup = agent.warmup_steps if task.dataset is None else 0
        step = agent.collect_every * collector.env.num_envs
        while clock.env_steps < stage.env_steps:
            random = clock.env_steps < warmup
            finished = collector.collect(agent, agent.collect_every, True, random)
            self._rollouts.extend(zip(finished["returns"], finished["lengths"], strict=True))
            clock.env_steps += step
            clock.total_env_steps += step
            if clock.env_steps >= warmup:
                for _ in range(agent.updates_per_collect):
                    self._update(source, stage)
            self._after(stage, clock.env_steps, step)
            yield clock

    @property
    def metrics(self) -> Metrics:
        """Of the last update, on the device."""
        return self._metrics

    def _update(self, source: Buffer | Mixture, stage: Stage) -> None:
        self._metrics = self._updater(self.agent.sample(source))
        self.clock.total_updates += 1
        self.clock.counted_updates += stage.counted

    # ---- what falls due ----------------------------------------------------------------------

    def _after(self, stage: Stage, position: int, step: int) -> None:
        config = self.config

        def due(every: int) -> bool:
            return every > 0 and position // every > (position - step) // every

        if due(config.log_every):
            self._log(stage)
        if stage.counted and due(config.eval_every):
            self._evaluate(stage)
        if self._stop:
            self._save()
            raise KeyboardInterrupt
        if due(config.save_every):
            self._save()
        self.tick(self.clock, stage, self.score)

    def _stop_watch(self) -> None:
        """Add the time since the stopwatch was last read to `seconds`."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def _check_finite(self) -> None:
        """Stop before a NaN or an infinity is logged, evaluated or saved.

        A gradient can turn parameters into NaN in an update whose metrics are still finite.
        """
        found = [*self._metrics.items(), *self.agent.named_parameters()]
        bad = next((k for k, v in found if not bool(torch.isfinite(v).all())), None)
        if bad is not None:
            kept = "earlier checkpoints are kept" if self._saved else "no checkpoint was saved yet"
            raise TrainingDiverged(
                f"{bad} is not finite after {self.clock.total_updates} updates; training stopped, "
                f"{kept}: lower the learning rate or check the data"
            )

    def _log(self, stage: Stage) -> None:
        self._check_finite()
        if self._value_check is not None and not stage.env_steps:
            self._value_check(self._metrics, self.clock.total_updates)
        prefix = "train" if stage.counted else stage.name
        values = {f"{prefix}/{k}": float(v.float().mean()) for k, v in self._metrics.items()}
        self._stop_watch()
        then, updates = self._marks
        values["time/updates_per_s"] = (self.clock.total_updates - updates) / max(
            self.seconds - then, 1e-9
        )
        if self._rollouts:
            returns, lengths = zip(*self._rollouts, strict=True)
            values["rollout/ep_rew_mean"] = float(np.mean(returns))
            values["rollout/ep_len_mean"] = float(np.mean(lengths))
        self.log(self.clock, values)
        self._marks = (self.seconds, self.clock.total_updates)

    def _is_evaluated(self) -> bool:
        """Whether the last evaluation happened exactly here."""
        here = (self.clock.task, self.clock.counted_updates, self.clock.total_env_steps)
        return bool(self.evaluations) and here == tuple(
            self.evaluations[-1][k] for k in ("during", "updates", "env_steps")
        )

    def _evaluate(self, stage: Stage) -> None:
        """Evaluate every task begun so far, each in its own focus; training is not disturbed."""
        self._check_finite()
        self._stop_watch()
        clock, current = self.clock, self.tasks[self.clock.task]
        index = sum(e["task"] == e["during"] for e in self.evaluations)
        for k, task in enumerate(self.tasks[: clock.task + 1]):
            if task.env is None:
                continue
            if k not in self._evaluators:
                self._evaluators[k] = Evaluator(
                    task.env,
                    self.config.eval_lanes,
                    task.reference_scores,
                    task.obs_pad,
                    task.shift,
                )
            seed = seeding.child(self.config.seed, "evaluation", index)
            self.agent.focus(task)
            result = self._evaluators[k].evaluate(self.agent, self.config.eval_episodes, seed)
            self.agent.focus(current)
            score = None if result.score is None else [float(x) for x in result.score]
            self.evaluations.append(
                {
                    "task": k,
                    "during": clock.task,
                    "updates": clock.counted_updates,
                    "env_steps": clock.total_env_steps,
                    "returns": result.returns.tolist(),
                    "lengths": result.lengths.tolist(),
                    "score": score,
                }
            )
            tag = "eval" if len(self.tasks) == 1 else f"eval/{task.name}"
            values = {f"{tag}/mean_reward": float(result.returns.mean())}
            values[f"{tag}/mean_ep_length"] = float(result.lengths.mean())
            if score is not None:
                self.score = values[f"{tag}/normalized_score"] = float(np.mean(score))
            self.log(clock, values)
        self.evaluated(self.evaluations)
        self._since = time.perf_counter()

    # ---- buffers -----------------------------------------------------------------------------

    def _open(self, task: Task) -> None:
        """Fresh buffers and collector for a task."""
        config, k = self.config, self.clock.task
        device = next((p.device for p in self.agent.parameters()), torch.device("cpu"))
        seeds = tuple(seeding.child(config.seed + s, "sampler", k) for s in range(config.seeds))
        observation_space, action_space = task.observation_space, task.action_space
        assert observation_space is not None and action_space is not None
        spec = transition_spec(observation_space, action_space)
        self._lives, self.ring, self.collector = self.lives(), None, None
        if task.data is None and not task.env_steps:
            raise UserError(f"task {task.name!r} has nothing to learn from: give --dataset ID|PATH")
        if task.data is not None:
            columns = self.agent.columns
            mapped = data_mapping.mapped_where_needed(
                task.data,
                k,
                columns,
                config.data_mode,
                task.reward,
                config.data_memory,
                device,
                seeds,
            )
            if mapped is not None:
                self.buffer = mapped
            else:
                arrays = datasets.load(
                    task.data,
                    columns,
                    config.data_mode,
                    task.reward,
                    action_space,
                    observation_space=observation_space,
                )
                arrays["task"] = np.full(len(arrays["reward"]), k, dtype=np.int64)
                self.buffer = Buffer.from_arrays(arrays, device, seeds)
        self._value_check = None if task.data is None else ValueCheck(self.agent, self.buffer)
        if task.env_steps:
            if task.env is None:
                raise UserError(
                    f"task {task.name!r} has env_steps, and its dataset names no environment: give "
                    "--env ID"
                )
            env = envs.make(task.env, config.lanes, shift=task.shift, obs_pad=task.obs_pad)
            capacity = self.agent.buffer_capacity
            if capacity < config.lanes:
                raise UserError(
                    f"{config.lanes} lanes need a row each, but this agent's buffer has "
                    f"{capacity}: give fewer lanes, or a larger buffer (or rollout)"
                )
            raw = {} if task.data is None else datasets.load(task.data, mode=config.data_mode)
            scale = datasets.reward_transform(task.reward, raw)  # the same as the data's
            self.ring = Buffer(spec, capacity, config.lanes, device, seeds, stream="ring")
            every = config.life_every or (100 if task.shift is not None else 0)
            life = Life(every) if every else None
            seed = seeding.child(config.seed, "collector", k)
            self.collector = Collector(env, self.ring, seed, k, scale, life)
            if task.data is None:
                self.buffer = self.ring

    def lives(self) -> list[dict[str, Any]]:
        """What each online task with a life earned so far, see `Life.rows`."""
        current = self.collector
        if current is None or current.life is None:
            return list(self._lives)
        rows = current.life.rows(current.env.num_envs)
        return [*self._lives, {"task": current.task, "seed": self.config.seed, **rows}]

    # ---- state -------------------------------------------------------------------------------

    def _save(self) -> None:
        self._check_finite()
        self._stop_watch()
        self.save(self.clock, self.state())
        self._saved = True
        self._since = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """Everything a bitwise continuation needs."""
        offline = self.buffer is not self.ring
        return {
            "agent": self.agent.state(),
            "clock": asdict(self.clock),
            "stage": self.agent.stage,
            "evaluations": self.evaluations,
            "lives": self._lives,
            "rollouts": [list(r) for r in self._rollouts],
            "seconds": self.seconds,
            "generators": seeding.capture(),
            "buffer": self.buffer.state(copy=False) if offline and len(self.buffer) else None,
            "ring": self.ring.state(copy=False) if self.ring is not None else None,
            "collector": self.collector.state() if self.collector is not None else None,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, once `run` is called."""
        self.clock = Clock(**state["clock"])
        self.evaluations = list(state["evaluations"])
        self._lives = list(state.get("lives", ()))
        scores = [e["score"] for e in self.evaluations if e["score"] is not None]
        self.score = float(np.mean(scores[-1])) if scores else None
        self.seconds = state["seconds"]
        self._rollouts.extend((r[0], r[1]) for r in state["rollouts"])
        self.agent.load_state(state["agent"])
        self._resumed = state

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Put back what exists only once the task's buffers are open."""
        self.agent.enter(state["stage"])
        self.agent.focus(self.tasks[self.clock.task])
        if state["buffer"] is not None:
            self.buffer.load_state(state["buffer"])
        if self.ring is not None and state["ring"] is not None:
            self.ring.load_state(state["ring"])
        if self.collector is not None and state["collector"] is not None:
            if not self.collector.load_state(state["collector"]):
                self.warnings.append(
                    f"{self.tasks[self.clock.task].env} cannot export its state: new episodes were "
                    "begun, so this continuation is not exact"
                )
        seeding.restore(state["generators"])


class _Interrupts:
    """While training, SIGINT and SIGTERM ask for a checkpoint; a second one stops at once."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.trainer._stop:
            raise KeyboardInterrupt
        self.trainer._stop = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
