"""Section `latency` of the benchmark: what CDSA's correction adds to the time of an action."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box

from rl_shift import agents
from rl_shift.benchmark import Candidate, Row, compare, pinned, warm_up

OBS, ACTION = 17, 6
SMALL = {"mode": "conditional", "hidden": (256, 256)}  # as the preset cdsa.gym_mujoco has it
VARIANTS: dict[str, dict[str, Any]] = {
    "off": SMALL | {"correction": "off"},
    "on, judge off": SMALL | {"judge": "off"},
    "on, judge off, one step": SMALL | {"judge": "off", "steps": (0.1,)},
    "on, judge value": SMALL,
    "both channels, 4 x 256, judge off": {"judge": "off"},
}


def latency_section(
    *,
    rounds: int = 6,
    seconds: float = 1.0,
    cpu: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Actions of TD3+BC per second, corrected and not, at batches of 1 and of 256."""
    spaces = Box(-np.inf, np.inf, (OBS,), np.float32), Box(-1, 1, (ACTION,), np.float32)
    kind, base_kind = agents.get("cdsa"), agents.get("td3_bc")
    found: list[Row] = []
    for batch in (1, 256):
        torch.manual_seed(0)
        obs = torch.randn(batch, OBS)
        base = base_kind(*spaces, base_kind.Config())
        candidates = [Candidate("td3_bc", lambda o=obs, a=base: a.run(a.act, o, False), batch)]
        for name, fields in VARIANTS.items():
            config = dataclasses.replace(kind.Config(), **fields)
            agent = kind(*spaces, config, base)
            call = lambda o=obs, a=agent: a.run(a.act, o, False)  # noqa: E731
            candidates.append(Candidate(f"cdsa, {name}", call, batch))
        for candidate in candidates:
            warm_up(candidate, calls=3)
        with pinned(cpu):
            found += compare(
                f"latency, batches of {batch}",
                candidates,
                rounds=rounds,
                seconds=seconds,
                unit="actions/s",
                progress=progress,
            )
    return found
