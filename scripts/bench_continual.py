"""Section `continual` of the benchmark: an update of OER against one of TD3+BC, by stored tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from bench_updates import ACTION, OBS, make_arrays, own_candidate
from gymnasium.spaces import Box

from rl_shift import agents
from rl_shift.benchmark import Candidate, Row, compare, pinned, warm_up
from rl_shift.buffer import Buffer
from rl_shift.compile import Updater
from rl_shift.config import Task

STORED = (0, 1, 5, 10)  # tasks in the memory


def after(tasks: int, buffer: Buffer, memory: int) -> Any:
    """An OER agent in the task that follows `tasks` finished ones, random rows kept of each."""
    kind = agents.get("oer")
    spaces = Box(-np.inf, np.inf, (OBS,), np.float32), Box(-1, 1, (ACTION,), np.float32)
    torch.manual_seed(0)
    agent = kind(*spaces, kind.Config(selector="random", memory=memory, select_updates=1))
    for k in range(tasks + 1):
        name = f"task{k}"
        task = Task(
            name=name,
            dataset=name,
            updates=1,
            observation_space=spaces[0],
            action_space=spaces[1],
        )
        agent.begin_task(task, buffer)
        for stage in agent.stages(task):
            agent.enter(stage.name)
            if k < tasks:
                agent.update(agent.sample(buffer))
        if k < tasks:
            agent.end_task(task, buffer)
    agent.enter("learner")
    return agent


def continual_section(
    *,
    rows: int = 100_000,
    memory: int = 1000,
    stored: Sequence[int] = STORED,
    modes: Sequence[str] = ("off", "on"),
    rounds: int = 6,
    seconds: float = 1.0,
    cpu: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Updates per second: 256 rows of the current task, and 256 of the memory for OER's clone."""
    arrays = make_arrays(rows)
    buffer = Buffer.from_arrays(arrays)
    found: list[Row] = []
    for mode in modes:
        candidates = [
            own_candidate("td3_bc", f"td3_bc, compile={mode}", mode, arrays, buffer, "highest")
        ]
        for tasks in stored:
            agent = after(tasks, buffer, memory)
            updater = Updater(agent, mode=mode)
            candidates.append(
                Candidate(
                    f"oer, {tasks} stored tasks, compile={mode}",
                    lambda a=agent, u=updater, b=buffer: u(a.sample(b)),
                )
            )
        for candidate in candidates:
            warm_up(candidate)
        with pinned(cpu):
            found += compare(
                f"continual, compile={mode}",
                candidates,
                rounds=rounds,
                seconds=seconds,
                progress=progress,
            )
    return found
