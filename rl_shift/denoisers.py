"""Networks F(x, c_noise) for `diffusion.EDM`: a temporal U-Net, and a residual MLP for short rows.

The U-Net is that of Policy-Guided Diffusion's published code; its parameter counts are exact. The
residual MLP is SynthER's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl_shift.errors import UserError

GROUPS = 8  # of GroupNorm; statistics over a group's channels and time


class Sinusoid(nn.Module):
    """sin and cos of `width / 2` frequencies, then Linear, SiLU, Linear."""

    frequencies: Tensor

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        count = width // 2
        exponents = torch.arange(count) / max(count - 1, 1)
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * exponents))
        self.first, self.second = nn.Linear(width, outputs), nn.Linear(outputs, outputs)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, outputs)."""
        angles = t[:, None] * self.frequencies
        features = torch.cat([angles.sin(), angles.cos()], -1)
        out: Tensor = self.second(F.silu(self.first(features)))
        return out


class Convolution(nn.Module):
    """Convolution over time, a shift by the noise level, GroupNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, embedding: int = 0) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(inputs, outputs, kernel)
        self.shift = nn.Linear(embedding, outputs) if embedding else None
        self.norm = nn.GroupNorm(GROUPS, outputs)
        self.padding = ((kernel - 1) // 2, kernel // 2)  # an even kernel pads on the right

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """(B, inputs, T), (B, embedding) -> (B, outputs, T)."""
        x = self.convolution(F.pad(x, self.padding))
        if self.shift is not None and t is not None:
            x = x + self.shift(t)[..., None]
        return F.relu(self.norm(x))


class Encoder(nn.Module):
    """Two convolutions, the first shifted by the noise level."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.first = Convolution(inputs, outputs, 3, embedding)
        self.second = Convolution(outputs, outputs)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, inputs, T), (B, embedding) -> (B, outputs, T)."""
        out: Tensor = self.second(self.first(x, t))
        return out


class Decoder(nn.Module):
    """Stretch to the skip's length, halve the channels, join the skip, two convolutions."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.enter = Convolution(2 * width, width, 2, embedding)
        self.first, self.second = Convolution(2 * width, width), Convolution(width, width)

    def forward(self, x: Tensor, skip: Tensor, t: Tensor) -> Tensor:
        """(B, 2 width, T'), (B, width, T), (B, embedding) -> (B, width, T)."""
        x = self.enter(F.interpolate(x, size=skip.shape[-1]), t)
        out: Tensor = self.second(self.first(torch.cat([x, skip], 1)))
        return out


class TemporalUNet(nn.Module):
    """Convolutions over time at several resolutions; takes windows of any length.

    Args:
        channels: width d of a row.
        width: channels C of the first block, a multiple of 8; block i has C 2^i.
        blocks: resolutions.

    Raises:
        UserError: for a width that GroupNorm cannot divide.
    """

    def __init__(self, channels: int, width: int = 128, blocks: int = 3) -> None:
        super().__init__()
        if width < GROUPS or width % GROUPS:
            raise UserError(f"a U-Net of width {width}: choose a multiple of {GROUPS}")
        self.embedding = Sinusoid(width // 4, width)
        widths = [width * 2**i for i in range(blocks)]
        self.down = nn.ModuleList(
            Encoder(i, o, width) for i, o in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.up = nn.ModuleList(Decoder(w, width) for w in reversed(widths[:-1]))
        self.head = nn.Conv1d(width, channels, 1)

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        """(B, T, d), (B,) -> (B, T, d)."""
        t = F.silu(self.embedding(noise_level))
        x = x.transpose(1, 2)
        skips: list[Tensor] = []
        for encode in self.down:
            x = encode(F.max_pool1d(x, 2) if skips else x, t)
            skips.append(x)
        for decode, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = decode(x, skip, t)
        out: Tensor = self.head(x).transpose(1, 2)
        return out


class ResidualMLP(nn.Module):
    """Residual blocks x + Linear(ReLU(x)) over a flattened sample.

    Args:
        shape: of one sample, such as (T, d) or (d,).
        width: of the blocks.
        depth: blocks.
        embedding: width of the input's projection, to which the noise level is added; that of a
            wider sample is as wide as the sample, or it would lose some of its directions (ours).
        fourier: random frequencies of the noise level.
    """

    frequencies: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 1024,
        depth: int = 6,
        embedding: int = 128,
        fourier: int = 8,
    ) -> None:
        super().__init__()
        inputs = math.prod(shape)
        embedding = max(embedding, inputs)
        self.register_buffer("frequencies", torch.randn(fourier))
        self.level = nn.Sequential(
            nn.Linear(2 * fourier + 1, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.project = nn.Linear(inputs, embedding)
        self.enter = nn.Linear(embedding, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.leave = nn.Linear(width, inputs)

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        """(B, *shape), (B,) -> (B, *shape)."""
        angles = 2 * math.pi * noise_level[:, None] * self.frequencies
        level = torch.cat([noise_level[:, None], angles.sin(), angles.cos()], -1)
        h = self.enter(self.project(x.flatten(1)) + self.level(level))
        for block in self.blocks:
            h = h + block(F.relu(h))
        out: Tensor = self.leave(F.relu(h))
        return out.view_as(x)


def multiply_adds(network: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds of one forward pass, counted from the layers that run."""
    total = 0

    def count(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.Conv1d):
            total += output.numel() * module.in_channels * module.kernel_size[0]

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    try:
        with torch.no_grad():
            network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total
