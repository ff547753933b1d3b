"""ER: experience replay with one network, what OER's dual cloning is compared with.

TD3+BC whose actor has a head per task and also reproduces the memory: L(actor) + c replay, on the
network that climbs Q. Everything else (memory, selection, retention, normalisers) is OER's; the
critics are new for every task and never replay. Our design of a baseline that OER's abstract names.
Known gaps: those of OER; finished learners cannot be reused.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import Agent, Batch, Loss, Metrics, Transform
from rl_shift.agents.oer import OER
from rl_shift.agents.td3_bc import TD3BC
from rl_shift.continual import MultiHead
from rl_shift.errors import UserError
from rl_shift.retention import Retention


class KeepingTD3BC(TD3BC):
    """L(actor) = -lambda E Q_1(s, pi(s)) + E |pi(s) - a|^2 + what the retention adds."""

    actor: Any  # a MultiHead
    target_actor: Any

    def adopt(self, actor: MultiHead, retention: Retention) -> None:
        """Train this policy from here on."""
        self.actor, self.target_actor = actor, copy.deepcopy(actor)
        self.keeping = (retention,)  # in a tuple: it is a submodule of the agent, not of this one
        self.optimizer("actor", lr=self.config.learning_rate)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Climb Q_1, stay near the data, keep the old tasks."""
        loss, metrics = super().actor_loss(batch)
        kept = self.keeping[0].loss(self.actor, batch)
        return loss + kept, metrics | {"actor/retention": kept}

    def learn(
        self,
        names: str | tuple[str, ...],
        loss: Loss,
        *data: Any,
        transform: Transform | None = None,
    ) -> Metrics:
        """As ever; the actor's gradient passes through the retention."""
        if names == "actor":
            transform = self.keeping[0].transform(self.actor, data[0])
        return super().learn(names, loss, *data, transform=transform)


class ER(OER):
    """The learner's actor is all that stays."""

    @dataclass(frozen=True)
    class Config(OER.Config):
        """OER's; `learner_config` holds TD3+BC's fields."""

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        if config.learner != "td3_bc" or config.learners or config.clone_updates:
            raise UserError(
                "ER trains td3_bc itself and clones nothing: leave agent.learner and "
                "agent.learners out, and agent.clone_updates at 0"
            )
        super().__init__(observation_space, action_space, config)

    def hold(self, policy: MultiHead) -> None:
        """The first learner will take it."""
        self.first = (policy,)

    @property
    def kept(self) -> MultiHead:
        """The learner's actor."""
        if not hasattr(self, "learner"):
            return self.first[0]
        actor = self.learner.actor
        assert isinstance(actor, MultiHead)
        return actor

    def build_learner(self, observation_space: Space[Any], action_space: Space[Any]) -> None:
        """New critics around the same actor."""
        policy = self.kept
        learner = KeepingTD3BC(observation_space, action_space, self.learner_settings(TD3BC))
        learner.adopt(policy, self.retention)
        self.learner: Agent = learner

    def observe(self) -> None:
        """Let the retention see the actor's last step."""
        self.retention.observe(self.kept, self.learner.optimizers["actor"])

    def imitate(self, batch: Batch) -> Metrics:
        """There is no second network."""
        return {}
