"""A MuJoCo task of two stages with a state-coverage gap, for fine-tuning without forgetting.

AppleRetrieval (Wolczyk et al., 2024, arXiv 2402.02868) with a cheetah's body; our design. Stage one
is met in every episode, stage two only by who has solved stage one. Who was trained on stage two
alone (`rl_shift/CheetahRetrievalFar-v0`) and is fine-tuned on the whole task does not meet what it
can do until it has learnt the rest, and may have unlearnt it by then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.spaces import Box
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class CheetahRetrieval(HalfCheetahEnv):
    """Run out `distance` metres, then back, until the time limit; an episode never terminates.

    Reward: velocity in the stage's direction (m/s) - 0.1 |a|^2. Observations (18,): HalfCheetah's,
    and the stage, -contrast on the way out and +contrast on the way back.
    """

    def __init__(
        self, distance: float = 5.0, contrast: float = 1.0, far: bool = False, **kwargs: Any
    ) -> None:
        """`far`: episodes begin with the way back, `distance` metres out."""
        self.distance, self.contrast, self.far = float(distance), float(contrast), bool(far)
        self.back = self.far
        super().__init__(**kwargs)
        self.observation_space = Box(-np.inf, np.inf, (18,), np.float64)

    def reset_model(self) -> Floats:
        """The stage that episodes begin with."""
        self.back = self.far
        plain: Any = super()  # Gymnasium's methods have no types
        plain.reset_model()
        if self.far:
            self.data.qpos[0] += self.distance
        return self._get_obs()

    def step(self, action: Any) -> Any:
        """One step; the apple is taken after the step that reaches it was rewarded."""
        plain: Any = super()
        obs, reward, terminated, truncated, info = plain.step(action)
        if not self.back and self.data.qpos[0] >= self.distance:
            self.back = True
            obs = self._get_obs()
        return obs, reward, terminated, truncated, info | {"back": self.back}

    def _get_rew(self, x_velocity: float, action: Any) -> tuple[float, dict[str, float]]:
        plain: Any = super()
        along = -x_velocity if self.back else x_velocity
        control = plain.control_cost(action)
        return float(along - control), {"reward_forward": along, "reward_ctrl": -control}

    def _get_obs(self) -> Floats:
        plain: Any = super()
        return np.concatenate([plain._get_obs(), [self.contrast if self.back else -self.contrast]])
