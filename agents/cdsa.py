"""CDSA: corrects any policy's actions towards the data (our design after arXiv 2406.07541).

The paper (Liu, Yang, Li, 2024) corrects the actions of a trained policy along the gradient of the
dataset's density, learnt by denoising, and turns guidance in state space into actions through an
inverse dynamics model. It says neither which networks nor which steps; all such details here are
our design: noise levels, stratified batches, Tweedie step size, gate, early stopping, default
values. Known gaps: vector observations and box actions only; no result of the paper is reproduced.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rl_shift import seeding
from rl_shift.agent import EVALUATION, Agent, Batch, Metrics, Stage, Wrapper
from rl_shift.buffer import Buffer, Mixture
from rl_shift.dynamics import GaussianEnsemble
from rl_shift.errors import UserError, check_fields
from rl_shift.held_out import Best, split_by_episode
from rl_shift.inverse_dynamics import InverseDynamics, inside_episodes
from rl_shift.score import (
    Gate,
    Mode,
    Quantiles,
    ScoreNetwork,
    action_score_norm,
    correct_action,
    gate_strength,
    geometric_levels,
    nearest_level,
    state_displacement,
)

if TYPE_CHECKING:
    from rl_shift.config import Task

log = logging.getLogger(__name__)
MODELS = ("score", "inverse", "forward")  # stages
HELD_OUT_ROWS = 20_000  # at most, per check


def guides(c: CDSA.Config) -> bool:
    """Whether the settings offer a state channel."""
    return c.mode != "conditional" and (c.target == "state" or c.forward_updates > 0)


class CDSA(Wrapper):
    """A score network and an inverse dynamics model beside a policy pi, which stays as it is.

    L(score)   = E ||eps(z + sigma_i n, i) - n||^2,  z = (s, a);  grad_a log p = -eps_a / sigma_i
    L(inverse) = E ||I(s, s') - a||^2;  L(forward) = E NLL of s' - s given (s, a)
    action channel: a <- clip(a + eta_a sigma_k^2 grad_a log p_k(s, a)),  from a = pi(s), K steps
    state channel:  a <- clip(a + w (I(s, s^ + d) - I(s, s^))),  d = eta_s sigma^2 grad_s log p
    judge:          the result is kept where min_i Q_i(s, a) >= min_i Q_i(s, pi(s))
    """

    @dataclass(frozen=True)
    class Config:
        """All values are ours; those of networks and noise follow NCSN and arXiv 2306.14079."""

        base: str = "td3_bc"  # an agent, trained along, or RUN_DIR[#k] of a finished one, frozen
        base_config: dict[str, Any] = field(default_factory=dict)  # fields of an agent named above
        base_run: str = ""  # filled in where base was a run: where the weights come from
        score: str = ""  # RUN_DIR[#k] on the same dataset: its models are used
        mode: Mode = "joint"  # noise on both, on actions only (conditional), on next states (state)
        sigma_min: float = 0.02  # smallest noise scale, in action units
        sigma_max: float = 0.5  # largest noise scale
        level_count: int = 10  # geometric in between
        state_scale: float = 0.5  # scale of observation noise relative to action noise
        hidden: tuple[int, ...] = (256, 256, 256, 256)  # score network
        learning_rate: float = 3e-4  # AdamW (score), Adam (dynamics)
        weight_decay: float = 0.01  # score network
        clip: float = 1.0  # gradient norm of the score network
        average: float = 0.995  # decay of the averaged score network, which is the one that is used
        batch_size: int = 1024  # of the score network
        score_updates: int = 200_000  # at most; see patience
        model_hidden: tuple[int, ...] = (256, 256, 256)  # inverse and forward dynamics
        inverse_difference: bool = True  # input (s, s' - s) instead of (s, s')
        model_batch_size: int = 256  # of either
        inverse_updates: int = 100_000  # at most; none in mode conditional
        forward_updates: int = 100_000  # at most; none in mode conditional; 0: no forward model
        check_every: int = 1000  # updates between two looks at the held-out loss
        patience: int = 10  # such looks without improvement that end a stage; 0: never
        normalize: bool = True  # observations, std + 1e-3
        correction: Literal["on", "off"] = field(default="on", metadata=EVALUATION)  # off: the base
        channels: Literal["both", "action", "state"] = field(  # of those that the mode offers
            default="both", metadata=EVALUATION
        )
        steps: tuple[float, ...] = field(  # noise scales of the K action steps
            default=(0.2, 0.1, 0.05), metadata=EVALUATION
        )
        eta_action: float = field(default=1.0, metadata=EVALUATION)  # step size, in sigma^2
        eta_state: float = field(default=0.5, metadata=EVALUATION)  # step size, in sigma^2
        state_step: float = field(default=0.1, metadata=EVALUATION)  # noise scale, in action units
        weight: float = field(default=0.25, metadata=EVALUATION)  # of the state channel
        output: Literal["difference", "convex"] = field(  # convex: (1 - w) a + w I(s, s^ + d)
            default="difference", metadata=EVALUATION
        )
        target: Literal["forward", "state"] = field(  # s^: predicted next state, or s itself
            default="forward", metadata=EVALUATION
        )
        gate: Gate = field(default="off", metadata=EVALUATION)  # hard, soft: act outside the data
        gate_quantile: float = field(default=0.9, metadata=EVALUATION)  # of data that is let be
        judge: Literal["off", "value"] = (
            field(  # value: only if Q does not fall, where base has a Q
                default="value", metadata=EVALUATION
            )
        )

    limits: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Wrapper.limits,
        "eta_action": (0, math.inf),
        "eta_state": (0, math.inf),
        "weight": (0, math.inf),
        "gate_quantile": (0, 1),
    }
    reusable = {"score": ("average", "quantiles", "inverse", "dynamics", "normalizer")}
    SCORE_FIELDS = (
        "mode", "sigma_min", "sigma_max", "level_count", "state_scale", "hidden", "model_hidden",
        "inverse_difference", "normalize",
    )  # fmt: skip

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config, *base: Agent
    ) -> None:
        self.check_settings(config)
        super().__init__(observation_space, action_space, config, *base)
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        sigmas = geometric_levels(config.sigma_min, config.sigma_max, config.level_count)
        self.levels = [nearest_level(sigmas, sigma) for sigma in config.steps]
        self.state_level = nearest_level(sigmas, config.state_step)
        self.score = ScoreNetwork(
            obs, action, config.hidden, sigmas, config.mode, config.state_scale
        )
        self.average = copy.deepcopy(self.score)
        self.best_score = Best(self.average)
        self.quantiles = Quantiles(len(sigmas))
        self.inverse = InverseDynamics(obs, action, config.model_hidden, config.inverse_difference)
        self.best_inverse = Best(self.inverse)
        self.dynamics = GaussianEnsemble(obs, action, config.model_hidden, 1, 1, reward=False)
        self.best_dynamics = Best(self.dynamics)
        self.optimizer(
            "score", lr=config.learning_rate, weight_decay=config.weight_decay, clip=config.clip
        )
        self.optimizer("inverse.net", "dynamics", lr=config.learning_rate)
        self.rows: tuple[Buffer, dict[str, tuple[Tensor, Tensor]]] | None = None

    @staticmethod
    def check_settings(c: Config) -> None:
        """Refuse values out of range, and settings that would correct nothing without a word.

        Raises:
            UserError: naming the field and what it takes.
        """
        least = c.sigma_min if c.level_count > 1 else c.sigma_max  # a single level is the largest
        used, most = (least, c.sigma_max) if c.mode != "conditional" else (1e-9, math.inf)
        scales = f"between the noise scales {least:g} and {c.sigma_max:g}"
        check_fields(
            c,
            ("level_count", c.level_count >= 1, "at least 1 noise scale"),
            ("sigma_max", 0 < c.sigma_max < math.inf, "a positive noise scale"),
            ("sigma_min", 0 < c.sigma_min <= c.sigma_max, f"above 0, at most {c.sigma_max:g}"),
            ("steps", len(c.steps) > 0, "at least one noise scale"),
            ("steps", all(least <= s <= c.sigma_max for s in c.steps), f"values {scales}"),
            ("state_step", used <= c.state_step <= most, f"a value {scales}"),
        )
        if c.correction == "off":
            return
        if c.gate != "off" and c.mode == "state":
            raise UserError(
                f"agent.gate {c.gate} looks at scores of actions, which mode state does not learn: "
                "give --agent.gate off, or train with --agent.mode joint"
            )
        offered = [k for k, there in (("action", c.mode != "state"), ("state", guides(c))) if there]
        if c.channels not in offered and not (c.channels == "both" and offered):
            raise UserError(
                f"agent.channels {c.channels} would correct nothing: mode {c.mode} with "
                f"forward_updates {c.forward_updates} and target {c.target} offers the channels "
                f"[{', '.join(offered)}]; give one of them, or --agent.correction off"
            )

    @staticmethod
    def supports(observation_space: Space[Any], action_space: Space[Any]) -> str | None:
        """Vectors in, a box of actions out."""
        return Agent.supports(observation_space, action_space)

    # ---- losses ------------------------------------------------------------------------------

    def score_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Denoising, of (s, a), or of s' in mode state."""
        obs = batch["next_obs" if self.config.mode == "state" else "obs"]
        loss = self.score.loss(obs, batch["action"])
        return loss, {"score/loss": loss}

    def inverse_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Squared error of the action between two states."""
        loss = self.inverse_error(batch).sum()
        return loss, {"inverse/loss": loss}

    def held_out_loss(self, batch: Batch) -> Tensor:
        """Of the stage's model on raw rows: averaged network, errors of the dynamics, ()."""
        if self.stage == "forward":
            return self.dynamics.error(batch).mean()
        batch = self.normalizer.batch(batch)
        if self.stage == "inverse":
            return self.inverse_error(batch).sum()
        obs = batch["next_obs" if self.config.mode == "state" else "obs"]
        return self.average.loss(obs, batch["action"])

    def inverse_error(self, batch: Batch) -> Tensor:
        """Squared error of the inverse dynamics on normalised rows, (action,)."""
        return self.inverse.errors(batch["obs"], batch["next_obs"], batch["action"])

    def data_quantiles(self, batch: Batch) -> Tensor:
        """Gate statistic of dataset actions, (L, 101)."""
        return self.quantiles.of(self.average, batch["obs"], batch["action"])

    # ---- acting ------------------------------------------------------------------------------

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """The base's action, corrected; exploration is the base's own."""
        action = self.base.act(obs, explore)
        return action if explore else self.corrected(obs, action)

    def corrected(self, raw: Tensor, action: Tensor) -> Tensor:
        """(B, obs) raw, (B, action) -> (B, action)."""
        if self.config.correction == "off":
            return action
        c, obs, given = self.config, self.normalizer(raw), action
        strength = self.strength(obs, action)
        if c.mode != "state" and c.channels != "state":
            action = correct_action(self.average, obs, action, self.levels, c.eta_action, strength)
        if guides(c) and c.channels != "action":
            action = self.guided(raw, obs, action, strength)
        if c.judge == "value":
            before, after = (self.base.action_value(raw, a) for a in (given, action))
            if before is not None and after is not None:
                action = torch.where((after >= before).unsqueeze(-1), action, given)
        return action

    def strength(self, obs: Tensor, action: Tensor) -> Tensor:
        """What the gate lets through, (B, 1) in 0..1."""
        c = self.config
        if c.gate == "off":
            return torch.ones_like(action[..., :1])
        statistic = action_score_norm(self.average, obs, action, self.levels[0])
        return gate_strength(statistic, self.quantiles(self.levels[0], c.gate_quantile), c.gate)

    def guided(self, raw: Tensor, obs: Tensor, action: Tensor, strength: Tensor) -> Tensor:
        """State channel: what the inverse dynamics would do to reach a denser state."""
        c, reached = self.config, obs
        if c.target == "forward":
            reached = self.normalizer(self.dynamics.mean(raw, action))
        scored = reached if c.mode == "state" else obs  # the score of s', or that of (s, a)
        delta = state_displacement(
            self.average, scored, action, self.state_level, c.eta_state, self.inverse.step
        )
        weight = c.weight * strength * self.inverse.usable
        auxiliary = self.inverse(obs, reached + delta)
        if c.output == "convex":
            return torch.lerp(action, auxiliary, weight).clamp(-1, 1)
        return (action + weight * (auxiliary - self.inverse(obs, reached))).clamp(-1, 1)

    def diagnostics(self, obs: Tensor) -> Metrics:
        """Size of the correction; score norm before and after, at the last step's level.

        In mode state there are no scores of actions, and none are shown.
        """
        before = self.base.act(obs, False)
        after = self.corrected(obs, before)
        obs = self.normalizer(obs)
        change, level = after - before, self.levels[-1]
        found = {
            "correction/norm": change.norm(dim=-1),
            "correction/mean_abs": change.abs().mean(-1),
            "corrected/share": change.any(-1).to(obs.dtype),
        }
        if self.config.mode != "state":
            found["score/before"] = action_score_norm(self.average, obs, before, level)
            found["score/after"] = action_score_norm(self.average, obs, after, level)
        return found

    def focus(self, task: Task) -> None:
        """Also refuses to act with a gate that was never calibrated."""
        super().focus(task)
        c = self.config
        if self.stage == "" and c.correction == "on" and c.gate != "off":
            if not self.quantiles.known:
                raise UserError(
                    "this run has no gate quantiles, its score stage did not end: give "
                    "--agent.gate off, or train it on with rl-shift train --resume"
                )

    # ---- stages ------------------------------------------------------------------------------

    def stages(self, task: Task) -> list[Stage]:
        """The models, unless they come from another run; then what the base does."""
        c = self.config
        budgets = {"score": c.score_updates}
        if c.mode != "conditional":
            budgets |= {"inverse": c.inverse_updates, "forward": c.forward_updates}
        own = [
            Stage(k, n, counted=False, check_every=c.check_every) for k, n in budgets.items() if n
        ]
        return [*([] if c.score else own), *super().stages(task)]

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Needs a dataset; models of another run must have seen one with the same statistics."""
        if not len(buffer) or not buffer.flat:
            raise UserError("a correction is learnt from a dataset: give --dataset ID|PATH")
        if self.config.score and self.config.normalize:
            mean, std = buffer.statistics("obs")
            off = (self.normalizer.mean - mean).abs() > 1e-3 * (std + 1e-3)
            if bool(off.any()):
                raise UserError(
                    f"the models of {self.config.score} were learnt on data with another mean "
                    f"observation than {task.name}: use a run on the same dataset"
                )
        super().begin_task(task, buffer)
        if not self.config.score:
            self.forget()
        if not self.config.score and self.config.mode != "conditional":
            rows = self.split(buffer)["inverse"][0]
            self.inverse.fit_statistics(buffer, rows, self.normalizer)
            self.dynamics.fit(buffer.take(rows))
        if self.config.mode == "joint" and not guides(self.config):
            log.warning("no forward model: the action channel alone corrects, unless target=state")

    def forget(self) -> None:
        """What was measured on an earlier task's data says nothing about this one's."""
        for network, best in self.bests.values():
            best.reset(network)
        self.quantiles.table.fill_(-1.0)
        self.inverse.error.fill_(-1.0)

    @property
    def bests(self) -> dict[str, tuple[nn.Module, Best]]:
        """The network of every stage and its best weights."""
        return {
            "score": (self.average, self.best_score),
            "inverse": (self.inverse, self.best_inverse),
            "forward": (self.dynamics, self.best_dynamics),
        }

    def split(self, buffer: Buffer) -> dict[str, tuple[Tensor, Tensor]]:
        """Rows to learn from and rows held out, per stage."""
        if self.rows is None or self.rows[0] is not buffer:
            inside = split_by_episode(buffer, usable=inside_episodes(buffer))
            whole = inside if self.config.mode == "state" else split_by_episode(buffer)
            self.rows = buffer, {"score": whole, "inverse": inside, "forward": inside}
        return self.rows[1]

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """Rows that are not held out, for the models; the base's own for the base."""
        if isinstance(buffer, Buffer) and self.stage in MODELS:
            c = self.config
            size = c.batch_size if self.stage == "score" else c.model_batch_size
            return buffer.sample(size, self.split(buffer)[self.stage][0])
        return super().sample(buffer)

    def check(self, stage: Stage, updates: int, buffer: Buffer) -> bool:
        """Keep the best weights on held-out episodes; at the end, use them and calibrate."""
        if stage.name not in MODELS:
            return self.base.check(stage, updates, buffer)
        network, best = self.bests[stage.name]
        held_out = self.spread(buffer, stage.name, 1)
        with seeding.forked(0):  # the same noise at every check
            best.offer(network, self.run(self.held_out_loss, held_out))
        if updates < stage.updates and not best.exhausted(self.config.patience):
            return False
        best.restore(network)
        if stage.name == "score":
            data = self.normalizer.batch(self.spread(buffer, stage.name, 0))
            self.quantiles.table.copy_(self.run(self.data_quantiles, data))
        elif stage.name == "inverse":
            self.inverse.error.copy_(self.run(self.inverse_error, self.normalizer.batch(held_out)))
            self.warn_if_unusable()
        return True

    def outcome(self, stage: Stage) -> Metrics:
        """Squared error of the inverse dynamics on held-out episodes beside the actions' variance.

        The mean over the seeds, for every dimension of the action.
        """
        if stage.name != "inverse":
            return super().outcome(stage)
        found = {"mse": self.inverse.error, "variance": self.inverse.variance}
        return {
            f"{name}/{k}": value.clone()
            for name, values in found.items()
            for k, value in enumerate(values.unbind(-1))
        }

    def spread(self, buffer: Buffer, stage: str, side: int) -> Batch:
        """Rows spread evenly over one side of the split, raw, (S, B, ...) if stacked."""
        rows = self.split(buffer)[stage][side]
        batch = buffer.take(rows[:: -(-len(rows) // HELD_OUT_ROWS)])
        if self.seeds > 1:
            batch = {k: v.expand(self.seeds, *v.shape) for k, v in batch.items()}
        return batch

    def warn_if_unusable(self) -> None:
        """One line if the state channel stays off."""
        if not bool(self.inverse.usable.all()):
            log.warning(
                "the inverse dynamics err by %.3f on held-out episodes, more than half of the "
                "actions' variance %.3f: the state channel stays off",
                float(self.inverse.error.mean()),
                float(self.inverse.variance.mean()),
            )

    def reuse(self, field: str, source: Agent) -> None:
        """The models and statistics of another run, which must have been configured alike."""
        assert isinstance(source, CDSA)
        for name in self.SCORE_FIELDS:
            theirs, mine = getattr(source.config, name), getattr(self.config, name)
            if theirs != mine:
                raise UserError(
                    f"the models of {self.config.score} have agent.{name} {theirs}, this run has "
                    f"{mine}: give --agent.{name} as there"
                )
        theirs, mine = (c.forward_updates > 0 for c in (source.config, self.config))
        if theirs != mine and self.config.mode != "conditional":  # how long it learnt is theirs
            raise UserError(
                f"{self.config.score} has {'a' if theirs else 'no'} forward model: give "
                f"--agent.forward_updates {source.config.forward_updates} as there"
            )
        if not source.quantiles.known:
            raise UserError(f"the score stage of {self.config.score} did not end: train it on")
        super().reuse(field, source)

    def update(self, batch: Batch) -> Metrics:
        """The stage's own model, or the base."""
        if self.stage == "score":
            metrics = self.learn("score", self.score_loss, self.normalizer.batch(batch))
            self.polyak("score", "average", 1 - self.config.average)
            return metrics
        if self.stage == "inverse":
            return self.learn("inverse.net", self.inverse_loss, self.normalizer.batch(batch))
        if self.stage == "forward":
            return self.learn("dynamics", self.dynamics.loss, batch)
        return super().update(batch)
