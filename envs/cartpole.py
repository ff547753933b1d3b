"""InfCartPole: a cart-pole that never ends, with parameters that can change (Steinparz et al.).

Published form with its defects mended: parameters are always floats, absent ones are the defaults,
so that mixing two sets mixes all of them.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rl_shift.errors import UserError, nearest

TRACK = 2.4  # m, to each side
STEP = 0.02  # s, explicit Euler
DEFAULTS = {"gravity": 9.8, "cart_mass": 1.0, "pole_mass": 0.1, "length": 0.5, "force": 10.0}


class InfCartPole(gymnasium.Env[Any, Any]):
    """Keep the pole up and the cart in the middle, for ever.

    Observation: x in m, its speed, the angle in [0, 2 pi) (0: upright), its speed; float32. With
    `angle_obs="sincos"` the angle is replaced by its sine and cosine. Actions: 0 pushes to the left
    and 1 to the right with `force`. Reward: 1 - x^2 / 11.52 - degrees^2 / 288. A pole that falls
    through straight down starts anew near upright; neither that nor the track's end ends anything.
    Every `horizon` steps `truncated` is True, and a `reset()` without a seed lets the life go on.

    Args:
        horizon: steps between two truncations; 0: never.
        angle_obs: "raw" (as published; jumps between 0 and 2 pi at the upright) or "sincos".
        **parameters: gravity (m/s^2), cart_mass, pole_mass (kg), length (half the pole, m), force
            (N; negative: the controls are inverted).

    Raises:
        UserError: a negative horizon, an unknown parameter or form of the angle.
    """

    parameters: dict[str, float]

    def __init__(
        self,
        horizon: int = 10_000,
        angle_obs: str = "raw",
        render_mode: str | None = None,
        **parameters: float,
    ) -> None:
        if horizon < 0:
            raise UserError(f"InfCartPole: horizon must not be negative, got {horizon}")
        if angle_obs not in ("raw", "sincos"):
            raise UserError(f"InfCartPole: angle_obs is raw or sincos, not {angle_obs!r}")
        for name in parameters:
            if name not in DEFAULTS:
                raise UserError(
                    f"InfCartPole has no parameter {name!r}{nearest(name, DEFAULTS)}; it has "
                    f"{', '.join(DEFAULTS)}"
                )
        self.render_mode, self.horizon, self.time = render_mode, horizon, 0
        self.parameters = {k: float(parameters.get(k, v)) for k, v in DEFAULTS.items()}
        self.sincos = angle_obs == "sincos"
        size = 5 if self.sincos else 4
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.position = [0.0, 0.0, 0.0, 0.0]  # x, x', angle, angle'

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """With a seed, or at first, near upright in the middle: all four numbers U(-0.05, 0.05)."""
        first = self._np_random is None
        super().reset(seed=seed)
        if seed is not None or first:
            self.time = 0
            self.position = self.np_random.uniform(-0.05, 0.05, 4).tolist()
            self.position[2] %= 2 * math.pi
        return self._observation(), {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One Euler step of 0.02 s."""
        p, (x, x_dot, theta, theta_dot) = self.parameters, self.position
        force = p["force"] if action == 1 else -p["force"]
        mass = p["cart_mass"] + p["pole_mass"]
        sin, cos = math.sin(theta), math.cos(theta)
        push = (force + p["pole_mass"] * p["length"] * theta_dot**2 * sin) / mass
        theta_acc = (p["gravity"] * sin - cos * push) / (
            p["length"] * (4 / 3 - p["pole_mass"] * cos**2 / mass)
        )
        x_acc = push - p["pole_mass"] * p["length"] * theta_acc * cos / mass
        x = x + STEP * x_dot
        if abs(x) > TRACK:
            x, x_dot, x_acc = math.copysign(TRACK, x), 0.0, 0.0
        x_dot = x_dot + STEP * x_acc
        raw = theta + STEP * theta_dot
        fallen = (theta_dot > 0 and theta < math.pi <= raw) or (
            theta_dot < 0 and theta > math.pi >= raw
        )
        if fallen:
            raw, theta_dot = self.np_random.uniform(-0.05, 0.05, 2).tolist()
        theta = raw % (2 * math.pi)
        theta_dot = theta_dot + STEP * theta_acc
        self.position = [x, x_dot, theta, theta_dot]
        degrees = math.degrees(min(theta, 2 * math.pi - theta))
        reward = 1 - x**2 / 11.52 - degrees**2 / 288
        self.time += 1
        truncated = self.horizon > 0 and self.time % self.horizon == 0
        return self._observation(), reward, False, truncated, {"hidden_reset": fallen}

    def _observation(self) -> NDArray[np.float32]:
        x, x_dot, theta, theta_dot = self.position
        angle = [math.sin(theta), math.cos(theta)] if self.sincos else [theta]
        return np.array([x, x_dot, *angle, theta_dot], np.float32)
