"""Learning machinery under every agent: one door for gradients, and how its tensors are kept.

`learn` differentiates a loss with respect to the named submodules only. It has two engines with one
meaning: `torch.autograd.grad` for a single seed run eagerly, and functional gradients, mapped over
seeds, for stacked seeds and inside compiled units. Our design.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Metrics]]
Gradients = dict[str, Tensor]
Transform = Callable[[Gradients], Gradients]


def _counted(update: Callable[..., Metrics]) -> Callable[..., Metrics]:
    @functools.wraps(update)
    def wrapper(self: Learner, batch: Batch) -> Metrics:
        self.ran = True  # read by `advance`, outside the compiled unit
        return update(self, batch)

    return wrapper


class Learner(nn.Module):
    """Named submodules, an Adam for each, and the operations an `update` is made of.

    Attributes:
        seeds: number of stacked seeds S; agent code never sees the axis.
        updates: calls of `update` so far.
        delay: `update` may read `updates` modulo this number and nothing else of it.
        stage: name of the current `Stage`.
        frozen: part of a finished agent that another one holds: none of its tensors changes.
    """

    delay: int = 1

    def __init__(self) -> None:
        super().__init__()
        self.seeds, self.updates, self.stage, self.ran = 1, 0, "", False
        self.frozen = False
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.schedules: dict[str, int] = {}
        self.schedule_starts: dict[str, int] = {}  # of schedules that began later than training
        self.clips: dict[str, float] = {}
        self.structure = 0  # grows whenever tensors may have been added or replaced
        self.live: dict[str, Tensor] | None = None  # set while a compiled unit is traced
        self.prefix = ""  # where this learner's tensors lie in `live`
        self._split: dict[tuple[str, ...], tuple[list[Tensor], list[Tensor]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let every `update` note that it ran."""
        super().__init_subclass__(**kwargs)
        if "update" in cls.__dict__:
            cls.update = _counted(cls.__dict__["update"])  # type: ignore[attr-defined]

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
        self.structure += 1

    def restart_schedule(self, name: str, updates: int) -> None:
        """Let a submodule's learning rate begin its schedule anew, over `updates` from now on."""
        self.schedules[name], self.schedule_starts[name] = updates, self.updates

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
            loss: a method of this agent, or of one inside it, returning (scalar, metrics).
            data: its arguments; dicts of tensors and tensors carry the seed axis when S > 1.
            transform: pure function on the gradients by name, of one seed; before clipping.

        Returns:
            The loss's metrics, detached, on the device.
        """
        if self.frozen:
            raise RuntimeError(f"{type(self).__name__} is frozen: it comes from a finished run")
        names = (names,) if isinstance(names, str) else names
        if self.live is not None:
            return self._learn_traced(self.live, names, loss, data, transform)
        own, rest = self._parameters_of(names)
        if self.seeds > 1:
            state = self._values(None)
            gradients, metrics = self._gradients(state, names, loss, data, transform)
        else:
            for p in own:
                p.requires_grad_(True)
            for p in rest:
                p.requires_grad_(False)
            with torch.enable_grad():
                value, metrics = loss(*data)
            if value.requires_grad:
                found = torch.autograd.grad(value, own, allow_unused=True, materialize_grads=True)
            else:  # it uses none of them
                found = tuple(torch.zeros_like(p, requires_grad=False) for p in own)
            gradients = dict(zip(self._names_of(names), found, strict=True))
            if transform is not None:
                gradients = transform(gradients)
        gradients = self._clipped(gradients, names)
        for p, g in zip(own, gradients.values(), strict=True):
            p.grad = g.contiguous()  # torch's fused CPU Adam ignores gradient strides
        for name in names:
            self.optimizers[name].step()
        return {k: v.detach() for k, v in metrics.items()}

    def run(self, fn: Callable[..., Any], *data: Any) -> Any:
        """`fn(*data)` without gradients; maps over the seed axis of tensors when S > 1.

        Inside an `update` it sees what the update has changed so far, compiled or not.
        """
        with torch.no_grad():
            if self.seeds == 1 and self.live is None:
                return fn(*data)
            state = self._values(self.live)
            if self.seeds == 1:
                return functional_call(self, state, (fn, *data))

            def one(state: dict[str, Tensor], *data: Any) -> Any:
                return functional_call(self, state, (fn, *data))

            axes = (0, *(0 if isinstance(x, Tensor | dict) else None for x in data))
            return vmap(one, in_dims=axes, randomness="different")(state, *data)

    def polyak(self, source: str, target: str, tau: float) -> None:
        """Target <- (1 - tau) target + tau source, over all parameters."""
        if self.live is not None:
            for k, _ in self.get_submodule(target).named_parameters():
                into, start = f"{self.prefix}{target}.{k}", f"{self.prefix}{source}.{k}"
                self.live[into] = torch.lerp(self.live[into], self.live[start], tau)
            return
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.get_submodule(target).parameters()),
                list(self.get_submodule(source).parameters()),
                tau,
            )

    def forward(self, fn: Callable[..., Any], *data: Any) -> Any:
        """Call a method of this learner or of one inside it: the door `functional_call` needs."""
        return fn(*data)

    def schedule(self) -> None:
        """Set this update's learning rates; called before each update, outside compiled units."""
        for agent in self.contained():
            if agent.frozen:
                continue
            for name, total in agent.schedules.items():
                group = agent.optimizers[name].param_groups[0]
                since = agent.updates - agent.schedule_starts.get(name, 0)
                progress = min(since / total, 1.0) if total else 0.0
                group["lr"].fill_(group["initial_lr"] * 0.5 * (1 + math.cos(math.pi * progress)))

    def advance(self, succeeded: bool = True) -> None:
        """Count the update for every contained agent whose `update` ran."""
        for agent in self.contained():
            agent.updates += int(agent.ran and succeeded)
            agent.ran = False

    def contained(self) -> Iterator[Learner]:
        """This learner and those inside it, this one first."""
        return (m for m in self.modules() if isinstance(m, Learner))

    # ---- engines -----------------------------------------------------------------------------

    def _values(self, live: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Parameters and buffers by name: the module's own, or those in a traced unit's dict."""
        if live is None:
            return {k: v.detach() for k, v in [*self.named_parameters(), *self.named_buffers()]}
        start = len(self.prefix)
        return {k[start:]: v for k, v in live.items() if k[0] != "@" and k.startswith(self.prefix)}

    def _names_of(self, names: tuple[str, ...]) -> list[str]:
        return [f"{n}.{k}" for n in names for k, _ in self.get_submodule(n).named_parameters()]

    def _parameters_of(self, names: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
        if names not in self._split:
            own: list[Tensor] = [p for n in names for p in self.get_submodule(n).parameters()]
            ids = {id(p) for p in own}
            self._split[names] = own, [p for p in self.parameters() if id(p) not in ids]
        return self._split[names]

    def _gradients(
        self,
        state: dict[str, Tensor],
        names: tuple[str, ...],
        loss: Loss,
        data: Sequence[Any],
        transform: Transform | None,
    ) -> tuple[Gradients, Metrics]:
        """Functional engine: gradients of the named submodules' tensors in `state`."""
        own = {k: state[k] for k in self._names_of(names)}
        rest = {k: v for k, v in state.items() if k not in own}

        def gradient(own: Gradients, rest: Gradients, *data: Any) -> tuple[Gradients, Metrics]:
            def value(own: Gradients) -> tuple[Tensor, Metrics]:
                result: tuple[Tensor, Metrics] = functional_call(
                    self, {**rest, **own}, (loss, *data)
                )
                return result

            gradients, metrics = grad(value, has_aux=True)(own)
            if transform is not None:  # sees one seed, and this seed's tensors of the agent
                gradients = functional_call(self, {**rest, **own}, (transform, gradients))
            return gradients, metrics

        if self.seeds > 1:
            axes = (0, 0, *(0 if isinstance(x, Tensor | dict) else None for x in data))
            return vmap(gradient, in_dims=axes, randomness="different")(own, rest, *data)
        return gradient(own, rest, *data)

    def _clipped(self, gradients: Gradients, names: tuple[str, ...]) -> Gradients:
        for name in names:
            if name not in self.clips:
                continue
            mine = {k: g for k, g in gradients.items() if k.startswith(name + ".")}
            first = 1 if self.seeds > 1 else 0  # the norm is per seed
            square = sum(g.square().reshape(*g.shape[:first], -1).sum(-1) for g in mine.values())
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
        state = self._values(live)
        gradients, metrics = self._gradients(state, names, loss, data, transform)
        gradients = self._clipped(gradients, names)
        for name in names:
            key, group = self.prefix + name, self.optimizers[name].param_groups[0]
            (b1, b2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
            lr = live["@lr." + key]
            t = live["@step." + key] + 1
            live["@step." + key] = t
            count = t.double()  # 1 - b^t, exact where `1 - b**t` cancels
            own = self._names_of((name,))
            dtype = gradients[own[0]].dtype
            rate = (lr / -torch.expm1(count * math.log(b1))).to(dtype)
            scale = (-torch.expm1(count * math.log(b2))).rsqrt().to(dtype)
            # as_strided: else the compiler computes both anew for every vector of elements
            rate, scale = rate.as_strided((), ()), scale.as_strided((), ())
            for k in own:
                g, full = gradients[k], self.prefix + k
                m = torch.lerp(live["@m." + full], g, 1 - b1)
                v = live["@v." + full] * b2 + g * g * (1 - b2)
                p = live[full] - (lr * decay) * live[full] if decay else live[full]
                live["@m." + full], live["@v." + full] = m, v
                live[full] = p - rate * m / (v.sqrt() * scale + eps)
        return metrics

    def tensors(self) -> dict[str, Tensor]:
        """All that an update may change, as detached aliases with stable addresses.

        Parameters and buffers under their names; Adam's moments, step and learning rate under
        `@m.`, `@v.`, `@step.` and `@lr.` + submodule, those of contained agents included.
        """
        found = {k: v.detach() for k, v in [*self.named_parameters(), *self.named_buffers()]}
        for prefix, agent in self.prefixed():
            for name, optimizer in agent.optimizers.items():
                for i, (k, p) in enumerate(agent.get_submodule(name).named_parameters()):
                    moments = optimizer.state[p]
                    found[f"@m.{prefix}{name}.{k}"] = moments["exp_avg"]
                    found[f"@v.{prefix}{name}.{k}"] = moments["exp_avg_sq"]
                    if i == 0:
                        found[f"@step.{prefix}{name}"] = moments["step"]
                        found[f"@lr.{prefix}{name}"] = optimizer.param_groups[0]["lr"]
        return found

    def prefixed(self) -> Sequence[tuple[str, Learner]]:
        """The contained learners with the prefixes of their tensors' names, this one first."""
        named = self.named_modules()
        return [(name + "." if name else "", m) for name, m in named if isinstance(m, Learner)]

    def sync_steps(self) -> None:
        """Compiled units advance one step tensor per optimiser; copy it to the others."""
        for agent in self.contained():
            for optimizer in agent.optimizers.values():
                first, *others = [s["step"] for s in optimizer.state.values()]
                for step in others:
                    step.copy_(first)

    # ---- device and seeds --------------------------------------------------------------------

    def place(self, device: torch.device | str) -> Self:
        """Move parameters, buffers and optimiser state to `device`."""
        self.to(device)
        for agent in self.contained():
            for optimizer in agent.optimizers.values():
                group = optimizer.param_groups[0]
                group["lr"] = group["lr"].to(device)
                for moments in optimizer.state.values():
                    moments.update({k: v.to(device) for k, v in moments.items()})
            agent.structure += 1
        return self

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
        self.sync_steps()
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
            for mine, *rest in zip(self._all_tensors(), *sources, strict=True):
                mine.data = torch.stack([r.data for r in rest])
