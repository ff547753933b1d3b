"""Environments by Gymnasium id: `make_env` for one, `make` for a vector of lanes.

Any registered id works, and "module:Id-v0" imports `module` first.
"""

import difflib
import logging
import warnings
from functools import cache
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rl_shift.envs import robotics
from rl_shift.envs.shift import ShiftWrapper
from rl_shift.envs.state import env_state, set_env_state
from rl_shift.envs.wrappers import agent_view
from rl_shift.errors import UserError
from rl_shift.seeding import child

__all__ = ["ShiftWrapper", "env_state", "make", "make_env", "set_env_state"]

# Made only when asked for; Gymnasium knows them once this module is imported.
for _name, _entry_point in {
    "JellyBean": "rl_shift.envs.jellybean:JellyBean",
    "InfCartPole": "rl_shift.envs.cartpole:InfCartPole",
}.items():
    gymnasium.register(f"rl_shift/{_name}-v0", entry_point=_entry_point)
robotics.register()

# Members of task families: `rl_shift/CheetahVel-7-v0`, and without a number for any goal.
for _name, _members in {
    "CheetahVel": 40,
    "AntDir": 50,
    "WalkerRandParams": 50,
    "HopperRandParams": 50,
    "CheetahVelGoals": 0,
    "AntDirGoals": 0,
}.items():
    for _member in ("", *(f"-{k}" for k in range(_members))):
        gymnasium.register(
            f"rl_shift/{_name}{_member}-v0",
            entry_point="rl_shift.envs.families:make",
            max_episode_steps=200,
            kwargs={"family": _name, "member": int(_member[1:]) if _member else None},
        )

for _name, _far in (("CheetahRetrieval", False), ("CheetahRetrievalFar", True)):
    gymnasium.register(
        f"rl_shift/{_name}-v0",
        entry_point="rl_shift.envs.retrieval:CheetahRetrieval",
        max_episode_steps=200,
        kwargs={"far": _far},
    )

# Gymnasium prints this for every `-v4` id; those are the ones that match D4RL's simulator best.
_OUT_OF_DATE = r".*The environment \S+ is out of date"


def make_env(
    id: str, shift: Any = None, *, obs_pad: int = 0, **kwargs: Any
) -> gymnasium.Env[Any, Any]:
    """One environment as agents see it: flat float32 observations, actions in [-1, 1], raw reward.

    Args:
        id: a Gymnasium id, one of ours, or "module:Id-v0".
        shift: what changes over the environment's life, see `rl_shift.envs.shift`; None: nothing.
        obs_pad: zeros appended to each observation (84 for D4RL's Ant data).
        **kwargs: passed on to `gymnasium.make`.
    """
    _check_mujoco_version(id)
    _quiet_mujoco()
    # The passive checker costs a tenth of a MuJoCo step and prints what authors, not users, need.
    kwargs.setdefault("disable_env_checker", True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _OUT_OF_DATE, DeprecationWarning)
            env = gymnasium.make(id, **kwargs)
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv) as error:
        raise UserError(f"unknown environment {id!r}{_suggestion(id)}") from error
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"environment {id!r} needs a package: {_one_line(error)}") from error
    except ImportError as error:
        extra = ', such as pip install "rl_shift[robotics]"' * ("robotics" in str(error))
        raise UserError(
            f"environment {id!r} cannot be imported: {_one_line(error)}; install the package it "
            f"comes from{extra}, or start in the folder that holds its module"
        ) from error
    except gymnasium.error.Error as error:
        raise UserError(f"environment {id!r} cannot be made: {_one_line(error)}") from error
    env = agent_view(env, obs_pad)
    return env if shift is None else ShiftWrapper(env, shift)


def make(
    id: str, lanes: int = 1, seed: int = 0, shift: Any = None, *, obs_pad: int = 0, **kwargs: Any
) -> SyncVectorEnv:
    """`lanes` copies of an environment; each call yields one true transition per lane (SAME_STEP).

    Every lane's generators are seeded from `seed`, so a later `reset()` without a seed is
    reproducible.
    """
    vector = SyncVectorEnv(
        [lambda: make_env(id, shift, obs_pad=obs_pad, **kwargs)] * lanes,
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    for lane, env in enumerate(vector.envs):
        lane_seed = child(seed, "env", lane)
        env.reset(seed=lane_seed)
        env.action_space.seed(lane_seed)
    vector.action_space.seed(child(seed, "env", "action_space"))
    return vector


def _check_mujoco_version(id: str) -> None:
    """Refuses `-v2` and `-v3` ids of MuJoCo tasks: their simulator package is no longer built."""
    name, _, version = id.rpartition(":")[2].rpartition("-v")
    if version not in ("1", "2", "3"):
        return
    newer = [
        spec.id
        for spec in (gymnasium.registry.get(f"{name}-v{number}") for number in (4, 5))
        if spec is not None and str(spec.entry_point).startswith("gymnasium.envs.mujoco")
    ]
    if newer:
        raise UserError(f"environment {id!r} needs mujoco-py; use {' or '.join(newer)} instead")


@cache
def _quiet_mujoco() -> None:
    """Sends MuJoCo's warnings to `logging`: by default it writes MUJOCO_LOG.TXT into the cwd."""
    try:
        import mujoco
    except ImportError:
        return
    logger = logging.getLogger("rl_shift.mujoco")

    def report(message: str | bytes) -> None:
        text = message.decode(errors="replace") if isinstance(message, bytes) else message
        # The shipped models use an old compiler attribute: of no interest to a user.
        level = logging.DEBUG if "deprecated" in text else logging.WARNING
        logger.log(level, "MuJoCo: %s", text)

    mujoco.set_mju_user_warning(report)


def _suggestion(id: str) -> str:
    """The nearest registered id as the end of a message, or how to look ids up."""
    known = {name.lower(): name for name in gymnasium.registry}
    close = difflib.get_close_matches(id.rpartition(":")[2].lower(), known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {known[close[0]]!r}?"
    return '; `rl-shift list envs` shows the known ids, "module:Id-v0" imports a module first'


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
