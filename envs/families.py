"""Families of MuJoCo tasks that differ in a goal or in the body, for continual learners.

Rewards, terminations, observations and grids follow published code (katerakelly/oyster,
eric-mitchell/macaw, dennisl88/rand_param_envs) on Gymnasium's MuJoCo environments; episodes last
200 steps. Where published code draws its tasks unseeded, ours have fixed seeds. A member's id ends
in its number, `rl_shift/CheetahVel-7-v0`; `gymnasium.make("rl_shift/CheetahVel-v0", goal=1.5)`
takes any goal, and `rl_shift/CheetahVelGoals-v0` draws one per episode and shows it: one agent
trained there knows every member. No published reference scores are known: returns are scored by
those that a dataset of ours brings along, where it does.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv
from gymnasium.spaces import Box
from numpy.typing import NDArray

from rl_shift.seeding import numpy_generator

Floats = NDArray[np.float64]

# MACAW, CoD and CuGRO: v*_i = 0.075 (i + 1); MACAW tests on 2, 7, 15, 23, 26
CHEETAH_VELOCITIES = tuple(float(v) for v in np.linspace(0.075, 3.0, 40))
# MACAW and CoD, radians; MACAW tests on 6, 17, 23, 30, 41
ANT_DIRECTIONS = (
    1.2034, 0.4266, 4.9448, 4.1239, 4.0057, 3.6166, 0.2454, 2.2482, 5.9419, 0.3773,
    5.4289, 5.5122, 0.3217, 4.0993, 3.4668, 3.7543, 3.0381, 1.7781, 1.8707, 3.5281,
    2.4884, 4.9556, 2.6294, 0.9042, 0.9482, 0.3471, 4.5116, 1.8367, 1.2489, 5.2236,
    3.5688, 0.5174, 3.4243, 0.9988, 4.2522, 0.7444, 2.7960, 5.5794, 5.0094, 0.4271,
    6.0368, 4.1419, 4.5162, 4.6720, 5.5778, 0.8416, 4.8819, 5.2653, 5.2107, 0.1832,
)  # fmt: skip
# Members in the order of published sequences; `ten` and `four` are ours. CuGRO's json lists ids 0
# to 40 in steps of 10, but its loader multiplies the index by 5.
SEQUENCES = {
    "CheetahVel/cugro": (0, 5, 10, 15, 20),
    "CheetahVel/ten": (0, 4, 8, 12, 16, 20, 24, 28, 32, 36),
    "AntDir/cod-4": (10, 15, 19, 25),
    "AntDir/cod-6": (4, 18, 26, 34, 42, 49),
    "WalkerRandParams/four": (0, 1, 2, 3),
    "HopperRandParams/four": (0, 1, 2, 3),
}


class CheetahVel(HalfCheetahEnv):
    """Run at a velocity: reward -|v_x - goal| - 0.05 |a|^2; an episode never terminates.

    Observations (20,): qpos without x, qvel, and the torso's position, as in oyster.
    """

    def __init__(self, goal: float = 1.0, **kwargs: Any) -> None:
        """`goal` in metres per second."""
        self.goal = float(goal)
        super().__init__(ctrl_cost_weight=0.05, **kwargs)
        self.observation_space = Box(-np.inf, np.inf, (20,), np.float64)

    @property
    def context(self) -> Floats:
        """What a goal-conditioned policy is told, (1,)."""
        return np.array([self.goal])

    def _get_rew(self, x_velocity: float, action: Any) -> tuple[float, dict[str, float]]:
        plain: Any = super()  # Gymnasium's methods have no types
        forward, control = -abs(x_velocity - self.goal), plain.control_cost(action)
        return float(forward - control), {"reward_forward": forward, "reward_ctrl": -control}

    def _get_obs(self) -> Floats:
        plain: Any = super()
        return np.concatenate([plain._get_obs(), self.data.body("torso").xpos])


class AntDir(AntEnv):
    """Run in a direction: reward v . (cos g, sin g) + 1 - 0.5 |a|^2 - 0.0005 |clipped forces|^2.

    Terminates where the torso's height leaves [0.2, 1]. Observations (27,): no contact forces.
    """

    def __init__(self, goal: float = 0.0, **kwargs: Any) -> None:
        """`goal` in radians."""
        self.goal = float(goal)
        super().__init__(include_cfrc_ext_in_observation=False, **kwargs)

    @property
    def context(self) -> Floats:
        """What a goal-conditioned policy is told, (2,): the direction as a unit vector."""
        return np.array([np.cos(self.goal), np.sin(self.goal)])

    def step(self, action: Any) -> Any:
        """One step; the direction's reward takes the place of the forward one."""
        plain: Any = super()  # Gymnasium's methods have no types
        obs, _, terminated, truncated, info = plain.step(action)
        along = info["x_velocity"] * np.cos(self.goal) + info["y_velocity"] * np.sin(self.goal)
        info |= {"reward_forward": along, "reward_survive": 1.0}
        reward = along + 1.0 - plain.control_cost(action) - plain.contact_cost
        return obs, float(reward), bool(terminated), truncated, info


def multipliers(task: int, body: str, model: Any, log_scale: float = 3.0) -> dict[str, Floats]:
    """Factors of a member's physical parameters, each element by itself.

    1.5^U(-3, 3) for masses, inertias and frictions, 1.3^U(-3, 3) for dampings.
    """
    generator = numpy_generator(task, "random parameters", body)
    bases = {"body_mass": 1.5, "body_inertia": 1.5, "dof_damping": 1.3, "geom_friction": 1.5}
    return {
        name: base ** generator.uniform(-log_scale, log_scale, getattr(model, name).shape)
        for name, base in bases.items()
    }


def _vary(env: Any, task: int, body: str) -> None:
    """Multiply the parameters of a freshly made environment in place."""
    for name, factor in multipliers(task, body, env.model).items():
        getattr(env.model, name)[:] *= factor
    mujoco.mj_setConst(env.model, env.data)


class WalkerRandParams(Walker2dEnv):
    """Walker2d with other masses, inertias, dampings and frictions; reward v_x + 1 - 1e-3 |a|^2."""

    def __init__(self, task: int = 0, **kwargs: Any) -> None:
        """`task` numbers the member of the family."""
        self.task = int(task)
        super().__init__(**kwargs)
        _vary(self, self.task, "walker")

    @property
    def healthy_reward(self) -> float:
        """1 in every step, the last one included."""
        return 1.0


class HopperRandParams(HopperEnv):
    """Hopper with other masses, inertias, dampings and frictions; reward v_x + 1 - 1e-3 |a|^2."""

    def __init__(self, task: int = 0, **kwargs: Any) -> None:
        """`task` numbers the member of the family."""
        self.task = int(task)
        super().__init__(**kwargs)
        _vary(self, self.task, "hopper")

    @property
    def healthy_reward(self) -> float:
        """1 in every step, the last one included."""
        return 1.0


class Goals(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A family as one task: an episode draws a goal of the grid, and observations end in it."""

    def __init__(self, env: Any, grid: tuple[float, ...]) -> None:
        """`env` has a `goal` and its `context`."""
        super().__init__(env)
        self.grid = grid
        width = env.observation_space.shape[0] + len(env.context)
        self.observation_space = Box(-np.inf, np.inf, (width,), np.float64)

    def observed(self, obs: Floats) -> Floats:
        """The member's observation with the context behind it."""
        return np.concatenate([obs, self.env.unwrapped.context])  # type: ignore[attr-defined]

    def reset(self, **kwargs: Any) -> tuple[Floats, dict[str, Any]]:
        """Another goal, drawn by the environment's own generator after its reset."""
        obs, info = self.env.reset(**kwargs)
        self.env.unwrapped.goal = float(self.np_random.choice(self.grid))  # type: ignore[attr-defined]
        return self.observed(obs), info

    def step(self, action: Any) -> Any:
        """The member's step."""
        obs, *rest = self.env.step(action)
        return self.observed(obs), *rest


def make(family: str, member: int | None = None, **kwargs: Any) -> Any:
    """The entry point of the registered ids."""
    goals = {"CheetahVel": CHEETAH_VELOCITIES, "AntDir": ANT_DIRECTIONS}
    kinds = {
        kind.__name__: kind for kind in (CheetahVel, AntDir, WalkerRandParams, HopperRandParams)
    }
    name = family.removesuffix("Goals")
    if member is not None:
        kwargs |= {"goal": goals[name][member]} if name in goals else {"task": member}
    env = kinds[name](**kwargs)
    return env if name == family else Goals(env, goals[name])
