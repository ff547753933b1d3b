"""Section `generation` of the benchmark: windows and transitions that denoisers sample per second.

A run with `--compile on` compiles its updates and not its generation: what is compiled here is the
denoiser alone, to show what that would gain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from rl_shift import agents, config
from rl_shift.benchmark import (
    Candidate,
    Row,
    compare,
    largest_difference,
    pinned,
    precision,
    warm_up,
)

OBS, ACTION = 17, 6
DATA = {"tasks.0.dataset": "rl_shift/hopper-replay-v0"}  # presets need one; nothing is read
TOLERANCE = 1e-3  # between equal samples, standardised; medium precision is not held to it
BATCHES = {"windows of pgd.td3_bc": (1024, 7168), "transitions of synther": (64,)}  # per call


def made(what: str) -> Any:
    """An agent with the settings of PGD's CPU preset, or with SynthER's own."""
    spaces = Box(-np.inf, np.inf, (OBS,), np.float32), Box(-1, 1, (ACTION,), np.float32)
    torch.manual_seed(0)
    if what.endswith("pgd.td3_bc"):
        return agents.get("pgd")(*spaces, config.make(preset="pgd.td3_bc", overrides=DATA).agent)
    kind = agents.get("synther")
    return kind(*spaces, kind.Config())


def sampling(agent: Any, count: int, guided: bool) -> Callable[[], Tensor]:
    """`count` samples of an agent, always the same ones."""

    def windows() -> Tensor:
        return agent.run(agent.generate, count, guided)

    def transitions() -> Tensor:
        return agent.run(agent.sampler, agent.averaged, torch.randn(count, len(agent.codec.mean)))

    def seeded() -> Tensor:
        torch.manual_seed(0)
        return windows() if hasattr(agent, "generate") else transitions()

    return seeded


def candidates_of(what: str, modes: Sequence[str], levels: Sequence[str]) -> list[Candidate]:
    """Every variant, eager at the highest precision first, which the compiled ones must equal."""
    found: list[Candidate] = []
    expected: dict[tuple[bool, int], Tensor] = {}
    forms = (True, False) if "pgd" in what else (False,)
    for guided, count, mode, level in product(forms, BATCHES[what], modes, levels):
        agent = made(what)
        if mode == "on":
            agent.averaged = torch.compile(agent.averaged, fullgraph=True, dynamic=False)
        name = f"{count} {what}, {'guided, ' if guided else ''}compile={mode}, {level}"
        call = sampling(agent, count, guided)
        found.append(warm_up(Candidate(name, call, count, level), calls=2))
        with precision(level):
            samples = call()
        gap = largest_difference([samples], [expected.setdefault((guided, count), samples)])
        if level == "highest" and gap > TOLERANCE:
            raise AssertionError(f"{name} samples differ by {gap:.1e}: not timed")
    return found


def generation_section(
    *,
    modes: Sequence[str] = ("off", "on"),
    levels: Sequence[str] = ("highest", "medium"),
    rounds: int = 6,
    seconds: float = 1.0,
    cpu: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Samples per second, guided and not, eager and with a compiled denoiser, by precision."""
    found: list[Row] = []
    for what in BATCHES:
        candidates = candidates_of(what, modes, levels)
        with pinned(cpu):
            found += compare(
                f"generation, {what}",
                candidates,
                rounds=rounds,
                seconds=seconds,
                unit=f"{what.split()[0]}/s",
                progress=progress,
            )
    return found
