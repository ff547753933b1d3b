"""Held-out data for models learnt beside a policy: a split by episode, and the best weights.

Our design.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rl_shift.buffer import Buffer
from rl_shift.errors import UserError


def split_by_episode(
    buffer: Buffer, share: float = 0.05, usable: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Row numbers for learning and for validation, none of whose episodes is in both.

    Every round(1 / share)-th episode is held out, so data that were collected by improving policies
    are covered evenly. With fewer episodes than that the last one is held out.

    Args:
        buffer: flat data.
        share: of the episodes to hold out.
        usable: (rows,) bool, the rows that may occur; None: all.

    Raises:
        UserError: if either side would be empty.
    """
    episodes = buffer.episodes()
    every = round(1 / share)
    held = torch.zeros(len(buffer), dtype=torch.bool, device=episodes.device)
    chosen = episodes[every - 1 :: every] if len(episodes) >= every else episodes[-1:]
    for start, end in chosen.tolist():
        held[start:end] = True
    if len(episodes) == 1:  # nothing but its own end is left to hold out
        held[: -max(1, round(len(buffer) * share))] = False
    usable = torch.ones_like(held) if usable is None else usable
    train, validation = ((usable & side).nonzero()[:, 0] for side in (~held, held))
    if len(train) == 0 or len(validation) == 0:
        raise UserError(
            f"the data ({len(buffer)} rows in {len(episodes)} episodes) cannot be split into "
            "episodes to learn from and to validate on: give more data"
        )
    return train, validation


class Best(nn.Module):
    """The weights with the smallest held-out loss so far, one choice per stacked seed.

    Its tensors are part of the owner's state, so a resumed run goes on with the same choice.
    """

    loss: Tensor
    stale: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.register_buffer("loss", torch.tensor(torch.finfo(torch.float32).max))
        self.register_buffer("stale", torch.tensor(0))

    @torch.no_grad()
    def reset(self, network: nn.Module) -> None:
        """Forget every offer: losses on other data do not compare with these."""
        for mine, theirs in zip(self.network.parameters(), network.parameters(), strict=True):
            mine.copy_(theirs)
        self.loss.fill_(torch.finfo(torch.float32).max)
        self.stale.zero_()

    @torch.no_grad()
    def offer(self, network: nn.Module, loss: Tensor) -> None:
        """Keep `network`'s parameters where `loss`, () or (S,), is below the best one."""
        better = loss < self.loss
        for mine, theirs in zip(self.network.parameters(), network.parameters(), strict=True):
            shape = better.shape + (1,) * (mine.dim() - better.dim())
            mine.copy_(torch.where(better.reshape(shape), theirs, mine))
        self.loss.copy_(torch.where(better, loss, self.loss))
        self.stale.copy_(torch.where(better, torch.zeros_like(self.stale), self.stale + 1))

    @torch.no_grad()
    def restore(self, network: nn.Module) -> None:
        """Put the best parameters into `network`."""
        for mine, theirs in zip(self.network.parameters(), network.parameters(), strict=True):
            theirs.copy_(mine)

    def exhausted(self, patience: int) -> bool:
        """Whether every seed has seen `patience` offers in a row that were no better."""
        return patience > 0 and bool((self.stale >= patience).all())
