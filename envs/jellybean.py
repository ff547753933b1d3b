"""JellyBean: an infinite grid of good and bad items, one endless life, three actions.

The world of Steinparz et al. (2022) with zero item interactions: its Gibbs field then factorises
into independent cells, so a grid of hashed independent cells is an exact substitute for the
simulator (our design). Cell contents depend on the world's seed and the cell's place only, never on
the order of visits; a collected cell stays empty for ever.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rl_shift.errors import UserError
from rl_shift.seeding import child, numpy_generator

PATCH = 32  # cells per side of a patch: the unit in which the world is generated
RADIUS = 5  # cells that the agent sees to each side
SCENT_RADIUS = PATCH // 2 + 1  # exclusive
SCENT_STEPS = 2000  # how long a collected item is smelt
SPAN = 5 * PATCH  # cells per side of the part of the world that is held in memory
COLOURS = np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0]], np.uint8)  # empty, banana, onion
AGENT_COLOUR = np.array([0, 0, 1], np.uint8)
STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # forward for the headings up, right, down, left


class JellyBean(gymnasium.Env[Any, Any]):
    """Walk over an infinite plane: bananas are +1, onions -1, and nothing ever ends.

    Observation: what lies within 5 cells, (11, 11, 3) uint8 in {0, 1}; axis 0 runs from left to
    right and axis 1 from behind to ahead, relative to the heading. Colours: banana [0, 1, 0],
    onion [1, 0, 0], the agent itself [0, 0, 1]. With `scent`, a dict of "vision" and "scent" (3,).
    Actions: 0 forward, 1 turn left, 2 turn right. After every action an item under the agent is
    collected. `terminated` is never True; every `horizon` steps `truncated` is, and a `reset()`
    without a seed lets the same life go on where it stands.

    Memory: 160 x 160 cells, the patches made last (1 MiB for all worlds of a process), and one bit
    per cell for every patch of 32 x 32 cells in which something was collected; the rest is
    forgotten and made anew from the seed.

    Args:
        horizon: steps between two truncations; 0: never.
        rewards: of a banana and of an onion.
        scent: also give the scent vector.
        render_mode: None or "rgb_array".

    Raises:
        UserError: a negative horizon.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012

    def __init__(
        self,
        horizon: int = 10_000,
        rewards: tuple[float, float] = (1.0, -1.0),
        scent: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if horizon < 0:
            raise UserError(f"JellyBean: horizon must not be negative, got {horizon}")
        self.horizon, self.scent, self.render_mode = horizon, scent, render_mode
        self.rewards = (0.0, float(rewards[0]), float(rewards[1]))
        side = 2 * RADIUS + 1
        vision = spaces.Box(0, 1, (side, side, 3), np.uint8)
        smell = spaces.Box(0, np.inf, (3,), np.float32)
        self.observation_space: spaces.Space[Any] = (
            spaces.Dict(vision=vision, scent=smell) if scent else vision
        )
        self.action_space = spaces.Discrete(3)
        self.world_seed = 0
        self.collected: dict[tuple[int, int], bytearray] = {}  # patch -> one bit per cell
        self.recent: list[tuple[int, int, int, int]] = []  # x, y, type, step; for the scent
        self.counts = [0, 0, 0]
        self.time = 0
        self._place(0, 0, 0)

    # ---- the world -----------------------------------------------------------------------------

    def patch(self, px: int, py: int) -> NDArray[np.int8]:
        """The items of a patch as they are now, (32, 32) [x, y]: 0 empty, 1 banana, 2 onion."""
        items = _pristine(self.world_seed, px, py)
        taken = self.collected.get((px, py))
        if taken is None:
            return items.copy()
        bits = np.unpackbits(np.frombuffer(taken, np.uint8)).reshape(PATCH, PATCH)
        return np.where(bits, np.int8(0), items)

    def _place(self, x: int, y: int, heading: int) -> None:
        """Put the agent somewhere and hold the 5 x 5 patches around it in memory."""
        self.x, self.y, self.heading = x, y, heading
        px, py = x // PATCH - 2, y // PATCH - 2
        self.origin = (px * PATCH, py * PATCH)
        self.cells = np.empty((SPAN, SPAN), np.int8)
        for i in range(5):
            for j in range(5):
                square = slice(i * PATCH, (i + 1) * PATCH), slice(j * PATCH, (j + 1) * PATCH)
                self.cells[square] = self.patch(px + i, py + j)

    def _collect(self) -> int:
        """Take the item under the agent; its type, 0 if there is none."""
        x, y = self.x, self.y
        i, j = x - self.origin[0], y - self.origin[1]
        item = int(self.cells[i, j])
        if item:
            self.cells[i, j] = 0
            self.counts[item] += 1
            place = (x // PATCH, y // PATCH)
            if place not in self.collected:
                self.collected[place] = bytearray(PATCH * PATCH // 8)
            bit = x % PATCH * PATCH + y % PATCH
            self.collected[place][bit >> 3] |= 128 >> (bit & 7)  # the order of np.packbits
            if self.scent:
                self.recent = [r for r in self.recent if self.time - r[3] < SCENT_STEPS]
                self.recent.append((x, y, item, self.time))
        return item

    # ---- gymnasium's methods -------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """A new world with a seed, or at the first call; else the life goes on."""
        first = self._np_random is None
        super().reset(seed=seed)
        if seed is not None or first:
            self.world_seed = int(self.np_random.integers(2**62))
            self.collected, self.recent = {}, []
            self.counts, self.time = [0, 0, 0], 0
            self._place(0, 0, 0)
        return self._observation(), {"collected": tuple(self.counts[1:])}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One move or turn, then collect what lies here."""
        self.time += 1
        if action == 0:
            dx, dy = STEPS[self.heading]
            self.x += dx
            self.y += dy
            i, j = self.x - self.origin[0], self.y - self.origin[1]
            # the scent reaches farther than the view
            if min(i, j) < SCENT_RADIUS or max(i, j) >= SPAN - SCENT_RADIUS:
                self._place(self.x, self.y, self.heading)
        else:
            self.heading = (self.heading + (3 if action == 1 else 1)) % 4
        item = self._collect()
        truncated = self.horizon > 0 and self.time % self.horizon == 0
        info = {"collected": tuple(self.counts[1:]), "item": item}
        return self._observation(), self.rewards[item], False, truncated, info

    def _observation(self) -> Any:
        i, j = self.x - self.origin[0], self.y - self.origin[1]
        window = self.cells[i - RADIUS : i + RADIUS + 1, j - RADIUS : j + RADIUS + 1]
        # np.rot90(window, heading), written out for speed
        if self.heading == 1:
            window = window.T[::-1]
        elif self.heading == 2:
            window = window[::-1, ::-1]
        elif self.heading == 3:
            window = window.T[:, ::-1]
        vision = COLOURS[window]
        vision[RADIUS, RADIUS] = AGENT_COLOUR  # the own cell is empty: its item was collected
        return {"vision": vision, "scent": self._smell()} if self.scent else vision

    def _smell(self) -> NDArray[np.float32]:
        """Sum over the items around of colour times diffusion, (3,)."""
        i, j = self.x - self.origin[0], self.y - self.origin[1]
        r, steady = SCENT_RADIUS - 1, _diffusion()
        near = self.cells[i - r : i + r + 1, j - r : j + r + 1]
        offsets = np.abs(np.arange(-r, r + 1))
        strength = steady[SCENT_STEPS - 1][offsets[:, None], offsets[None, :]]
        amounts = [float(strength[near == item].sum()) for item in (1, 2)]
        for x, y, item, time in self.recent:
            dx, dy, age = abs(x - self.x), abs(y - self.y), self.time - time
            if max(dx, dy) <= r and age < SCENT_STEPS:
                amounts[item - 1] += steady[SCENT_STEPS - 1][dx, dy] - steady[age][dx, dy]
        return np.array(amounts, np.float32) @ COLOURS[1:].astype(np.float32)

    def render(self) -> NDArray[np.uint8] | None:
        """What the agent sees, ahead is up, 24 pixels a cell, empty cells white."""
        if self.render_mode is None:
            return None
        seen = self._observation()
        vision = np.asarray(seen["vision"] if self.scent else seen)
        colours = np.where(vision.any(-1, keepdims=True), vision * np.uint8(220), np.uint8(255))
        picture = np.rot90(colours.astype(np.uint8))
        return picture.repeat(24, 0).repeat(24, 1)

    # ---- resuming ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything an exact continuation needs."""
        import torch

        places = np.array(list(self.collected), np.int64).reshape(-1, 2)
        cells = np.array([np.frombuffer(c, np.uint8) for c in self.collected.values()], np.uint8)
        generator = None if self._np_random is None else self.np_random.bit_generator.state
        return {
            "generator": generator,
            "world_seed": self.world_seed,
            "place": [self.x, self.y, self.heading],
            "counts": list(self.counts),
            "time": self.time,
            "patches": torch.from_numpy(places),
            "collected": torch.from_numpy(cells.reshape(-1, PATCH * PATCH // 8)),
            "recent": [list(item) for item in self.recent],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        if state["generator"] is not None:
            self._np_random = np.random.default_rng()
            self._np_random.bit_generator.state = state["generator"]
        self.world_seed, self.time = state["world_seed"], state["time"]
        self.counts = list(state["counts"])
        self.recent = [(int(x), int(y), int(i), int(t)) for x, y, i, t in state["recent"]]
        self.collected = {
            (int(px), int(py)): bytearray(taken.tobytes())
            for (px, py), taken in zip(
                state["patches"].tolist(), state["collected"].numpy(), strict=True
            )
        }
        self._place(*state["place"])


@lru_cache(maxsize=1024)
def _pristine(world_seed: int, px: int, py: int) -> NDArray[np.int8]:
    """A patch before anyone was there, read-only; the start cell is empty (our design)."""
    # Signed places as numbers that are not negative: 0, -1, 1, -2, ... -> 0, 1, 2, 3, ...
    x, y = (2 * p if p >= 0 else -2 * p - 1 for p in (px, py))
    uniform = numpy_generator(_patch_seed(world_seed), x, y).random((PATCH, PATCH))
    # every intensity is -2: P(item k) = e^-2 / (1 + 2 e^-2) = 0.10651
    share = math.exp(-2) / (1 + 2 * math.exp(-2))
    items = (uniform < 2 * share).astype(np.int8) + (uniform < share).astype(np.int8)
    if (px, py) == (0, 0):
        items[0, 0] = 0
    items.setflags(write=False)
    return items


@lru_cache(maxsize=64)
def _patch_seed(world_seed: int) -> int:
    return child(world_seed, "patch")


@cache
def _diffusion() -> NDArray[np.float64]:
    """Scent of one item after t steps at distance (|dx|, |dy|), (2000, 17, 17).

    S_t = 0.4 S_{t-1} + 0.14 (sum of the four neighbours of S_{t-1}) + 1 at the origin.
    """
    side = 2 * (SCENT_RADIUS + 24) + 1  # wide enough that the border is not felt
    centre, field = side // 2, np.zeros((side, side))
    found = np.empty((SCENT_STEPS, SCENT_RADIUS, SCENT_RADIUS))
    for t in range(SCENT_STEPS):
        around = np.zeros_like(field)
        around[1:] += field[:-1]
        around[:-1] += field[1:]
        around[:, 1:] += field[:, :-1]
        around[:, :-1] += field[:, 1:]
        field = 0.4 * field + 0.14 * around
        field[centre, centre] += 1.0
        found[t] = field[centre : centre + SCENT_RADIUS, centre : centre + SCENT_RADIUS]
    return found
