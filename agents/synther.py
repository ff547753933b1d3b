"""SynthER: synthetic experience replay (Lu et al., 2023), single transitions by diffusion.

Faithful: residual MLP, EDM objective, standardised transitions with the termination left raw, Adam
(0.9, 0.99) with cosine and clipping, learning from generated rows only. Differs: 32 deterministic
steps instead of 128 with churn, the average of the weights moves at every update, actions are
clipped to the box. Known gaps: the online form, rewards of the residual MLP without normalisation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import Agent, Batch, Metrics, Stage, Wrapper
from rl_shift.buffer import Buffer, Mixture
from rl_shift.denoisers import ResidualMLP
from rl_shift.diffusion import EDM, Sampler, Solver
from rl_shift.synthetic import Synthetic, described, needs_dataset, share, taking_turns
from rl_shift.trajectories import TransitionCodec

if TYPE_CHECKING:
    from rl_shift.config import Task


class SynthER(Wrapper):
    """Trains its base on generated transitions.

    L(denoiser) = E (sigma^2 + 1) / sigma^2 (D(y + sigma eps; sigma) - y)^2
    """

    limits: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Wrapper.limits,
        "samples": (1, math.inf),
        "synthesis_updates": (1, math.inf),
        "denoiser_updates": (1, math.inf),
        "denoiser_batch": (1, math.inf),
        "average": (0, 1),
    }
    reusable: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "denoiser": ("codec", "behaviour", "averaged")
    }

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters; the published code's values where not said otherwise."""

        base: str = "td3_bc"  # any offline agent, by name
        base_config: dict[str, Any] = field(default_factory=dict)  # its fields
        base_run: str = ""  # filled in for --agent.base RUN_DIR
        denoiser: str = ""  # RUN_DIR whose trained denoiser is used instead of a new one
        width: int = 1024  # 2048 for large sets
        depth: int = 6  # residual blocks
        denoiser_updates: int = 100_000
        denoiser_batch: int = 256  # 1024 from 800,000 transitions on
        learning_rate: float = 3e-4  # Adam, cosine
        clip: float | None = 1.0
        average: float = 0.0005  # rate of the averaged weights; 0.005 every tenth update
        samples: int = 5_000_000  # generated before the base learns
        synthesis_updates: int = 50  # blocks in which that is done
        sampler_steps: int = 32  # ours; 128
        solver: Solver = "heun"
        churn: float = 0.0  # ours; 80
        real_fraction: float = 0.0  # of a batch

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        config: Config,
        base: Agent | None = None,
    ) -> None:
        super().__init__(observation_space, action_space, config, base)
        c = config
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        self.codec = TransitionCodec(obs, action)
        self.behaviour = EDM(ResidualMLP((sum(self.codec.sizes),), c.width, c.depth))
        self.averaged = copy.deepcopy(self.behaviour)
        self.optimizer(
            "behaviour", lr=c.learning_rate, schedule="cosine", clip=c.clip, betas=(0.9, 0.99)
        )
        self.sampler = Sampler(c.sampler_steps, c.solver, c.churn)
        self.synthetic = Synthetic(observation_space, action_space, self.base)

    @staticmethod
    def supports(observation_space: Space[Any], action_space: Space[Any]) -> str | None:
        """Vectors and continuous actions, whatever the base takes."""
        return Agent.supports(observation_space, action_space)

    def behaviour_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """EDM's loss on raw transitions (B, ...)."""
        loss = self.behaviour.loss(self.codec.encode(batch))
        return loss, {"loss": loss}

    def reuse(self, field: str, source: Agent) -> None:
        """Take a trained denoiser."""
        super().reuse(field, source)
        self.synthetic.reuse(source)

    def rows(self, count: int) -> Batch:
        """Generated transitions."""
        noise = torch.randn_like(self.codec.mean.expand(count, -1))
        return self.codec.decode(self.sampler(self.averaged, noise))

    def synthesise(self) -> Batch:
        """Fill one block of the ring; gives its rows."""
        c = self.config
        count = share(c.samples, c.synthesis_updates, self.synthetic.blocks % c.synthesis_updates)
        with self.synthetic.noise():
            rows: Batch = self.run(self.rows, count)
        self.synthetic.extend(rows)
        return rows

    def stages(self, task: Task) -> list[Stage]:
        """The denoiser, unless it is given; one generation; the base's updates."""
        c = self.config
        once = Stage("synthesise", c.synthesis_updates, counted=False)
        turns = taking_turns(super().stages(task), max(task.updates, 1), once, once)
        denoiser = Stage("denoiser", c.denoiser_updates, counted=False)
        return turns if c.denoiser else [denoiser, *turns]

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Take the data's statistics and make room for what will be generated."""
        needs_dataset(task)
        super().begin_task(task, buffer)
        self.restart_schedule("behaviour", self.config.denoiser_updates)
        if not self.config.denoiser:
            self.codec.fit(buffer)
        self.synthetic.begin(self.config.samples, buffer, task)

    def extra_state(self) -> dict[str, Any]:
        """What was generated."""
        return self.synthetic.state()

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take it back."""
        self.synthetic.load_state(extra, self.codec.mean.device)

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """Real rows for the denoiser, a new block of rows, or generated rows for the base."""
        if self.stage == "denoiser":
            return buffer.sample(self.config.denoiser_batch)
        if self.stage == "synthesise":
            return self.synthesise()
        return self.base.sample(self.synthetic.mixed(buffer, self.config.real_fraction))

    def update(self, batch: Batch) -> Metrics:
        """One step of the denoiser, a report on generated rows, or the base's update."""
        if self.stage == "denoiser":
            metrics = self.learn("behaviour", self.behaviour_loss, batch)
            self.polyak("behaviour", "averaged", self.config.average)
            return metrics
        if self.stage == "synthesise":
            return dict(self.run(described, batch))
        return super().update(batch)
