"""InfCartPole: a cart-pole that never ends, with parameters that can change (Steinparz et al.).

Published form with its defects mended: parameters are always floats, absent ones are the defaults,
so that mixing two sets mixes all of them; no transition straddles a fallen pole's new start.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rl_shift.envs.values import number
from rl_shift.errors import UserError, nearest

TRACK = 2.4  # m, to each side
STEP = 0.02  # s, explicit Euler
PIXELS = 100  # per metre of the picture
DEFAULTS = {"gravity": 9.8, "cart_mass": 1.0, "pole_mass": 0.1, "length": 0.5, "force": 10.0}


class InfCartPole(gymnasium.Env[Any, Any]):
    """Keep the pole up and the cart in the middle, for ever.

    Observation: x in m, its speed, the angle in [0, 2 pi) (0: upright), its speed; float32. With
    `angle_obs="sincos"` the angle is replaced by its sine and cosine. Actions: 0 pushes to the left
    and 1 to the right with `force`. Reward: 1 - x^2 / 11.52 - degrees^2 / 288. The track's end ends
    nothing. Every `horizon` steps `truncated` is True, and a `reset()` without a seed lets the life
    go on.

    A pole that falls through straight down starts anew near upright, the cart stays where it is.
    Such a step earns what the new start earns, as published, but it is `truncated` with its true
    last observation, so that learners cut their traces there and no model sees a pair of states
    that dynamics do not connect; `reset()` shows the new start. `info["hidden_reset"]` is True: the
    life goes on, and so does an episode of `rl_shift.evaluation`.

    Args:
        horizon: steps of an evaluation's episode, after which `truncated` is True; 0: never.
        angle_obs: "raw" (as published; jumps between 0 and 2 pi at the upright) or "sincos".
        render_mode: None or "rgb_array".
        **parameters: gravity (m/s^2), cart_mass, pole_mass (kg), length (half the pole, m), force
            (N; negative: the controls are inverted).

    Raises:
        UserError: a negative horizon, an unknown form of the angle, a parameter that is unknown or
            not finite, a mass or length that is not positive.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
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
        self.parameters = {
            name: number(
                parameters.get(name, default),
                name,
                "InfCartPole",
                above=-math.inf if name in ("gravity", "force") else 0.0,
            )
            for name, default in DEFAULTS.items()
        }
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
        self.position = [x, x_dot, raw % (2 * math.pi), theta_dot + STEP * theta_acc]
        obs = self._observation()
        if fallen:
            raw, theta_dot = self.np_random.uniform(-0.05, 0.05, 2).tolist()
            self.position[2:] = raw % (2 * math.pi), theta_dot + STEP * theta_acc
        theta = self.position[2]
        degrees = math.degrees(min(theta, 2 * math.pi - theta))
        reward = 1 - x**2 / 11.52 - degrees**2 / 288
        self.time += 1
        truncated = self.horizon > 0 and self.time % self.horizon == 0
        info = {"hidden_reset": fallen and not truncated}
        return obs, reward, False, truncated or fallen, info

    def render(self) -> NDArray[np.uint8] | None:
        """Track, cart and pole from the side, (480, 640, 3); the pole's joint is half-way up."""
        if self.render_mode is None:
            return None
        x, _, theta, _ = self.position
        sin, cos = math.sin(theta), math.cos(theta)
        rows, columns = np.indices((480, 640))
        across, up = columns / PIXELS - 3.2, 2.4 - rows / PIXELS  # m, from the track's middle
        along = ((across - x) * sin + up * cos).clip(0, 2 * self.parameters["length"])
        away = np.hypot(across - x - along * sin, up - along * cos)  # from the pole's axis
        picture = np.full((480, 640, 3), 255, np.uint8)
        picture[(abs(across) <= TRACK) & (abs(up) < 0.01)] = 0
        picture[(abs(across - x) <= 0.2) & (abs(up) <= 0.1)] = 60
        picture[away <= 0.05] = 202, 152, 101
        return picture

    def _observation(self) -> NDArray[np.float32]:
        x, x_dot, theta, theta_dot = self.position
        angle = [math.sin(theta), math.cos(theta)] if self.sincos else [theta]
        return np.array([x, x_dot, *angle, theta_dot], np.float32)
