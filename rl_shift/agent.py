"""The agent contract: what an algorithm declares, and the one door through which it learns.

An agent is an `nn.Module` whose losses are pure methods of one seed. `learn("critic",
self.critic_loss, batch)` differentiates a loss with respect to the named submodules only, so agent
files hold no `detach`, no `zero_grad` and no `requires_grad`. The same file runs eagerly, as one
compiled graph (`rl_shift.compile`) and with S stacked seeds. Our design.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from gymnasium.spaces import Box, Space
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from rl_shift.errors import UnsupportedSpace
from rl_shift.networks import Normalizer

if TYPE_CHECKING:
    from rl_shift.buffer import Buffer, Mixture
    from rl_shift.config import Task

Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Metrics]]
Gradients = dict[str, Tensor]
Transform = Callable[[Gradients], Gradients]


@dataclass(frozen=True)
class Stage:
    """One leg of a task: `updates` on given data, or `env_steps` of interaction with updates.

    Stages with `counted=False` prepare something (a denoiser, a dynamics model) and are not part of
    the user's `--updates`.
    """

    name: str
    updates: int = 0
    env_steps: int = 0
    counted: bool = True


def _counted(update: Callable[..., Metrics]) -> Callable[..., Metrics]:
    @functools.wraps(update)
    def wrapper(self: Agent, batch: Batch) -> Metrics:
        self.ran = True  # read by `advance`, outside the compiled unit
        return update(self, batch)

    return wrapper


class Agent(nn.Module):
    """Base class of every algorithm; override `act`, the losses and `update`.

    Attributes:
        Config: frozen dataclass of hyper-parameters, the paper's values as defaults.
        stackable: several seeds may share one process (False: it holds data of its own per seed).
        delay: `update` may read `self.updates` modulo this number and nothing else of it.
        columns: data-derived columns (`next_action`, `mc_return`, `reward_mask`) it needs.
        seeds: number of stacked seeds S; agent code never sees the axis.
        updates: calls of `update` so far.
        stage: name of the current `Stage`.
    """

    Config: ClassVar[type]
    stackable: ClassVar[bool] = True
    delay: int = 1
    columns: tuple[str, ...] = ()

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
        self.observation_space, self.action_space = observation_space, action_space
        self.config = config
        self.seeds, self.updates, self.stage, self.ran = 1, 0, "", False
        self.begun: list[Task] = []
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.schedules: dict[str, int] = {}
        self.clips: dict[str, float] = {}
        self.live: dict[str, Tensor] | None = None  # set while a compiled unit is traced
        self.prefix = ""  # where this agent's tensors lie in `live`
        self._split: dict[tuple[str, ...], tuple[list[Tensor], list[Tensor]]] = {}
        self.normalizer = Normalizer(observation_space)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in cls.__dict__:
            cls.update = _counted(cls.__dict__["update"])  # type: ignore[method-assign]

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

    def build(self, task: Task) -> None:
        """Structure a task needs (heads, adapters); called again, in order, before a resume."""

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Record and build the task; fit the normaliser on the first data if configured."""
        if not self.begun and len(buffer) and getattr(self.config, "normalize", False):
            self.normalizer.fit(*buffer.statistics("obs"))
        for name, total in self.schedules.items():
            self.schedules[name] = total or task.updates or task.env_steps
        self.begun.append(task)
        self.build(task)

    def end_task(self, task: Task, buffer: Buffer) -> None:
        """What is kept of a finished task; short."""

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

    # ---- declaration -------------------------------------------------------------------------

    def optimizer(
        self,
        *names: str,
        lr: float,
        schedule: str | None = None,
        schedule_updates: int = 0,
        weight_decay: float = 0.0,
        clip: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Give each named submodule an Adam (AdamW if `weight_decay`) of its own.

        Args:
            names: submodules of this agent.
            lr: learning rate, kept as a 0-d tensor so that a schedule never recompiles.
            schedule: "cosine" decays `lr` to 0 over `schedule_updates` updates.
            schedule_updates: length of the schedule; 0: the budget of the first task.
            weight_decay: decoupled weight decay.
            clip: maximum gradient norm per seed.
            betas: Adam's decay rates.
            eps: Adam's epsilon.

        Raises:
            ValueError: for an unknown schedule.
        """
        if schedule not in (None, "cosine"):
            raise ValueError(f"unknown schedule {schedule!r}: choose cosine or none")
        kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
        for name in names:
            parameters = list(self.get_submodule(name).parameters())
            device = parameters[0].device
            optimizer = kind(
                [{"params": parameters, "lr": torch.tensor(lr, device=device)}],
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                fused=True,
            )
            optimizer.param_groups[0]["initial_lr"] = lr
            for p in parameters:  # from the start, so that every mode shares the same tensors
                optimizer.state[p] = {
                    "step": torch.zeros((), device=device),
                    "exp_avg": torch.zeros_like(p, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
                }
            self.optimizers[name] = optimizer
            if schedule is not None:
                self.schedules[name] = schedule_updates
            if clip is not None:
                self.clips[name] = clip
        self._split.clear()

    # ---- learning ----------------------------------------------------------------------------

    def learn(
        self,
        names: str | tuple[str, ...],
        loss: Loss,
        *data: Any,
        transform: Transform | None = None,
    ) -> Metrics:
        """One optimiser step of the named submodules on `loss(*data)`.

        Everything else is a constant of the loss. A parameter of the named submodules that the loss
        does not use gets a zero gradient (Adam's momentum still moves it).

        Args:
            names: submodule or submodules, each with an optimiser.
            loss: a method of this agent returning (scalar, metrics).
            data: its arguments; dicts of tensors and tensors carry the seed axis when S > 1.
            transform: pure function on the dict of gradients, applied before clipping.

        Returns:
            The loss's metrics, detached, on the device.
        """
        names = (names,) if isinstance(names, str) else names
        if self.live is not None:
            return self._learn_traced(self.live, names, loss, data, transform)
        own, rest = self._parameters_of(names)
        if self.seeds > 1:
            state = {k: v.detach() for k, v in [*self.named_parameters(), *self.named_buffers()]}
            gradients, metrics = self._gradients(state, names, loss, data)
        else:
            for p in own:
                p.requires_grad_(True)
            for p in rest:
                p.requires_grad_(False)
            with torch.enable_grad():
                value, metrics = loss(*data)
            found = torch.autograd.grad(value, own, allow_unused=True, materialize_grads=True)
            gradients = dict(zip(self._names_of(names), found))
        gradients = self._processed(gradients, names, transform)
        for p, g in zip(own, gradients.values()):
            p.grad = g.contiguous()  # torch's fused CPU Adam ignores gradient strides
        for name in names:
            self.optimizers[name].step()
        return {k: v.detach() for k, v in metrics.items()}

    def run(self, fn: Callable[..., Any], *data: Any) -> Any:
        """`fn(*data)` without gradients; maps over the seed axis of tensors when S > 1."""
        with torch.no_grad():
            if self.seeds == 1:
                return fn(*data)
            state = {k: v.detach() for k, v in [*self.named_parameters(), *self.named_buffers()]}

            def one(state: dict[str, Tensor], *data: Any) -> Any:
                return functional_call(self, state, (fn.__name__, *data))

            axes = (0, *(0 if isinstance(x, Tensor | dict) else None for x in data))
            return vmap(one, in_dims=axes, randomness="different")(state, *data)

    def polyak(self, source: str, target: str, tau: float) -> None:
        """target <- (1 - tau) target + tau source, over all parameters."""
        if self.live is not None:
            into, start = self.prefix + target + ".", self.prefix + source + "."
            for k in [k for k in self.live if k.startswith(into)]:
                self.live[k] = torch.lerp(self.live[k], self.live[start + k[len(into) :]], tau)
            return
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.get_submodule(target).parameters()),
                list(self.get_submodule(source).parameters()),
                tau,
            )

    def forward(self, method: str, *data: Any) -> Any:
        """Call a method by name: the door `functional_call` needs."""
        return getattr(self, method)(*data)

    def schedule(self) -> None:
        """Set this update's learning rates; called before each update, outside compiled units."""
        for agent in self.contained():
            for name, total in agent.schedules.items():
                group = agent.optimizers[name].param_groups[0]
                progress = min(agent.updates / total, 1.0) if total else 0.0
                group["lr"].fill_(group["initial_lr"] * 0.5 * (1 + math.cos(math.pi * progress)))

    def advance(self, succeeded: bool = True) -> None:
        """Count the update for every contained agent whose `update` ran."""
        for agent in self.contained():
            agent.updates += int(agent.ran and succeeded)
            agent.ran = False

    def contained(self) -> Iterator[Agent]:
        """This agent and those inside it, this one first."""
        return (m for m in self.modules() if isinstance(m, Agent))

    # ---- engines -----------------------------------------------------------------------------

    def _names_of(self, names: tuple[str, ...]) -> list[str]:
        return [
            f"{n}.{k}" for n in names for k, _ in self.get_submodule(n).named_parameters()
        ]

    def _parameters_of(self, names: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
        if names not in self._split:
            own = [p for n in names for p in self.get_submodule(n).parameters()]
            ids = {id(p) for p in own}
            self._split[names] = own, [p for p in self.parameters() if id(p) not in ids]
        return self._split[names]

    def _gradients(
        self, state: dict[str, Tensor], names: tuple[str, ...], loss: Loss, data: Sequence[Any]
    ) -> tuple[Gradients, Metrics]:
        """Functional engine: gradients of the named submodules' tensors in `state`."""
        own = {k: state[k] for k in self._names_of(names)}
        rest = {k: v for k, v in state.items() if k not in own}

        def gradient(own: Gradients, rest: Gradients, *data: Any) -> tuple[Gradients, Metrics]:
            def value(own: Gradients) -> tuple[Tensor, Metrics]:
                result: tuple[Tensor, Metrics] = functional_call(
                    self, {**rest, **own}, (loss.__name__, *data)
                )
                return result

            result: tuple[Gradients, Metrics] = grad(value, has_aux=True)(own)
            return result

        if self.seeds > 1:
            axes = (0, 0, *(0 if isinstance(x, Tensor | dict) else None for x in data))
            return vmap(gradient, in_dims=axes, randomness="different")(own, rest, *data)  # type: ignore[no-any-return]
        return gradient(own, rest, *data)

    def _processed(
        self, gradients: Gradients, names: tuple[str, ...], transform: Transform | None
    ) -> Gradients:
        if transform is not None:
            gradients = transform(gradients)
        for name in names:
            if name not in self.clips:
                continue
            mine = {k: g for k, g in gradients.items() if k.startswith(name + ".")}
            first = 1 if self.seeds > 1 else 0  # the norm is per seed
            square = sum(g.square().flatten(first).sum(-1) for g in mine.values())
            scale = (self.clips[name] / (torch.as_tensor(square).sqrt() + 1e-6)).clamp(max=1.0)
            for k, g in mine.items():
                gradients[k] = g * scale.reshape(scale.shape + (1,) * (g.dim() - scale.dim()))
        return gradients

    def _learn_traced(
        self,
        live: dict[str, Tensor],
        names: tuple[str, ...],
        loss: Loss,
        data: Sequence[Any],
        transform: Transform | None,
    ) -> Metrics:
        """`learn` on the tensor dict of a compiled unit: functional gradients, functional Adam."""
        start = len(self.prefix)
        state = {
            k[start:]: v for k, v in live.items() if k[0] != "@" and k.startswith(self.prefix)
        }
        gradients, metrics = self._gradients(state, names, loss, data)
        gradients = self._processed(gradients, names, transform)
        for name in names:
            key, group = self.prefix + name, self.optimizers[name].param_groups[0]
            (b1, b2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
            lr = live["@lr." + key]
            t = live["@step." + key] + 1
            live["@step." + key] = t
            count = t.double()  # 1 - b^t, exact where `1 - b**t` cancels
            c1 = -torch.expm1(count * math.log(b1))
            c2 = (-torch.expm1(count * math.log(b2))).sqrt()
            for k in self._names_of((name,)):
                g, full = gradients[k], self.prefix + k
                m = torch.lerp(live["@m." + full], g, 1 - b1)
                v = live["@v." + full] * b2 + g * g * (1 - b2)
                p = live[full] * (1 - lr * decay) if decay else live[full]
                live["@m." + full], live["@v." + full] = m, v
                live[full] = p - (lr / c1) * m / (v.sqrt() / c2 + eps)
        return metrics

    def tensors(self) -> dict[str, Tensor]:
        """All that an update may change, as detached aliases with stable addresses.

        Parameters and buffers under their names; Adam's moments, step and learning rate under
        `@m.`, `@v.`, `@step.` and `@lr.` + submodule, those of contained agents included.
        """
        found = {k: v.detach() for k, v in [*self.named_parameters(), *self.named_buffers()]}
        for prefix, agent in self._prefixed():
            for name, optimizer in agent.optimizers.items():
                for i, (k, p) in enumerate(agent.get_submodule(name).named_parameters()):
                    moments = optimizer.state[p]
                    found[f"@m.{prefix}{name}.{k}"] = moments["exp_avg"]
                    found[f"@v.{prefix}{name}.{k}"] = moments["exp_avg_sq"]
                    if i == 0:
                        found[f"@step.{prefix}{name}"] = moments["step"]
                        found[f"@lr.{prefix}{name}"] = optimizer.param_groups[0]["lr"]
        return found

    def _prefixed(self) -> list[tuple[str, Agent]]:
        named = self.named_modules()
        return [(name + "." if name else "", m) for name, m in named if isinstance(m, Agent)]

    def sync_steps(self) -> None:
        """Compiled units advance one step tensor per optimiser; copy it to the others."""
        for agent in self.contained():
            for optimizer in agent.optimizers.values():
                first, *others = [s["step"] for s in optimizer.state.values()]
                for step in others:
                    step.copy_(first)

    # ---- state, device, seeds ----------------------------------------------------------------

    def place(self, device: torch.device | str) -> Self:
        """Move parameters, buffers and optimiser state to `device`."""
        self.to(device)
        for agent in self.contained():
            for optimizer in agent.optimizers.values():
                group = optimizer.param_groups[0]
                group["lr"] = group["lr"].to(device)
                for moments in optimizer.state.values():
                    moments.update({k: v.to(device) for k, v in moments.items()})
        return self

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
                for prefix, agent in self._prefixed()
            },
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Rebuild the begun tasks' structure, then copy tensors in place.

        Raises:
            KeyError, RuntimeError: if the state belongs to another agent or configuration.
        """
        from rl_shift.config import Task

        for prefix, agent in self._prefixed():
            saved = state["agents"][prefix]
            agent.updates = saved["updates"]
            agent.begun = [Task.from_plain(task) for task in saved["begun"]]
            agent.schedules.update(saved["schedules"])  # a longer run keeps its first schedule
            for task in agent.begun:
                agent.build(task)
        self.load_state_dict(state["module"])
        for prefix, agent in self._prefixed():
            saved = state["agents"][prefix]
            with torch.no_grad():
                for name, optimizer in agent.optimizers.items():
                    source = saved["optimizers"][name]
                    optimizer.param_groups[0]["lr"].copy_(source["lr"])
                    for k, p in agent.get_submodule(name).named_parameters():
                        for key, tensor in optimizer.state[p].items():
                            tensor.copy_(source["moments"][k][key])
            agent.load_extra_state(saved["extra"])

    @classmethod
    def stacked(cls, agents: Sequence[Self]) -> Self:
        """One agent whose tensors carry a leading seed axis, from S separate ones."""
        out = copy.deepcopy(agents[0])
        if len(agents) > 1:
            out._replace_tensors([list(a._all_tensors()) for a in agents])
            for agent in out.contained():
                agent.seeds = len(agents)
        return out

    def select(self, seed: int) -> Self:
        """The `seed`-th of the stacked agents, alone."""
        out = copy.deepcopy(self)
        if self.seeds > 1:
            with torch.no_grad():
                for tensor in out._all_tensors():
                    tensor.data = tensor.data[seed].clone()
            for agent in out.contained():
                agent.seeds = 1
        return out

    def _all_tensors(self) -> Iterator[Tensor]:
        """Parameters, buffers and moments: all that carries the seed axis."""
        yield from self.parameters()
        yield from self.buffers()
        for agent in self.contained():
            for optimizer in agent.optimizers.values():
                for moments in optimizer.state.values():
                    yield moments["exp_avg"]
                    yield moments["exp_avg_sq"]

    def _replace_tensors(self, sources: list[list[Tensor]]) -> None:
        with torch.no_grad():
            for mine, *rest in zip(self._all_tensors(), *sources):
                mine.data = torch.stack([r.data for r in rest])


class Wrapper(Agent):
    """An agent that changes another one, held as `base`, and delegates all it does not change.

    `config.base` names the base agent and `config.base_config` its fields. A wrapper passes raw
    batches to its base, which normalises them itself.
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
        self.stackable = base.stackable and type(self).stackable  # type: ignore[misc]
        self.delay = math.lcm(type(self).delay, base.delay)
        self.columns = tuple(dict.fromkeys([*type(self).columns, *base.columns]))

    @staticmethod
    def supports(observation_space: Space[Any], action_space: Space[Any]) -> str | None:
        """Whatever the base supports; it is asked when it is built."""
        return None

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """The base's action."""
        return self.base.act(obs, explore)

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """What the base wants to see."""
        return self.base.sample(buffer)

    def update(self, batch: Batch) -> Metrics:
        """The base's update."""
        return self.base.update(batch)

    def stages(self, task: Task) -> list[Stage]:
        """The base's stages."""
        return self.base.stages(task)

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Begin the task here, then in the base."""
        super().begin_task(task, buffer)
        self.base.begin_task(task, buffer)

    def end_task(self, task: Task, buffer: Buffer) -> None:
        """End it in the base."""
        self.base.end_task(task, buffer)

    def focus(self, task: Task) -> None:
        """Focus the base."""
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
