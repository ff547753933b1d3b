"""Sections `sampling`, `loading`, `evaluation` and `memory` of the benchmark."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import torch
from bench_reference import PlainArrays, plain_returns
from bench_updates import (
    BATCH,
    make_agent,
    make_arrays,
    make_plain_arrays,
    make_reference,
    paired_parameters,
)

from rl_shift import datasets, seeding
from rl_shift.benchmark import Candidate, Row, compare, pinned, warm_up
from rl_shift.buffer import Buffer
from rl_shift.compile import Updater
from rl_shift.evaluation import Evaluator

Progress = Callable[[str], None] | None


def sampling_section(
    arrays: dict[str, np.ndarray],
    *,
    rounds: int = 6,
    seconds: float = 1.0,
    cpu: int | None = None,
    progress: Progress = None,
) -> list[Row]:
    """Batches per second: five indexed arrays against blocks of one packed gather."""
    plain = make_plain_arrays(arrays)
    single, stacked = Buffer.from_arrays(arrays), Buffer.from_arrays(arrays, seeds=tuple(range(5)))
    batch = single.sample(BATCH)
    rows = batch["index"].numpy()
    for key, values in arrays.items():
        if not np.array_equal(batch[key].numpy(), values[rows]):
            raise AssertionError(f"sampling: column {key!r} is not the data's")
    count = 64  # two blocks

    def repeat(sample: Callable[[int], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                sample(BATCH)

        return run

    candidates = [
        Candidate("five arrays", repeat(plain.sample), units=count),
        Candidate("Buffer", repeat(single.sample), units=count),
        Candidate("Buffer, 5 seeds", repeat(stacked.sample), units=5 * count),
    ]
    for candidate in candidates:
        warm_up(candidate, calls=1)
    with pinned(cpu):
        return compare(
            "sampling",
            candidates,
            rounds=rounds,
            seconds=seconds,
            unit=f"batches of {BATCH}/s",
            progress=progress,
        )


def evaluation_section(
    name: str,
    *,
    env_id: str = "HalfCheetah-v5",
    episodes: int = 10,
    lanes: int = 10,
    rounds: int = 6,
    cpu: int | None = None,
    progress: Progress = None,
) -> list[Row]:
    """Episodes per second: one environment and one observation at a time against lanes."""
    env = gymnasium.make(env_id)
    dims = (*env.observation_space.shape, *env.action_space.shape)  # type: ignore[misc]
    agent, reference = make_agent(name, None, dims=dims), make_reference(name, dims=dims)
    with torch.no_grad():
        for mine, its in zip(*paired_parameters(name, agent, reference), strict=True):
            its.copy_(mine)
    seeds = [seeding.child(0, "episode", number) for number in range(episodes)]
    mean, std = agent.normalizer.mean.numpy(), agent.normalizer.std.numpy()

    def play_plain(seeds: Sequence[int] = seeds) -> np.ndarray:
        return plain_returns(env, reference.act, seeds, mean, std)

    with Evaluator(env_id, lanes=1) as one, Evaluator(env_id, lanes=lanes) as many:
        ours = one.evaluate(agent, episodes=1).returns[0, 0]
        plain = play_plain(seeds[:1])[0]
        if not np.isclose(ours, plain, rtol=1e-4):
            raise AssertionError(f"evaluation: the same policy scores {ours} here, {plain} plain")
        candidates = [
            Candidate("one environment", play_plain, units=episodes),
            Candidate(
                f"Evaluator, {lanes} lanes",
                lambda: many.evaluate(agent, episodes=episodes),
                units=episodes,
            ),
        ]
        for candidate in candidates:
            warm_up(candidate, calls=1)
        with pinned(cpu):
            rows = compare(
                f"evaluation {env_id}",
                candidates,
                rounds=rounds,
                seconds=0.0,  # one block is one evaluation
                unit="episodes/s",
                progress=progress,
            )
    env.close()
    return rows


# ---- figures that need a process of their own ---------------------------------------------------


def memory_of_process(field: str) -> float:
    """Megabytes in a field of /proc/self/status: VmRSS now, VmHWM at the peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _in_new_process(function: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """Run a module-level function alone, so that peaks and caches are its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_report, args=(sender, function, args), daemon=True)
    worker.start()
    sender.close()
    try:
        result: dict[str, float] = receiver.recv()
    except EOFError:
        worker.join()
        raise RuntimeError(f"{function.__name__} failed in its process (see above)") from None
    worker.join()
    return result


def _report(sender: Any, function: Callable[..., dict[str, float]], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    sender.send(function(*args))


def write_dataset(path: Path, rows: int) -> None:
    """A D4RL v2 file without compression: whole episodes of 1000 random transitions."""
    arrays = make_arrays(rows)
    with h5py.File(path, "w") as file:
        file["observations"] = arrays["obs"]
        file["actions"] = arrays["action"]
        file["rewards"] = arrays["reward"]
        file["next_observations"] = arrays["next_obs"]
        file["terminals"] = np.zeros(rows, dtype=bool)
        file["timeouts"] = arrays["truncated"]


def _load(kind: str, path: Path) -> dict[str, float]:
    before = memory_of_process("VmRSS")
    _reset_peak()
    start, used = time.perf_counter(), time.process_time()
    if kind == "plain":
        with h5py.File(path) as file:
            keys = ("observations", "actions", "rewards", "next_observations", "terminals")
            plain = PlainArrays(*(file[key][:] for key in keys))
        size = sum(value.nbytes for value in vars(plain).values() if isinstance(value, np.ndarray))
        loaded, used = time.perf_counter(), time.process_time() - used
    else:
        found = datasets.load(path, cache=kind != "hdf5")
        loaded, used = time.perf_counter(), time.process_time() - used
        size = sum(value.nbytes for value in found.values())
        Buffer.from_arrays(found)
    end = time.perf_counter()
    return {
        "load_s": loaded - start,
        "cpu_s": used,
        "with_buffer_s": end - start,
        "peak": (memory_of_process("VmHWM") - before) / (size / 2**20),
    }


def loading_section(
    *, rows: int = 1_000_000, rounds: int = 6, progress: Progress = None
) -> list[Row]:
    """Wall time of loading a file that the system has already cached, each in a new process."""
    kinds = {
        "plain": "h5py, five arrays",
        "hdf5": "datasets.load, no cache",
        "cache": "datasets.load, from cache",
    }
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.hdf5"
        write_dataset(path, rows)
        first = _in_new_process(_load, "writes the cache", path)
        for number in range(rounds):
            order: Sequence[str] = list(kinds)
            for kind in order if number % 2 == 0 else order[::-1]:
                results[kind].append(_in_new_process(_load, kind, path))
            if progress is not None:
                progress(f"loading: round {number + 1} of {rounds}")
    reference = [1 / r["load_s"] for r in results["plain"]]
    found = []
    for kind, label in kinds.items():
        rates = [1 / r["load_s"] for r in results[kind]]
        median = {key: float(np.median([r[key] for r in results[kind]])) for key in first}
        notes = {
            "seconds": round(median["load_s"], 4),
            "cpu_seconds": round(median["cpu_s"], 4),
            "seconds_with_buffer": round(median["with_buffer_s"], 4),
            "peak_over_arrays": round(median["peak"], 2),
        }
        if kind == "cache":
            notes["seconds_first_time"] = round(first["load_s"], 4)
        found.append(
            Row(
                section=f"loading {rows:,} rows",
                name=label,
                reference=kinds["plain"],
                unit="loads/s (wall)",
                precision="",
                rates=rates,
                ratios=[mine / plain for mine, plain in zip(rates, reference, strict=True)],
                percents=[],
                notes=notes,
            )
        )
    return found


def _train(kind: str, name: str, path: Path, updates: int) -> dict[str, float]:
    imported = memory_of_process("VmRSS")
    if kind == "plain":
        with h5py.File(path) as file:
            keys = ("observations", "actions", "rewards", "next_observations", "terminals")
            plain = PlainArrays(*(file[key][:] for key in keys))
        plain.normalize()
        learner = make_reference(name)
        for _ in range(updates):
            learner.update(plain.sample(BATCH))
    else:
        arrays = datasets.load(path)
        agent, buffer = make_agent(name, None), Buffer.from_arrays(arrays)
        del arrays
        agent.normalizer.fit(*buffer.statistics("obs"))
        updater = Updater(agent, mode=kind)  # type: ignore[arg-type]
        for _ in range(updates):
            updater(agent.sample(buffer))
    return {
        "imported": imported,
        "now": memory_of_process("VmRSS"),
        "peak": memory_of_process("VmHWM"),
    }


def memory_section(
    name: str,
    *,
    rows: int = 1_000_000,
    updates: int = 20,
    modes: Sequence[str] = ("off", "on"),
    progress: Progress = None,
) -> list[Row]:
    """Resident memory of a training process with its data, at the peak."""
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.hdf5"
        write_dataset(path, rows)
        for kind in ("plain", *modes):
            result = _in_new_process(_train, kind, name, path, updates)
            plain = found[0].rates[0] if found else result["peak"]
            found.append(
                Row(
                    section=f"memory {name}, {rows:,} rows",
                    name="plain eager" if kind == "plain" else f"ours, compile={kind}",
                    reference="plain eager",
                    unit="MB at the peak",
                    precision="",
                    rates=[result["peak"]],
                    ratios=[result["peak"] / plain],
                    percents=[],
                    notes={
                        "MB_after_imports": round(result["imported"]),
                        "MB_while_training": round(result["now"]),
                    },
                )
            )
            if progress is not None:
                progress(f"memory: {found[-1].name} done")
    return found
