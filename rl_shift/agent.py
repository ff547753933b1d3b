"""The agent contract: what an algorithm declares, and the one door through which it learns.

An agent is an `nn.Module` whose losses are pure methods of one seed. `learn("critic",
self.critic_loss, batch)` differentiates a loss with respect to the named submodules only, so agent
files hold no `detach`, no `zero_grad` and no `requires_grad`. The same file runs eagerly, as one
compiled graph (`rl_shift.compile`) and with S stacked seeds. Our design.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from gymnasium.spaces import Box, Space
from torch import Tensor

from rl_shift.errors import UnsupportedSpace, UserError
from rl_shift.learner import Batch, Gradients, Learner, Loss, Metrics, Transform
from rl_shift.networks import ActionValues, Normalizer

if TYPE_CHECKING:
    from rl_shift.buffer import Buffer, Mixture
    from rl_shift.config import Task

log = logging.getLogger(__name__)
# metadata of hyper-parameters that `rl-shift evaluate` may change
EVALUATION: Mapping[str, bool] = {"evaluation": True}

__all__ = [
    "EVALUATION",
    "Agent",
    "Batch",
    "Gradients",
    "Loss",
    "Metrics",
    "Policy",
    "Stage",
    "Transform",
    "Wrapper",
]


@dataclass(frozen=True)
class Stage:
    """One leg of a task: `updates` on given data, or `env_steps` of interaction with updates.

    Stages with `counted=False` prepare something (a denoiser, a dynamics model) and are not part of
    the user's `--updates`. Stages of one name go on with each other: intervals count through them,
    and only the end of the last one asks for an evaluation. After every `check_every` updates, and
    after the last, the trainer asks `Agent.check` whether the stage has converged and may end (0:
    never).
    """

    name: str
    updates: int = 0
    env_steps: int = 0
    counted: bool = True
    check_every: int = 0


class Policy(NamedTuple):
    """What an agent would do at N states, for methods that compare other actions with it."""

    mean: Tensor  # (N, action)
    std: Tensor | None = None  # (N, action) or (action,); None: deterministic
    squashed: bool = False  # mean and std are those of atanh(action), as in SAC


class Agent(Learner):
    """Base class of every algorithm; override `act`, the losses and `update`.

    Attributes:
        Config: frozen dataclass of hyper-parameters, the paper's values as defaults.
        stackable: several seeds may share one process (False: it holds data of its own per seed).
        columns: data-derived columns (`next_action`, `mc_return`, `reward_mask`) it needs.
        limits: least and largest value of numeric fields of Config, by name; a class adds its own.
        reusable: fields of Config that may name a run of the same agent (`RUN_DIR[#k]`), with the
            submodules that are then taken from it instead of being trained.
        begun: the tasks begun so far.
    """

    Config: ClassVar[type]
    stackable: bool = True
    columns: tuple[str, ...] = ()
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {
        "batch_size": (1, math.inf),
        "model_batch_size": (1, math.inf),
        "learning_rate": (0, math.inf),
        "discount": (0, 1),
        "tau": (0, 1),
        "policy_delay": (1, math.inf),
        "warmup_steps": (0, math.inf),
        "collect_every": (1, math.inf),
        "updates_per_collect": (1, math.inf),
        "buffer_capacity": (1, math.inf),
        "real_fraction": (0, 1),
    }
    reusable: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Any
    ) -> None:
        super().__init__()
        reason = self.supports(observation_space, action_space)
        if reason is not None:
            raise UnsupportedSpace(
                f"{type(self).__name__} cannot be used here: {reason} "
                f"(observations {observation_space}, actions {action_space})"
            )
        self.check_numbers(config)
        self.observation_space, self.action_space = observation_space, action_space
        self.config = config
        self.begun: list[Task] = []
        self.normalizer = Normalizer(observation_space)

    @classmethod
    def check_numbers(cls, config: Any) -> None:
        """Refuse numbers outside `limits`, NaN everywhere, and layers without a unit.

        Raises:
            UserError: naming the field and what it must be.
        """
        for f in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
            value = getattr(config, f.name)
            if f.name.endswith("hidden") and isinstance(value, tuple) and min(value, default=1) < 1:
                raise UserError(f"{cls.__name__}: {f.name} {list(value)} has a layer without units")
            low, high = cls.limits.get(f.name, (-math.inf, math.inf))
            if not isinstance(value, int | float) or low <= value <= high:
                continue
            if math.isnan(value):
                must = "be a number"
            elif high == math.inf:
                must = f"be at least {low:g}"
            else:
                must = f"lie between {low:g} and {high:g}"
            raise UserError(f"{cls.__name__}: {f.name} must {must}, not {value}")

    # ---- the seams: what an algorithm overrides ----------------------------------------------

    @staticmethod
    def supports(observation_space: Space[Any], action_space: Space[Any]) -> str | None:
        """None if the spaces fit, else the reason; default: vectors in, a box of actions out."""
        if not isinstance(observation_space, Box) or len(observation_space.shape) != 1:
            return "it needs observations that are a vector"
        if not isinstance(action_space, Box) or len(action_space.shape) != 1:
            return "it needs continuous actions (a Box)"
        return None

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, obs) -> (N, action) in [-1, 1], or (N,) int64; pure."""
        raise NotImplementedError

    def distribution(self, obs: Tensor) -> Policy:
        """The distribution behind `act` at raw (N, obs); default: its greedy action. Pure."""
        return Policy(self.act(obs, False))

    def action_value(self, obs: Tensor, action: Tensor) -> Tensor | None:
        """The agent's own estimate of the return of raw (N, obs), (N, action): (N,), or None.

        Default: the smallest of `critic`'s values, where there is one. Pure.
        """
        critic = self._modules.get("critic")
        if not isinstance(critic, ActionValues):
            return None
        values: Tensor = critic(self.normalizer(obs), action)
        return values.amin(0)

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """What one `update` sees; default: `config.batch_size` uniform transitions."""
        return buffer.sample(self.config.batch_size)

    def update(self, batch: Batch) -> Metrics:
        """One gradient recipe: `learn`, `learn`, `polyak`."""
        raise NotImplementedError

    def step(self, batch: Batch) -> Metrics:
        """The compiled unit; override only if `update` loops over minibatches."""
        return self.update(batch)

    def stages(self, task: Task) -> list[Stage]:
        """The legs of a task; default: updates on its data, then interaction."""
        legs = [Stage("offline", updates=task.updates), Stage("online", env_steps=task.env_steps)]
        return [leg for leg in legs if leg.updates or leg.env_steps]

    def check(self, stage: Stage, updates: int, buffer: Buffer) -> bool:
        """Whether a stage with `check_every` may end after so many updates; may read the device.

        Part of training: whatever it changes must lie in modules or in `extra_state`.
        """
        return False

    def outcome(self, stage: Stage) -> Metrics:
        """What a stage ended with, logged beside the metrics of its last update; after `check`."""
        return {}

    def diagnostics(self, obs: Tensor) -> Metrics:
        """Numbers about `act` at these states, (N, obs) -> (N,) each; pure.

        `rl-shift evaluate` averages them over all steps of its episodes.
        """
        return {}

    def resources(self) -> dict[str, float]:
        """What it costs to keep, for results.json: numbers by name."""
        return {"parameters": float(sum(p.numel() for p in self.parameters()))}

    def build(self, task: Task) -> None:
        """Structure a task needs (heads, adapters); called again, in order, before a resume."""

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Record and build the task; fit the normaliser on the first data if configured."""
        if task.env_steps and self.columns:
            raise UserError(
                f"{type(self).__name__} needs {', '.join(self.columns)} of every transition, which "
                "only datasets have: leave out --env-steps"
            )
        if not self.begun and len(buffer) and getattr(self.config, "normalize", False):
            self.normalizer.fit(*buffer.statistics("obs"))
        for name, total in self.schedules.items():
            self.schedules[name] = total or task.updates or task.env_steps
        self.begun.append(task)
        self._build(task)

    def _build(self, task: Task) -> None:
        """`build`, for every stacked seed by itself, on the device of what is there already."""
        self.structure += 1
        if type(self).build is Agent.build:
            return
        known = {id(tensor) for tensor in self._all_tensors()}
        alone = [self.select(k) for k in range(self.seeds)] if self.seeds > 1 else []
        for agent in alone:
            agent.build(task)
        self.build(task)
        if alone:
            for inner in self.contained():
                inner.seeds = self.seeds
            everyone = (list(agent._all_tensors()) for agent in (self, *alone))
            for mine, *own in zip(*everyone, strict=True):
                if id(mine) not in known:
                    mine.data = torch.stack([tensor.data for tensor in own])
        self.place(self.normalizer.mean.device)

    def end_task(self, task: Task, buffer: Buffer) -> None:
        """What is kept of a finished task; short, and nothing that `act` depends on."""

    def focus(self, task: Task) -> None:
        """Choose the head that `act` uses; must not touch anything that is trained."""

    def variant(self) -> tuple[Any, ...]:
        """What besides tensors decides how an update runs; one compiled graph per value."""
        return (self.stage,)

    def extra_state(self) -> dict[str, Any]:
        """Plain values and tensors beyond modules and optimisers, for the checkpoint."""
        return {}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take back what `extra_state` gave."""

    def reuse(self, field: str, source: Agent) -> None:
        """Take the submodules that `reusable` lists for `field`, buffers included, from `source`.

        Called once, before a run starts; a resumed run finds them in its own checkpoint. Override
        it to take more than submodules.

        Raises:
            KeyError, RuntimeError: if their tensors do not fit.
        """
        for name in self.reusable[field]:
            self.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())

    # Cadence of interaction, read by the trainer.
    @property
    def collect_every(self) -> int:
        """Vector steps between two rounds of updates."""
        return int(getattr(self.config, "collect_every", 1))

    @property
    def updates_per_collect(self) -> int:
        """Updates after each collection."""
        return int(getattr(self.config, "updates_per_collect", 1))

    @property
    def warmup_steps(self) -> int:
        """Environment steps with uniform actions and no updates at the start of a stage."""
        return int(getattr(self.config, "warmup_steps", 0))

    @property
    def buffer_capacity(self) -> int:
        """Rows of the ring buffer of an online task."""
        return int(getattr(self.config, "buffer_capacity", 1_000_000))

    # ---- state --------------------------------------------------------------------------------

    def enter(self, stage: str) -> None:
        """Be in the stage of this name, with every agent inside."""
        for agent in self.contained():
            agent.stage = stage

    def contained(self) -> Iterator[Agent]:
        """This agent and those inside it, this one first."""
        return (a for a in super().contained() if isinstance(a, Agent))

    def prefixed(self) -> Sequence[tuple[str, Agent]]:
        """The contained agents with the prefixes of their tensors' names, this one first."""
        return [(prefix, a) for prefix, a in super().prefixed() if isinstance(a, Agent)]

    def state(self) -> dict[str, Any]:
        """Everything training depends on: nested dict of tensors and plain values."""
        self.sync_steps()
        return {
            "module": {k: v.detach() for k, v in self.state_dict().items()},
            "agents": {
                prefix: {
                    "updates": agent.updates,
                    "begun": [task.plain() for task in agent.begun],
                    "schedules": dict(agent.schedules),
                    "schedule_starts": dict(agent.schedule_starts),
                    "extra": agent.extra_state(),
                    "optimizers": {
                        name: {
                            "lr": optimizer.param_groups[0]["lr"],
                            "moments": {
                                k: dict(optimizer.state[p])
                                for k, p in agent.get_submodule(name).named_parameters()
                            },
                        }
                        for name, optimizer in agent.optimizers.items()
                    },
                }
                for prefix, agent in self.prefixed()
            },
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Rebuild the begun tasks' structure, then copy tensors in place.

        Raises:
            KeyError, RuntimeError: if the state belongs to another agent or configuration.
        """
        from rl_shift.config import Task

        restored: set[str] = set()
        while left := [pair for pair in self.prefixed() if pair[0] not in restored]:
            prefix, agent = left[0]  # asked anew each time: `build` may replace a contained agent
            restored.add(prefix)
            saved = state["agents"][prefix]
            agent.updates = saved["updates"]
            agent.begun = [Task.from_plain(task) for task in saved["begun"]]
            agent.schedules.update(saved["schedules"])  # a longer run keeps its first schedule
            agent.schedule_starts.update(saved.get("schedule_starts", {}))  # none in older ones
            for task in agent.begun:
                agent._build(task)
        self.load_state_dict(state["module"])
        for prefix, agent in self.prefixed():
            saved = state["agents"][prefix]
            with torch.no_grad():
                for name, optimizer in agent.optimizers.items():
                    source = saved["optimizers"][name]
                    optimizer.param_groups[0]["lr"].copy_(source["lr"])
                    for k, p in agent.get_submodule(name).named_parameters():
                        for key, tensor in optimizer.state[p].items():
                            tensor.copy_(source["moments"][k][key])
            agent.load_extra_state(saved["extra"])


class Wrapper(Agent):
    """An agent that changes another one, held as `base`, and delegates all it does not change.

    `config.base` names the base agent and `config.base_config` its fields. A wrapper passes raw
    batches to its base, which normalises them itself.

    Where `config.base_run` is set, the base is the finished agent of that run (`RUN_DIR[#k]`) and
    frozen: no hook but `act` and `sample` reaches it, and nothing of it changes. Users write
    `--agent.base RUN_DIR#k`, from which `rl_shift.config` fills in all three fields. The base's
    tensors are part of the wrapper's own state, so a checkpoint needs no folder but its own.
    """

    base: Agent

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        config: Any,
        base: Agent | None = None,
    ) -> None:
        super().__init__(observation_space, action_space, config)
        if base is None:
            from rl_shift import agents

            kind = agents.get(config.base)
            base = kind(observation_space, action_space, kind.Config(**config.base_config))
        self.base = base
        if getattr(config, "base_run", ""):
            for inner in base.contained():
                inner.frozen = True
        self.stackable = base.stackable and type(self).stackable
        self.delay = math.lcm(type(self).delay, base.delay)
        self.columns = tuple(dict.fromkeys([*type(self).columns, *base.columns]))

    @staticmethod
    def supports(observation_space: Space[Any], action_space: Space[Any]) -> str | None:
        """Whatever the base supports; it is asked when it is built."""
        return None

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """The base's action."""
        return self.base.act(obs, explore)

    def distribution(self, obs: Tensor) -> Policy:
        """The base's distribution, unless this agent acts in another way."""
        if type(self).act is Wrapper.act:
            return self.base.distribution(obs)
        return super().distribution(obs)

    def action_value(self, obs: Tensor, action: Tensor) -> Tensor | None:
        """What the base thinks of an action."""
        return self.base.action_value(obs, action)

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """What the base wants to see."""
        return self.base.sample(buffer)

    def update(self, batch: Batch) -> Metrics:
        """The base's update; nothing if it is frozen."""
        return {} if self.base.frozen else self.base.update(batch)

    def stages(self, task: Task) -> list[Stage]:
        """The base's stages; if it is frozen, an empty one, after which it is evaluated."""
        return [Stage("frozen")] if self.base.frozen else self.base.stages(task)

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Begin the task here, then in the base; says so where the budget has nothing to train."""
        super().begin_task(task, buffer)
        if not self.base.frozen:
            self.base.begin_task(task, buffer)
        elif task.updates:
            log.warning(
                "the base is the finished agent of %s and stays as it is: the %d updates of this "
                "task are not made",
                self.config.base_run,
                task.updates,
            )

    def outcome(self, stage: Stage) -> Metrics:
        """The base's."""
        return self.base.outcome(stage)

    def end_task(self, task: Task, buffer: Buffer) -> None:
        """End it in the base."""
        if not self.base.frozen:
            self.base.end_task(task, buffer)

    def focus(self, task: Task) -> None:
        """Focus the base; a frozen one keeps the focus that it ended with."""
        if not self.base.frozen:
            self.base.focus(task)

    def variant(self) -> tuple[Any, ...]:
        """The stage here and the base's own variant."""
        return (self.stage, *self.base.variant())

    @property
    def collect_every(self) -> int:
        """The base's cadence."""
        return self.base.collect_every

    @property
    def updates_per_collect(self) -> int:
        """The base's cadence."""
        return self.base.updates_per_collect

    @property
    def warmup_steps(self) -> int:
        """The base's warm-up."""
        return self.base.warmup_steps

    @property
    def buffer_capacity(self) -> int:
        """The base's ring."""
        return self.base.buffer_capacity
