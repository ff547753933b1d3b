"""Section `nearest` of the benchmark: MBES's search for the nearest row, beside a k-d tree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.spatial import KDTree

from rl_shift import seeding
from rl_shift.benchmark import Candidate, Row, compare, pinned, warm_up
from rl_shift.nearest import Nearest

WIDTHS, QUERIES = (11, 17, 20), 50  # numbers of an observation; roll-outs that step together


def nearest_section(
    *,
    rows: int,
    rounds: int = 6,
    seconds: float = 1.0,
    cpu: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Queries per second among independent normal rows: the worst case, nothing can be skipped."""
    found: list[Row] = []
    for width in WIDTHS:
        rng = seeding.numpy_generator(width, "bench_nearest")
        values = rng.normal(size=(rows, width)).astype("float32")
        queries = rng.normal(size=(QUERIES, width))
        tree, blocks = KDTree(values), Nearest(torch.from_numpy(values))
        name = f"{rows:,} rows of {width}"
        candidates = [
            Candidate(f"{name}, scipy's k-d tree", lambda t=tree, q=queries: t.query(q), QUERIES),
            Candidate(f"{name}, blocks", lambda b=blocks, q=queries: b(q), QUERIES),
        ]
        for candidate in candidates:
            warm_up(candidate, calls=1)
        with pinned(cpu):
            found += compare(
                "nearest",
                candidates,
                rounds=rounds,
                seconds=seconds,
                unit="queries/s",
                progress=progress,
            )
    return found
