"""Generated transitions for an agent that learns from them and from real ones in turn.

Shared by the agents that generate: a ring of generated rows, part of the checkpoint, the stages in
which generating and learning take turns, and noise that leaves the training's own untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift import seeding
from rl_shift.agent import Agent, Batch, Metrics, Stage
from rl_shift.buffer import Buffer, Mixture, transition_spec
from rl_shift.errors import UserError


class Synthetic:
    """A ring of generated rows beside the real data; empty until a task begins.

    Args:
        observation_space: of the rows.
        action_space: of the rows.
        base: the agent that will learn from them.

    Raises:
        UserError: if the base needs columns that generated rows do not have.
    """

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], base: Agent
    ) -> None:
        if base.columns:
            raise UserError(
                f"{type(base).__name__} needs the data's {', '.join(base.columns)}, which "
                "generated rows do not have: choose another base"
            )
        self.spaces = observation_space, action_space
        self.ring: Buffer | None = None
        self.task, self.blocks = -1, 0

    def begin(self, rows: int, real: Buffer) -> None:
        """An empty ring for the next task, on the device and with the seeds of its real data."""
        self._make(rows, real.device, real.seeds)
        self.task, self.blocks = self.task + 1, 0

    def _make(self, rows: int, device: torch.device, seeds: tuple[int, ...]) -> Buffer:
        spec = transition_spec(*self.spaces)
        self.ring = Buffer(spec, rows, device=device, seeds=seeds, stream="synthetic")
        return self.ring

    @contextmanager
    def noise(self) -> Iterator[None]:
        """Generate under the next noise stream of this ring; the training's stays as it is."""
        assert self.ring is not None
        seed = seeding.child(self.ring.seeds[0], "synthesis", self.task, self.blocks)
        self.blocks += 1
        with seeding.forked(seed):
            yield

    def extend(self, rows: Mapping[str, Tensor]) -> None:
        """Append rows, (N, ...) each; where they end within an episode is not marked."""
        assert self.ring is not None
        flags = torch.zeros_like(rows["terminated"])
        task = torch.full_like(flags, self.task, dtype=torch.int64)
        self.ring.extend({**rows, "truncated": flags, "task": task})

    def mixed(self, real: Buffer | Mixture, fraction: float) -> Mixture:
        """Generated and real rows, the latter at this fraction."""
        assert self.ring is not None and isinstance(real, Buffer)
        return Mixture([(self.ring, 1 - fraction), (real, fraction)])

    def state(self) -> dict[str, Any]:
        """Rows, generators and counters, with what it takes to make the ring again."""
        if self.ring is None:
            return {}
        return {
            "ring": self.ring.state(),
            "task": self.task,
            "blocks": self.blocks,
            "capacity": self.ring.capacity,
            "seeds": list(self.ring.seeds),
        }

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue where `state` was taken."""
        if state:
            seeds = tuple(int(seed) for seed in state["seeds"])
            self._make(int(state["capacity"]), device, seeds).load_state(state["ring"])
            self.task, self.blocks = int(state["task"]), int(state["blocks"])


def described(rows: Batch) -> Metrics:
    """What is worth knowing about generated rows of any kind."""
    reward = rows["reward"]
    return {"reward": reward.mean(), "terminated": rows["terminated"].to(reward).mean()}


def taking_turns(legs: Iterable[Stage], every: int, first: Stage, again: Stage) -> list[Stage]:
    """Counted legs in parts of `every` updates, each after a stage that generates.

    Args:
        legs: the stages of the agent that learns.
        every: its updates between two generations.
        first: generates before the first part.
        again: generates before each of the others.

    Raises:
        UserError: for interaction, or an interval of no updates.
    """
    if every < 1:
        raise UserError(f"refresh_updates {every}: give at least 1 update between generations")
    stages: list[Stage] = []
    generates = first
    for leg in legs:
        if leg.env_steps:
            raise UserError("generated data need a dataset to learn from: give no --env-steps")
        if not leg.counted or not leg.updates:
            stages.append(leg)
            continue
        for start in range(0, leg.updates, every):
            part = Stage(leg.name, min(every, leg.updates - start))
            stages += [generates, part]
            generates = again
    return stages
