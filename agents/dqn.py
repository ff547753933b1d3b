"""DQN: deep Q-learning with replay and a target network (Mnih et al., 2015).

Faithful to stable-baselines3's recipe: Huber loss, hard target copies, epsilon annealed over the
first tenth of the run. Settings turn it into double DQN (van Hasselt et al., 2016), prioritised
replay (Schaul et al., 2015) and soft Q-learning (Haarnoja et al., 2017; on discrete actions). A
truncated step bootstraps from its true last observation. `epsilon_period` repeats the annealing,
the ablation of the Reactive Exploration paper. Known gaps: no n-step returns, no duelling heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from gymnasium.spaces import Space
from torch import Tensor
from torch.nn import functional as F

from rl_shift.agent import Agent, Batch, Metrics
from rl_shift.buffer import Mixture
from rl_shift.errors import UserError
from rl_shift.online_networks import ActionValues, unsupported
from rl_shift.priorities import Priorities

if TYPE_CHECKING:
    from rl_shift.buffer import Buffer
    from rl_shift.config import Task


class DQN(Agent):
    """One-step Q-learning.

    L(q) = E w huber(Q(s, a) - r - gamma (1 - terminated) V'(s'))
    V'(s') = max_a Q'(s', a)                            plain
           = Q'(s', argmax_a Q(s', a))                  double
           = T log sum_a exp(Q'(s', a) / T)             soft, temperature T > 0
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of DQN; stable-baselines3's and the published code's values."""

        batch_size: int = 32
        hidden: tuple[int, ...] = (64, 64)  # ReLU, on vectors
        features: int = 128  # after the pixel encoder; published code of Reactive Exploration
        learning_rate: float = 1e-4  # Adam
        discount: float = 0.99  # 0.75 for soft Q-learning in the published code
        gradient_clip: float = 10.0  # 1.0 for soft Q-learning in the published code
        target_every: int = 2500  # updates between two copies: 10,000 env steps at one per 4
        double: bool = False
        temperature: float = 0.0  # above 0: soft Q-learning; 0.1 in the published code
        prioritized: bool = False
        priority_exponent: float = 0.6  # alpha
        importance_exponent: float = 0.0  # beta; 0 in the published code: no correction
        epsilon_start: float = 1.0
        epsilon_end: float = 0.05
        epsilon_fraction: float = 0.1  # of the task's (or period's) env steps, annealing
        epsilon_period: int = 0  # env steps after which the annealing begins anew; 0: never
        warmup_steps: int = 50_000  # uniform actions before the first update
        collect_every: int = 4  # vector steps between rounds of updates
        updates_per_collect: int = 1  # updates per round
        buffer_capacity: int = 1_000_000

    stackable = False  # priorities belong to one seed
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Agent.limits,
        "target_every": (1, math.inf),
        "temperature": (0, math.inf),
        "epsilon_start": (0, 1),
        "epsilon_end": (0, 1),
        "epsilon_fraction": (0, 1),
        "epsilon_period": (0, math.inf),
    }
    annealing = ("steps_per_update", "horizon", "restarted", "ranked")  # numbers in a checkpoint

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        super().__init__(observation_space, action_space, config)
        choices = int(action_space.n)  # type: ignore[attr-defined]
        self.q = ActionValues(observation_space, choices, config.hidden, config.features)
        self.target_q = copy.deepcopy(self.q)
        self.optimizer("q", lr=config.learning_rate, clip=config.gradient_clip)
        self.steps_per_update = 1.0  # env steps, over all lanes
        self.horizon = 0  # env steps of the task, or of a period
        self.restarted = 0  # env step at which the annealing last began
        self.priorities: Priorities | None = None
        self.ranked = 0  # rows of the ring that have a priority

    @staticmethod
    def supports(observation_space: Space[Any], action_space: Space[Any]) -> str | None:
        """Vectors or images in, discrete actions out."""
        return unsupported(observation_space, action_space, continuous=False)

    # ---- exploration -------------------------------------------------------------------------

    @property
    def env_steps(self) -> int:
        """Environment steps at which the current update stands."""
        return int(self.config.warmup_steps + self.updates * self.steps_per_update)

    @property
    def epsilon(self) -> float:
        """Probability of a uniform action: linear, then constant."""
        c = self.config
        since = self.env_steps - self.restarted
        if c.epsilon_period:
            since %= c.epsilon_period
        length = max(1.0, c.epsilon_fraction * self.horizon)
        return max(
            c.epsilon_end, c.epsilon_start + (c.epsilon_end - c.epsilon_start) * since / length
        )

    def explore_again(self) -> None:
        """Begin the annealing of epsilon anew: a reaction to a shift."""
        self.restarted = self.env_steps

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, obs) -> (N,): greedy; exploring, epsilon-greedy or, if soft, ~ exp(Q / T)."""
        q = self.q(self.normalizer(obs))
        greedy = q.argmax(-1)
        if not explore:
            return greedy
        if self.config.temperature:
            gumbel = -(-torch.rand_like(q).log()).log()
            return (q / self.config.temperature + gumbel).argmax(-1)
        uniform = torch.rand_like(q).argmax(-1)
        return torch.where(torch.rand_like(q[..., 0]) < self.epsilon, uniform, greedy)

    # ---- learning ----------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Huber loss of the temporal-difference error, weighted if prioritised."""
        c = self.config
        q = self.q(batch["obs"]).gather(-1, batch["action"][..., None]).squeeze(-1)
        next_q = self.target_q(batch["next_obs"])
        if c.temperature:
            value = c.temperature * (next_q / c.temperature).logsumexp(-1)
        elif c.double:
            best = self.q(batch["next_obs"]).argmax(-1, keepdim=True)
            value = next_q.gather(-1, best).squeeze(-1)
        else:
            value = next_q.amax(-1)
        target = batch["reward"] + c.discount * ~batch["terminated"] * value
        loss = F.smooth_l1_loss(q, target.detach(), reduction="none")
        loss = (loss * batch["weight"] if "weight" in batch else loss).mean()
        return loss, {"q/loss": loss, "q/value": q.mean(), "q/error": (q - target).abs()}

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Lay out the annealing over this task; its ring is empty."""
        super().begin_task(task, buffer)
        c = self.config
        self.steps_per_update = c.collect_every * buffer.lanes / c.updates_per_collect
        self.horizon = c.epsilon_period or task.env_steps
        self.restarted = int(self.updates * self.steps_per_update)
        self.priorities, self.ranked = None, 0

    def extra_state(self) -> dict[str, Any]:
        """Annealing and priorities."""
        kept: dict[str, Any] = {name: getattr(self, name) for name in self.annealing}
        if self.priorities is not None:
            kept["priorities"] = self.priorities.state()
        return kept

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take them back."""
        for name in self.annealing:
            setattr(self, name, extra[name])
        saved, device = extra.get("priorities"), self.normalizer.mean.device
        self.priorities = None if saved is None else Priorities.restored(saved, device)

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """Uniform transitions, or prioritised ones with their importance weights."""
        c = self.config
        if not c.prioritized:
            return buffer.sample(c.batch_size)
        if isinstance(buffer, Mixture):
            raise UserError(
                "prioritised replay reads one buffer, not a dataset and a ring: set "
                "--agent.prioritized false or leave the dataset out"
            )
        if self.priorities is None:
            self.priorities = Priorities(buffer.capacity, buffer.device)
        new = buffer.newest(buffer.appended - self.ranked)
        if len(new):  # what has not been seen yet comes first
            self.priorities.set(new, self.priorities.largest)
            self.ranked = buffer.appended
        index, probability = self.priorities.draw(c.batch_size)
        weight = (len(buffer) * probability) ** -c.importance_exponent
        return buffer.take(index) | {"index": index, "weight": (weight / weight.amax()).float()}

    def step(self, batch: Batch) -> Metrics:
        """The gradient step: the compiled unit."""
        return self.learn("q", self.loss, self.normalizer.batch(batch))

    def update(self, batch: Batch) -> Metrics:
        """Gradient step, new priorities, and every `target_every`-th time a copy."""
        metrics = self.step(batch)
        if self.priorities is not None and self.config.prioritized:
            priority = (metrics["q/error"] + 1e-6) ** self.config.priority_exponent
            self.priorities.set(batch["index"], priority)
        if (self.updates + 1) % self.config.target_every == 0:
            self.polyak("q", "target_q", 1.0)
        epsilon = torch.full_like(metrics["q/loss"], self.epsilon)
        return metrics | {"q/error": metrics["q/error"].mean(), "exploration/epsilon": epsilon}
