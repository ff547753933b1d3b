"""What can shift: observations, actions, rewards, dynamics, disturbances. Our design.

A kind is a small object with the hooks it needs; `rl_shift.envs.shift` calls them in the order
dynamics, action, step, reward, observation. `alpha` in [0, 1] mixes the environment as it is (0)
with the shifted one (1). Kinds that cannot be mixed, such as permutations, act from 0.5 on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rl_shift.envs.values import listed, number, seed_of, whole
from rl_shift.errors import UserError, nearest
from rl_shift.seeding import numpy_generator

Env = gymnasium.Env[Any, Any]


class Kind:
    """A shift of one thing; the hooks do nothing by default.

    Attributes:
        target: observation, action, reward, dynamics or disturbance.
    """

    target = ""

    def bind(self, env: Env, where: str) -> None:
        """Look at the environment, remember its nominal values, refuse what cannot be."""

    def prepare(self, alpha: float) -> None:
        """Change the environment before a step."""

    def action(self, action: Any, alpha: float) -> Any:
        """The action that the environment gets."""
        return action

    def reward(self, reward: float, info: dict[str, Any], alpha: float) -> float:
        """The reward that the learner gets."""
        return reward

    def observation(self, obs: Any, alpha: float, rng: np.random.Generator) -> Any:
        """The observation that the learner gets."""
        return obs

    def params(self, alpha: float) -> dict[str, float]:
        """The truth, for `info["shift"]`."""
        return {}

    def reset(self) -> None:
        """A new episode begins."""

    def state(self) -> dict[str, Any]:
        """What is remembered from step to step, as tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


def _box(space: Any, what: str, where: str) -> tuple[int, ...]:
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise UserError(f"{where}: it needs {what} that are a vector, this environment has {space}")
    return space.shape


def _is_mujoco(env: Env) -> bool:
    return hasattr(getattr(env.unwrapped, "model", None), "body_mass")


def _name(env: Env) -> str:
    return env.spec.id if env.spec else type(env.unwrapped).__name__


def _tells(env: Env, keys: tuple[str, ...], where: str) -> None:
    """One step says whether `info` holds the keys; the generator is put back as it was."""
    inner = env.unwrapped
    kept = inner._np_random, inner._np_random_seed
    env.reset(seed=0)
    space: Any = env.action_space
    action = np.zeros(space.shape, space.dtype) if isinstance(space, spaces.Box) else space.start
    info = env.step(action)[4]
    inner._np_random, inner._np_random_seed = kept
    missing = [key for key in keys if key not in info]
    if missing:
        raise UserError(
            f"{where}: {_name(env)} gives no {' and '.join(missing)} in its info; HalfCheetah, "
            "Hopper, Walker2d, Ant, Humanoid and Swimmer -v5 do"
        )


# ---- rewards -----------------------------------------------------------------------------------


class RewardFlip(Kind):
    """r + (s - 1) x, s from +1 to -1.

    `part` says what x is: "forward" is `info["reward_forward"]`, so that control costs and survival
    stay (the default for MuJoCo environments), "all" is r itself (the default elsewhere).
    """

    target = "reward"

    def __init__(self, where: str, part: Any = None) -> None:
        if part not in (None, "forward", "all"):
            raise UserError(f"{where}: part is forward or all, not {part!r}")
        self.part = part

    def bind(self, env: Env, where: str) -> None:
        """The forward part must be told by the environment."""
        self.forward = self.part == "forward" or (self.part is None and _is_mujoco(env))
        if self.forward:
            _tells(env, ("reward_forward",), f"{where} (part=all flips the whole reward)")

    def reward(self, reward: float, info: dict[str, Any], alpha: float) -> float:
        """Exactly r at alpha 0."""
        return reward - 2 * alpha * float(info["reward_forward"] if self.forward else reward)

    def params(self, alpha: float) -> dict[str, float]:
        """The sign."""
        return {"sign": 1 - 2 * alpha}


class RewardScale(Kind):
    """The reward times a factor."""

    target = "reward"

    def __init__(self, where: str, scale: Any) -> None:
        self.scale = number(scale, "scale", where)

    def reward(self, reward: float, info: dict[str, Any], alpha: float) -> float:
        """Factor 1 at alpha 0, `scale` at 1."""
        return reward * (1 + alpha * (self.scale - 1))

    def params(self, alpha: float) -> dict[str, float]:
        """The factor."""
        return {"reward_scale": 1 + alpha * (self.scale - 1)}


class TargetVelocity(Kind):
    """-|x_velocity - v| in place of the forward reward, v from `base` to `value` in m/s."""

    target = "reward"

    def __init__(self, where: str, value: Any, base: Any = 0.0) -> None:
        self.base, self.value = number(base, "base", where), number(value, "value", where)

    def bind(self, env: Env, where: str) -> None:
        """MuJoCo's walkers say what they run at."""
        _tells(env, ("x_velocity", "reward_forward"), where)

    def reward(self, reward: float, info: dict[str, Any], alpha: float) -> float:
        """The rest of the reward (control, survival) stays."""
        rest = reward - float(info["reward_forward"])
        return rest - abs(float(info["x_velocity"]) - self.params(alpha)["velocity"])

    def params(self, alpha: float) -> dict[str, float]:
        """The velocity that is asked for."""
        return {"velocity": self.base + alpha * (self.value - self.base)}


# ---- observations ------------------------------------------------------------------------------


class ObsPermute(Kind):
    """A fixed random order of the observation's numbers."""

    target = "observation"

    def __init__(self, where: str, seed: Any = 0) -> None:
        self.seed = seed_of(seed, where)

    def bind(self, env: Env, where: str) -> None:
        """Draw the order."""
        (size,) = _box(env.observation_space, "observations", where)
        self.order = numpy_generator(self.seed, "obs_permute").permutation(size)

    def observation(self, obs: Any, alpha: float, rng: np.random.Generator) -> Any:
        """(obs,) -> (obs,)."""
        return obs[self.order] if alpha >= 0.5 else obs


class ObsNegate(Kind):
    """Flipped signs: of the dimensions in `dims`, or of a random half."""

    target = "observation"

    def __init__(self, where: str, dims: Any = None, seed: Any = 0) -> None:
        self.seed, self.dims = seed_of(seed, where), None
        if dims is not None:
            self.dims = [whole(d, "dims", where, least=0) for d in listed(dims)]
            if not self.dims:
                raise UserError(f"{where}: dims names no dimension; leave it out for a random half")

    def bind(self, env: Env, where: str) -> None:
        """Draw the signs."""
        (size,) = _box(env.observation_space, "observations", where)
        if self.dims is None:
            chosen = numpy_generator(self.seed, "obs_negate").permutation(size)[: (size + 1) // 2]
        else:
            chosen = np.array(self.dims)
            if chosen.max() >= size:
                raise UserError(f"{where}: dims must lie in 0..{size - 1}, got {self.dims}")
        self.signs = np.ones(size, np.float32)
        self.signs[chosen] = -1

    def observation(self, obs: Any, alpha: float, rng: np.random.Generator) -> Any:
        """(obs,) -> (obs,)."""
        return obs * self.signs if alpha >= 0.5 else obs


class ObsScale(Kind):
    """Observations times a factor."""

    target = "observation"

    def __init__(self, where: str, scale: Any) -> None:
        self.scale = number(scale, "scale", where)

    def bind(self, env: Env, where: str) -> None:
        """Vectors only."""
        _box(env.observation_space, "observations", where)

    def observation(self, obs: Any, alpha: float, rng: np.random.Generator) -> Any:
        """(obs,) -> (obs,)."""
        return obs * np.float32(self.params(alpha)["obs_scale"]) if alpha else obs

    def params(self, alpha: float) -> dict[str, float]:
        """The factor."""
        return {"obs_scale": 1 + alpha * (self.scale - 1)}


class ObsBias(Kind):
    """A number added to every dimension."""

    target = "observation"

    def __init__(self, where: str, value: Any) -> None:
        self.value = number(value, "value", where)

    def bind(self, env: Env, where: str) -> None:
        """Vectors only."""
        _box(env.observation_space, "observations", where)

    def observation(self, obs: Any, alpha: float, rng: np.random.Generator) -> Any:
        """(obs,) -> (obs,)."""
        return obs + np.float32(alpha * self.value) if alpha else obs

    def params(self, alpha: float) -> dict[str, float]:
        """What is added."""
        return {"obs_bias": alpha * self.value}


class ObsNoise(Kind):
    """Gaussian noise of standard deviation `std`.

    With `relative`, `std` is in units of the states' own deviation `state_std` (obs,): that of the
    data a policy was trained on, which `rl-shift evaluate` fills in.
    """

    target = "observation"

    def __init__(self, where: str, std: Any, relative: Any = False, state_std: Any = None) -> None:
        self.std = number(std, "std", where, least=0)
        self.relative = str(relative).lower() in ("true", "1", "yes")
        self.state_std = state_std
        for value in [] if state_std is None else listed(state_std):
            number(value, "state_std", where, least=0)

    def bind(self, env: Env, where: str) -> None:
        """Vectors only."""
        (size,) = _box(env.observation_space, "observations", where)
        self.unit = np.ones(size, np.float32)
        if self.relative:
            if self.state_std is None or np.shape(self.state_std) != (size,):
                raise UserError(
                    f"{where}: relative noise needs state_std, {size} numbers; `rl-shift evaluate` "
                    "takes them from agents that normalise their observations"
                )
            self.unit = np.asarray(self.state_std, np.float32)

    def observation(self, obs: Any, alpha: float, rng: np.random.Generator) -> Any:
        """(obs,) -> (obs,); nothing is drawn at alpha 0."""
        if not alpha:
            return obs
        noise = rng.standard_normal(len(self.unit), dtype=np.float32)
        return obs + np.float32(alpha * self.std) * self.unit * noise

    def params(self, alpha: float) -> dict[str, float]:
        """The standard deviation."""
        return {"obs_noise": alpha * self.std}


class ObsDropout(Kind):
    """Each number is zero with probability `p`."""

    target = "observation"

    def __init__(self, where: str, p: Any) -> None:
        self.p = number(p, "p", where)
        if not 0 <= self.p <= 1:
            raise UserError(f"{where}: p is a probability, got {self.p}")

    def bind(self, env: Env, where: str) -> None:
        """Vectors only."""
        _box(env.observation_space, "observations", where)

    def observation(self, obs: Any, alpha: float, rng: np.random.Generator) -> Any:
        """(obs,) -> (obs,); nothing is drawn at alpha 0."""
        return obs * (rng.random(len(obs)) >= alpha * self.p).astype(np.float32) if alpha else obs

    def params(self, alpha: float) -> dict[str, float]:
        """The probability."""
        return {"obs_dropout": alpha * self.p}


class _Image(Kind):
    """A change of JellyBean's view."""

    target = "observation"

    def bind(self, env: Env, where: str) -> None:
        """Square images of zeros and ones with three colours."""
        space = env.observation_space
        shape: Any = getattr(space, "shape", None) or ()
        if len(shape) != 3 or shape[0] != shape[1] or shape[2] != 3:
            raise UserError(f"{where}: it needs square images of three colours, not {space}")

    def observation(self, obs: Any, alpha: float, rng: np.random.Generator) -> Any:
        """(side, side, 3) -> the same shape."""
        return self.changed(obs) if alpha >= 0.5 else obs

    def changed(self, obs: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The shifted view."""
        raise NotImplementedError


# Quadrants (left behind, right behind, left ahead, right ahead): what empty, green and red become.
_SWAP = (("010", "100", "000"), ("100", "111", "010"), ("011", "110", "101"), ("111", "100", "011"))


class ColourSwap(_Image):
    """Colours of empty, green and red cells change by quadrant of the view; injective in each."""

    def bind(self, env: Env, where: str) -> None:
        """A table from place and colour to colour, (side, side, 8, 3)."""
        super().bind(env, where)
        shape: Any = env.observation_space.shape
        side = int(shape[0])
        colours = np.array([[c >> 2 & 1, c >> 1 & 1, c & 1] for c in range(8)], np.uint8)
        table = np.broadcast_to(colours, (side, side, 8, 3)).copy()
        split = side // 2
        for quadrant, codes in enumerate(_SWAP):
            lateral = slice(split, None) if quadrant % 2 else slice(0, split)
            forward = slice(split, None) if quadrant >= 2 else slice(0, split)
            for source, code in zip((0b000, 0b010, 0b100), codes, strict=True):
                table[lateral, forward, source] = [int(bit) for bit in code]
        self.table = table
        self.places = np.indices((side, side))

    def changed(self, obs: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Every pixel by its own quadrant's map."""
        code = 4 * obs[..., 0] + 2 * obs[..., 1] + obs[..., 2]
        swapped: NDArray[np.uint8] = self.table[self.places[0], self.places[1], code]
        return swapped


class Rotation(_Image):
    """The view turned by 180 degrees."""

    def changed(self, obs: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What is ahead appears behind."""
        return np.ascontiguousarray(obs[::-1, ::-1])


class GreenWhite(_Image):
    """Empty and green cells change places."""

    def changed(self, obs: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Only whole-pixel matches."""
        plain = (obs[..., 0] == 0) & (obs[..., 2] == 0)
        out = obs.copy()
        out[..., 1] = np.where(plain, 1 - obs[..., 1], obs[..., 1])
        return out


# ---- actions -----------------------------------------------------------------------------------


class ActionFlip(Kind):
    """The action's sign, (1 - 2 alpha) a; discrete choices are counted from the other end."""

    target = "action"

    def bind(self, env: Env, where: str) -> None:
        """Boxes and choices."""
        space = env.action_space
        if not isinstance(space, spaces.Box | spaces.Discrete):
            raise UserError(f"{where}: it needs a box or discrete actions, not {space}")
        self.space = space

    def action(self, action: Any, alpha: float) -> Any:
        """(action,) in [-1, 1], or a choice."""
        if isinstance(self.space, spaces.Discrete):
            last = 2 * self.space.start + self.space.n - 1
            return last - action if alpha >= 0.5 else action
        return action * np.float32(1 - 2 * alpha) if alpha else action

    def params(self, alpha: float) -> dict[str, float]:
        """The sign."""
        return {"action_sign": 1 - 2 * alpha}


class ActionGain(Kind):
    """The action times a factor (clipped by the environment)."""

    target = "action"

    def __init__(self, where: str, scale: Any) -> None:
        self.scale = number(scale, "scale", where)

    def bind(self, env: Env, where: str) -> None:
        """Vectors only."""
        _box(env.action_space, "actions", where)

    def action(self, action: Any, alpha: float) -> Any:
        """(action,) -> (action,)."""
        return action * np.float32(self.params(alpha)["action_gain"]) if alpha else action

    def params(self, alpha: float) -> dict[str, float]:
        """The factor."""
        return {"action_gain": 1 + alpha * (self.scale - 1)}


class ActionPermute(Kind):
    """A fixed random order of the action's numbers, or of the choices."""

    target = "action"

    def __init__(self, where: str, seed: Any = 0) -> None:
        self.seed = seed_of(seed, where)

    def bind(self, env: Env, where: str) -> None:
        """Draw the order; one that changes something."""
        space = env.action_space
        self.start = int(space.start) if isinstance(space, spaces.Discrete) else None
        size = (
            int(space.n) if isinstance(space, spaces.Discrete) else _box(space, "actions", where)[0]
        )
        rng = numpy_generator(self.seed, "action_permute")
        self.order = rng.permutation(size)
        while size > 1 and (self.order == np.arange(size)).all():
            self.order = rng.permutation(size)

    def action(self, action: Any, alpha: float) -> Any:
        """(action,) or a choice."""
        if alpha < 0.5:
            return action
        if self.start is not None:
            return self.start + self.order[action - self.start]
        return action[self.order]


class ActionDelay(Kind):
    """The action of `steps` steps ago; zeros (or the first choice) at an episode's start."""

    target = "action"

    def __init__(self, where: str, steps: Any) -> None:
        self.steps = whole(steps, "steps", where, least=1)

    def bind(self, env: Env, where: str) -> None:
        """Boxes and choices."""
        space = env.action_space
        if isinstance(space, spaces.Discrete):
            self.first: Any = space.start
        else:
            self.first = np.zeros(space.shape or (), np.float32)
        self.waiting: list[Any] = [self.first] * self.steps

    def reset(self) -> None:
        """Nothing was done before."""
        self.waiting = [self.first] * self.steps

    def state(self) -> dict[str, Any]:
        """The actions that wait."""
        import torch

        return {"waiting": torch.from_numpy(np.array(self.waiting))}

    def load_state(self, state: dict[str, Any]) -> None:
        """As `state` gave them."""
        self.waiting = list(state["waiting"].numpy().copy())

    def action(self, action: Any, alpha: float) -> Any:
        """Remembered whether it acts or not, so that it may begin at any step."""
        self.waiting.append(np.copy(action))
        delayed = self.waiting.pop(0)
        return delayed if alpha >= 0.5 else action


# ---- dynamics ----------------------------------------------------------------------------------


class Scale(Kind):
    """A physical quantity times a factor, for all elements or for the named one.

    MuJoCo: gravity, mass (with inertia), friction (sliding), damping, gear. Other environments:
    an attribute or parameter of that name.
    """

    target = "dynamics"

    def __init__(self, where: str, quantity: str, scale: Any, element: Any = None) -> None:
        self.quantity, self.element = quantity, element
        # A body without mass has no dynamics, and MuJoCo's solver none without inertia.
        above = 0.0 if quantity == "mass" else -math.inf
        least = 0.0 if quantity in ("friction", "damping") else -math.inf
        self.scale = number(scale, "scale", where, least, above)
        self.now = 0.0
        self.scratch: Any = None

    def bind(self, env: Env, where: str) -> None:
        """Keep the nominal values: scaling never accumulates."""
        self.model: Any = None
        if not _is_mujoco(env):
            self.plain = Parameters(where, {self.quantity: 1.0})
            self.plain.bind(env, where)
            self.plain.sets = {
                name: (base, base * self.scale) for name, (base, _) in self.plain.sets.items()
            }
            return
        model: Any = _mujoco(env, where)
        self.model, q = model, self.quantity
        if q == "gravity":
            self._arrays, names = [model.opt.gravity], []
        elif q == "mass":
            self._arrays = [model.body_mass, model.body_inertia]
            names = [model.body(i).name for i in range(model.nbody)]
        elif q == "friction":
            self._arrays = [model.geom_friction[:, :1]]
            names = [model.geom(i).name for i in range(model.ngeom)]
        elif q == "damping":
            self._arrays = [model.dof_damping]
            names = [model.joint(int(j)).name for j in model.dof_jntid]
        else:
            self._arrays = [model.actuator_gear]
            names = [model.actuator(i).name for i in range(model.nu)]
        self.rows: Any = slice(None)
        if self.element is not None:
            rows = [i for i, name in enumerate(names) if name == str(self.element)]
            if not rows:
                known = [name for name in dict.fromkeys(names) if name]
                raise UserError(
                    f"{where}: nothing called {self.element!r}"
                    f"{nearest(str(self.element), known)}; it has {', '.join(known) or 'no parts'}"
                )
            self.rows = rows
        self._nominal = [array.copy() for array in self._arrays]

    def prepare(self, alpha: float) -> None:
        """Only when alpha has changed; alpha 0 restores the nominal model bit for bit."""
        if self.model is None:
            self.plain.prepare(alpha)
        elif alpha != self.now:
            factor = 1 + alpha * (self.scale - 1)
            for array, nominal in zip(self._arrays, self._nominal, strict=True):
                array[self.rows] = nominal[self.rows] * factor if alpha else nominal[self.rows]
            if self.quantity == "mass":
                import mujoco

                # On data of its own: it would move the simulated state to the reference pose.
                self.scratch = self.scratch or mujoco.MjData(self.model)
                mujoco.mj_setConst(self.model, self.scratch)
            self.now = alpha

    def params(self, alpha: float) -> dict[str, float]:
        """The factor."""
        name = self.quantity + (f"_{self.element}" if self.element is not None else "")
        return {name: 1 + alpha * (self.scale - 1)}


class Wind(Kind):
    """Wind (x, y, z) in m/s; where there is no medium to blow, one of `density` kg/m^3 is added."""

    target = "dynamics"

    def __init__(
        self, where: str, x: Any = 0.0, y: Any = 0.0, z: Any = 0.0, density: Any = 1.2
    ) -> None:
        self.wind = np.array([number(v, n, where) for v, n in ((x, "x"), (y, "y"), (z, "z"))])
        self.density = number(density, "density", where, least=0)

    def bind(self, env: Env, where: str) -> None:
        """MuJoCo only."""
        self.model = _mujoco(env, where)
        self.still, self.medium = self.model.opt.wind.copy(), float(self.model.opt.density)
        self.airless = not (self.medium or self.model.opt.viscosity)

    def prepare(self, alpha: float) -> None:
        """Set the wind and its medium."""
        self.model.opt.wind[:] = self.still + alpha * self.wind
        if self.airless:
            self.model.opt.density = alpha * self.density

    def params(self, alpha: float) -> dict[str, float]:
        """Metres per second."""
        return {f"wind_{k}": float(alpha * v) for k, v in zip("xyz", self.wind, strict=True)}


class Parameters(Kind):
    """Numbers of an environment that is no MuJoCo model, such as CartPole's `length`.

    `name=value` changes from what it is, `name=base/value` between two given values.
    """

    target = "dynamics"

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        if not isinstance(values, Mapping) or not values:
            raise UserError(f"{where}: name the parameters, such as parameters:length=1")
        self.given: dict[str, tuple[float | None, float]] = {}
        for name, value in values.items():
            pair = value.split("/") if isinstance(value, str) else listed(value)
            above = 0.0 if any(word in name for word in ("mass", "length")) else -math.inf
            numbers = [number(v, name, where, above=above) for v in pair]
            if not 1 <= len(numbers) <= 2:
                raise UserError(f"{where}: {name} is one value, or base/value, not {value!r}")
            self.given[name] = (numbers[0] if len(numbers) == 2 else None, numbers[-1])

    def bind(self, env: Env, where: str) -> None:
        """A dictionary `parameters` of the environment, or its numeric attributes."""
        self.owner = env.unwrapped
        if _is_mujoco(env):
            raise UserError(
                f"{where}: this is a MuJoCo environment; use gravity, mass, friction, damping, gear"
            )
        known = dict(_numbers(self.owner))
        self.sets: dict[str, tuple[float, float]] = {}
        for name, (base, value) in self.given.items():
            if name not in known:
                raise UserError(
                    f"{where}: {_name(env)} is no MuJoCo environment and has no {name!r}"
                    f"{nearest(name, known)}; it has {', '.join(sorted(known)) or 'no parameters'}"
                )
            self.sets[name] = (known[name] if base is None else base, value)

    def prepare(self, alpha: float) -> None:
        """Linear between both values."""
        table = getattr(self.owner, "parameters", None)
        for name, value in self.params(alpha).items():
            if isinstance(table, dict):
                table[name] = value
            else:
                setattr(self.owner, name, value)
        if hasattr(self.owner, "polemass_length"):  # what CartPole derives once, in its constructor
            self.owner.total_mass = self.owner.masspole + self.owner.masscart  # type: ignore[attr-defined]
            self.owner.polemass_length = self.owner.masspole * self.owner.length  # type: ignore[attr-defined]

    def params(self, alpha: float) -> dict[str, float]:
        """The values."""
        return {k: (1 - alpha) * base + alpha * value for k, (base, value) in self.sets.items()}


def _numbers(owner: Any) -> Iterable[tuple[str, float]]:
    """What `Parameters` may change: a table `parameters`, else the public attributes of type float.

    Those of its classes count (Acrobot's masses); what CartPole derives from others does not.
    """
    table = getattr(owner, "parameters", None)
    if isinstance(table, dict):
        yield from ((name, float(value)) for name, value in table.items())
        return
    classes = [c for c in type(owner).__mro__ if not c.__module__.startswith("gymnasium.core")]
    found = {name: v for c in reversed(classes) for name, v in vars(c).items()} | vars(owner)
    for name, value in found.items():
        derived = name in ("total_mass", "polemass_length")
        if isinstance(value, float) and name[0] != "_" and not derived:
            yield name, value


def _mujoco(env: Env, where: str) -> Any:
    if not _is_mujoco(env):
        raise UserError(f"{where}: {_name(env)} is no MuJoCo environment")
    return env.unwrapped.model  # type: ignore[attr-defined]


# ---- disturbances ------------------------------------------------------------------------------


class Push(Kind):
    """A force (x, y, z) in newtons on a body, at every step."""

    target = "disturbance"

    def __init__(
        self, where: str, x: Any = 0.0, y: Any = 0.0, z: Any = 0.0, body: Any = "torso"
    ) -> None:
        self.force = np.array([number(v, n, where) for v, n in ((x, "x"), (y, "y"), (z, "z"))])
        self.body = str(body)

    def bind(self, env: Env, where: str) -> None:
        """Find the body."""
        model = _mujoco(env, where)
        names = [model.body(i).name for i in range(1, model.nbody)]
        if self.body not in names:
            raise UserError(
                f"{where}: no body {self.body!r}{nearest(self.body, names)}; it has "
                f"{', '.join(names)}"
            )
        self.index, self.env = model.body(self.body).id, env.unwrapped

    def prepare(self, alpha: float) -> None:
        """MuJoCo keeps applied forces, so it is set anew every time."""
        self.env.data.xfrc_applied[self.index, :3] = alpha * self.force  # type: ignore[attr-defined]

    def params(self, alpha: float) -> dict[str, float]:
        """Newtons."""
        return {f"push_{k}": float(alpha * v) for k, v in zip("xyz", self.force, strict=True)}
