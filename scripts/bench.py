#!/usr/bin/env python
"""Benchmark against the frozen plain reference; prints Markdown tables.

    python scripts/bench.py                                # everything that runs here, 1 thread
    python scripts/bench.py --section updates --agent iql --json iql.json
    python scripts/bench.py --section updates --threads 2

Ratios are medians over rounds of the per-round ratio to the plain eager references of
`bench_reference.py` and `bench_reference_cql.py`, with the lowest and the highest round; rates are
per second of process CPU time unless they say wall.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

SECTIONS = (
    "updates", "sampling", "loading", "evaluation", "seeds", "memory", "online", "worlds",
    "nearest", "latency", "generation", "continual",
)  # fmt: skip
AGENTS = ("td3_bc", "iql", "cql")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--section", action="append", choices=SECTIONS, help="default: all")
    parser.add_argument("--agent", action="append", choices=AGENTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=6, help="default: 6")
    parser.add_argument("--seconds", type=float, default=1.0, help="least CPU time of a block")
    parser.add_argument("--rows", type=int, default=1_000_000, help="transitions in memory")
    parser.add_argument("--threads", type=int, default=1, help="torch and BLAS threads")
    parser.add_argument("--compile", action="append", choices=("off", "on"), help="default: both")
    parser.add_argument(
        "--precision",
        action="append",
        choices=("highest", "high", "medium"),
        help="default: highest, and medium on a CPU with AMX",
    )
    parser.add_argument("--cpu", type=int, help="CPU to pin to; default: the last one, 1 thread")
    parser.add_argument("--env", default="HalfCheetah-v5", help="of the section evaluation")
    parser.add_argument("--episodes", type=int, default=10, help="of the section evaluation")
    parser.add_argument("--processes", type=int, default=2, help="of the section seeds")
    parser.add_argument("--seeds-each", type=int, default=5, help="per process, section seeds")
    parser.add_argument(
        "--updates", type=int, default=100, help="per seed and block, section seeds"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Any]:
    """Run the chosen sections in turn, printing each table as soon as it is there."""
    import torch
    from bench_continual import continual_section
    from bench_data import evaluation_section, loading_section, memory_section, sampling_section
    from bench_generation import generation_section
    from bench_latency import latency_section
    from bench_nearest import nearest_section
    from bench_online import online_section
    from bench_updates import default_levels, make_arrays, seeds_section, updates_section
    from bench_worlds import worlds_section

    from rl_shift.benchmark import environment, load_average, table, write_json

    torch.set_num_threads(args.threads)
    sections, names = args.section or SECTIONS, args.agent or AGENTS
    modes, levels = tuple(args.compile or ("off", "on")), tuple(args.precision or default_levels())
    cpu = args.cpu
    if cpu is None and args.threads == 1 and hasattr(os, "sched_getaffinity"):
        cpu = max(os.sched_getaffinity(0))
    header = environment(cpu) | {"precision": list(levels), "compile": list(modes)}
    for key, value in header.items():
        print(f"{key}: {value}")
    print(flush=True)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    timing = {"rounds": args.rounds, "seconds": args.seconds, "cpu": cpu, "progress": say}
    arrays = make_arrays(args.rows) if {"updates", "sampling"} & set(sections) else {}
    jobs = {
        "updates": lambda name: updates_section(name, arrays, modes=modes, levels=levels, **timing),
        "sampling": lambda name: sampling_section(arrays, **timing),
        "loading": lambda name: loading_section(rows=args.rows, rounds=args.rounds, progress=say),
        "evaluation": lambda name: evaluation_section(
            name, env_id=args.env, episodes=args.episodes, rounds=args.rounds, cpu=cpu, progress=say
        ),
        "seeds": lambda name: seeds_section(
            name,
            processes=args.processes,
            seeds_each=args.seeds_each,
            rows=args.rows,
            updates=args.updates,
            levels=levels,
            mode=modes[-1],
            rounds=args.rounds,
            progress=say,
        ),
        "online": lambda name: online_section(modes=modes, **timing),
        "worlds": lambda name: worlds_section(**timing),
        "nearest": lambda name: nearest_section(rows=min(args.rows, 500_000), **timing),
        "latency": lambda name: latency_section(**timing),
        "generation": lambda name: generation_section(modes=modes, levels=levels, **timing),
        "continual": lambda name: continual_section(modes=modes, **timing),
        "memory": lambda name: memory_section(name, rows=args.rows, modes=modes, progress=say),
    }
    rows = []
    for section in SECTIONS:
        if section not in sections:
            continue
        if section == "updates":
            chosen = list(names)
        elif section == "seeds":  # CQL's plain runs would take hours
            chosen = [name for name in names if name != "cql"]
        else:  # does not depend on it
            chosen = list(names[:1])
        for name in chosen:
            found = jobs[section](name)
            rows += found
            print(table(found) + "\n", flush=True)
    header["load_after"] = load_average()
    print(f"load_after: {header['load_after']}")
    if args.json is not None:
        write_json(args.json, rows, header)
        say(f"wrote {args.json}")
    return rows


if __name__ == "__main__":
    options = arguments()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(options.threads)  # before numpy and torch are imported
    run(options)
