"""The agent's view of an environment: flat float32 observations, actions in [-1, 1].

Rewards pass through untouched: evaluation and normalised scores need the raw ones. Wrappers record
their arguments, so that Gymnasium can make an environment again from its `spec`.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import FlattenObservation


class Float32Observation(gymnasium.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """Observations of a Box as float32, whatever the simulator's own precision."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        """Wraps an environment whose observations are a Box."""
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, spaces.Box)
        # Bounds beyond float32 become infinite, which is what they mean.
        with np.errstate(over="ignore"):
            low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)

    def observation(self, observation: Any) -> np.ndarray:
        """(obs,) in any float or integer type -> (obs,) float32."""
        return np.asarray(observation, dtype=np.float32)


class PaddedObservation(gymnasium.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """Appends `pad` zeros: D4RL's 111 Ant numbers are 27 and 84 contact forces that were zero."""

    def __init__(self, env: gymnasium.Env[Any, Any], pad: int) -> None:
        """Wraps an environment with flat observations."""
        RecordConstructorArgs.__init__(self, pad=pad)
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, spaces.Box) and len(space.shape) == 1
        self.tail = np.zeros(pad, dtype=np.float32)
        self.observation_space = spaces.Box(
            np.concatenate([space.low, self.tail - np.inf]),
            np.concatenate([space.high, self.tail + np.inf]),
            dtype=np.float32,
        )

    def observation(self, observation: Any) -> np.ndarray:
        """(obs,) -> (obs + pad,)."""
        return np.concatenate([observation, self.tail])


class UnitAction(gymnasium.ActionWrapper[Any, Any, Any], RecordConstructorArgs):
    """Actions live in [-1, 1]: clipped there, then mapped linearly onto the bounded dimensions."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        """Wraps an environment whose actions are a Box; unbounded dimensions stay as they are."""
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        space = env.action_space
        assert isinstance(space, spaces.Box)
        bounded = np.isfinite(space.low) & np.isfinite(space.high)
        self.low = np.where(bounded, -1.0, space.low).astype(np.float32)
        self.high = np.where(bounded, 1.0, space.high).astype(np.float32)
        self.scale = np.where(bounded, (space.high - space.low) / 2, 1.0).astype(np.float32)
        self.centre = np.where(bounded, (space.high + space.low) / 2, 0.0).astype(np.float32)
        # Most MuJoCo tasks have the unit box already; the map is skipped so that bits stay equal.
        self.identity = bool((self.scale == 1).all() and (self.centre == 0).all())
        self.action_space = spaces.Box(self.low, self.high, dtype=np.float32)

    def action(self, action: Any) -> np.ndarray:
        """(action,) in [-1, 1] -> (action,) in the environment's own box."""
        clipped = np.clip(np.asarray(action, dtype=np.float32), self.low, self.high)
        return clipped if self.identity else clipped * self.scale + self.centre


def agent_view(env: gymnasium.Env[Any, Any], obs_pad: int = 0) -> gymnasium.Env[Any, Any]:
    """Flat float32 (or uint8 image) observations and unit actions, see this module's classes."""
    if not isinstance(env.observation_space, spaces.Box):
        env = FlattenObservation(env)
    if env.observation_space.dtype not in (np.dtype(np.float32), np.dtype(np.uint8)):
        env = Float32Observation(env)
    if obs_pad:
        env = PaddedObservation(env, obs_pad)
    return UnitAction(env) if isinstance(env.action_space, spaces.Box) else env
