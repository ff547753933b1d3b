"""Generated transitions for an agent that learns from them and from real ones in turn.

Shared by the agents that generate: a ring of generated rows, part of the checkpoint, the stages in
which generating and learning take turns, and noise that leaves the training's own untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rl_shift import seeding
from rl_shift.agent import Stage
from rl_shift.buffer import Buffer, Mixture, Spec
from rl_shift.errors import UserError


class Synthetic:
    """A ring of generated rows beside the real data.

    Args:
        spec: columns, see `buffer.transition_spec`.
        capacity: rows; older ones are overwritten.
        device: where they live.
        seeds: those of the real buffer, so that both can be mixed.
        task: number of the task, for the column of this name.
    """

    def __init__(
        self,
        spec: Spec,
        capacity: int,
        device: torch.device,
        seeds: tuple[int, ...],
        task: int,
    ) -> None:
        self.ring = Buffer(spec, capacity, device=device, seeds=seeds, stream="synthetic")
        self.task, self.blocks = task, 0

    @contextmanager
    def noise(self) -> Iterator[None]:
        """Generate under the next noise stream of this buffer; the training's stays as it is."""
        seed = seeding.child(self.ring.seeds[0], "synthesis", self.task, self.blocks)
        self.blocks += 1
        with seeding.forked(seed):
            yield

    def extend(self, rows: Mapping[str, Tensor]) -> None:
        """Append rows, (N, ...) each; where they end within an episode is not marked."""
        flags = torch.zeros_like(rows["terminated"])
        task = torch.full_like(flags, self.task, dtype=torch.int64)
        self.ring.extend({**rows, "truncated": flags, "task": task})

    def mixed(self, real: Buffer | Mixture, fraction: float) -> Buffer | Mixture:
        """Generated and real rows, the latter at this fraction."""
        if isinstance(real, Mixture):
            raise UserError("generated data are mixed with one dataset: give no --env-steps")
        return Mixture([(self.ring, 1 - fraction), (real, fraction)])

    def state(self) -> dict[str, Any]:
        """Rows, generators and counters, with what it takes to make the buffer again."""
        return {
            "ring": self.ring.state(),
            "task": self.task,
            "blocks": self.blocks,
            "capacity": self.ring.capacity,
            "seeds": list(self.ring.seeds),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], spec: Spec, device: torch.device) -> Synthetic:
        """What `state` came from."""
        seeds = tuple(int(seed) for seed in state["seeds"])
        made = cls(spec, int(state["capacity"]), device, seeds, int(state["task"]))
        made.ring.load_state(state["ring"])
        made.blocks = int(state["blocks"])
        return made


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
