"""Reactive Exploration: curiosity that wakes up when the world changes (Steinparz et al., 2022).

A model of the stream is learnt beside the agent, and its error is a part of the reward: small where
the world is mastered, large after a shift. Faithful to the published code: the convex mixture, the
separate reward model, intrinsic rewards once per rollout with the models as they were before the
update, sizes and losses (`rl_shift.curiosity`). What differs, ours: models learn from true
transitions (`pairing="shuffled"` is the published pairing); gradients of the models are clipped as
the policy's are; replay learners train their models on the newest rows too; running normalisation
of observations and errors; a detector with reactions, off by default. The losses share no parameter
and Adam works element by element, so two optimisers equal the published single one of equal rate.
Known gaps: no value head of its own for the intrinsic reward. `info["shift"]` is never read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift.agent import Agent, Batch, Metrics, Wrapper
from rl_shift.buffer import Buffer
from rl_shift.curiosity import KINDS, RewardModel, curiosity, visits
from rl_shift.errors import UserError
from rl_shift.rollouts import minibatches
from rl_shift.running import Detector, RunningStatistics

if TYPE_CHECKING:
    from rl_shift.buffer import Mixture

COLUMNS = ("obs", "action", "reward", "next_obs")
SIGNALS = ("state", "reward")


class Reactive(Wrapper):
    """Any base learner, fed the mixture of its reward and of what its models did not foresee.

    r    = beta_s r_s + beta_r r_r + (1 - beta_s - beta_r) r_ext
    r_s  = eta_s / 2 error_s(o, a, o'),   r_r = eta_r / 2 (R(o, a) - r_ext)^2
    L    = L_curiosity + E (R(o, a) - r_ext)^2
    """

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters; the published PPO+ICM+R where not said otherwise."""

        base: str = "ppo"  # or dqn, sac
        base_config: dict[str, Any] = field(default_factory=dict)
        curiosity: str = "icm"  # rnd, noveld, ride, disagreement, none
        beta_state: float = 0.15  # weight of the state error; 0.85 without a reward model
        beta_reward: float = 0.15  # weight of the reward error
        eta_state: float = 0.01  # scale of the state error; 1.0 on InfCartPole, 1e-4 with DQN
        eta_reward: float = 1.0  # scale of the reward error; 0.2 on InfCartPole
        latent: int = 0  # width of the latent; 0: published (128, RND 512)
        forward_weight: float = 0.2  # w
        inverse_target: Literal["mean", "sampled"] = "mean"  # sampled: as published; Box actions
        learning_rate: float = 3e-4  # Adam, models
        gradient_clip: float = 0.5  # per model; ours
        model_batch_size: int = 64  # on-policy: rows of a minibatch; a smaller rest is left out
        model_epochs: int = 10  # on-policy: passes over the rollout
        pairing: Literal["true", "shuffled"] = "true"  # shuffled: next row of a random batch as o'
        recency: float = 0.5  # replay: share of the models' batch from the newest rows; ours
        recent_rows: int = 10_000  # replay: how many are the newest; ours
        normalize: bool = False  # observations of the models, clipped at 5; ours, for MuJoCo
        normalize_rewards: bool = False  # divide r_s and r_r by their running std; for MuJoCo
        count: bool = True  # visits of a rollout, NovelD and RIDE; off for continuous observations
        fast_rate: float = 0.01  # of the detector's fast average, per env step; ours
        slow_rate: float = 0.0001  # of its slow average; ours
        threshold: float = 4.0  # of its score; ours
        react_beta: float = 0.0  # added to beta_state at a detection, decaying; ours, off
        react_steps: int = 10_000  # env steps over which it decays
        react_explore: bool = False  # dqn: begin epsilon anew; ppo: uniform policy; ours, off
        react_forget: bool = False  # replay: draw only rows since the detection; ours, off
        react_fall: float = 0.0  # these two wait, react_steps at most, until the reward has fallen
        # by so many of the detector's std; 0: at once; ours

    stackable = False  # running statistics and detector belong to one life
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Wrapper.limits,
        "eta_state": (0, math.inf),
        "eta_reward": (0, math.inf),
        "latent": (0, math.inf),
        "forward_weight": (0, 1),
        "model_epochs": (1, math.inf),
        "recency": (0, 1),
        "recent_rows": (1, math.inf),
        "react_beta": (0, math.inf),
        "react_steps": (1, math.inf),
        "react_fall": (0, math.inf),
    }

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        config: Config,
        base: Agent | None = None,
    ) -> None:
        _check(config)
        super().__init__(observation_space, action_space, config, base)
        c, spaces = config, (observation_space, action_space)
        sampled = c.inverse_target == "sampled"
        self.curiosity = curiosity(c.curiosity, *spaces, c.latent, c.forward_weight, sampled)
        self.reward_model = RewardModel(*spaces)
        self.learnt: tuple[str, ...] = ()
        if self.curiosity.trains:
            self.learnt = ("curiosity.model", "reward_model.model")
        elif c.beta_reward > 0:
            self.learnt = ("reward_model.model",)
        self.optimizer(*self.learnt, lr=c.learning_rate, clip=c.gradient_clip)
        self.statistics = RunningStatistics(self.normalizer.mean.shape)
        self.spread = torch.nn.ModuleDict({k: RunningStatistics() for k in SIGNALS})
        self.detectors = {k: Detector(c.fast_rate, c.slow_rate, c.threshold) for k in SIGNALS}
        if c.react_fall:  # of minus the reward
            self.detectors["fall"] = Detector(c.fast_rate, c.slow_rate, c.react_fall)
        self.since = torch.tensor(float("inf"))  # env steps since the last detection
        self.pending = torch.zeros(())  # 1: a detection that has not been reacted to
        self.appended = 0  # rows the ring has taken in
        self.remembered = 0  # how many of them were dropped from replay
        soft = getattr(self.base.config, "temperature", 0) > 0  # it explores by this, always
        if c.react_explore and (soft or not hasattr(self.base, "explore_again")):
            raise UserError(
                f"react_explore: {c.base}{' at a temperature' * soft} cannot begin to explore "
                "anew; set it to false"
            )
        if c.react_forget and getattr(self.base.config, "prioritized", False):
            raise UserError("react_forget draws uniformly: set prioritized to false in base_config")

    # ---- rewards -----------------------------------------------------------------------------

    def rows(self, batch: Batch, prefix: str = "") -> Batch:
        """The transitions under `prefix` as the models see them, (B, ...)."""
        rows = {k: batch[prefix + k] for k in COLUMNS}
        lead = rows["reward"].dim()
        if lead == 2 and self.curiosity.counts and self.config.count:
            rows["visits"] = visits(rows["obs"]).to(rows["reward"].dtype)
        rows = {k: v.flatten(0, lead - 1) for k, v in rows.items()}
        for key in ("obs", "next_obs"):
            rows[key] = self.normalizer(rows[key])
            if self.config.normalize:
                rows[key] = rows[key].clamp(-5, 5)
        return rows

    def errors(self, rows: Batch) -> Batch:
        """What the models did not foresee, (B,) each; called without gradients."""
        return {"state": self.curiosity.error(rows), "reward": self.reward_model.error(rows)}

    def intrinsic(self, errors: Batch) -> Batch:
        """r_s and r_r, (B,) each."""
        c = self.config
        eta = {"state": c.eta_state, "reward": c.eta_reward}
        return {k: 0.5 * eta[k] * errors[k] for k in SIGNALS}

    def mixture(self, reward: Tensor, errors: Batch) -> Tensor:
        """beta_s r_s + beta_r r_r + (1 - beta_s - beta_r) r_ext, (B,)."""
        c, r = self.config, self.intrinsic(errors)
        if c.normalize_rewards:
            r = {k: r[k] / (self.spread[k].std + 1e-8) for k in SIGNALS}  # type: ignore[operator]
        raised = c.react_beta * (1 - self.since.to(reward) / c.react_steps).clamp(0, 1)
        beta = (c.beta_state + raised).clamp(max=1 - c.beta_reward)
        extrinsic = (1 - beta - c.beta_reward) * reward
        return beta * r["state"] + c.beta_reward * r["reward"] + extrinsic

    def watch(self, errors: Batch, reward: Tensor, repeats: float = 1.0) -> Metrics:
        """Detectors on the newest errors and rewards in time order."""
        scores = {k: self.detectors[k].update(errors[k], repeats) for k in SIGNALS}
        metrics = {"detector/shift_score": torch.stack([*scores.values()]).amax()}
        if "fall" in self.detectors:
            metrics["detector/reward_fall"] = self.detectors["fall"].update(-reward, repeats)
        steps = len(reward) / repeats
        self.since = torch.where(self.detected > 0, 0.0, self.since.to(self.detected) + steps)
        waiting = self.pending.to(self.since) * (self.since <= self.config.react_steps)
        self.pending = torch.maximum(self.detected, waiting)
        return metrics

    @property
    def detected(self) -> Tensor:
        """1 if a detector has just fired, ()."""
        return torch.stack([self.detectors[k].values["detected"] for k in SIGNALS]).amax()

    def react(self) -> None:
        """The reactions that are switched on, if a detector fired and the reward has fallen."""
        c = self.config
        fall = self.detectors.get("fall")
        fallen = fall.values["score"] > fall.threshold if fall else True
        if (c.react_explore or c.react_forget) and bool(self.pending * fallen):  # one read
            if c.react_explore:
                self.base.explore_again()  # type: ignore[operator]
            self.remembered = self.appended if c.react_forget else 0
            self.pending = torch.zeros_like(self.pending)

    # ---- learning ----------------------------------------------------------------------------

    def loss(self, rows: Batch) -> tuple[Tensor, Metrics]:
        """Curiosity and reward model on a minibatch; they share no parameter."""
        if self.config.pairing == "shuffled":
            rows = rows | {"next_obs": rows["obs"].roll(-1, 0)}
        losses = [m.loss(rows) for m in (self.curiosity, self.reward_model) if m.trains]
        metrics = {k: v for _, found in losses for k, v in found.items()}
        return torch.stack([loss for loss, _ in losses]).sum(), metrics

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """The base's batch; from replay, with the newest rows and more of the recent ones."""
        ring = buffer if isinstance(buffer, Buffer) else buffer.buffers[-1]
        self.appended = ring.appended
        kept = Kept(ring, self.appended - self.remembered) if self.remembered else buffer
        batch = self.base.sample(kept)  # type: ignore[arg-type]
        if batch["reward"].dim() == 1 and self.learnt:
            recency = self.config.recency
            share = max(1, round(recency * len(batch["reward"]))) if recency else 0
            recent = ring.newest(self.config.recent_rows)
            drawn = torch.randint(len(recent), (share,), device=recent.device)
            new = ring.newest(self.base.collect_every * ring.lanes)
            for prefix, index in (("recent_", recent[drawn]), ("new_", new)):
                batch |= {prefix + k: v for k, v in ring.take(index).items() if k in COLUMNS}
        return batch

    def extra_state(self) -> dict[str, Any]:
        """Detectors and reactions."""
        detectors = {k: d.state() for k, d in self.detectors.items()}
        reactions = {k: getattr(self, k) for k in ("since", "pending", "remembered")}
        return {"detectors": detectors, **reactions}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take them back."""
        for name, detector in self.detectors.items():
            detector.load_state(extra["detectors"][name])
        for name in ("since", "pending", "remembered"):
            setattr(self, name, extra[name])

    def step(self, batch: Batch) -> Metrics:
        """The models on one minibatch: the compiled unit; the base has its own."""
        return self.learn(self.learnt, self.loss, batch)

    def learn_models(self, rows: Batch, batch: Batch) -> Metrics:
        """Passes over a rollout; or one step on replayed rows, a share of them recent ones."""
        if not self.learnt:
            return {}
        if "recent_reward" in batch:
            recent = self.rows(batch, "recent_")
            kept = len(rows["reward"]) - len(recent["reward"])
            return self.step({k: torch.cat([v[:kept], recent[k]]) for k, v in rows.items()})
        found = [
            self.step(piece)
            for _ in range(self.config.model_epochs)
            for piece in minibatches(rows, self.config.model_batch_size)
        ]
        return {k: torch.stack([m[k] for m in found]).mean() for k in found[0]}

    def update(self, batch: Batch) -> Metrics:
        """Mix the reward, learn the models, let the base learn, move the statistics."""
        rows, reward, news = self.rows(batch), batch["reward"], "new_" * ("new_reward" in batch)
        errors = self.run(self.errors, rows)
        if news:  # a row is new for all updates of one round
            stream, earned = self.run(self.errors, self.rows(batch, news)), batch["new_reward"]
        else:  # the lanes' rows side by side in time order
            lanes = reward.shape if reward.dim() == 2 else (1, -1)
            stream = {k: v.view(lanes).mT.flatten() for k, v in errors.items()}
            earned = reward.view(lanes).mT.flatten()
        metrics = self.watch(stream, earned, self.base.updates_per_collect if news else 1)
        if self.config.normalize_rewards:
            for key, values in self.intrinsic(stream).items():
                self.spread[key].update(values)  # type: ignore[operator]
        mixed = self.mixture(rows["reward"], errors).view_as(reward)
        metrics |= self.learn_models(rows, batch)
        plain = {k: v for k, v in batch.items() if not k.startswith(("new_", "recent_"))}
        metrics |= self.base.update(plain | {"reward": mixed})
        self.react()  # after the base has used the actions of the policy that took them
        if self.config.normalize:
            self.statistics.update(
                batch[news + "obs"].flatten(0, reward.dim() - 1 if not news else 0)
            )
            self.normalizer.fit(self.statistics.mean, self.statistics.std, epsilon=1e-4)
        metrics |= {f"curiosity/{k}_error": v.mean() for k, v in stream.items()}
        metrics |= {f"reward/{k}": v.mean() for k, v in self.intrinsic(stream).items()}
        return metrics | {"reward/mixed": mixed.mean(), "rollout/reward": reward.mean()}


class Kept:
    """A ring of which replay draws the newest `count` rows only; a thousand of them at least."""

    def __init__(self, ring: Buffer, count: int) -> None:
        self.ring, self.count = ring, max(count, 1000)

    def sample(self, n: int) -> Batch:
        """Uniform transitions of what is kept, (n, ...)."""
        return self.ring.sample(n, where=self.ring.newest(self.count))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the ring's."""
        return getattr(self.ring, name)


def _check(config: Reactive.Config) -> None:
    """Refuse settings that mean nothing."""
    c = config
    if c.beta_state < 0 or c.beta_reward < 0 or c.beta_state + c.beta_reward > 1:
        raise UserError(
            f"beta_state {c.beta_state} and beta_reward {c.beta_reward} must not be negative and "
            "must not sum to more than 1: the rest is the weight of the reward itself"
        )
    if c.curiosity not in KINDS:
        raise UserError(f"unknown curiosity {c.curiosity!r}: choose {', '.join(KINDS)}")
    for name in ("fast_rate", "slow_rate"):
        if not 0 < getattr(c, name) <= 1:
            raise UserError(
                f"{name} is the share of a new row in an average: it must be more than 0 and at "
                f"most 1, not {getattr(c, name)}"
            )
