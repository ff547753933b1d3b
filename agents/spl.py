"""SPL: semi-pessimistic RL, rewards known on few trajectories (after arXiv 2505.19002).

Faithful to the idea: a lower bound of the reward, learnt where rewards are known, labels the rest,
and an ordinary learner needs no further pessimism. Ours: the bound (bootstrapped networks, split
conformal scale) and all settings. Known gaps: model-free only; no quantile regressor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rl_shift import seeding
from rl_shift.agent import Agent, Batch, Metrics, Stage, Wrapper
from rl_shift.buffer import Buffer, Mixture
from rl_shift.errors import UserError
from rl_shift.held_out import Best
from rl_shift.networks import EnsembleMLP

if TYPE_CHECKING:
    from rl_shift.config import Task

CHECKED_ROWS = 2_000  # per member, out of its bag
CHUNK = 16_384  # rows labelled at once


class Split(NamedTuple):
    """Whose rewards are known, and what each network may see of them."""

    known: Tensor  # (rows,) bool
    held_out: Tensor  # known rows that calibrate
    bags: Tensor  # (members, longest) rows to learn from, padded
    sizes: Tensor  # (members,) rows of each bag
    checks: Tensor  # (members, CHECKED_ROWS) rows out of each bag


class SPL(Wrapper):
    """Labels what has no reward with a lower bound, and lets the base learn from everything.

    L(reward) = sum_b E_bag_b (r_b(s, a) - r)^2,  bags of whole trajectories
    r_low     = clip(mean_b r_b - kappa std_b r_b, observed range)
    kappa     : fixed, or the ceil((n + 1) coverage)-th smallest (mean_b r_b - r) / std_b r_b of n
                held-out rows
    """

    stackable = False  # every seed reveals trajectories of its own

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters of SPL; ours, the paper's are not known to us."""

        base: str = "iql"  # any offline agent
        base_config: dict[str, Any] = field(default_factory=dict)
        labelled: float = 0.05  # share of trajectories whose rewards are revealed
        labels: Literal["lower", "mean", "zero", "none", "all"] = "lower"  # of the other rows:
        # lower bound; mean (kappa 0); 0; left out (labelled only); true rewards (reference)
        everywhere: bool = False  # the bound replaces known rewards, too
        kappa: float = 1.0  # standard deviations below the mean
        coverage: float = 0.0  # above 0: kappa by split conformal for this nominal coverage
        members: int = 10  # bootstrapped networks
        hidden: tuple[int, ...] = (256, 256)
        batch_size: int = 256
        learning_rate: float = 1e-3  # Adam
        reward_updates: int = 10_000  # at most; early stopping on rows out of the bag
        check_every: int = 250  # updates between two looks at them
        patience: int = 4  # looks without a better network of any member
        held_out: float = 0.2  # share of the labelled trajectories that calibrates
        normalize: bool = True  # observations of the reward networks, std + 1e-3

    low: Tensor
    high: Tensor
    centre: Tensor
    scale: Tensor
    kappa: Tensor
    report: Tensor

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        super().__init__(observation_space, action_space, config)
        if "mc_return" in self.base.columns:
            raise UserError(f"{config.base} uses returns, which hidden rewards would leak into")
        if not 0 < config.labelled <= 1 or not 0 <= config.coverage < 1 or config.members < 2:
            raise UserError("spl: 0 < labelled <= 1, 0 <= coverage < 1 and members of at least 2")
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        self.reward = EnsembleMLP(config.members, obs + action, config.hidden, 1)
        self.optimizer("reward", lr=config.learning_rate)
        self.best = Best(self.reward)
        self.best.loss = self.best.loss.expand(config.members).clone()  # each member its own
        self.best.stale = self.best.stale.expand(config.members).clone()
        for name in ("low", "high", "centre", "scale"):  # of the known rewards
            self.register_buffer(name, torch.tensor(float(name == "scale")))
        self.register_buffer(
            "kappa", torch.tensor(0.0 if config.labels == "mean" else config.kappa)
        )
        self.register_buffer("report", torch.zeros(3))
        self.trajectories = torch.zeros(0, dtype=torch.int64)  # numbers of the labelled ones
        self.split: tuple[Buffer, Split] | None = None
        self.data: tuple[Buffer, Buffer] | None = None  # the task's, and the one with labels
        self.saved: dict[str, Any] | None = None  # of the labelled buffer, until it is made again

    # ---- who is labelled ---------------------------------------------------------------------

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Reveals the rewards of some trajectories; the base never sees the others."""
        if not len(buffer) or not buffer.flat or task.env_steps:
            raise UserError("spl learns from a dataset alone: give --dataset ID|PATH, no env steps")
        if task.reward == "normalize":
            raise UserError(
                "spl: reward normalize would use hidden rewards: give raw or SCALE,SHIFT"
            )
        Agent.begin_task(self, task, buffer)
        self.split = self.data = self.saved = None
        self.best.reset(self.reward)
        known = self.revealed(buffer).known
        reward = buffer.arrays()["reward"][known]
        for name, value in (
            ("low", reward.min()),
            ("high", reward.max()),
            ("centre", reward.mean()),
            ("scale", reward.std(correction=0) + 1e-6),
        ):
            getattr(self, name).copy_(value)
        zero = torch.zeros_like(known, dtype=torch.float32)
        self.base.begin_task(task, self.with_rewards(buffer, zero))

    def revealed(self, buffer: Buffer) -> Split:
        """The same split of the same data for the same seed and task, whenever it is asked for."""
        if self.split is None or self.split[0] is not buffer:
            self.split = buffer, self.draw(buffer)
        return self.split[1]

    def draw(self, buffer: Buffer) -> Split:
        """Labelled trajectories, held-out ones among them, and a bag of the rest per member."""
        c, episodes = self.config, buffer.episodes().cpu()
        generator = seeding.torch_generator(buffer.seeds[0], "revealed", len(self.begun))
        order = torch.randperm(len(episodes), generator=generator)
        self.trajectories = order[: max(1, round(c.labelled * len(episodes)))]
        chosen = episodes[self.trajectories]
        known = torch.zeros(len(buffer), dtype=torch.bool)
        known[_rows(chosen)] = True
        if len(chosen) > 1:
            held = max(1, round(c.held_out * len(chosen)))
            held_out, units = _rows(chosen[:held]), chosen[held:]
        else:  # one trajectory: its end
            rows = _rows(chosen)
            cut = max(1, round((1 - c.held_out) * len(rows)))
            held_out, units = rows[cut:], chosen.clone()
            units[0, 1] = rows[cut - 1] + 1
        if len(units) < 3:  # too few to draw from: single rows
            units = _rows(units)[:, None] + torch.tensor([0, 1])
        bags, checks = [], []
        for _ in range(c.members):
            drawn = torch.randint(len(units), (len(units),), generator=generator)
            out = torch.ones(len(units), dtype=torch.bool)
            out[drawn] = False
            if not out.any():  # rare; its first draw stays out
                out[drawn[0]] = True
                drawn = drawn[drawn != drawn[0]]
            bags.append(_rows(units[drawn]))
            rows = _rows(units[out])
            picked = torch.randint(len(rows), (CHECKED_ROWS,), generator=generator)
            checks.append(rows[picked])
        bag = torch.nn.utils.rnn.pad_sequence(bags, batch_first=True)
        sizes = torch.tensor([len(rows) for rows in bags])
        parts = (known, held_out, bag, sizes, torch.stack(checks))
        return Split(*(part.to(buffer.device) for part in parts))

    # ---- the bound ---------------------------------------------------------------------------

    def reward_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Each member on its own rows, (members, B, ...)."""
        errors = self.errors(batch)
        return errors.sum(), {"reward/loss": errors.mean()}

    def errors(self, batch: Batch) -> Tensor:
        """Mean squared error of each member in units of the rewards' variance, (members,)."""
        predicted = self.reward(torch.cat([batch["obs"], batch["action"]], -1)).squeeze(-1)
        return (predicted - (batch["reward"] - self.centre) / self.scale).square().mean(-1)

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over members for raw rows, (B,) each."""
        batch = self.normalizer.batch(batch)
        x = torch.cat([batch["obs"], batch["action"]], -1)
        predicted = self.centre + self.scale * self.reward(x).squeeze(-1)
        return predicted.mean(0), predicted.std(0) + 1e-8

    def lower(self, mean: Tensor, std: Tensor) -> Tensor:
        """The label r_low, (B,)."""
        return (mean - self.kappa * std).clamp(self.low, self.high)

    def check(self, stage: Stage, updates: int, buffer: Buffer) -> bool:
        """Keep each member's best weights; at the end, use them, calibrate and report."""
        if stage.name != "reward":
            return self.base.check(stage, updates, buffer)
        split = self.revealed(buffer)
        batch = self.normalizer.batch(buffer.take(split.checks))
        self.best.offer(self.reward, self.run(self.errors, batch))
        patient = self.config.patience
        if updates < stage.updates and not bool((self.best.stale >= patient).all()):
            return False
        self.best.restore(self.reward)
        self.calibrate(buffer, split)
        return True

    def calibrate(self, buffer: Buffer, split: Split) -> None:
        """Choose kappa if asked to; coverage, share of uncertain rows and mean gap."""
        held_out = buffer.take(split.held_out)
        mean, std = self.run(self.moments, held_out)
        if self.config.coverage and self.config.labels == "lower":
            scores = ((mean - held_out["reward"]) / std).sort().values
            rank = math.ceil((len(scores) + 1) * self.config.coverage)
            self.kappa.fill_(scores[rank - 1] if rank <= len(scores) else math.inf)
        covered = (self.lower(mean, std) <= held_out["reward"]).float().mean()
        unknown = (~split.known).nonzero()[:, 0]
        unknown = unknown[:: max(1, len(unknown) // CHUNK)]
        mean_there, std_there = self.run(self.moments, buffer.take(unknown))
        beyond = (std_there > std.quantile(0.95)).float().mean()
        gap = (self.lower(mean_there, std_there) - mean_there).mean()
        if not len(unknown):  # every reward is known
            beyond = gap = torch.zeros_like(covered)
        self.report.copy_(torch.stack([covered, beyond, gap]))

    # ---- what the base sees ------------------------------------------------------------------

    def labelled(self, buffer: Buffer) -> Buffer:
        """The data with labels in place of hidden rewards; the task's own if all are known."""
        if self.data is None or self.data[0] is not buffer:
            self.data = buffer, self.with_rewards(buffer, self.label(buffer))
            if self.saved is not None and self.data[1] is not buffer:
                self.data[1].load_state(self.saved)
            self.saved = None
        return self.data[1]

    def label(self, buffer: Buffer) -> Tensor:
        """A label for every row, (rows,)."""
        if self.config.labels not in ("lower", "mean"):
            return torch.zeros(len(buffer), device=buffer.device)
        chunks = torch.split(torch.arange(len(buffer), device=buffer.device), CHUNK)
        found = [self.lower(*self.run(self.moments, buffer.take(rows))) for rows in chunks]
        return torch.cat(found).float()

    def with_rewards(self, buffer: Buffer, label: Tensor) -> Buffer:
        """A buffer with known rewards where they are known (if wanted), and `label` elsewhere."""
        c, known = self.config, self.revealed(buffer).known
        if c.labels == "all" or (bool(known.all()) and not c.everywhere):
            return buffer
        arrays = buffer.arrays()
        kept = torch.zeros_like(known) if c.everywhere else known
        arrays["reward"] = torch.where(kept, arrays["reward"], label)
        end = torch.zeros_like(known)
        end[buffer.episodes()[:, 1] - 1] = True
        if c.labels == "none":
            arrays, end = {k: v[known] for k, v in arrays.items()}, end[known]
        return Buffer.from_arrays(arrays, buffer.device, buffer.seeds, end)

    def stages(self, task: Task) -> list[Stage]:
        """The reward networks where labels need them, then the base's stages."""
        c = self.config
        needed = c.labels in ("lower", "mean") and (c.labelled < 1 or c.everywhere)
        learn = Stage("reward", c.reward_updates, counted=False, check_every=c.check_every)
        return [*([learn] if needed else []), *super().stages(task)]

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """A bag of rows for each member, then what the base wants of the labelled data."""
        assert isinstance(buffer, Buffer)
        if self.stage != "reward":
            return super().sample(self.labelled(buffer))
        split = self.revealed(buffer)
        place = torch.rand(len(split.bags), self.config.batch_size, device=buffer.device)
        return buffer.take(split.bags.gather(1, (place * split.sizes[:, None]).long()))

    def extra_state(self) -> dict[str, Any]:
        """Which trajectories are labelled, and the draws from the data with labels."""
        made = self.data is not None and self.data[0] is not self.data[1]
        data = self.data[1].state() if self.data is not None and made else self.saved
        return {"trajectories": self.trajectories, "data": data}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """The draws go on where they stopped, once the data are labelled again."""
        self.split = self.data = None
        self.trajectories, self.saved = extra["trajectories"], extra["data"]

    def update(self, batch: Batch) -> Metrics:
        """The reward networks in their stage, then the base, with how good its labels are."""
        if self.stage == "reward":
            return self.learn("reward", self.reward_loss, self.normalizer.batch(batch))
        names = ("labels/coverage", "labels/uncertain", "labels/gap", "labels/kappa")
        report = dict(zip(names, [*self.report.unbind(), self.kappa], strict=True))
        return super().update(batch) | report


def _rows(ranges: Tensor) -> Tensor:
    """All rows of the ranges [start, end), (N, 2) -> (rows,)."""
    return torch.cat([torch.arange(a, b) for a, b in ranges.tolist()])
