"""PGD: Policy-Guided Diffusion (Jackson et al., 2024), near-on-policy data for an offline agent.

Faithful: which windows are taken, row layout, EDM objective, U-Net, closed form of the guidance,
mixture of 15/16 generated and 1/16 real rows, first set unguided, a new one every 10,000 updates.
Differs: the sampler takes its Euler step from the right point, 32 deterministic steps instead of
256 with churn, guidance inside the denoiser (`guidance: additive` is the published rule), windows
of the training length are generated (128 + 1 rows there), terminating windows are listed
round((T - 1) / stride) times (`repeat_endings: false` is the published rule), terminal rows at the
end of a generated window are kept, terminations are 0 or 4 for the denoiser (`ending_gap: null`
standardises them, as published). The denoiser learns for a number of updates on batches of 256
instead of 10,000 epochs of batches of 32, without the warm-up of the learning rate over the first
10 %, its gradients clipped, all episodes in use (5 % held out there), and the average of its
weights moves at every update instead of ten times as far at every tenth. The base keeps its own
settings and update ratios. Known gaps: one dataset per task, no interaction.
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
from torch import Tensor

from rl_shift.agent import Agent, Batch, Metrics, Stage, Wrapper
from rl_shift.buffer import Buffer, Mixture
from rl_shift.denoisers import ResidualMLP, TemporalUNet
from rl_shift.diffusion import EDM, Sampler, Solver
from rl_shift.errors import UserError, check_fields
from rl_shift.guidance import Form, Guidance, Norm, log_likelihood, tuned
from rl_shift.synthetic import Synthetic, needs_dataset, share, taking_turns
from rl_shift.trajectories import TrajectoryCodec, window_starts

if TYPE_CHECKING:
    from rl_shift.config import Task

log = logging.getLogger(__name__)
PROBES, PROBE_WINDOWS = 5, 40  # of the self-tuned strength, before each generation
MLP_WINDOW = 8  # longest window of the mlp: its layers grow with the square of the rows
UNET_WINDOW = 4  # shortest window of the U-Net, which halves it twice


class PGD(Wrapper):
    """Trains its base on windows of the behaviour, pushed towards the base's current policy.

    L(denoiser)  = E (sigma^2 + 1) / sigma^2 (D(y + sigma eps; sigma) - y)^2
    p(window)    ~ behaviour(window) prod_t pi(a_t|s_t)^lambda
    """

    limits: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Wrapper.limits,
        "stride": (1, math.inf),
        "windows": (1, math.inf),
        "synthesis_updates": (1, math.inf),
        "denoiser_updates": (1, math.inf),
        "denoiser_batch": (1, math.inf),
        "average": (0, 1),
        "coefficient": (0, math.inf),
        "spread": (0, math.inf),
    }
    reusable: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "denoiser": ("codec", "behaviour", "averaged")
    }

    @dataclass(frozen=True)
    class Config:
        """Hyper-parameters; the published code's values where not said otherwise."""

        base: str = "td3_bc"  # any offline agent, by name
        base_config: dict[str, Any] = field(default_factory=dict)  # its fields
        base_run: str = ""  # filled in for --agent.base RUN_DIR, a finished policy to diagnose
        denoiser: str = ""  # RUN_DIR whose trained denoiser is used instead of a new one
        # windows and denoiser
        window: int = 32  # rows T
        stride: int = 8  # distance of window starts
        repeat_endings: bool = True  # list windows that terminate (T - 1) / stride times; ours, no
        ending_gap: float | None = 4.0  # from no termination to one, for the denoiser; ours, None:
        # standardised
        network: Literal["unet", "mlp"] = (
            "unet"  # mlp: SynthER's, for windows of up to 8 rows; ours
        )
        width: int = 128  # 1024; see the presets
        depth: int = 6  # residual blocks of the mlp; SynthER
        denoiser_updates: int = 100_000  # ours; 10,000 epochs
        denoiser_batch: int = 256  # ours; 32
        learning_rate: float = 1e-3  # Adam, cosine; ours, 2e-3
        clip: float | None = 1.0  # SynthER; none
        average: float = 0.0005  # rate of the averaged weights; 0.005 every tenth update
        # generation
        windows: int = 8192  # per full generation
        synthesis_updates: int = 8  # blocks in which it is done
        sampler_steps: int = 32  # ours; 256
        solver: Solver = "heun"  # dpm: half the calls
        churn: float = 0.0  # ours; 80
        guidance: Form = "curvature"  # ours; additive
        coefficient: float = 4.0  # ours; 0, that is no guidance. Not comparable between forms
        spread: float = 0.0  # > 0: tune the coefficient until actions spread so around the policy
        norm: Norm = "rms"  # additive only; ours, none
        denoised: bool = False  # additive only: score at the denoised window
        bump: float = 0.3  # additive only
        invariant: bool = True  # additive only: strength per 256 steps; ours
        # learning from it
        refresh_updates: int = 10_000  # base updates between generations
        refresh_fraction: float = 1.0  # share of the windows made anew each time
        real_fraction: float = 0.0625  # of a batch: 16 of 256

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        config: Config,
        base: Agent | None = None,
    ) -> None:
        c = config
        self.check_settings(c)
        super().__init__(observation_space, action_space, config, base)
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        self.codec = TrajectoryCodec(obs, action, c.window, c.ending_gap)
        if c.network == "unet":
            self.behaviour = EDM(TemporalUNet(self.codec.width, c.width))
        else:
            self.behaviour = EDM(ResidualMLP((c.window, self.codec.width), c.width, c.depth))
        self.averaged = copy.deepcopy(self.behaviour)
        self.optimizer("behaviour", lr=c.learning_rate, schedule="cosine", clip=c.clip)
        self.register_buffer("coefficient", torch.tensor(c.coefficient))
        self.sampler = Sampler(c.sampler_steps, c.solver, c.churn)
        self.form = Guidance(c.guidance, c.norm, c.denoised, c.bump, c.invariant)
        self.starts = torch.zeros(0, dtype=torch.int64)
        self.synthetic = Synthetic(observation_space, action_space, self.base)

    coefficient: Tensor

    @staticmethod
    def check_settings(c: Config) -> None:
        """Refuse values out of range before anything large is built.

        Raises:
            UserError: naming the field and what it takes.
        """
        if c.network == "mlp" and c.window > MLP_WINDOW:
            raise UserError(
                f"agent.window {c.window}: network mlp takes windows of up to {MLP_WINDOW} rows; "
                "give --agent.network unet for longer ones"
            )
        least = 2 if c.network == "mlp" else UNET_WINDOW
        check_fields(
            c,
            ("ending_gap", c.ending_gap is None or c.ending_gap > 0, "a distance above 0, or null"),
            ("window", c.window >= least, f"at least {least} rows for network {c.network}"),
            ("refresh_fraction", 0 < c.refresh_fraction <= 1, "a share above 0, at most 1"),
        )

    @staticmethod
    def supports(observation_space: Space[Any], action_space: Space[Any]) -> str | None:
        """Vectors and continuous actions, whatever the base takes."""
        return Agent.supports(observation_space, action_space)

    # ---- the behaviour's denoiser --------------------------------------------------------------

    def behaviour_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """EDM's loss on raw windows (B, T, ...)."""
        loss = self.behaviour.loss(self.codec.encode(batch))
        return loss, {"loss": loss}

    def reuse(self, field: str, source: Agent) -> None:
        """Take a trained denoiser of the same window."""
        theirs = int(source.get_submodule("codec").window)  # type: ignore[arg-type]
        if theirs != self.config.window:
            raise UserError(
                f"the denoiser of {self.config.denoiser} was trained on windows of {theirs} rows: "
                f"give --agent.window {theirs} instead of {self.config.window}"
            )
        super().reuse(field, source)
        self.synthetic.reuse(source)

    # ---- generation ----------------------------------------------------------------------------

    def generate(self, count: int, guided: bool) -> Tensor:
        """Encoded windows of the behaviour, or of the behaviour near the policy, (count, T, d)."""
        noise = torch.randn_like(self.codec.mean.expand(count, self.config.window, -1))
        if not guided:
            return self.sampler(self.averaged, noise)
        return self.form.sample(
            self.sampler, self.averaged, noise, self.codec, self.base.distribution, self.coefficient
        )

    def deviation(self, rows: Batch) -> Tensor:
        """Root mean square of action - policy, ()."""
        at = self.base.distribution(rows["obs"])
        mean = at.mean.tanh() if at.squashed else at.mean
        return (rows["action"] - mean).square().mean().sqrt()

    def tune(self) -> None:
        """Move the strength towards the spread that is asked for."""
        for _ in range(PROBES):
            self.coefficient.copy_(self.run(self.probe))

    def probe(self) -> Tensor:
        """A better strength than the present one, by the spread of a few windows, ()."""
        rows = self.codec.transitions(self.generate(PROBE_WINDOWS, True))
        return tuned(self.coefficient, self.deviation(rows), self.config.spread)

    def rows(self, count: int, guided: bool) -> tuple[Batch, Batch]:
        """Generated transitions with their likelihood under the policy, and last rows."""
        x = self.generate(count, guided)
        rows = self.codec.transitions(x)
        rows["log_likelihood"] = log_likelihood(self.base.distribution(rows["obs"]), rows["action"])
        last = self.codec.last(x)
        rows["endings"] = last["terminated"]  # last rows are no transitions but where they end one
        return rows, last

    def synthesise(self) -> Batch:
        """Fill one block of the ring; gives its rows."""
        c, guided = self.config, self.stage == "guided"
        since = self.synthetic.blocks - self.blocks(1.0)  # the first generation is of all windows
        fraction = c.refresh_fraction if since >= 0 else 1.0
        part = since % self.blocks(fraction)
        count = share(round(c.windows * fraction), self.blocks(fraction), part)
        with self.synthetic.noise():
            if guided and c.spread and part == 0:
                self.tune()
            rows, last = self.run(self.rows, count, guided)
        self.synthetic.extend(rows, last)
        return rows

    def blocks(self, fraction: float) -> int:
        """Updates of a generating stage; a refresh of a part takes its part of them."""
        return max(1, round(self.config.synthesis_updates * fraction))

    # ---- hooks ---------------------------------------------------------------------------------

    def stages(self, task: Task) -> list[Stage]:
        """The denoiser, unless it is given; then generations and the base's updates in turn."""
        c = self.config
        first = Stage("unguided", self.blocks(1.0), counted=False)
        name = "unguided" if self.unguided else "guided"
        again = Stage(name, self.blocks(c.refresh_fraction), counted=False)
        turns = taking_turns(super().stages(task), c.refresh_updates, first, again)
        denoiser = Stage("denoiser", c.denoiser_updates, counted=False)
        return turns if c.denoiser else [denoiser, *turns]

    @property
    def unguided(self) -> bool:
        """Whether the policy has no say: trajectories of the behaviour."""
        return self.config.coefficient == 0 and not self.config.spread

    def begin_task(self, task: Task, buffer: Buffer) -> None:
        """Choose windows, take their statistics, make room for what will be generated."""
        needs_dataset(task)
        super().begin_task(task, buffer)
        c = self.config
        self.restart_schedule("behaviour", c.denoiser_updates)
        self.find_starts(buffer)
        if not c.denoiser:
            self.codec.fit(buffer, self.starts)
        self.synthetic.begin(c.windows * (c.window - 1), buffer, task)

    def find_starts(self, buffer: Buffer) -> None:
        """The windows to learn from; says what the data lose to short episodes."""
        c = self.config
        self.starts, dropped = window_starts(buffer, c.window, c.stride, c.repeat_endings)
        if dropped:
            log.warning(
                "%.1f %% of the rows lie in episodes too short for a window of %d rows and are "
                "left out",
                100 * dropped,
                c.window,
            )

    def extra_state(self) -> dict[str, Any]:
        """What was generated."""
        return self.synthetic.state()

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take it back; the windows are found again when they are needed."""
        self.synthetic.load_state(extra, self.codec.mean.device)
        self.starts = self.starts[:0]

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        """Windows for the denoiser, a new block of rows, or both kinds of rows for the base."""
        if self.stage == "denoiser":
            assert isinstance(buffer, Buffer)
            if not len(self.starts):  # after a resume
                self.find_starts(buffer)
            return buffer.windows(self.config.denoiser_batch, self.config.window, self.starts)
        if self.stage in ("unguided", "guided"):
            return self.synthesise()
        return self.base.sample(self.synthetic.mixed(buffer, self.config.real_fraction))

    def update(self, batch: Batch) -> Metrics:
        """One step of the denoiser, a report on generated rows, or the base's update."""
        if self.stage == "denoiser":
            metrics = self.learn("behaviour", self.behaviour_loss, batch)
            self.polyak("behaviour", "averaged", self.config.average)
            return metrics
        if self.stage in ("unguided", "guided"):
            return dict(self.run(self.report, batch))
        return super().update(batch)

    def report(self, rows: Batch) -> Metrics:
        """What is worth knowing about generated rows."""
        last, within = (rows[k].to(rows["reward"]).sum() for k in ("endings", "terminated"))
        return {
            "reward": rows["reward"].mean(),
            "terminated": (within + last) / (rows["reward"].numel() + last),
            "log_likelihood": rows["log_likelihood"].mean(),
            "saturated": (rows["action"].abs() > 0.99).to(rows["reward"]).mean(),
            "coefficient": self.coefficient.clone(),
        }
