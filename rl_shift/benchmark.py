"""Timing harness: interleaved candidates, per-round ratios, matrix-product ceilings.

Rates on a shared machine drift by a third within minutes, so candidates run in turns, in one
process, in an order that is reversed every round, and are compared inside a round. Time is the
process's CPU time on a CPU and wall time (with a device synchronise at both ends) on a GPU.
Nothing is discarded: every table shows the lowest and the highest round.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_shift import atomic


@dataclass
class Candidate:
    """Something to be timed.

    Attributes:
        name: Label of the row.
        call: One piece of work.
        units: What one call counts for (updates, batches, episodes).
        precision: `torch.set_float32_matmul_precision` during its blocks.
        ceiling: Name of the candidate whose rate is this one's 100 percent.
        setup_s: Wall seconds spent before the first measured block (compiling, mostly).
    """

    name: str
    call: Callable[[], object]
    units: float = 1.0
    precision: str = "highest"
    ceiling: str | None = None
    setup_s: float = 0.0


@dataclass
class Row:
    """Rates (units per second), ratios to the reference and percent of the ceiling over rounds."""

    section: str
    name: str
    reference: str
    unit: str
    precision: str
    rates: list[float]
    ratios: list[float]
    percents: list[float]
    setup_s: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Median, lowest and highest of every figure, as plain data."""
        return {
            "section": self.section,
            "name": self.name,
            "reference": self.reference,
            "unit": self.unit,
            "precision": self.precision,
            "rate": _spread(self.rates),
            "ratio": _spread(self.ratios),
            "percent_of_ceiling": _spread(self.percents),
            "setup_s": round(self.setup_s, 3),
            "rounds": len(self.rates),
            **self.notes,
        }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Set the float32 matrix-product precision for a block.

    The setting is global and compiled graphs guard on it: whoever warms up, compiles or times a
    candidate does so inside the candidate's own precision.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Keep the calling thread on one CPU where the system allows it."""
    if cpu is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {cpu})
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def warm_up(candidate: Candidate, calls: int = 4) -> Candidate:
    """Run a candidate before it is timed and book the wall time as set-up."""
    start = time.perf_counter()
    with precision(candidate.precision):
        for _ in range(calls):
            candidate.call()
    candidate.setup_s += time.perf_counter() - start
    return candidate


def run_block(
    candidate: Candidate,
    seconds: float,
    clock: Callable[[], float] = time.process_time,
    synchronize: Callable[[], None] | None = None,
) -> float:
    """Units per second of one block of at least `seconds`."""
    sync = synchronize or (lambda: None)
    with precision(candidate.precision):
        sync()
        calls, start = 0, clock()
        while True:
            candidate.call()
            calls += 1
            if clock() - start >= seconds:
                sync()
                return calls * candidate.units / (clock() - start)


def compare(
    section: str,
    candidates: Sequence[Candidate],
    *,
    rounds: int = 6,
    seconds: float = 1.0,
    unit: str = "updates/s",
    clock: Callable[[], float] = time.process_time,
    synchronize: Callable[[], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Time warmed-up candidates round-robin; the first one is the reference."""
    rates: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    if len(rates) < len(candidates):
        raise ValueError(f"candidates of section {section!r} need names of their own")
    for number in range(rounds):
        for candidate in candidates if number % 2 == 0 else list(reversed(candidates)):
            rates[candidate.name].append(run_block(candidate, seconds, clock, synchronize))
        if progress is not None:
            progress(f"{section}: round {number + 1} of {rounds}")
    reference = rates[candidates[0].name]
    rows = []
    for candidate in candidates:
        own = rates[candidate.name]
        ceiling = rates[candidate.ceiling] if candidate.ceiling is not None else []
        rows.append(
            Row(
                section=section,
                name=candidate.name,
                reference=candidates[0].name,
                unit=unit,
                precision=candidate.precision,
                rates=own,
                ratios=[mine / plain for mine, plain in zip(own, reference, strict=True)],
                percents=[100 * a / b for a, b in zip(own, ceiling, strict=False)],
                setup_s=candidate.setup_s,
            )
        )
    return rows


# ---- the ceiling: nothing but the matrix products of an update ---------------------------------


@dataclass(frozen=True)
class Network:
    """Matrix products that one network contributes to an update.

    Attributes:
        sizes: Width of the input, of each hidden layer and of the output.
        forward: Forward passes per update.
        weights: Backward passes per update that need the weights' gradients.
        inputs: Backward passes per update that need the gradient of the network's own input;
            hidden layers need theirs in every backward pass, that is `max(weights, inputs)`.
        rows: Rows that go through it for every row of the batch.
    """

    sizes: tuple[int, ...]
    forward: float = 1.0
    weights: float = 0.0
    inputs: float = 0.0
    rows: int = 1


class MatrixProducts:
    """Replays the products of one cycle of updates, in preallocated float32 memory."""

    def __init__(self, networks: Sequence[Network], batch_size: int, cycle: int = 1) -> None:
        """Expand the networks into products; `cycle` updates make every count a whole number."""
        self.flop = 0.0
        self.work: list[tuple[Tensor, Tensor, Tensor]] = []
        random = torch.Generator().manual_seed(0)
        for network in networks:
            widths = list(zip(network.sizes[:-1], network.sizes[1:], strict=True))
            backward, rows = max(network.weights, network.inputs), batch_size * network.rows
            for layer, (inputs, outputs) in enumerate(widths):
                x = torch.randn(rows, inputs, generator=random)
                weight = torch.randn(outputs, inputs, generator=random)
                y = torch.randn(rows, outputs, generator=random)
                counts = (
                    (network.forward, (x, weight.t(), torch.empty_like(y))),
                    (network.weights, (y.t(), x, torch.empty_like(weight))),
                    (
                        network.inputs if layer == 0 else backward,
                        (y, weight, torch.empty_like(x)),
                    ),
                )
                for count, product in counts:
                    times = round(count * cycle)
                    if abs(times - count * cycle) > 1e-9:
                        raise ValueError(f"{count} products per update in a cycle of {cycle}")
                    self.work += [product] * times
                    self.flop += times / cycle * 2 * rows * inputs * outputs

    def __call__(self) -> None:
        """One cycle."""
        for left, right, out in self.work:
            torch.mm(left, right, out=out)


# ---- equality before speed ----------------------------------------------------------------------


def largest_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Largest absolute difference over two lists of tensors of equal shapes."""
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not match")
        worst = max(worst, float((a.detach() - b.detach()).abs().max()))
    return worst


def graphs_compiled() -> int:
    """Graphs the compiler has built in this process, recompilations included."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


# ---- environment, tables, files -----------------------------------------------------------------


def cpu_flags() -> set[str]:
    """Instruction-set flags of the CPU (empty where /proc/cpuinfo does not exist)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def has_amx() -> bool:
    """Whether `medium` precision can use AMX bfloat16 products."""
    return "amx_bf16" in cpu_flags()


def cpu_model() -> str:
    """Name of the CPU, with family and model number: virtual machines shorten the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = dict(
        [part.strip() for part in line.split(":", 1)] for line in reversed(lines) if ":" in line
    )
    return (
        f"{found.get('model name', platform.processor())} "
        f"(family {found.get('cpu family', '?')}, model {found.get('model', '?')})"
    )


def environment(cpu: int | None = None) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    flags = cpu_flags()
    shown = sorted(f for f in flags if f in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni"))
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "flags": shown + sorted(f for f in flags if f.startswith("amx")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "pinned_to": cpu,
        "load_before": load_average(),
    }


def load_average() -> list[float]:
    """Load averages over 1, 5 and 15 minutes."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []


def table(rows: Sequence[Row]) -> str:
    """Markdown table of one section."""
    if not rows:
        return "(nothing ran)"
    lines = [
        f"| {rows[0].section} | {rows[0].unit}, median [min-max] "
        f"| ratio to {rows[0].reference}, median [min-max] | % of ceiling | set-up s | notes |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        percent = f"{statistics.median(row.percents):.0f}" if row.percents else ""
        setup = f"{row.setup_s:.1f}" if row.setup_s >= 0.05 else ""
        notes = ", ".join(f"{key} {value:.3g}" for key, value in row.notes.items())
        lines.append(
            f"| {row.name} | {_show(row.rates)} | {_show(row.ratios, 2)} "
            f"| {percent} | {setup} | {notes} |"
        )
    return "\n".join(lines)


def _show(values: Sequence[float], digits: int | None = None) -> str:
    def text(x: float) -> str:
        if digits is not None:
            return f"{x:.{digits}f}"
        return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    if len(values) == 1:
        return text(values[0])
    return f"{text(statistics.median(values))} [{text(min(values))}-{text(max(values))}]"


def write_json(path: Path, rows: Sequence[Row], header: dict[str, Any]) -> None:
    """Write all rows and the environment atomically."""
    content = {"format": 1, "environment": header, "rows": [row.summary() for row in rows]}
    atomic.write_text(path, json.dumps(content, indent=2) + "\n")
