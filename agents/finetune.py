"""FineTune: SAC that goes on from a finished run and keeps what that run could do.

After Wolczyk et al. (2024), "Fine-tuning reinforcement learning models is secretly a forgetting
mitigation problem" (arXiv 2402.02868), on SAC. Faithful: four ways to keep a policy, all on the
actor, none on the critic; the cloning term is the forward divergence KL(pi* || pi). Ours: the
Fisher information is exact for the Gaussian policy and taken over the kept data. Known gaps:
continuous actions; the published networks (four layers, a head per stage) are not built in.

What is kept of the old behaviour is a dataset: with `--dataset OLD --env NEW --env-steps N` batches
for the losses of SAC come from interaction alone, and the dataset serves what `keep` says.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import Batch, Metrics
from rl_shift.agents.sac import SAC
from rl_shift.buffer import Mixture
from rl_shift.errors import UserError
from rl_shift.networks import TanhGaussianActor
from rl_shift.retention import fisher_diagonal, gaussian_divergence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rl_shift.buffer import Buffer
    from rl_shift.config import Task


class FineTune(SAC):
    """SAC whose actor pi also stays near pi*, the actor that it started from.

    L(actor) = L_SAC(actor) + c decay^n K,    n: updates since the task began
    K (bc)   = E_{s ~ kept data} KL(pi*(.|s) || pi(.|s))
    K (kl)   = the same over the states that pi itself meets (kickstarting)
    K (ewc)  = sum_i F_i (theta_i - theta*_i)^2,  F: diagonal Fisher information of pi*, kept data
    memory:  K = 0, but the batches of SAC hold `offline_fraction` of kept transitions
    none:    K = 0, plain fine-tuning
    In a first task without `start` there is nothing to keep, and K = 0.
    """

    stackable = False  # online tasks have one process per seed anyway

    @dataclass(frozen=True)
    class Config(SAC.Config):
        """Those of SAC, and what is kept; the spec's values for Meta-World as defaults."""

        start: str = ""  # RUN_DIR[#k] of `sac` or `finetune`: its actor, critics and temperature
        keep: Literal["bc", "kl", "ewc", "memory", "none"] = "bc"
        coefficient: float = 1.0  # c; published: bc 1, ewc 100 (Meta-World), kl 0.5 (NetHack)
        decay: float = 1.0  # of c, per update; published for kl: 0.99998 per step
        kept_batch: int = 256  # kept states in the cloning term; ours

    reusable: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "start": ("actor", "critic", "target_critic", "log_alpha", "normalizer")
    }

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        super().__init__(observation_space, action_space, config)
        self.origin = copy.deepcopy(self.actor)
        if config.keep == "ewc":
            self.fisher = copy.deepcopy(self.actor)  # same names, so terms pair up
        self.keeping, self.began = False, 0

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """What the actor is now is what will be kept; its Fisher information, where needed."""
        super().begin_task(task, buffer)
        c = self.config
        self.keeping, self.began = bool(c.start) or len(self.begun) > 1, self.updates
        if not self.keeping:
            return
        if c.keep in ("bc", "ewc", "memory") and task.dataset is None:
            raise UserError(
                f"agent.keep {c.keep} needs states of what shall be kept: give --dataset, such as "
                "one made with `rl-shift data collect --policy RUN`, or choose kl or none"
            )
        self.origin.load_state_dict(self.actor.state_dict())
        if c.keep == "ewc":
            obs = self.normalizer(buffer.sample(c.kept_batch)["obs"])
            information = fisher_diagonal(self.origin, standardised, obs)
            with torch.no_grad():
                for name, p in self.fisher.named_parameters():
                    p.copy_(information[name])

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """What SAC learns from, with the weight of K and, for cloning, kept states."""
        c, kept = self.config, buffer
        if isinstance(buffer, Mixture) and c.keep != "memory":
            kept, buffer = buffer.buffers
        batch = buffer.sample(c.batch_size)
        if self.keeping and c.keep in ("bc", "kl", "ewc"):
            weight = c.coefficient * c.decay ** (self.updates - self.began)
            batch["weight"] = torch.full((), weight, device=batch["reward"].device)
            if c.keep == "bc":
                batch["kept_obs"] = kept.sample(c.kept_batch)["obs"]
        return batch

    def kept_loss(self, batch: Batch) -> Tensor:
        """K, ()."""
        if self.config.keep == "ewc":
            before, information = (dict(m.named_parameters()) for m in (self.origin, self.fisher))
            return torch.stack(
                [
                    (information[name] * (p - before[name]).square()).sum()
                    for name, p in self.actor.named_parameters()
                ]
            ).sum()
        obs = batch["kept_obs" if self.config.keep == "bc" else "obs"]
        return gaussian_divergence(self.origin.gaussian(obs), self.actor.gaussian(obs)).mean()

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """SAC's, and K with its weight."""
        loss, metrics = super().actor_loss(batch)
        if "weight" not in batch:
            return loss, metrics
        kept = self.kept_loss(batch)
        return loss + batch["weight"] * kept, metrics | {"actor/kept": kept}

    def update(self, batch: Batch) -> Metrics:
        """SAC's recipe; kept states are normalised as all others are."""
        if "kept_obs" in batch:
            batch = batch | {"kept_obs": self.normalizer(batch["kept_obs"])}
        return super().update(batch)

    def variant(self) -> tuple[Any, ...]:
        """Also whether anything is kept."""
        return (*super().variant(), self.keeping)

    @property
    def warmup_steps(self) -> int:
        """None where there is a policy to start from."""
        return 0 if self.config.start else super().warmup_steps

    def extra_state(self) -> dict[str, Any]:
        """Where the current task began."""
        return {"keeping": self.keeping, "began": self.began}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Go on in that task."""
        self.keeping, self.began = extra["keeping"], extra["began"]


def standardised(actor: TanhGaussianActor, obs: Tensor) -> Tensor:
    """Outputs whose squared gradients add up to a Gaussian's Fisher information, (B, 2 action).

    That is (d mean)^2 / std^2 + 2 (d log std)^2 for every dimension of the action.
    """
    mean, log_std = actor.gaussian(obs)
    return torch.cat([mean / log_std.detach().exp(), 2**0.5 * log_std], -1)
