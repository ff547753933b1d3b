"""Section `worlds` of the benchmark: steps of JellyBean, and what a shift costs per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from rl_shift import envs, seeding
from rl_shift.benchmark import Candidate, Row, compare, pinned, warm_up

STEPS = 2000  # per call
GROUPS: dict[str, tuple[str | None, ...]] = {
    "rl_shift/JellyBean-v0": (
        None, "colour_swap:period=5000", "reward_flip:type=triangle,period=5000",
    ),
    "rl_shift/InfCartPole-v0": (None, "parameters:force=20/5,type=triangle,period=5000"),
    "HalfCheetah-v5": (
        None, "reward_flip:period=5000", "gear:scale=0.5,type=triangle,period=5000",
        "mass:scale=1.2,period=5000", "mass:scale=1.2,type=triangle,period=5000",
    ),
}  # fmt: skip


def worlds_section(
    *,
    rounds: int = 6,
    seconds: float = 1.0,
    cpu: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Environment steps per second in one process, each environment bare and under shifts."""
    rows: list[Row] = []
    for env_id, shifts in GROUPS.items():
        candidates = [walking(env_id, shift) for shift in shifts]
        if env_id == "rl_shift/JellyBean-v0":
            candidates.append(walking(env_id, None, forward=1.0))
        for candidate in candidates:
            warm_up(candidate, calls=1)
        with pinned(cpu):
            rows += compare(
                "worlds",
                candidates,
                rounds=rounds,
                seconds=seconds,
                unit="env steps/s",
                progress=progress,
            )
    return rows


def walking(env_id: str, shift: str | None, forward: float = 0.8) -> Candidate:
    """Random actions that are drawn beforehand; JellyBean's go straight with chance `forward`."""
    env = envs.make_env(env_id, shift=shift)
    env.reset(seed=0)
    rng = seeding.numpy_generator(0, "bench_worlds")
    space: Any = env.action_space
    actions: Sequence[Any]
    if not isinstance(space, gymnasium.spaces.Discrete):
        actions = list(rng.uniform(-1, 1, (STEPS, *space.shape)).astype(np.float32))
    elif space.n == 3:
        turns = rng.integers(1, 3, STEPS)
        actions = np.where(rng.random(STEPS) < forward, 0, turns).tolist()
    else:
        actions = rng.integers(space.n, size=STEPS).tolist()

    def call() -> None:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    straight = ", straight ahead" if forward == 1 else ""
    return Candidate(f"{env_id}{straight}, {shift or 'no shift'}", call, units=STEPS)
