"""A warning for critics whose values no policy could earn with the data's rewards (our design).

A critic that bootstraps from actions outside the data can chase its own estimates. It grows by
orders of magnitude while every number stays finite and a policy that is held to the data still
scores, so nothing else tells.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rl_shift.agent import Agent
    from rl_shift.buffer import Buffer

log = logging.getLogger(__name__)
METRIC = "critic/q"
SLACK = 10.0  # times what is possible: rewards may be changed on their way to the critic
GLANCE = 10_000  # rows that are looked at before all of them are


class ValueCheck:
    """Watches `critic/q` of one task and warns once.

    Possible values are at most max |reward| / (1 - discount).

    Args:
        agent: has, or contains an agent that has, `config.discount`; else nothing is checked.
        buffer: the task's data.
    """

    def __init__(self, agent: Agent, buffer: Buffer) -> None:
        configs = (inner.config for inner in agent.contained())
        self.discount = next((c.discount for c in configs if hasattr(c, "discount")), 1.0)
        self.buffer, self.warned = buffer, self.discount >= 1
        self.worth: float | None = None  # the most that is possible, as far as is known
        self.exact = False

    def __call__(self, metrics: Mapping[str, Tensor], updates: int) -> None:
        """Look at metrics, of one seed or (S,), that are about to be logged."""
        if self.warned or METRIC not in metrics:
            return
        q = float(metrics[METRIC].max())
        if self.worth is None:
            self.worth = self.worth_of(self.glance())
        if q > SLACK * self.worth and not self.exact:
            self.worth, self.exact = self.worth_of(self.buffer.arrays()["reward"]), True
        if q > SLACK * self.worth:
            self.warned = True
            log.warning(
                "%s is %.3g after %d updates, but the rewards of the data are worth at most %.3g "
                "at discount %g: the critic diverges, and the policy learns little from it. Try "
                "--agent.layer_norm true where the agent has it, or a policy held closer to the "
                "data",
                METRIC,
                q,
                updates,
                self.worth,
                self.discount,
            )

    def glance(self) -> Tensor:
        """Rewards of rows spread over the data, which may lie on a disk."""
        rows = len(self.buffer)
        index = torch.arange(0, rows, max(1, rows // GLANCE))
        return self.buffer.take(index)["reward"]

    def worth_of(self, reward: Tensor) -> float:
        """What the largest of some rewards would be worth for ever."""
        return float(reward.abs().max()) / (1 - self.discount)
