"""Generated transitions for an agent that learns from them and from real ones in turn.

Shared by the agents that generate: a ring of generated rows per seed, part of the checkpoint, the
stages in which generating and learning take turns, and noise that leaves the training's own
untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift import seeding
from rl_shift.agent import Agent, Batch, Metrics, Stage
from rl_shift.buffer import Buffer, Mixture, PerSeed, transition_spec
from rl_shift.errors import UserError

if TYPE_CHECKING:
    from rl_shift.config import Task

NEEDS_DATASET = "generated data need a dataset to learn from: give no --env-steps"


class Synthetic:
    """A ring of generated rows per seed beside the real data; empty until a task begins.

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
        self.rings: list[Buffer] = []
        self.task, self.blocks = -1, 0
        self.learnt_from: Task | None = None  # by a model that is reused

    def reuse(self, source: Agent) -> None:
        """Remember the data that the model of another run, now reused, has learnt from."""
        self.learnt_from = source.begun[-1] if source.begun else None

    def begin(self, rows: int, real: Buffer, task: Task) -> None:
        """Empty rings for the next task, on the device and with the seeds of its real data.

        Raises:
            UserError: if the reused model would give rewards on another scale than the task's.
        """
        source = self.learnt_from
        if source is not None and source.reward != task.reward:
            raise UserError(
                f"the denoiser learnt rewards under `reward: {source.reward}`, task {task.name!r} "
                f"has `reward: {task.reward}`: give that, or train a denoiser of its own"
            )
        self._make(rows, real.device, real.seeds)
        self.task, self.blocks = self.task + 1, 0

    def _make(self, rows: int, device: torch.device, seeds: Sequence[int]) -> None:
        spec = transition_spec(*self.spaces)
        self.rings = [
            Buffer(spec, rows, device=device, seeds=(seed,), stream="synthetic") for seed in seeds
        ]

    @contextmanager
    def noise(self) -> Iterator[None]:
        """Generate under the next noise stream of the rings; the training's stays as it is."""
        seed = seeding.child(self.rings[0].seeds[0], "synthesis", self.task, self.blocks)
        self.blocks += 1
        with seeding.forked(seed):
            yield

    def extend(self, rows: Mapping[str, Tensor], last: Mapping[str, Tensor] | None = None) -> None:
        """Append rows, (N, ...) each, or (S, N, ...) for S seeds.

        Where they end within an episode is not marked.

        Args:
            rows: transitions.
            last: last rows of windows, appended after them where they terminate: windows terminate
                in their last row only, so there would be no termination without these (our design).
        """
        for k, ring in enumerate(self.rings):
            own = self._of_seed(rows, k)
            if last is not None:
                final = self._of_seed(last, k)
                ended = final["terminated"]
                own = {key: torch.cat([own[key], x[ended]]) for key, x in final.items()}
            flags = torch.zeros_like(own["terminated"])
            task = torch.full_like(flags, self.task, dtype=torch.int64)
            ring.extend({**own, "truncated": flags, "task": task})

    def _of_seed(self, rows: Mapping[str, Tensor], k: int) -> Mapping[str, Tensor]:
        return rows if len(self.rings) == 1 else {key: x[k] for key, x in rows.items()}

    def mixed(self, real: Buffer | Mixture, fraction: float) -> Mixture:
        """Generated and real rows, the latter at this fraction."""
        assert self.rings and isinstance(real, Buffer)
        made = self.rings[0] if len(self.rings) == 1 else PerSeed(self.rings)
        return Mixture([(made, 1 - fraction), (real, fraction)])

    def state(self) -> dict[str, Any]:
        """Rows, generators and counters, with what it takes to make the rings again."""
        if not self.rings:
            return {}
        return {
            "rings": {str(k): ring.state() for k, ring in enumerate(self.rings)},
            "task": self.task,
            "blocks": self.blocks,
            "capacity": self.rings[0].capacity,
            "seeds": [seed for ring in self.rings for seed in ring.seeds],
        }

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue where `state` was taken."""
        if state:
            self._make(int(state["capacity"]), device, [int(seed) for seed in state["seeds"]])
            saved = state.get("rings") or {"0": state["ring"]}  # older checkpoints: one seed
            for k, ring in enumerate(self.rings):
                ring.load_state(saved[str(k)])
            self.task, self.blocks = int(state["task"]), int(state["blocks"])


def needs_dataset(task: Task) -> None:
    """Refuse interaction, before anything looks for rows.

    Raises:
        UserError: for a task with env_steps, or without a dataset.
    """
    if task.env_steps or task.data is None:
        raise UserError(NEEDS_DATASET)


def share(total: int, parts: int, part: int) -> int:
    """Size of one of `parts` blocks, as equal as can be, that add up to `total` or 1 each."""
    total = max(total, parts)
    return total * (part + 1) // parts - total * part // parts


def described(rows: Batch) -> Metrics:
    """What is worth knowing about generated rows that end episodes themselves."""
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
            raise UserError(NEEDS_DATASET)
        if not leg.counted or not leg.updates:
            stages.append(leg)
            continue
        for start in range(0, leg.updates, every):
            part = Stage(leg.name, min(every, leg.updates - start))
            stages += [generates, part]
            generates = again
    return stages
