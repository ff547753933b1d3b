"""`ShiftWrapper`: any Gymnasium environment, changing over its life. Our design.

    make_env("HalfCheetah-v5", shift="gear:scale=0.5,period=100000")
    make_env("CartPole-v1", shift={"kind": "parameters", "values": {"length": 2}, "start": 5000})

A specification is a kind with its fields and those of a schedule: as text `KIND:field=value,...`,
several joined with "+"; as a mapping with `kind`; as a mapping from kinds to factors or fields,
`{"gravity": 2, "mass": {"body": "torso", "scale": 1.5}}`; or as a list of these under "shifts".
Parts have their names in the vocabulary of CARL: `mass_torso` is `mass` with `body=torso`.
Without schedule fields a shift acts all the time. See `rl_shift.envs.shift_kinds` and
`rl_shift.envs.schedules`.

Options, `name: true` in a mapping or a word of its own in a text ("mass:scale=2+context"):
`context` appends what `info["shift"]["params"]` says to the observation; `endless` makes terminal
transitions truncations, see `rl_shift.envs.endless`; `episodic` starts the clock anew with every
episode, as ns-gym does unless told otherwise.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from rl_shift.envs import shift_kinds as kinds
from rl_shift.envs.endless import EndlessLife
from rl_shift.envs.schedules import Schedule, make_schedule
from rl_shift.errors import UserError, nearest
from rl_shift.seeding import numpy_generator

SCHEDULE_FIELDS = ("type", "period", "start", "end", "sigma", "points")
_ELEMENTS = {
    "gravity": None, "mass": "body", "friction": "geom", "damping": "joint", "gear": "actuator"
}  # fmt: skip
KINDS: dict[str, Callable[..., kinds.Kind]] = {
    "reward_flip": kinds.RewardFlip,
    "reward_scale": kinds.RewardScale,
    "target_velocity": kinds.TargetVelocity,
    "obs_permute": kinds.ObsPermute,
    "obs_negate": kinds.ObsNegate,
    "obs_scale": kinds.ObsScale,
    "obs_bias": kinds.ObsBias,
    "obs_noise": kinds.ObsNoise,
    "obs_dropout": kinds.ObsDropout,
    "colour_swap": kinds.ColourSwap,
    "rotation": kinds.Rotation,
    "green_white": kinds.GreenWhite,
    "action_flip": kinds.ActionFlip,
    "action_gain": kinds.ActionGain,
    "action_permute": kinds.ActionPermute,
    "action_delay": kinds.ActionDelay,
    **{name: functools.partial(kinds.Scale, quantity=name) for name in _ELEMENTS},
    "wind": kinds.Wind,
    "parameters": kinds.Parameters,
    "push": kinds.Push,
}
SIGN_FLIP = {"reward": "reward_flip", "action": "action_flip", "observation": "obs_negate"}
_FIELD = re.compile(r"(?:[^,\[\]]|\[(?:[^\[\]]|\[[^\[\]]*\])*\]?)+")  # commas in brackets stay
OPTIONS = ("context", "endless", "episodic")
HOOKS = ("prepare", "action", "reward", "observation", "params")
ORDER = ("dynamics", "disturbance", "action", "reward", "observation")


@dataclass
class Shift:
    """A kind and when it acts."""

    name: str
    kind: kinds.Kind
    schedule: Schedule


@dataclass
class Plan:
    """What a specification says."""

    shifts: list[Shift]
    context: bool = False
    endless: bool = False
    episodic: bool = False


def parse(spec: str | Mapping[str, Any]) -> Plan:
    """The shifts and options of a specification.

    Raises:
        UserError: an unknown kind, schedule or field, or a value that means nothing.
    """
    if isinstance(spec, str):
        return parse(_listed(spec))
    values = dict(spec)
    options = {name: bool(values.pop(name, False)) for name in OPTIONS}
    if "shifts" in values:
        given = values.pop("shifts")
        if values or not isinstance(given, list) or not (given or options["endless"]):
            raise UserError(
                f"shift: expected a list `shifts`, perhaps {', '.join(OPTIONS)}, got {spec!r}"
            )
        return Plan([_from_text_or_mapping(s) for s in given], **options)
    if "kind" in values or not (values or options["endless"]):
        return Plan([_from_mapping(values)], **options)
    named = []
    for name, value in values.items():
        if not isinstance(value, Mapping):
            needed = _needed(KINDS[name]) if name in KINDS else []
            if not needed and name in KINDS and value not in (True, None):
                raise UserError(f"shift {name!r} takes fields or true, not {value!r}")
            value = {needed[0]: value} if needed else {}
        named.append(_from_mapping({**value, "kind": name}))
    return Plan(named, **options)


def _from_text_or_mapping(given: Any) -> Shift:
    if not isinstance(given, str | Mapping):
        raise UserError(f"shift: a shift is KIND:field=value,... or a mapping, not {given!r}")
    return _from_mapping(_from_text(given) if isinstance(given, str) else dict(given))


def with_state_std(spec: str | Mapping[str, Any], state_std: Any) -> str | Mapping[str, Any]:
    """The specification with `state_std`, (obs,) numbers, where relative noise lacks it."""
    if not isinstance(spec, str) or state_std is None:
        return spec
    listed = _listed(spec)
    for shift in listed["shifts"]:
        if shift["kind"] == "obs_noise" and "relative" in shift:
            shift["state_std"] = state_std
    return listed


def _listed(text: str) -> dict[str, Any]:
    """A text as a mapping with "shifts"; the plus sign of 1e+5 joins nothing."""
    parts = [part.strip() for part in re.split(r"(?<![0-9.][eE])\+", text)]
    words = [part for part in parts if part in OPTIONS]
    shifts = [_from_text(part) for part in parts if part not in OPTIONS]
    return {"shifts": shifts, **dict.fromkeys(words, True)}


def _needed(make: Callable[..., kinds.Kind]) -> list[str]:
    """Fields without a default."""
    found = inspect.signature(make).parameters.items()
    return [k for k, p in found if p.default is inspect.Parameter.empty and k != "where"]


def _from_text(text: str) -> dict[str, Any]:
    name, _, rest = text.partition(":")
    values: dict[str, Any] = {"kind": name.strip()}
    for part in filter(None, (p.strip() for p in _FIELD.findall(rest))):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise UserError(f"shift {text!r}: expected field=value, got {part!r}")
        values[key] = value
        if value.startswith("["):
            try:
                values[key] = json.loads(value)
            except ValueError as error:
                raise UserError(
                    f"shift {text!r}: {value!r} is no list such as [1, 2] or [[0, 1], [500, 0]]"
                ) from error
    return values


def _from_mapping(values: dict[str, Any]) -> Shift:
    values = dict(values)
    name, target = str(values.pop("kind", "")), values.pop("target", None)
    if name == "sign_flip":
        name = SIGN_FLIP.get(str(target), name)
    quantity, _, part = name.partition("_")
    if part and _ELEMENTS.get(quantity):
        name = quantity
        values.setdefault(str(_ELEMENTS[quantity]), part)
    where = f"shift {name!r}"
    if name == "sign_flip":
        raise UserError(f"{where} needs a target: {', '.join(SIGN_FLIP)}")
    if name not in KINDS:
        raise UserError(f"unknown {where}{nearest(name, KINDS)}; the shifts are {', '.join(KINDS)}")
    timing = values.pop("schedule", {})
    if not isinstance(timing, Mapping):
        raise UserError(f"{where}: schedule holds fields such as period, not {timing!r}")
    timing = dict(timing)
    timing |= {key: values.pop(key) for key in SCHEDULE_FIELDS if key in values}
    element = _ELEMENTS.get(name)
    if element is not None and element in values:
        values["element"] = values.pop(element)
    make = KINDS[name]
    if name == "parameters":
        values = {"values": values.pop("values", None) or values}
    taken = [k for k in inspect.signature(make).parameters if k not in ("where", "quantity")]
    known = [element or k if k == "element" else k for k in taken if k != "element" or element]
    for key in values:
        if key not in taken:
            all_known = [*known, *SCHEDULE_FIELDS]
            raise UserError(
                f"{where} has no field {key!r}{nearest(key, all_known)}; it has "
                f"{', '.join(known) or 'none'}, and those of a schedule: "
                f"{', '.join(SCHEDULE_FIELDS)}"
            )
    needed = [k for k in _needed(make) if k not in values]
    if needed:
        raise UserError(f"{where} needs {', '.join(needed)}, such as {name}:{needed[0]}=...")
    takes_where = "where" in inspect.signature(make).parameters
    kind = make(where=where, **values) if takes_where else make()
    if target is not None and target != kind.target:
        raise UserError(f"{where} changes the {kind.target}, not the {target}")
    return Shift(name, kind, make_schedule(timing, where))


class ShiftWrapper(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Applies shifts in the order dynamics, action, (step), reward, observation.

    One clock: the steps of this environment's life. It survives resets, so a regime persists from
    episode to episode (unless `episodic`); a reset with a seed begins a new life at step 0. Spaces
    are unchanged. `info["shift"]` is the truth for metrics, never for agents: `t` of the
    transition, `alpha` of the first shift, `regime` (bit i: shift i acts by at least half),
    `changed` (the regime differs from the step before) and `params`; shifts are counted as the
    specification lists them.

    Args:
        env: as agents see it: float32 vectors or uint8 images, actions in [-1, 1] or choices.
        spec: see `parse`.

    Raises:
        UserError: what `parse` raises, and a shift of something that the environment lacks.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], spec: str | Mapping[str, Any]) -> None:
        plan = parse(spec)
        RecordConstructorArgs.__init__(self, spec=spec)
        super().__init__(EndlessLife(env) if plan.endless else env)
        self.shifts, self.context, self.episodic = plan.shifts, plan.context, plan.episodic
        for shift in self.shifts:
            shift.kind.bind(env, f"shift {shift.name!r}")
        self.rng = numpy_generator(0, "shift")
        # Only hooks that do something are called: an idle one costs more than a grid world's step.
        self._acting = {hook: self._overriding(hook) for hook in HOOKS}
        self._set_clock(0)
        if self.context:
            size = len(self._params)
            space = env.observation_space
            if not isinstance(space, spaces.Box) or len(space.shape) != 1:
                raise UserError(
                    f"shift: a context is appended to vectors, but the observations are {space}; "
                    "leave `context` out"
                )
            if not size:
                names = ", ".join(shift.name for shift in self.shifts) or "no shift at all"
                raise UserError(
                    f"shift: {names} has no numbers that a context could show; leave `context` out"
                )
            wide = np.full(size, np.inf, np.float32)
            self.observation_space = spaces.Box(
                np.concatenate([space.low, -wide]),
                np.concatenate([space.high, wide]),
                dtype=np.float32,
            )

    def _overriding(self, hook: str) -> list[tuple[int, kinds.Kind]]:
        """The kinds that have the hook, each with its place in the specification."""
        idle = getattr(kinds.Kind, hook)
        pairs = [(i, shift.kind) for i, shift in enumerate(self.shifts)]
        if hook != "params":  # what is told keeps the specification's order, what acts does not
            pairs.sort(key=lambda pair: ORDER.index(pair[1].target))
        return [(i, kind) for i, kind in pairs if getattr(type(kind), hook) is not idle]

    def _at(self, t: int) -> list[float]:
        return [shift.schedule.alpha(t) for shift in self.shifts]

    def _set_clock(self, t: int) -> None:
        """Everything that follows from the clock, whatever it showed before."""
        self.t, self._alphas = t, self._at(t)
        self._before = _regime(self._at(t - 1)) if t > 0 else _regime(self._alphas)
        self._describe()

    def _tick(self) -> None:
        """One step later; what stays as it was is not computed again."""
        alphas = self._at(self.t + 1)
        self.t, self._before = self.t + 1, self._regime
        if alphas != self._alphas:
            self._alphas = alphas
            self._describe()

    def _describe(self) -> None:
        self._regime = _regime(self._alphas)
        self._params: dict[str, float] = {}
        for i, kind in self._acting["params"]:
            self._params |= kind.params(self._alphas[i])

    def _info(self) -> dict[str, Any]:
        return {
            "t": self.t,
            "alpha": self._alphas[0] if self._alphas else 0.0,
            "regime": self._regime,
            "changed": self._regime != self._before,
            "params": dict(self._params),  # whoever keeps or changes it does not share ours
        }

    def _seen(self, obs: Any) -> Any:
        """The observation at the clock's present step."""
        for i, kind in self._acting["observation"]:
            obs = kind.observation(obs, self._alphas[i], self.rng)
        if self.context:
            obs = np.concatenate([obs, np.array(list(self._params.values()), np.float32)])
        return obs

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """A new episode of the same life, or a new life with a seed."""
        if seed is not None:
            self.rng = numpy_generator(seed, "shift")
        if seed is not None or self.episodic:
            self._set_clock(0)
        for i, kind in self._acting["prepare"]:
            kind.prepare(self._alphas[i])
        for shift in self.shifts:
            shift.kind.reset()
        obs, info = self.env.reset(seed=seed, options=options)
        return self._seen(obs), {**info, "shift": self._info()}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One transition; dynamics, action and reward of step t, the observation of t + 1."""
        alphas = self._alphas
        for i, kind in self._acting["prepare"]:
            kind.prepare(alphas[i])
        for i, kind in self._acting["action"]:
            action = kind.action(action, alphas[i])
        obs, reward, terminated, truncated, info = self.env.step(action)
        for i, kind in self._acting["reward"]:
            reward = kind.reward(float(reward), info, alphas[i])
        info = {**info, "shift": self._info()}
        self._tick()
        return self._seen(obs), reward, terminated, truncated, info

    def state(self) -> dict[str, Any]:
        """The clock, the noise and what waits; dynamics follow from the clock."""
        return {
            "t": self.t,
            "rng": self.rng.bit_generator.state,
            "kinds": {str(i): shift.kind.state() for i, shift in enumerate(self.shifts)},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; before the inner layers do, as `set_env_state` goes."""
        self._set_clock(int(state["t"]))
        self.rng.bit_generator.state = state["rng"]
        before = self._at(max(self.t - 1, 0))
        for i, shift in enumerate(self.shifts):
            shift.kind.load_state(state["kinds"][str(i)])
            shift.kind.prepare(before[i])  # as the last step left it


def _regime(alphas: list[float]) -> int:
    return sum(1 << i for i, alpha in enumerate(alphas) if alpha >= 0.5)
