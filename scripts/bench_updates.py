"""Sections `updates` and `seeds` of the benchmark: learners against the plain eager reference.

Equality comes before speed: a variant is timed only after it has produced the reference's
parameters from the same initial networks, batches and noise.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench_reference import PlainArrays, PlainBatch, PlainIQL, PlainTD3BC
from bench_reference_cql import PlainCQL
from gymnasium.spaces import Box
from torch import Tensor, nn

from rl_shift import agents
from rl_shift.agent import Agent, Batch
from rl_shift.benchmark import (
    Candidate,
    MatrixProducts,
    Network,
    Row,
    compare,
    graphs_compiled,
    has_amx,
    largest_difference,
    pinned,
    precision,
    warm_up,
)
from rl_shift.buffer import Buffer
from rl_shift.compile import Updater
from rl_shift.networks import EnsembleCritic

OBS, ACTION, BATCH = 17, 6, 256
SAMPLED = 10  # actions of each kind in CQL
TOLERANCE = 1e-5
Plain = PlainTD3BC | PlainIQL | PlainCQL


@dataclass(frozen=True)
class Problem:
    """What the benchmark knows about an agent.

    Attributes:
        reference: The plain learner's class.
        cycle: Updates after which the work repeats.
        networks: The matrix products of an update.
        pairs: Our submodule -> the reference's modules that it corresponds to, in order.
    """

    reference: type[PlainTD3BC] | type[PlainIQL] | type[PlainCQL]
    cycle: int
    networks: tuple[Network, ...]
    pairs: dict[str, tuple[str, ...]]


def _problems(obs: int = OBS, action: int = ACTION) -> dict[str, Problem]:
    policy, critic, value = (
        (obs, 256, 256, action),
        (obs + action, 256, 256, 1),
        (obs, 256, 256, 1),
    )
    critics = {
        "critic": ("critic_1", "critic_2"),
        "target_critic": ("critic_1_target", "critic_2_target"),
    }
    td3_bc = (
        Network(policy),  # target action
        Network(critic),  # two target critics, two critics
        Network(critic),
        Network(critic, weights=1),
        Network(critic, weights=1),
        Network(policy, forward=0.5, weights=0.5),  # every second update
        Network(critic, forward=0.5, inputs=0.5),
    )
    iql = (
        Network(critic),
        Network(critic),
        Network(critic, weights=1),
        Network(critic, weights=1),
        Network(value),  # V(s')
        Network(value, weights=1),
        Network(policy, weights=1),
    )
    gaussian, deep = (obs, 256, 256, 256, 2 * action), (obs + action, 256, 256, 256, 1)
    cql = (
        Network(gaussian),  # temperature
        Network(gaussian, weights=1),
        Network(deep, inputs=1),
        Network(deep, inputs=1),
        Network(gaussian),  # once per state, whatever the number of actions
        Network(gaussian),
        Network(deep),  # two target critics, two critics
        Network(deep),
        Network(deep, weights=1, rows=3 * SAMPLED + 1),
        Network(deep, weights=1, rows=3 * SAMPLED + 1),
    )
    return {
        "td3_bc": Problem(
            PlainTD3BC,
            2,
            td3_bc,
            {"actor": ("actor",), "target_actor": ("actor_target",), **critics},
        ),
        "iql": Problem(PlainIQL, 1, iql, {"actor": ("actor",), "value": ("value",), **critics}),
        "cql": Problem(
            PlainCQL, 1, cql, {"log_alpha": ("log_alpha",), "actor": ("actor",), **critics}
        ),
    }


PROBLEMS = _problems()


def make_arrays(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A random dataset of `rows` transitions with raw observations off the unit scale."""
    random = np.random.default_rng(seed)
    scale = random.uniform(0.5, 3.0, OBS).astype(np.float32)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    obs = normal(rows, OBS) * scale + 0.5
    return {
        "obs": obs,
        "action": np.tanh(normal(rows, ACTION)),
        "reward": normal(rows),
        "next_obs": obs + 0.1 * normal(rows, OBS),
        "terminated": normal(rows) > 2.5,
        "truncated": np.arange(rows) % 1000 == 999,
    }


def make_agent(
    name: str,
    arrays: dict[str, np.ndarray] | None,
    seed: int = 0,
    dims: tuple[int, int] = (OBS, ACTION),
) -> Agent:
    """Our agent with default hyper-parameters, its normaliser fitted to the data if given."""
    kind = agents.get(name)
    torch.manual_seed(seed)
    spaces = Box(-np.inf, np.inf, (dims[0],), np.float32), Box(-1, 1, (dims[1],), np.float32)
    agent = kind(*spaces, kind.Config())
    if arrays is not None and agent.config.normalize:
        mean, std = arrays["obs"].mean(0), arrays["obs"].std(0)
        agent.normalizer.fit(torch.from_numpy(mean), torch.from_numpy(std))
    return agent


def make_reference(name: str, seed: int = 0, dims: tuple[int, int] = (OBS, ACTION)) -> Plain:
    """A plain learner with networks of its own."""
    torch.manual_seed(seed)
    return PROBLEMS[name].reference(*dims)


def make_plain_arrays(arrays: dict[str, np.ndarray], seed: int = 0) -> PlainArrays:
    """The reference's copy of the data, normalised once."""
    plain = PlainArrays(
        arrays["obs"],
        arrays["action"],
        arrays["reward"],
        arrays["next_obs"],
        arrays["terminated"],
        seed,
    )
    plain.normalize()
    return plain


def parameters_of(module: nn.Module) -> list[Tensor]:
    """Parameters of one network after another, (outputs, inputs) and (outputs,) per layer."""
    if not isinstance(module, EnsembleCritic):
        return list(module.parameters())
    layers = [
        (layer.get_parameter("weight"), layer.get_parameter("bias")) for layer in module.net.layers
    ]
    members = range(len(layers[0][0]))
    return [p for k in members for weight, bias in layers for p in (weight[k].T, bias[k, 0])]


def paired_parameters(
    name: str, agent: Agent, reference: Plain
) -> tuple[list[Tensor], list[Tensor]]:
    """Our parameters and the reference's, in one order."""
    ours: list[Tensor] = []
    plain: list[Tensor] = []
    for submodule, modules in PROBLEMS[name].pairs.items():
        ours += parameters_of(agent.get_submodule(submodule))
        for module in modules:
            network: nn.Module = getattr(reference, module)
            plain += list(network.parameters())
    return ours, plain


def check_equality(name: str, mode: str, arrays: dict[str, np.ndarray], updates: int = 8) -> float:
    """Largest parameter difference to the reference after `updates` common updates."""
    # Where a gradient is almost zero, Adam turns rounding into whole steps (one weight in 200,000,
    # up to 1e-5, under two initialisations of six). This initialisation has no such weight.
    agent, reference = make_agent(name, arrays, seed=4), make_reference(name, seed=1)
    ours, plain = paired_parameters(name, agent, reference)
    with torch.no_grad():
        for mine, its in zip(ours, plain, strict=True):
            its.copy_(mine)
    # The eager random stream also inside the compiled graph: both sides draw the same noise.
    options = {"fallback_random": True} if mode != "off" else None
    updater = Updater(agent, mode=mode, options=options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(6)
    data = {k: torch.from_numpy(v) for k, v in arrays.items()}
    with precision("highest"):
        for number in range(updates):
            index = torch.randint(len(arrays["obs"]), (BATCH,), generator=generator)
            batch: Batch = {k: v[index] for k, v in data.items()}
            torch.manual_seed(number)
            updater(batch)
            normalized = agent.normalizer.batch(batch)
            plain_batch = PlainBatch(
                normalized["obs"],
                batch["action"],
                batch["reward"],
                normalized["next_obs"],
                batch["terminated"].float(),
            )
            torch.manual_seed(number)
            reference.update(plain_batch)
    return largest_difference(ours, plain)


def demand_equality(name: str, mode: str, arrays: dict[str, np.ndarray]) -> float:
    """`check_equality`, refusing to go on beyond the tolerance."""
    difference = check_equality(name, mode, arrays)
    if not difference <= TOLERANCE:
        raise AssertionError(
            f"{name}, compile={mode}: parameters differ from the reference's by {difference:.2e}, "
            f"more than {TOLERANCE:.0e}; it is not timed"
        )
    return difference


def plain_candidate(
    name: str, label: str, arrays: PlainArrays, level: str = "highest"
) -> Candidate:
    """The reference with its own sampling."""
    learner = make_reference(name)
    return Candidate(label, lambda: learner.update(arrays.sample(BATCH)), precision=level)


def own_candidate(
    name: str, label: str, mode: str, arrays: dict[str, np.ndarray], buffer: Buffer, level: str
) -> Candidate:
    """Our agent with its own sampling, as the trainer calls it."""
    agent = make_agent(name, arrays)
    updater = Updater(agent, mode=mode)  # type: ignore[arg-type]
    return Candidate(label, lambda: updater(agent.sample(buffer)), precision=level)


def updates_section(
    name: str,
    arrays: dict[str, np.ndarray],
    *,
    modes: Sequence[str] = ("off", "on"),
    levels: Sequence[str] = ("highest", "medium"),
    rounds: int = 6,
    seconds: float = 1.0,
    cpu: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Updates per second of one agent: reference, ours, and the matrix products alone."""
    say = progress or (lambda text: None)
    equal = {mode: demand_equality(name, mode, arrays) for mode in modes}
    for mode, difference in equal.items():
        say(f"{name}, compile={mode}: equal to the reference within {difference:.1e}")
    problem, plain = PROBLEMS[name], make_plain_arrays(arrays)
    buffer = Buffer.from_arrays(arrays)
    candidates = []
    for level in levels:
        suffix = "" if level == "highest" else f", {level}"
        ceiling = f"{name} matrix products{suffix}"
        found = [plain_candidate(name, f"{name} plain eager{suffix}", plain, level)]
        for mode in modes:
            label = f"{name} ours, compile={mode}{suffix}"
            found.append(own_candidate(name, label, mode, arrays, buffer, level))
        for candidate in found:
            candidate.ceiling = ceiling
        products = MatrixProducts(problem.networks, BATCH, problem.cycle)
        found.append(Candidate(ceiling, products, units=problem.cycle, precision=level))
        for candidate in found:
            warm_up(candidate, calls=3 * problem.cycle)
            if candidate.setup_s > 1:
                say(f"{candidate.name}: compiled in {candidate.setup_s:.1f} s")
        candidates += found
    before = graphs_compiled()
    with pinned(cpu):
        rows = compare(
            f"updates {name}", candidates, rounds=rounds, seconds=seconds, progress=progress
        )
    for row in rows:
        row.notes["recompilations"] = graphs_compiled() - before
        for mode in modes:
            if f"compile={mode}" in row.name and row.precision == "highest":
                row.notes["largest_difference"] = equal[mode]
    if graphs_compiled() != before:
        raise AssertionError(f"{graphs_compiled() - before} graphs were compiled while timing")
    return rows


# ---- many seeds on few cores --------------------------------------------------------------------


def _seed_blocks(
    name: str, seeds: Sequence[int], rows: int, updates: int, levels: Sequence[str], mode: str
) -> list[Candidate]:
    """One process's candidates: each call gives every seed of the process `updates` updates."""
    arrays = make_arrays(rows)
    plain = make_plain_arrays(arrays)
    learners = [make_reference(name, seed) for seed in seeds]
    total = updates * len(seeds)

    def run_plain() -> None:
        for learner in learners:
            for _ in range(updates):
                learner.update(plain.sample(BATCH))

    candidates = [Candidate("plain runs", run_plain, units=total)]
    for level in levels:
        stack = Agent.stacked([make_agent(name, arrays, seed) for seed in seeds])
        shared = Buffer.from_arrays(arrays, seeds=tuple(seeds))
        updater = Updater(stack, mode=mode)  # type: ignore[arg-type]

        def run_stacked(updater: Updater = updater, shared: Buffer = shared) -> None:
            for _ in range(updates):
                updater(updater.agent.sample(shared))

        candidates.append(
            Candidate(f"ours, stacked, compile={mode}, {level}", run_stacked, total, level)
        )
        single = Buffer.from_arrays(arrays)
        updaters = [
            Updater(make_agent(name, arrays, seed), mode=mode)  # type: ignore[arg-type]
            for seed in seeds
        ]

        def run_in_turn(updaters: list[Updater] = updaters, single: Buffer = single) -> None:
            for updater in updaters:
                for _ in range(updates):
                    updater(updater.agent.sample(single))

        candidates.append(
            Candidate(f"ours, one by one, compile={mode}, {level}", run_in_turn, total, level)
        )
    return candidates


def _seed_worker(
    number: int, cpu: int | None, seeds: Sequence[int], options: dict[str, Any], meet: Any, out: Any
) -> None:
    torch.set_num_threads(1)
    rounds = options["rounds"]
    candidates = _seed_blocks(
        options["name"],
        seeds,
        options["rows"],
        options["updates"],
        options["levels"],
        options["mode"],
    )
    for candidate in candidates:
        warm_up(candidate, calls=1)
    spans: dict[str, list[tuple[float, float]]] = {c.name: [] for c in candidates}
    with pinned(cpu):
        for turn in range(rounds):
            for candidate in candidates if turn % 2 == 0 else candidates[::-1]:
                meet.wait()
                with precision(candidate.precision):
                    start = time.monotonic()
                    candidate.call()
                    spans[candidate.name].append((start, time.monotonic()))
    described = [(c.name, c.units, c.precision, c.setup_s) for c in candidates]
    out.put((number, described, spans))


def seeds_section(
    name: str,
    *,
    processes: int = 2,
    seeds_each: int = 5,
    rows: int = 1_000_000,
    updates: int = 100,
    levels: Sequence[str] = ("highest", "medium"),
    mode: str = "on",
    rounds: int = 6,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Wall time of many seeds on as many cores as processes, against plain runs on the same."""
    say = progress or (lambda text: None)
    context = multiprocessing.get_context("spawn")
    meet, out = context.Barrier(processes), context.Queue()
    allowed: list[int | None] = [None] * processes
    if hasattr(os, "sched_getaffinity"):
        allowed = [*sorted(os.sched_getaffinity(0)), *allowed]
    options = {
        "name": name,
        "rows": rows,
        "updates": updates,
        "levels": tuple(levels),
        "mode": mode,
        "rounds": rounds,
    }
    workers = []
    for number in range(processes):
        seeds = range(number * seeds_each, (number + 1) * seeds_each)
        workers.append(
            context.Process(
                target=_seed_worker,
                args=(number, allowed[number], tuple(seeds), options, meet, out),
                daemon=True,
            )
        )
    say(f"seeds {name}: {processes} processes of {seeds_each} seeds are compiling")
    for worker in workers:
        worker.start()
    results: list[Any] = []
    while len(results) < processes:
        try:
            results.append(out.get(timeout=5))
        except queue.Empty:
            if any(worker.exitcode not in (None, 0) for worker in workers):
                meet.abort()
                raise RuntimeError("a process of the section `seeds` failed (see above)") from None
    for worker in workers:
        worker.join()
    described = results[0][1]
    rates = {}
    for label, units, _, _ in described:
        rates[label] = []
        for turn in range(rounds):
            spans = [spans[label][turn] for _, _, spans in results]
            wall = max(end for _, end in spans) - min(start for start, _ in spans)
            rates[label].append(units * processes / wall)
    reference = rates[described[0][0]]
    return [
        Row(
            section=f"seeds {name}, {processes} x {seeds_each}",
            name=label,
            reference=described[0][0],
            unit="seed-updates/s (wall)",
            precision=level,
            rates=rates[label],
            ratios=[mine / plain for mine, plain in zip(rates[label], reference, strict=True)],
            percents=[],
            setup_s=setup,
        )
        for label, _, level, setup in described
    ]


def default_levels() -> tuple[str, ...]:
    """`medium` is worth a row only where AMX multiplies bfloat16."""
    return ("highest", "medium") if has_amx() else ("highest",)
