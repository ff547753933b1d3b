"""PPO: proximal policy optimisation on rollouts of the current policy (Schulman et al., 2017).

Faithful to stable-baselines3's settings and networks. What differs: the rollout is read from the
shared buffer, and old log-probabilities and values are recomputed at the start of `update` (the
parameters have not moved since collection); a truncated step bootstraps from its true last
observation; the likelihood of a clipped continuous action is that of the clipped distribution
(`ClippedGaussian`); a compiled step has one shape, so where `batch_size` does not divide the
rollout each pass leaves out a random rest smaller than a minibatch, which stable-baselines3 makes a
short minibatch. Known gaps: no learning-rate schedule, no early stop on the divergence; no
datasets, whose actions it would take for its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import Agent, Batch, Metrics, Stage
from rl_shift.errors import UserError
from rl_shift.online_networks import ActorCritic, unsupported
from rl_shift.rollouts import advantages, minibatches
from rl_shift.running import RunningStatistics

if TYPE_CHECKING:
    from rl_shift.buffer import Buffer, Mixture
    from rl_shift.config import Task


class PPO(Agent):
    """Clipped surrogate, value regression and an entropy bonus in one loss.

    L(policy) = -E min(rho A, clip(rho, 1 - eps, 1 + eps) A) + c_v E (V(s) - R)^2 - c_e E H(pi(.|s))
    rho       = pi(a|s) / pi_old(a|s)
    A         = GAE(lambda) of r + gamma (1 - terminated) V_old(s') - V_old(s),   R = A + V_old(s)
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of PPO; stable-baselines3's values."""

        rollout: int = 2048  # rows between two updates, over all lanes
        batch_size: int = 64  # rows of a minibatch
        epochs: int = 10
        hidden: tuple[int, ...] = (64, 64)  # Tanh, actor and critic each; on vectors
        features: int = 128  # after the pixel encoder; published code of Reactive Exploration
        learning_rate: float = 3e-4  # Adam
        adam_epsilon: float = 1e-5
        discount: float = 0.99
        gae_lambda: float = 0.95
        clip: float = 0.2  # of the ratio
        value_coefficient: float = 0.5
        entropy_coefficient: float = 0.0
        gradient_clip: float = 0.5  # norm over all parameters
        normalize: bool = False  # observations by their running statistics; for MuJoCo
        observation_clip: float = 5.0  # of normalised observations; ours, as the curiosity code

    stackable = False  # it learns from interaction only
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Agent.limits,
        "rollout": (2, math.inf),
        "batch_size": (2, math.inf),  # a single advantage has no deviation
        "epochs": (1, math.inf),
        "gae_lambda": (0, 1),
        "clip": (0, math.inf),
    }

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        super().__init__(observation_space, action_space, config)
        self.lanes = 1
        self.actor_critic = ActorCritic(
            observation_space, action_space, config.hidden, config.features
        )
        self.statistics = RunningStatistics(self.normalizer.mean.shape)
        self.optimizer(
            "actor_critic",
            lr=config.learning_rate,
            eps=config.adam_epsilon,
            clip=config.gradient_clip,
        )

    @staticmethod
    def supports(observation_space: Space[Any], action_space: Space[Any]) -> str | None:
        """Vectors or images in, discrete actions or a vector of them out."""
        return unsupported(observation_space, action_space, continuous=True)

    @property
    def collect_every(self) -> int:
        """One rollout, shared by the lanes."""
        return max(1, self.config.rollout // self.lanes)

    @property
    def buffer_capacity(self) -> int:
        """One rollout."""
        return int(self.config.rollout)

    def normalized(self, obs: Tensor) -> Tensor:
        """What the networks see of raw observations, (..., obs)."""
        obs = self.normalizer(obs)
        bound = self.config.observation_clip
        return obs.clamp(-bound, bound) if self.config.normalize else obs

    def targets(self, batch: Batch) -> Batch:
        """The rollout (N, T, ...) as rows (N * T, ...) with what its own policy says of them."""
        lanes, length = batch["reward"].shape
        rows = {k: v.flatten(0, 1) for k, v in batch.items()}
        obs, next_obs = self.normalized(rows["obs"]), self.normalized(rows["next_obs"])
        output, value = self.actor_critic(obs)
        next_value = self.actor_critic(next_obs)[1]
        target = rows["reward"] + self.config.discount * ~rows["terminated"] * next_value
        advantage = advantages(
            (target - value).view(lanes, length),
            (rows["terminated"] | rows["truncated"]).view(lanes, length),
            self.config.discount * self.config.gae_lambda,
        ).flatten()
        return {
            "obs": obs,
            "action": rows["action"],
            "log_prob": self.actor_critic.head.log_prob(output, rows["action"]),
            "advantage": advantage,
            "return": advantage + value,
        }

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The clipped surrogate on a minibatch of `targets`."""
        c, head = self.config, self.actor_critic.head
        output, value = self.actor_critic(batch["obs"])
        advantage = batch["advantage"]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        log_ratio = head.log_prob(output, batch["action"]) - batch["log_prob"]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - c.clip, 1 + c.clip)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage).mean()
        error = (value - batch["return"]).square().mean()
        entropy = head.entropy(output).mean()
        loss = -surrogate + c.value_coefficient * error - c.entropy_coefficient * entropy
        return loss, {
            "policy/loss": -surrogate,
            "policy/entropy": entropy,
            "policy/kl": (ratio - 1 - log_ratio).mean(),
            "policy/clipped": ((ratio - 1).abs() > c.clip).to(ratio.dtype).mean(),
            "value/loss": error,
        }

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """(N, obs) -> (N, action) or (N,): a sample when exploring, else the mode."""
        head, output = self.actor_critic.head, self.actor_critic.policy(self.normalized(obs))
        return head.sample(output) if explore else head.mode(output)

    def explore_again(self) -> None:
        """Near-uniform actions again, features and values kept: a reaction to a shift; ours."""
        for parameter in self.actor_critic.head.parameters():
            torch.nn.init.zeros_(parameter)

    def stages(self, task: Task) -> list[Stage]:
        """Interaction; ratios mean nothing for actions that another policy took."""
        if task.dataset is not None:
            raise UserError(
                f"task {task.name!r}: PPO learns from its own actions only, leave the dataset out "
                "and give env and env_steps"
            )
        return super().stages(task)

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Learn how many lanes share a rollout."""
        super().begin_task(task, buffer)
        self.lanes = buffer.lanes

    def extra_state(self) -> dict[str, Any]:
        """The number of lanes: a resumed task is not begun again."""
        return {"lanes": self.lanes}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take it back."""
        self.lanes = extra["lanes"]

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """The newest rows of every lane, (N, T, ...)."""
        return buffer.latest(min(self.collect_every, len(buffer) // self.lanes))

    def step(self, batch: Batch) -> Metrics:
        """One minibatch: the compiled unit."""
        return self.learn("actor_critic", self.loss, batch)

    def update(self, batch: Batch) -> Metrics:
        """Targets once, `epochs` passes over the rollout, then the statistics for the next one."""
        rows = self.run(self.targets, batch)
        found = [
            self.step(minibatch)
            for _ in range(self.config.epochs)
            for minibatch in minibatches(rows, self.config.batch_size)
        ]
        metrics = {k: torch.stack([m[k] for m in found]).mean() for k in found[0]}
        if self.config.normalize:
            self.statistics.update(batch["obs"].flatten(0, 1))
            self.normalizer.fit(self.statistics.mean, self.statistics.std, epsilon=1e-4)
        return metrics | {"rollout/reward": batch["reward"].mean()}
