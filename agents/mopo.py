"""MOPO: model-based offline policy optimisation (Yu et al., 2020), short penalised model rollouts.

Faithful to OfflineRL-Kit: ensemble of 7 with 5 elites, rollouts of the current policy from data
states, reward lowered by the largest predicted std, SAC on 5 % real rows, known termination
functions (tasks without one never end). Differs: any base, standardised targets, a rollout that
ends goes on from a new state of the data, no cosine of the actor's learning rate. Known gaps: each
member keeps its last weights, not its best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import Agent, Batch, Metrics, Stage, Wrapper
from rl_shift.buffer import Buffer, Mixture
from rl_shift.dynamics import GaussianEnsemble, split_rows
from rl_shift.synthetic import Synthetic, described, needs_dataset, share, taking_turns

if TYPE_CHECKING:
    from rl_shift.config import Task

Termination = Callable[[Tensor, Tensor, Tensor], Tensor]


class MOPO(Wrapper):
    """Trains its base on rollouts of a learnt model, pessimistic by the model's own uncertainty.

    L(dynamics) = sum_E mean (mean - y)^2 exp(-logvar) + logvar + decay and bounds
    r~(s, a)    = r_hat(s, a) - lambda max_i |std_i(s, a)|_2
    """

    limits: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Wrapper.limits,
        "model_batch": (1, math.inf),
        "dynamics_updates": (1, math.inf),
        "check_every": (1, math.inf),
        "patience": (1, math.inf),
        "horizon": (1, math.inf),
        "penalty": (0, math.inf),
        "starts": (1, math.inf),
        "rounds": (1, math.inf),
        "rollout_updates": (1, math.inf),
    }
    stackable = False  # each seed's model converges at a time of its own
    columns = ("next_obs_known",)

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters; OfflineRL-Kit's values where not said otherwise."""

        base: str = "sac"  # any offline agent, by name
        base_config: dict[str, Any] = field(default_factory=dict)  # its fields
        base_run: str = ""  # filled in for --agent.base RUN_DIR
        model_hidden: tuple[int, ...] = (200, 200, 200, 200)
        members: int = 7
        elites: int = 5
        learning_rate: float = 1e-3  # Adam, of the model
        model_batch: int = 256  # rows per member
        dynamics_updates: int = 100_000  # at most; ours, no limit
        check_every: int = 1_000  # ours, an epoch
        patience: int = 5  # checks without 1 % of progress before the model is done
        horizon: int = 5  # steps of a rollout; 1 on some sets
        penalty: float = 1.0  # lambda; 0.5 to 5 by set
        starts: int = 50_000  # rollouts per round
        rounds: int = 5  # that are kept
        rollout_updates: int = 5  # blocks in which a round is done; ours
        refresh_updates: int = 1_000  # base updates between rounds
        real_fraction: float = 0.05  # of a batch

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
        self.dynamics = GaussianEnsemble(obs, action, c.model_hidden, c.members, c.elites)
        self.optimizer("dynamics", lr=c.learning_rate)
        self.synthetic = Synthetic(observation_space, action_space, self.base)
        self.rows: tuple[Tensor, Tensor] | None = None  # to learn the model from, and held out
        self.termination: Termination | None = None

    @staticmethod
    def supports(observation_space: Space[Any], action_space: Space[Any]) -> str | None:
        """Vectors and continuous actions, whatever the base takes."""
        return Agent.supports(observation_space, action_space)

    # ---- the model -----------------------------------------------------------------------------

    def split(self, buffer: Buffer) -> tuple[Tensor, Tensor]:
        """Rows with a true next observation: those to learn from, and those held out."""
        if self.rows is None:
            known = buffer.arrays()["next_obs_known"].nonzero()[:, 0]
            self.rows = split_rows(buffer, known)
        return self.rows

    def check(self, stage: Stage, updates: int, buffer: Buffer) -> bool:
        """Choose the elites; whether the model has converged."""
        error = self.run(self.dynamics.error, buffer.take(self.split(buffer)[1]))
        return self.dynamics.converged(error, self.config.patience)

    # ---- rollouts ------------------------------------------------------------------------------

    def rollout(self, real: Buffer) -> Batch:
        """Fill one block of the ring with rollouts from the data's states; gives its rows."""
        c = self.config
        count = share(c.starts, c.rollout_updates, self.synthetic.blocks % c.rollout_updates)
        steps: list[Batch] = []
        with self.synthetic.noise():
            obs = self.begin_rollouts(real, count)
            for _ in range(c.horizon):
                action = self.base.act(obs, True)
                next_obs, reward, unsure = self.dynamics.sample(obs, action)
                ended = torch.zeros_like(reward, dtype=torch.bool)
                if self.termination is not None:
                    ended = self.termination(obs, action, next_obs)
                steps.append(
                    {
                        "obs": obs,
                        "action": action,
                        "reward": reward - c.penalty * unsure,
                        "next_obs": next_obs,
                        "terminated": ended,
                    }
                )
                fresh = self.begin_rollouts(real, count)
                obs = torch.where(ended[:, None], fresh, next_obs)
        rows = {key: torch.cat([step[key] for step in steps]) for key in steps[0]}
        self.synthetic.extend(rows)
        return rows

    def begin_rollouts(self, real: Buffer, count: int) -> Tensor:
        """States of the data, (count, obs), in the model's precision."""
        at = torch.randint(len(real), (count,), device=real.device)
        return real.take(at)["obs"].to(self.dynamics.input_mean)

    # ---- hooks ---------------------------------------------------------------------------------

    def stages(self, task: Task) -> list[Stage]:
        """The model; then rounds of rollouts and the base's updates in turn."""
        c = self.config
        model = Stage("dynamics", c.dynamics_updates, counted=False, check_every=c.check_every)
        rounds = Stage("rollout", c.rollout_updates, counted=False)
        return [model, *taking_turns(super().stages(task), c.refresh_updates, rounds, rounds)]

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Take the data's statistics and make room for the rollouts."""
        needs_dataset(task)
        super().begin_task(task, buffer)
        c = self.config
        self.rows, self.termination = None, task.termination
        self.dynamics.fit(buffer.take(self.split(buffer)[0]))
        self.synthetic.begin(c.rounds * c.starts * c.horizon, buffer, task)

    def focus(self, task: Task) -> None:
        """The rule by which the task's episodes end; a resumed run finds it here."""
        super().focus(task)
        self.termination = task.termination

    def extra_state(self) -> dict[str, Any]:
        """The rollouts."""
        return self.synthetic.state()

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take them back."""
        self.synthetic.load_state(extra, self.dynamics.input_mean.device)
        self.rows = None

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """Rows for each member, a new block of rollouts, or both kinds of rows for the base."""
        if self.stage == "dynamics":
            assert isinstance(buffer, Buffer)
            c, rows = self.config, self.split(buffer)[0]
            batch = buffer.sample(c.members * c.model_batch, rows)
            shape = (c.members, c.model_batch)
            return {key: x.view(*shape, *x.shape[1:]) for key, x in batch.items()}
        if self.stage == "rollout":
            made: Batch = self.run(self.rollout, buffer)
            return made
        return self.base.sample(self.synthetic.mixed(buffer, self.config.real_fraction))

    def update(self, batch: Batch) -> Metrics:
        """One step of the model, a report on rollouts, or the base's update."""
        if self.stage == "dynamics":
            return self.learn("dynamics", self.dynamics.loss, batch)
        if self.stage == "rollout":
            return described(batch)
        return super().update(batch)
