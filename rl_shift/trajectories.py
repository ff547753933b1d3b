"""Windows of trajectories, and single transitions, as samples of a diffusion model.

The rules for windows are those of Policy-Guided Diffusion's published code: row t is (obs, action,
reward, terminated), standardised over all windows, with the action taken through atanh first. Those
for transitions are SynthER's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rl_shift.errors import UserError

if TYPE_CHECKING:
    from rl_shift.buffer import Buffer

Batch = dict[str, Tensor]
EDGE = 0.999  # actions are clipped to this before atanh
KEYS: tuple[str, ...] = (
    "obs",
    "action",
    "reward",
    "next_obs",
    "terminated",
)  # of a transition, in this order
INSIDE = 1 - 1e-6  # ... and decoded ones to this: tanh reaches 1 in float32


def window_starts(
    buffer: Buffer, length: int, stride: int, repeat: bool = True
) -> tuple[Tensor, float]:
    """First rows of the windows to learn from, and the share of rows in episodes too short for any.

    A truncated episode needs `length` + 1 rows: the window of its last row is left out. Published,
    that is the row of the timeout, which is no transition where a file has no next observations:
    of such files one row per truncated episode more is left out here.

    Every `stride`-th start at which a window fits, every episode's start and every start whose
    window ends on a termination; none whose window ends on a truncation. A row within an episode
    opens a transition in `(length - 1) / stride` windows, its last one ends only one: with
    `repeat`, windows that end on a termination are listed that often, so that terminations are as
    frequent in what windows give as in the data (ours).

    Args:
        buffer: flat data.
        length: rows T of a window.
        stride: distance of starts.
        repeat: whether windows that end on a termination are listed several times.

    Raises:
        UserError: if no window is left; it names the longest that would fit.
    """
    episodes = buffer.episodes()
    lengths = episodes[:, 1] - episodes[:, 0]
    rows = torch.arange(len(buffer), device=buffer.device)
    episode = torch.searchsorted(episodes[:, 1].contiguous(), rows, right=True)
    valid = rows[episodes[episode, 1] - rows >= length]
    terminated = buffer.arrays()["terminated"]
    last = valid + length - 1
    keep = torch.zeros(len(valid), dtype=torch.bool, device=buffer.device)
    keep[::stride] = True
    keep |= valid == episodes[episode[valid], 0]
    keep |= terminated[last]
    keep &= terminated[last] | (last + 1 < episodes[episode[valid], 1])
    often = max(1, round((length - 1) / stride)) if repeat else 1
    starts = valid.repeat_interleave(torch.where(terminated[last], often, 1) * keep)
    longest = torch.where(terminated[episodes[:, 1] - 1], lengths, lengths - 1)  # per episode
    if not len(starts):
        raise UserError(
            f"no window of {length} rows fits into an episode of the data: the longest usable "
            f"window has {int(longest.max())}; choose a shorter one"
        )
    dropped = lengths[longest < length].sum() / len(buffer)
    return starts, float(dropped)


class TrajectoryCodec(nn.Module):
    """Windows of transitions (B, T, ...) <-> standardised matrices (B, T, obs + action + 2).

    Args:
        obs: width of an observation.
        action: width of an action.
        window: rows T of the windows it is fitted to.
        gap: distance of a termination from none for the denoiser (our design); None standardises
            it as everything else. Where episodes are long, it then lies tens of standard
            deviations away, beyond the noise that a denoiser is trained on.
    """

    mean: Tensor
    std: Tensor
    window: Tensor

    def __init__(self, obs: int, action: int, window: int, gap: float | None = None) -> None:
        super().__init__()
        self.obs, self.action, self.gap = obs, action, gap
        self.width = obs + action + 2
        self.latent = slice(obs, obs + action)  # the action block
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("std", torch.ones(self.width))
        self.register_buffer("window", torch.tensor(window))

    def _rows(self, batch: Batch) -> Tensor:
        """(..., d) before standardisation."""
        latent = batch["action"].clamp(-EDGE, EDGE).atanh()
        single = torch.stack([batch["reward"], batch["terminated"].to(latent)], -1)
        return torch.cat([batch["obs"], latent, single], -1)

    def fit(self, buffer: Buffer, starts: Tensor) -> None:
        """Take mean and std over the windows at `starts`; constant columns get std 1."""
        length = int(self.window.flatten()[0])  # of several stacked seeds the same
        ones = torch.ones(len(starts), dtype=torch.float64, device=starts.device)
        edges = torch.zeros(len(buffer) + 1, dtype=torch.float64, device=starts.device)
        edges.index_add_(0, starts, ones).index_add_(0, starts + length, -ones)
        weight = edges.cumsum(0)[:-1, None] / (len(starts) * length)  # windows over each row
        rows = self._rows(buffer.arrays()).double()
        mean = (weight * rows).sum(0)
        std = (weight * (rows - mean).square()).sum(0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std < 1e-6, 1.0, std))
        if self.gap is not None:
            self.mean[..., -1], self.std[..., -1] = 0.0, 1 / self.gap

    def encode(self, batch: Batch) -> Tensor:
        """Windows (B, T, ...) -> (B, T, d)."""
        return (self._rows(batch) - self.mean) / self.std

    def observations(self, x: Tensor) -> Tensor:
        """Raw observations of encoded windows, (B, T, obs)."""
        block = slice(self.obs)
        return x[..., block] * self.std[block] + self.mean[block]

    def latents(self, x: Tensor) -> Tensor:
        """Actions before the tanh of encoded windows, (B, T, action)."""
        return x[..., self.latent] * self.std[self.latent] + self.mean[self.latent]

    def decode(self, x: Tensor) -> Batch:
        """(B, T, d) -> obs, action, reward, terminated, (B, T, ...)."""
        single = x[..., -2:] * self.std[-2:] + self.mean[-2:]
        return {
            "obs": self.observations(x),
            "action": self.latents(x).tanh().clamp(-INSIDE, INSIDE),
            "reward": single[..., 0],
            "terminated": single[..., 1] > 0.5,
        }

    def transitions(self, x: Tensor) -> Batch:
        """(B, T, d) -> B (T - 1) transitions; a row's next observation is the next row's."""
        rows = self.decode(x)
        rows["next_obs"] = rows["obs"][:, 1:]
        return {key: value[:, : x.shape[1] - 1].flatten(0, 1) for key, value in rows.items()}

    def last(self, x: Tensor) -> Batch:
        """Last rows, (B, T, d) -> (B, ...); `next_obs` is their own obs: use them if terminated."""
        rows = {key: value[:, -1] for key, value in self.decode(x).items()}
        rows["next_obs"] = rows["obs"]
        return rows


class TransitionCodec(nn.Module):
    """Transitions (B, ...) <-> standardised rows (B, 2 obs + action + 2); termination stays raw.

    Args:
        obs: width of an observation.
        action: width of an action.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, obs: int, action: int) -> None:
        super().__init__()
        self.sizes = [obs, action, 1, obs, 1]
        self.register_buffer("mean", torch.zeros(sum(self.sizes)))
        self.register_buffer("std", torch.ones(sum(self.sizes)))

    def _rows(self, batch: Batch) -> Tensor:
        single = {key: batch[key][..., None].to(batch["obs"]) for key in ("reward", "terminated")}
        parts = {**batch, **single}
        return torch.cat([parts[key] for key in KEYS], -1)

    def fit(self, buffer: Buffer) -> None:
        """Take mean and std over all rows; 1e-5 is added to the std."""
        std, mean = torch.std_mean(self._rows(buffer.arrays()).double(), 0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(std + 1e-5)
        self.mean[..., -1], self.std[..., -1] = 0.0, 1.0

    def encode(self, batch: Batch) -> Tensor:
        """Transitions (B, ...) -> (B, d)."""
        return (self._rows(batch) - self.mean) / self.std

    def decode(self, x: Tensor) -> Batch:
        """(B, d) -> transitions, with actions clipped to the box."""
        parts: Batch = dict(
            zip(KEYS, torch.split(x * self.std + self.mean, self.sizes, -1), strict=True)
        )
        parts["action"] = parts["action"].clamp(-1, 1)
        parts["reward"] = parts["reward"].squeeze(-1)
        parts["terminated"] = parts["terminated"].squeeze(-1) > 0.5
        return parts
