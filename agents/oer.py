"""OER: offline experience replay for continual offline RL (arXiv 2305.13804).

Known to us by its abstract; the rest is our design. Faithful: a sequence of datasets, a small
memory, no interaction; dual behaviour cloning (one policy climbs Q on the current task, another
clones it and replays the memory, so that replay never disturbs Q-learning); model-based experience
selection. Differs: input layers and heads per task, task known; replay targets are by default the
finished policy's own actions (`target: dataset_action` is what the abstract implies). The
baselines of the literature are settings: `coefficient: 0` fine-tunes, `dual: false` has one network
that climbs Q and replays, `retention` replaces replay. Known gaps: offline tasks only; a memory
larger than a dataset keeps all of it.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift import agents, seeding, selectors
from rl_shift.agent import Agent, Batch, Loss, Metrics, Stage, Transform
from rl_shift.agents.td3_bc import TD3BC
from rl_shift.buffer import Buffer, Mixture
from rl_shift.continual import Memory, MultiHead
from rl_shift.dynamics import GaussianEnsemble, split_rows
from rl_shift.errors import UserError
from rl_shift.networks import Normalizer
from rl_shift.retention import KINDS, Retention

if TYPE_CHECKING:
    from rl_shift.config import Task


class OneNetwork(TD3BC):
    """TD3+BC whose actor is the policy that must not forget: what dual cloning is compared with."""

    def adopt(self, actor: MultiHead, retention: Retention) -> None:
        """Train this policy, with the retention's term and transform."""
        self.actor, self.target_actor = actor, copy.deepcopy(actor)
        self.keeping = (retention,)  # in a tuple: it is a submodule of the agent, not of this one
        self.optimizer("actor", lr=self.config.learning_rate)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """L(actor) of TD3+BC + what retention adds."""
        loss, metrics = super().actor_loss(batch)
        kept = self.keeping[0].loss(self.actor, batch)
        return loss + kept, metrics | {"actor/retention": kept}

    def learn(
        self,
        names: str | tuple[str, ...],
        loss: Loss,
        *data: Any,
        transform: Transform | None = None,
    ) -> Metrics:
        """As ever; the actor's gradients pass the retention's transform."""
        if names == "actor":
            transform = self.keeping[0].transform(self.actor, data[0])
        return super().learn(names, loss, *data, transform=transform)


class OER(Agent):
    """A learner climbs Q on the current task n; a clone with a head per task is all that stays.

    L(learner) = that of TD3+BC on D_n, networks and optimisers new for every task
    L(clone)   = E_{s ~ D_n} |pi_n(s) - mu(s)|^2
                 + c / (n - 1) sum_{j < n} E_{(s, y) ~ B_j} |pi_j(s) - y|^2
    B_n        = rows of D_n nearest to roll-outs of pi_n in a learnt model, y = pi_n(s)

    |.|^2 is a mean over the action's dimensions. Attributes: `known`, the distinct tasks begun, in
    the order of their heads; `head`, the one that `act` uses (`focus`); `shifts`, the policy shift
    of every finished task (RL's Razor): how far old heads moved on the new task's states.
    """

    stackable = False
    reusable: ClassVar[dict[str, tuple[str, ...]]] = {"learners": ()}

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters; the paper's are unknown to us, these are ours and TD3+BC's."""

        batch_size: int = 256  # rows of the current task
        memory_batch: int = 256  # rows of the old tasks together, the same number of each
        hidden: tuple[int, ...] = (256, 256)  # first: a task's own layer; the rest is shared
        shared_inputs: bool = False  # one first layer for all tasks whose observations fit it
        learning_rate: float = 3e-4  # Adam, of the clone
        normalize: bool = True  # observations, by the statistics of their own task
        learner: str = "td3_bc"  # any agent that acts; one-network variants need td3_bc
        learner_config: dict[str, Any] = field(default_factory=dict)  # its fields
        learners: tuple[str, ...] = ()  # finished runs RUN_DIR[#k], one per task, to clone from
        dual: bool = True  # False: one network climbs Q and replays
        retention: Literal["replay", "none", "agem", "l2", "ewc", "si", "frozen"] = "replay"
        coefficient: float = 1.0  # c of replay, or weight of l2 (5000), ewc (5000), si; 0: none
        anchor: float = 0.0  # weight of old heads' actions on the new data; 1 without replay: LwF
        target: Literal["policy_action", "dataset_action"] = "policy_action"  # y
        selector: str = "mbes"  # which rows to keep: see rl_shift.selectors
        memory: int = 1000  # rows kept per task
        memory_total: int = 0  # rows kept of all tasks together; 0: no limit
        select_updates: int = 100  # steps into which the selection is divided
        dynamics_updates: int = 5000  # at most; MBES: of the model ensemble
        dynamics_hidden: tuple[int, ...] = (200, 200, 200, 200)  # MOPO's
        dynamics_members: int = 5  # networks of the ensemble
        dynamics_rate: float = 1e-3  # Adam; MOPO's
        roll_outs: int = 10  # MBES: side by side
        horizon: int = 1000  # MBES: steps of a roll-out
        action_weight: float = 0.0  # MBES: prefers rows whose action the policy would take
        warm_start: bool = False  # a new head begins as the old one that fits the data best
        lr_warmup: int = 0  # updates until the clone's learning rate is reached, in every task

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        super().__init__(observation_space, action_space, config)
        self._check(config)
        kind = agents.get(config.learner)
        self.columns = kind.columns
        self.retention = KINDS[config.retention](config.coefficient, config.anchor)
        if config.dual:
            self.clone = MultiHead(config.hidden, config.shared_inputs)
        self.known: list[Task] = []
        self.head, self.started = -1, 0
        self.seed = int(torch.randint(2**62, ()))  # of the memory's and the selection's streams
        self.memory = Memory(self.seed)
        self.finished: list[dict[str, Tensor]] = []  # the learners of `config.learners`
        self.shifts: list[float] = []
        self.selection: selectors.Selection | None = None
        self.selected, self.half_selected = 0, {}  # steps done, and a selection to go on with

    @staticmethod
    def _check(config: Config) -> None:
        if config.coefficient < 0 or config.anchor < 0:
            raise UserError("agent.coefficient and agent.anchor must not be negative")
        if config.memory < 1 or config.memory_total < 0:
            raise UserError(
                f"a memory of {min(config.memory, config.memory_total)} transitions per task keeps "
                "nothing: give agent.memory 1 or more (agent.coefficient 0 trains without memory)"
            )
        if config.selector not in selectors.NAMES or config.selector == "oracle_onpolicy":
            usable = ", ".join(name for name in selectors.NAMES if name != "oracle_onpolicy")
            raise UserError(f"agent.selector {config.selector!r} is none of {usable}")
        if not config.dual and (config.learner != "td3_bc" or config.learners):
            raise UserError("agent.dual false trains td3_bc itself: leave learner and learners out")

    # ---- structure ---------------------------------------------------------------------------

    @property
    def policy(self) -> MultiHead:
        """What is kept, deployed and evaluated."""
        policy = self.clone if self.config.dual else self.learner.actor
        assert isinstance(policy, MultiHead)
        return policy

    @property
    def modelled(self) -> bool:
        """Whether the selection needs a model of the environment."""
        return self.retention.remembers and self.config.selector in selectors.MODEL_BASED

    def normalized(self, obs: Tensor, task: int) -> Tensor:
        """Raw observations by the statistics of their own task, (B, obs)."""
        found: Tensor = (self.normalizer if task == 0 else getattr(self, f"normalizer_{task}"))(obs)
        return found

    def build(self, task: Task) -> None:
        """A head; and learner, model and optimisers anew, which drops those of the last task."""
        observation_space, action_space = task.observation_space, task.action_space
        assert observation_space is not None and action_space is not None
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        c, old = self.config, len(self.known)
        policy = self.policy if c.dual or old else MultiHead(c.hidden, c.shared_inputs)
        if task not in self.known:
            self.known.append(task)
            policy.add(obs, action)
            if old:
                self.add_module(f"normalizer_{old}", Normalizer(observation_space))
        policy.current = self.known.index(task)
        self.retention.extend(policy, old)
        self.learner = self._learner(observation_space, action_space)
        if isinstance(self.learner, OneNetwork):
            self.learner.adopt(policy, self.retention)
        else:
            self.optimizer("clone", lr=c.learning_rate)
        if self.modelled:
            hidden, members = c.dynamics_hidden, c.dynamics_members
            self.dynamics = GaussianEnsemble(obs, action, hidden, members, members, reward=False)
            self.optimizer("dynamics", lr=c.dynamics_rate)
        self.focus(task)

    def _learner(self, observation_space: Space[Any], action_space: Space[Any]) -> Agent:
        kind = agents.get(self.config.learner)
        shared = {
            name: getattr(self.config, name) for name in ("batch_size", "hidden", "normalize")
        }
        names = {f.name for f in dataclasses.fields(kind.Config)}
        shared = {name: value for name, value in shared.items() if name in names}
        config = kind.Config(**{**shared, **self.config.learner_config})
        learner = (kind if self.config.dual else OneNetwork)(
            observation_space, action_space, config
        )
        if self.config.learners:
            learner.frozen = True
            if self.finished:
                learner.load_state_dict(self.finished[self.policy.current])
        return learner

    def reuse(self, field: str, source: Agent) -> None:
        """Keep a finished learner for the task whose turn it is when all are given."""
        self.finished.append({k: v.detach().clone() for k, v in source.state_dict().items()})

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Fit the task's normaliser, and begin with the learner."""
        seen = task in self.known
        super().begin_task(task, buffer)
        current = self.policy.current
        if current and not seen and self.config.normalize:
            getattr(self, f"normalizer_{current}").fit(*buffer.statistics("obs"))
        if not self.learner.frozen:
            self.learner.begin_task(task, buffer)
        if self.modelled:
            self.dynamics.fit(buffer.take(split_rows(buffer)[0]))
        if self.config.warm_start and current and not seen:
            self._warm_start(buffer)
        self.started = self.updates

    def _warm_start(self, buffer: Buffer) -> None:
        """The new head starts as the old one whose actions agree best with the data."""
        policy, current = self.policy, self.policy.current
        rows = buffer.take(self._some_rows(buffer))
        state = self.normalized(rows["obs"], current)
        alike = [j for j in range(current) if policy.sizes[j] == policy.sizes[current]]
        with torch.no_grad():
            errors = [float((policy(state, j) - rows["action"]).square().mean()) for j in alike]
        if alike:
            policy.copy_head(alike[errors.index(min(errors))], current)

    def _some_rows(self, buffer: Buffer, most: int = 2000) -> Tensor:
        """Row numbers spread over the data, without drawing from any stream."""
        step = max(1, len(buffer) // most)
        return torch.arange(0, len(buffer), step, device=buffer.device)[:most]

    # ---- losses ------------------------------------------------------------------------------

    def cloning_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Imitate the learner on the current task, and keep the old tasks."""
        mu = self.learner.act(batch["obs"], False)
        current = (self.clone(batch["state"]) - mu).square().mean()
        kept = self.retention.loss(self.clone, batch)
        return current + kept, {"clone/current": current, "clone/retention": kept}

    def surprise(self, rows: Batch) -> Tensor:
        """|TD error| of the learner's critics on raw rows, (B,)."""
        learner: Any = self.learner
        batch = learner.normalizer.batch(rows)
        value = learner.target_critic(batch["next_obs"], learner.act(rows["next_obs"], False))
        target = rows["reward"] + learner.config.discount * ~rows["terminated"] * value.amin(0)
        return (learner.critic(batch["obs"], rows["action"]).mean(0) - target).abs()

    # ---- seams -------------------------------------------------------------------------------

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, obs) -> (N, action) by the head in focus; zeros before the first task."""
        if self.head < 0:
            return obs.new_zeros((*obs.shape[:-1], *(self.action_space.shape or ())))
        return self.policy(self.normalized(obs, self.head), self.head)

    def focus(self, task: Task) -> None:
        """The task's head; for an unknown task the newest one that fits its spaces."""
        if task in self.known:
            self.head = self.known.index(task)
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

    def stages(self, task: Task) -> list[Stage]:
        """The learner with its clone, then the model, then the choice of what is kept."""
        if task.env_steps:
            raise UserError(f"task {task.name!r}: OER learns from datasets, leave env_steps out")
        c = self.config
        legs = [Stage("learner", task.updates)]
        if self.modelled:
            legs.append(Stage("dynamics", c.dynamics_updates, counted=False, check_every=500))
        chosen = c.select_updates if self.retention.remembers else 1
        return [*legs, Stage("select", chosen, counted=False)]

    def check(self, stage: Stage, updates: int, buffer: Buffer) -> bool:
        """The model stops learning once its error on rows held out does."""
        held = buffer.take(split_rows(buffer)[1])
        return self.dynamics.converged(self.run(self.dynamics.error, held))

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """Rows of the current task, and of every old one; in the last stage, what was selected."""
        c = self.config
        assert isinstance(buffer, Buffer)
        if self.stage == "select":
            return self._select(buffer)
        if self.stage == "dynamics":
            return buffer.sample(c.batch_size, where=split_rows(buffer)[0])
        batch = buffer.sample(c.batch_size)
        if self.retention.remembers and c.coefficient:
            batch |= self.memory.sample(c.memory_batch, without=self.policy.current)
        if self.updates > self.started:
            part = self.learner if isinstance(self.learner, OneNetwork) else self
            name = "actor" if part is self.learner else "clone"
            self.retention.observe(self.policy, part.optimizers[name])
        return batch

    def _select(self, buffer: Buffer) -> Batch:
        """A step of the selection, on the host; numbers about it as tensors."""
        shift, selection = self.shift(buffer), None
        self.selected += 1
        if self.retention.remembers:
            selection = self._selection(buffer)
            selection.advance(self.selected / self.config.select_updates)
        return {
            "select/policy_shift": shift,
            "select/roll_outs": shift.new_tensor(selection.begun if selection else 0),
            "select/filled": shift.new_tensor(selection.filled if selection else 0),
            "select/memory_bytes": shift.new_tensor(self.memory.nbytes),
        }

    def shift(self, buffer: Buffer) -> Tensor:
        """RL's Razor: mean squared action change of the old heads on this task's states."""
        obs = buffer.take(self._some_rows(buffer))["obs"]
        state = self.normalized(obs, self.policy.current)
        found: Tensor = self.run(self.retention.shift, self.policy, state)
        return found

    def _selection(self, buffer: Buffer) -> selectors.Selection:
        """The selection of this task; where a checkpoint holds one, that goes on."""
        if self.selection is None:
            c, current = self.config, self.policy.current
            sources = selectors.Sources(
                buffer,
                lambda obs: self.run(self.act, obs, False),
                self._predict if self.modelled else None,
                c.dynamics_members,
                lambda rows: self.run(self.surprise, rows),
            )
            self.selection = selectors.make(
                c.selector,
                sources,
                c.memory,
                seeding.numpy_generator(self.seed, "select", current),
                selectors.RollOutSettings(c.roll_outs, c.horizon, c.action_weight),
            )
            if self.half_selected:
                self.selection.load(self.half_selected)
        return self.selection

    def _predict(self, obs: Tensor, action: Tensor, members: Tensor) -> Tensor:
        """Mean prediction of one member per row, (B, obs)."""
        predicted = self.run(self.dynamics.predict, obs, action).next_obs
        rows = torch.arange(len(obs), device=obs.device)
        found: Tensor = predicted[self.dynamics.elites[members.to(obs.device)], rows]
        return found

    def end_task(self, task: Task, buffer: Buffer) -> None:
        """Keep the selected rows and what the policy does there; shrink to the total."""
        self.shifts.append(float(self.shift(buffer)))
        current, c = self.policy.current, self.config
        obs = buffer.take(self._some_rows(buffer))["obs"]
        self.retention.finish(self.policy, self.normalized(obs, current))
        if self.retention.remembers:
            order = torch.from_numpy(self._selection(buffer).order()).to(buffer.device)
            rows = buffer.take(order)
            action = rows["action"]
            if c.target == "policy_action":
                action = self.run(self.act, rows["obs"], False)
            self.memory.store(current, {"obs": rows["obs"], "target": action})
            if c.memory_total:
                self.memory.shrink(max(1, c.memory_total // len(self.memory.parts)))
        self.selection, self.selected, self.half_selected = None, 0, {}

    def variant(self) -> tuple[Any, ...]:
        """The stage and the head that is trained."""
        return (self.stage, self.policy.current)

    def schedule(self) -> None:
        """The clone's learning rate rises from 0 at the start of every task."""
        super().schedule()
        if self.config.lr_warmup and "clone" in self.optimizers:
            group = self.optimizers["clone"].param_groups[0]
            share = (self.updates - self.started + 1) / self.config.lr_warmup
            group["lr"].fill_(group["initial_lr"] * min(share, 1.0))

    def extra_state(self) -> dict[str, Any]:
        """The memory, its streams, and a selection that is not finished."""
        return {
            "head": self.head,
            "started": self.started,
            "seed": self.seed,
            "memory": self.memory.save(),
            "finished": self.finished,
            "shifts": self.shifts,
            "selected": self.selected,
            "selection": self.selection.save() if self.selection else self.half_selected,
        }

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take back what `extra_state` gave; the selection goes on once the data is there."""
        self.head, self.started, self.seed = extra["head"], extra["started"], extra["seed"]
        self.memory = Memory(self.seed)
        self.memory.load(extra["memory"], self.normalizer.mean.device)
        self.finished, self.shifts = extra["finished"], list(extra["shifts"])
        self.selected, self.half_selected = extra["selected"], extra["selection"]

    def update(self, batch: Batch) -> Metrics:
        """The learner's update, and a step of the clone for each of its actor's."""
        if self.stage == "select":
            return dict(batch)
        if self.stage == "dynamics":
            return self.learn("dynamics", self.dynamics.loss, batch)
        batch = self._normalized_states(batch)
        metrics = {} if self.learner.frozen else self.learner.update(batch)
        turn = self.learner.frozen or (self.learner.updates + 1) % self.learner.delay == 0
        if self.config.dual and turn:
            transform = self.retention.transform(self.clone, batch)
            metrics |= self.learn("clone", self.cloning_loss, batch, transform=transform)
        return metrics

    def _normalized_states(self, batch: Batch) -> Batch:
        """`state`: normalised obs; the memory's observations each by its own task's statistics."""
        state = self.normalized(batch["obs"], self.policy.current)
        old = {
            key: self.normalized(value, int(key.removeprefix("memory_obs_")))
            for key, value in batch.items()
            if key.startswith("memory_obs_")
        }
        return {**batch, "state": state, **old}


def _shapes(task: Task) -> tuple[Any, Any]:
    return getattr(task.observation_space, "shape", None), getattr(task.action_space, "shape", None)
