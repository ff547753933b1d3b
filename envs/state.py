"""Export and restore of an environment's whole state, for training that resumes exactly.

The exported dictionary has string keys and holds tensors and plain values only, so that a
checkpoint can store it. Objects that cannot be written that way are refused by name.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import SyncVectorEnv

State = dict[str, Any]

# Quantities that MuJoCo derives from the last sub-step: several tasks read them before the next
# one (Ant's body position, Humanoid's inertias), when they lag behind qpos and qvel.
_DERIVED = (
    "actuator_force actuator_length actuator_velocity cacc cam_xmat cam_xpos cfrc_ext cfrc_int "
    "cinert cvel energy geom_xmat geom_xpos qacc qacc_warmstart qfrc_actuator qfrc_bias "
    "qfrc_constraint qfrc_passive sensordata site_xmat site_xpos subtree_angmom subtree_com "
    "subtree_linvel ten_length ten_velocity ximat xipos xmat xpos xquat"
).split()
_CONSTANT = ("MjModel", "MujocoRenderer")  # made by the constructor, the same in a fresh env


def env_state(env: gymnasium.Env[Any, Any] | SyncVectorEnv) -> State:
    """State of an environment, wrappers and generators included.

    An environment or wrapper with methods `state()` and `load_state()` speaks for itself.

    Raises:
        NotImplementedError: it holds an object of unknown kind; the message names it.
    """
    if isinstance(env, SyncVectorEnv):
        lanes = {str(lane): env_state(single) for lane, single in enumerate(env.envs)}
        return {"lanes": lanes}
    layers: State = {}
    for depth, layer in enumerate(_layers(env)):
        name = f"{depth}_{type(layer).__name__}"
        if _speaks_for_itself(layer):
            layers[name] = {"own": layer.state()}  # type: ignore[attr-defined]
        else:
            layers[name] = _attributes(layer)
    return layers


def set_env_state(env: gymnasium.Env[Any, Any] | SyncVectorEnv, state: State) -> None:
    """Puts an exported state into an environment made the same way; it continues bitwise."""
    if isinstance(env, SyncVectorEnv):
        for lane, single in enumerate(env.envs):
            set_env_state(single, state["lanes"][str(lane)])
        env._autoreset_envs = np.zeros(env.num_envs, dtype=np.bool_)
        return
    layers = list(_layers(env))
    names = [f"{depth}_{type(layer).__name__}" for depth, layer in enumerate(layers)]
    if names != list(state):
        raise ValueError(f"state of {list(state)} does not fit an environment of {names}")
    for name, layer in zip(names, layers, strict=True):
        if _speaks_for_itself(layer):
            layer.load_state(state[name]["own"])  # type: ignore[attr-defined]
            continue
        for key, value in state[name].items():
            current = vars(layer).get(key)
            setattr(layer, key, _decode(value, current))


def _layers(env: gymnasium.Env[Any, Any]) -> list[gymnasium.Env[Any, Any]]:
    """The wrappers from the outside in, then the environment itself."""
    layers = [env]
    while isinstance(layers[-1], gymnasium.Wrapper):
        layers.append(layers[-1].env)
    return layers


def _speaks_for_itself(layer: gymnasium.Env[Any, Any]) -> bool:
    # Looked up on the class: a wrapper forwards unknown attributes, and CartPole has data "state".
    return callable(getattr(type(layer), "state", None)) and callable(
        getattr(type(layer), "load_state", None)
    )


def _attributes(layer: gymnasium.Env[Any, Any]) -> State:
    state: State = {}
    for key, value in vars(layer).items():
        if key in ("env", "_saved_kwargs") or callable(value) or isinstance(value, EnvSpec):
            continue
        if type(value).__name__ in _CONSTANT:
            continue
        try:
            state[key] = _encode(value)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{type(layer).__name__}.{key} ({error}) cannot be exported; give "
                f"{type(layer).__name__} the methods state() and load_state(state)"
            ) from None
    return state


def _encode(value: Any) -> Any:
    """Plain values as they are, everything else as a dictionary that names its kind."""
    import torch

    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {"kind": "scalar", "data": torch.from_numpy(np.array([value]))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"kind": "array", "data": torch.from_numpy(value.copy())}
    if isinstance(value, np.random.Generator):
        return {"kind": "generator", "data": _plain(value.bit_generator.state)}
    if isinstance(value, gymnasium.Space):
        generator = value._np_random
        return {"kind": "space", "data": None if generator is None else _encode(generator)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"kind": "dict", "data": {key: _encode(item) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        items = {str(position): _encode(item) for position, item in enumerate(value)}
        return {"kind": "list" if isinstance(value, list) else "tuple", "data": items}
    if type(value).__name__ == "MjData":
        return {"kind": "mujoco", "data": _mujoco_state(value)}
    raise NotImplementedError(type(value).__name__)


def _decode(value: Any, current: Any) -> Any:
    """The value `_encode` was given; objects with an identity are changed in place."""
    if not isinstance(value, dict):
        return value
    data = value["data"]
    match value["kind"]:
        case "scalar":
            return data.numpy()[0]
        case "array":
            return data.numpy().copy()
        case "generator":
            generator = np.random.Generator(getattr(np.random, data["bit_generator"])())
            generator.bit_generator.state = data
            return generator
        case "space":
            if data is not None:
                current._np_random = _decode(data, None)
            return current
        case "dict":
            old = current if isinstance(current, dict) else {}
            return {key: _decode(item, old.get(key)) for key, item in data.items()}
        case "list" | "tuple" as kind:
            before = list(current) if isinstance(current, list | tuple) else []
            before += [None] * (len(data) - len(before))
            items = [_decode(item, old) for item, old in zip(data.values(), before, strict=False)]
            return items if kind == "list" else tuple(items)
        case "mujoco":
            _set_mujoco_state(current, data)
            return current
        case kind:
            raise ValueError(f"environment state of unknown kind {kind!r}")


def _plain(value: Any) -> Any:
    """Generator state with NumPy arrays (MT19937) turned into lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _mujoco_state(data: Any) -> State:
    import mujoco
    import torch

    model, kind = data.model, mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, integration, kind)
    derived = {key: torch.from_numpy(getattr(data, key).copy()) for key in _DERIVED}
    return {"integration": torch.from_numpy(integration), "derived": derived}


def _set_mujoco_state(data: Any, state: State) -> None:
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(data.model, data, state["integration"].numpy(), kind)
    mujoco.mj_forward(data.model, data)
    # The forward pass computes from the present state; the interrupted run held the lagging ones.
    for key, value in state["derived"].items():
        getattr(data, key)[:] = value.numpy()
