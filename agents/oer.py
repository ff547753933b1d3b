"""OER: offline experience replay for continual offline RL (arXiv 2305.13804).

Known to us by its abstract; the rest is our design. Faithful: a sequence of datasets, a small
memory, no interaction; dual behaviour cloning (one policy climbs Q on the current task, another
clones it and replays the memory, so that replay never disturbs Q-learning); model-based experience
selection. Differs: input layers and heads per task, the task is known; replay targets are by
default the finished policy's own actions (`target: dataset_action` is what the abstract implies).
Baselines are settings: `coefficient: 0` fine-tunes, `retention` replaces replay, `selector`
replaces MBES; agent `er` has one network. Known gaps: offline tasks only; a memory larger than a
dataset keeps all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift import agents, seeding, selectors
from rl_shift.agent import Agent, Batch, Metrics, Stage, Wrapper
from rl_shift.buffer import Buffer, Mixture
from rl_shift.continual import Memory, MultiHead, has_td_error, some_rows, td_error
from rl_shift.dynamics import GaussianEnsemble, split_rows
from rl_shift.errors import UserError
from rl_shift.networks import Normalizer
from rl_shift.retention import KINDS

if TYPE_CHECKING:
    from rl_shift.config import Task


class OER(Agent):
    """A learner climbs Q on the current task n; a clone with a head per task is all that stays.

    L(learner) = that of TD3+BC on D_n, networks and optimisers new for every task
    L(clone)   = E_{s ~ D_n} |pi_n(s) - mu(s)|^2
                 + c / (n - 1) sum_{j < n} E_{(s, y) ~ B_j} |pi_j(s) - y|^2
    B_n        = rows of D_n nearest to roll-outs of pi_n in a learnt model, y = pi_n(s)

    |.|^2 is a mean over the action's dimensions.

    Attributes:
        known: the distinct tasks begun, in the order of their heads.
        head: the one that `act` uses, see `focus`.
        shifts: per finished task, how far old heads moved on its states (RL's Razor).
    """

    stackable = False
    reusable: ClassVar[Mapping[str, tuple[str, ...]]] = {"learners": ()}

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters; the paper's are unknown to us, these are ours and TD3+BC's."""

        batch_size: int = 256  # rows of the current task
        memory_batch: int = 256  # rows of the old tasks together, the same number of each
        hidden: tuple[int, ...] = (256, 256)  # first: a task's own layer; the rest is shared
        shared_inputs: bool = False  # one first layer for all tasks whose observations fit it
        learning_rate: float = 3e-4  # Adam, of the clone
        normalize: bool = True  # observations, by the statistics of their own task
        learner: str = "td3_bc"  # any agent that acts
        learner_config: dict[str, Any] = field(default_factory=dict)  # its fields
        learners: tuple[str, ...] = ()  # finished runs RUN_DIR[#k], one per task, to clone from
        clone_updates: int = 0  # cloning after the learner is done; 0: along with its actor's steps
        retention: Literal["replay", "none", "agem", "l2", "ewc", "si", "frozen"] = "replay"
        coefficient: float = 1.0  # c of replay, or weight of l2 (5000), ewc (5000), si; 0: none
        anchor: float = 0.0  # weight of old heads' actions on the new data; 1 without replay: LwF
        target: Literal["policy_action", "dataset_action"] = "policy_action"  # y
        selector: str = "mbes"  # which rows to keep: see rl_shift.selectors
        memory: int = 1000  # rows kept per task
        memory_total: int = 0  # rows kept of all tasks together; 0: no limit
        select_updates: int = 100  # steps into which the selection is divided
        roll_outs: int = 50  # MBES: side by side
        horizon: int = 1000  # MBES: steps of a roll-out
        reach: float = 4.0  # MBES: see rl_shift.selectors.RollOutSettings
        action_weight: float = 0.0  # MBES: prefers rows whose action the policy would take
        dynamics_updates: int = 5000  # MBES: at most, of the model ensemble
        dynamics_hidden: tuple[int, ...] = (200, 200, 200, 200)  # MOPO's
        dynamics_members: int = 5  # networks of the ensemble
        dynamics_rate: float = 1e-3  # Adam; MOPO's
        warm_start: bool = False  # a new head begins as the old one that fits the data best
        lr_warmup: int = 0  # updates until the clone's learning rate is reached, in every task

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        super().__init__(observation_space, action_space, config)
        _check(config)
        self.columns = agents.get(config.learner).columns
        self.retention = KINDS[config.retention](config.coefficient, config.anchor)
        self.remembers = self.retention.remembers and config.coefficient > 0
        self.modelled = self.remembers and config.selector in selectors.MODEL_BASED
        self.hold(MultiHead(config.hidden, config.shared_inputs))
        self.known: list[Task] = []
        self.head, self.started = -1, 0
        self.seed = int(torch.randint(2**62, ()))  # of the memory's and the selection's streams
        self.memory, self.selecting = Memory(self.seed), selectors.InSteps()
        self.finished: list[dict[str, Tensor]] = []  # the learners of `config.learners`
        self.shifts: list[float] = []
        self.divided: tuple[Buffer, tuple[Tensor, Tensor]] | None = None

    def hold(self, policy: MultiHead) -> None:
        """Where the policy lives that is kept, deployed and evaluated."""
        self.clone = policy

    @property
    def kept(self) -> MultiHead:
        """The policy that is kept, deployed and evaluated."""
        return self.clone

    # ---- losses ------------------------------------------------------------------------------

    def cloning_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Imitate the learner on the current task, and keep the old tasks."""
        mu = self.learner.act(batch["obs"], False)
        current = (self.clone(batch["state"]) - mu).square().mean()
        kept = self.retention.loss(self.clone, batch)
        return current + kept, {"clone/current": current, "clone/retention": kept}

    # ---- acting ------------------------------------------------------------------------------

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, obs) -> (N, action) by the head in focus; zeros before the first task."""
        if self.head < 0:
            return obs.new_zeros((*obs.shape[:-1], *(self.action_space.shape or ())))
        return self.kept(self.normalized(obs, self.head), self.head)

    def normalized(self, obs: Tensor, task: int) -> Tensor:
        """Raw observations by the statistics of their own task, (B, obs)."""
        found: Tensor = (self.normalizer if task == 0 else getattr(self, f"normalizer_{task}"))(obs)
        return found

    def focus(self, task: Task) -> None:
        """The task's head; for an unknown task the newest one that fits its spaces."""
        place = self.place_of(task)
        if place is not None:
            self.head = place
        elif self.known:
            shapes = [_shapes(one) for one in self.known]
            if _shapes(task) not in shapes:
                raise UserError(
                    f"no head fits task {task.name!r}: it was not trained, and no task was that "
                    f"has its observations {task.observation_space} and actions {task.action_space}"
                )
            self.head = len(shapes) - 1 - shapes[::-1].index(_shapes(task))
        else:
            return
        known = self.known[self.head]
        assert known.observation_space is not None and known.action_space is not None
        self.observation_space, self.action_space = known.observation_space, known.action_space

    def place_of(self, task: Task) -> int | None:
        """Which of the known tasks this is: the same name and data, whatever is shifted in it."""
        names = [(one.name, one.dataset) for one in self.known]
        mine = (task.name, task.dataset)
        return names.index(mine) if mine in names else None

    # ---- a task ------------------------------------------------------------------------------

    def build(self, task: Task) -> None:
        """A head; and learner, model and optimisers anew, which drops those of the last task."""
        observation_space, action_space = task.observation_space, task.action_space
        assert observation_space is not None and action_space is not None
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        c, old = self.config, len(self.known)
        place = self.place_of(task)
        if place is None:
            place = old
            self.known.append(task)
            self.kept.add(obs, action)
            if old:
                self.add_module(f"normalizer_{old}", Normalizer(observation_space))
        self.kept.current = place
        self.retention.extend(self.kept, old)
        self.build_learner(observation_space, action_space)
        if self.modelled:
            hidden, members = c.dynamics_hidden, c.dynamics_members
            self.dynamics = GaussianEnsemble(obs, action, hidden, members, members, reward=False)
            self.optimizer("dynamics", lr=c.dynamics_rate)
        self.focus(task)

    def build_learner(self, observation_space: Space[Any], action_space: Space[Any]) -> None:
        """The learner, or the finished one that takes its place, and the clone's optimiser."""
        c = self.config
        kind = agents.get(c.learner)
        self.learner = kind(observation_space, action_space, self.learner_settings(kind))
        if self.remembers and c.selector == "surprise" and not has_td_error(self.learner):
            raise UserError(
                f"agent.selector surprise needs a learner with a critic and a target critic, and "
                f"{c.learner} has none: choose td3_bc, or another selector"
            )
        if c.learners:
            self.learner.frozen = True
            if self.finished:  # else a checkpoint brings it
                self.learner.load_state_dict(self.finished[self.kept.current])
        self.optimizer("clone", lr=self.config.learning_rate)

    def learner_settings(self, kind: type[Agent]) -> Any:
        """The learner's Config: what it shares with ours, and `learner_config`."""
        names = {f.name for f in dataclasses.fields(kind.Config)}
        shared = {"batch_size", "hidden", "normalize"} & names
        values = {name: getattr(self.config, name) for name in sorted(shared)}
        return kind.Config(**{**values, **self.config.learner_config})

    def reuse(self, field: str, source: Agent) -> None:
        """Keep a finished learner until its task's turn; they come in the order of the tasks."""
        kind = agents.get(self.config.learner)
        if type(source) is not kind:
            raise LookupError(
                f"it is a run of {type(source).__name__}, agent.learner is {self.config.learner}"
            )
        settings = self.learner_settings(kind)
        fitting = kind(source.observation_space, source.action_space, settings)
        fitting.load_state_dict(source.state_dict())  # shapes that differ are an error now
        self.finished.append({k: v.detach().clone() for k, v in source.state_dict().items()})

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Fit the task's normaliser and the model's scales; begin with the learner."""
        new = self.place_of(task) is None
        tasks = len(self.known) + new
        if self.config.memory_total and self.remembers and self.config.memory_total < tasks:
            raise UserError(
                f"agent.memory_total {self.config.memory_total} has no row for each of {tasks} "
                "tasks: give more"
            )
        super().begin_task(task, buffer)
        current = self.kept.current
        if new and current and self.config.normalize:
            getattr(self, f"normalizer_{current}").fit(*buffer.statistics("obs"))
        if not self.learner.frozen:
            self.learner.begin_task(task, buffer)
        if self.modelled:
            self.dynamics.fit(buffer.take(self.split(buffer)[0]))
        if new and current and self.config.warm_start:
            rows = buffer.take(some_rows(buffer))
            self.kept.start_from_best(self.normalized(rows["obs"], current), rows["action"])
        self.started = self.updates + (task.updates if self.clones_after else 0)

    @property
    def clones_after(self) -> bool:
        """Whether cloning waits until the learner is done."""
        return self.config.clone_updates > 0 and not self.config.learners

    def stages(self, task: Task) -> list[Stage]:
        """The learner with its clone, then the model, then the choice of what is kept."""
        if task.env_steps:
            raise UserError(f"task {task.name!r}: OER learns from datasets, leave env_steps out")
        c = self.config
        legs = [Stage("learner", task.updates)]
        if self.clones_after:
            legs.append(Stage("clone", c.clone_updates))
        if self.modelled:
            legs.append(Stage("dynamics", c.dynamics_updates, counted=False, check_every=500))
        steps = c.select_updates if self.remembers else 1
        return [*legs, Stage("select", steps, counted=False)]

    def check(self, stage: Stage, updates: int, buffer: Buffer) -> bool:
        """The model stops learning once its error on rows held out does."""
        held = buffer.take(self.split(buffer)[1])
        return self.dynamics.converged(self.run(self.dynamics.error, held))

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """Rows of the current task, and of every old one; in the last stage, what was selected."""
        c = self.config
        assert isinstance(buffer, Buffer)
        if self.stage == "select":
            return self.choose(buffer)
        if self.stage == "dynamics":
            return buffer.sample(c.batch_size, where=self.split(buffer)[0])
        batch = buffer.sample(c.batch_size)
        if self.stage == "learner" and self.clones_after:
            return batch
        if self.remembers:
            batch |= self.memory.sample(c.memory_batch, without=self.kept.current)
        self.observe()
        return batch

    def split(self, buffer: Buffer) -> tuple[Tensor, Tensor]:
        """Rows that the model learns from and rows held out; found once per task."""
        if self.divided is None or self.divided[0] is not buffer:
            self.divided = (buffer, split_rows(buffer))
        return self.divided[1]

    def observe(self) -> None:
        """Let the retention see the clone's last step."""
        self.retention.observe(self.clone, self.optimizers["clone"])

    def choose(self, buffer: Buffer) -> Batch:
        """A step of the selection, on the host; numbers about it as tensors."""
        shift = self.shift(buffer)
        self.selecting.steps += 1
        if self.remembers:
            self.selection(buffer).advance(self.selecting.steps / self.config.select_updates)
        chosen = self.selecting.selection
        return {
            "policy_shift": shift,
            "roll_outs": shift.new_tensor(chosen.begun if chosen else 0),
            "filled": shift.new_tensor(chosen.filled if chosen else 0),
            "memory_bytes": shift.new_tensor(self.memory.nbytes),
        }

    def shift(self, buffer: Buffer) -> Tensor:
        """RL's Razor: mean squared action change of the old heads on this task's states."""
        obs = buffer.take(some_rows(buffer))["obs"]
        state = self.normalized(obs, self.kept.current)
        found: Tensor = self.run(self.retention.shift, self.kept, state)
        return found

    def selection(self, buffer: Buffer) -> selectors.Selection:
        """The selection of this task."""
        c = self.config
        return self.selecting.open(
            lambda: selectors.make(
                c.selector,
                selectors.Sources(
                    buffer,
                    lambda obs: self.run(self.act, obs, False),
                    self.predict if self.modelled else None,
                    c.dynamics_members,
                    lambda rows: self.run(td_error, self.learner, rows),
                ),
                c.memory,
                seeding.numpy_generator(self.seed, "select", self.kept.current),
                selectors.RollOutSettings(
                    lanes=c.roll_outs,
                    horizon=c.horizon,
                    reach=c.reach,
                    action_weight=c.action_weight,
                ),
            )
        )

    def predict(self, obs: Tensor, action: Tensor, members: Tensor) -> Tensor:
        """Mean next observation by one member of the model per row, (B, obs)."""
        predicted = self.run(self.dynamics.predict, obs, action).next_obs
        rows = torch.arange(len(obs), device=obs.device)
        found: Tensor = predicted[self.dynamics.elites[members.to(obs.device)], rows]
        return found

    def end_task(self, task: Task, buffer: Buffer) -> None:
        """Keep the selected rows and what the policy does there; shrink to the total."""
        current, c = self.kept.current, self.config
        self.shifts.append(float(self.shift(buffer)))
        obs = buffer.take(some_rows(buffer))["obs"]
        self.retention.finish(self.kept, self.normalized(obs, current))
        if self.remembers:
            order = torch.from_numpy(self.selection(buffer).order()).to(buffer.device)
            rows = buffer.take(order)
            action = rows["action"]
            if c.target == "policy_action":
                action = self.run(self.act, rows["obs"], False)
            self.memory.store(current, {"obs": rows["obs"], "target": action})
            if c.memory_total:
                self.memory.shrink(c.memory_total // len(self.memory.parts))
        self.selecting, self.divided = selectors.InSteps(), None

    def resources(self) -> dict[str, float]:
        """What stays between tasks: the policy, the memory, and whatever else keeps old tasks.

        `memory_bytes` holds kept rows, weights per parameter, copies of the policy and statistics
        of the tasks' observations; `policy_shift_K` is RL's Razor after task K.
        """
        parts = self.memory.parts.values()
        tasks = [self.normalizer, *(m for n, m in self.named_children() if "normalizer_" in n)]
        besides = [t for m in (self.retention, *tasks) for t in m.state_dict().values()]
        shifts = {f"policy_shift_{k}": shift for k, shift in enumerate(self.shifts)}
        return {
            "parameters": float(sum(p.numel() for p in self.kept.parameters())),
            "memory_rows": float(sum(len(part) for part in parts)),
            "memory_bytes": float(self.memory.nbytes + sum(t.nbytes for t in besides)),
            **shifts,
        }

    # ---- state -------------------------------------------------------------------------------

    def variant(self) -> tuple[Any, ...]:
        """The stage and the head that is trained."""
        return (self.stage, self.kept.current)

    def extra_state(self) -> dict[str, Any]:
        """The memory with its streams, and a selection that is not finished."""
        return {
            "head": self.head,
            "started": self.started,
            "seed": self.seed,
            "memory": self.memory.save(),
            "selecting": self.selecting.save(),
            "finished": self.finished,
            "shifts": self.shifts,
        }

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take back what `extra_state` gave."""
        self.head, self.started, self.seed = extra["head"], extra["started"], extra["seed"]
        self.memory = Memory(self.seed)
        self.memory.load(extra["memory"], self.normalizer.mean.device)
        self.selecting.load(extra["selecting"])
        self.finished, self.shifts = extra["finished"], list(extra["shifts"])

    # ---- the recipe --------------------------------------------------------------------------

    def schedule(self) -> None:
        """The clone's learning rate rises from 0 at the start of every task."""
        super().schedule()
        if self.config.lr_warmup and "clone" in self.optimizers:
            group = self.optimizers["clone"].param_groups[0]
            share = max(self.updates - self.started + 1, 0) / self.config.lr_warmup
            group["lr"].fill_(group["initial_lr"] * min(share, 1.0))

    def update(self, batch: Batch) -> Metrics:
        """The learner's update, and a step of the clone for each of its actor's."""
        if self.stage == "select":
            return dict(batch)
        if self.stage == "dynamics":
            return self.learn("dynamics", self.dynamics.loss, batch)
        batch = self.with_states(batch)
        if self.learner.frozen or self.stage == "clone":
            return self.imitate(batch)
        metrics = self.learner.update(batch)
        if not self.clones_after and (self.learner.updates + 1) % self.learner.delay == 0:
            metrics |= self.imitate(batch)
        return metrics

    def with_states(self, batch: Batch) -> Batch:
        """`state`: normalised obs; the memory's observations each by its own task's statistics."""
        found = {**batch, "state": self.normalized(batch["obs"], self.kept.current)}
        for key, value in batch.items():
            if key.startswith("memory_obs_"):
                found[key] = self.normalized(value, int(key.removeprefix("memory_obs_")))
        return found

    def imitate(self, batch: Batch) -> Metrics:
        """One step of the clone."""
        transform = self.retention.transform(self.clone, batch)
        return self.learn("clone", self.cloning_loss, batch, transform=transform)


def _check(config: OER.Config) -> None:
    """Refuses settings that mean nothing."""
    if not config.hidden or min(config.hidden) < 1:
        raise UserError(
            f"agent.hidden {list(config.hidden)} must hold at least one width: the first layer is "
            "a task's own"
        )
    kind = agents.get(config.learner)
    if issubclass(kind, Wrapper) or kind.stages is not Agent.stages:
        raise UserError(
            f"agent.learner {config.learner} learns in stages of its own: choose an agent that "
            "learns from data alone, such as td3_bc, iql or bc"
        )
    for name in ("coefficient", "anchor", "clone_updates"):
        if getattr(config, name) < 0:
            raise UserError(f"agent.{name} must not be negative")
    if config.memory < 1 or config.memory_total < 0:
        raise UserError(
            f"a memory of {min(config.memory, config.memory_total)} transitions keeps nothing: "
            "give agent.memory 1 or more (agent.coefficient 0 trains without a memory)"
        )
    if not config.reach > 0:
        raise UserError(
            f"agent.reach {config.reach:g} lets no roll-out go on: give a positive number, in "
            "units of the data's own neighbour distances (4 by default)"
        )
    if config.roll_outs < 1 or config.horizon < 1:
        raise UserError("agent.roll_outs and agent.horizon must be 1 or more")
    usable = [name for name in selectors.NAMES if name != "oracle_onpolicy"]
    if config.selector not in usable:
        raise UserError(f"agent.selector {config.selector!r} is none of {', '.join(usable)}")


def _shapes(task: Task) -> tuple[Any, Any]:
    return getattr(task.observation_space, "shape", None), getattr(task.action_space, "shape", None)
