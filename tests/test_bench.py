"""The benchmark's arithmetic, its reference's equality with the agents, and tiny rounds of it all.

Nothing here depends on how fast the machine is.
"""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rl_shift.benchmark import (
    Candidate,
    MatrixProducts,
    Network,
    compare,
    largest_difference,
    precision,
    table,
    write_json,
)

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the scripts folder."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


class Clock:
    """Time that passes only when work is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rates_and_ratios_come_from_the_same_round() -> None:
    clock = Clock()
    order = []

    def work(name: str, cost: float) -> Candidate:
        def call() -> None:
            slow = 2.0 if len(order) >= 6 else 1.0  # the machine halves its speed in round 2
            clock.now += cost * slow
            order.append(name)

        return Candidate(name, call, units=10, ceiling="bound")

    candidates = [work("plain", 4.0), work("fast", 2.0), work("bound", 1.0)]
    plain, fast, bound = compare("test", candidates, rounds=2, seconds=4.0, clock=clock)
    assert order[:7] == ["plain", "fast", "fast", "bound", "bound", "bound", "bound"]
    assert order[7] == "bound"  # round 2 runs in reverse
    assert fast.rates == [5.0, 2.5]
    assert fast.ratios == [2.0, 2.0]
    assert plain.ratios == [1.0, 1.0]
    assert fast.summary()["ratio"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert bound.percents == [100.0, 100.0]


def test_candidates_need_names_of_their_own() -> None:
    twice = [Candidate("a", lambda: None), Candidate("a", lambda: None)]
    with pytest.raises(ValueError, match="names of their own"):
        compare("test", twice)


def test_precision_is_set_for_a_block_only() -> None:
    before = torch.get_float32_matmul_precision()
    with precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before


def test_matrix_products_are_counted_by_hand() -> None:
    batch, wide = 8, (3, 5, 2)
    first, second = 2 * batch * 3 * 5, 2 * batch * 5 * 2
    assert MatrixProducts([Network(wide)], batch).flop == first + second
    full = MatrixProducts([Network(wide, weights=1)], batch)
    assert full.flop == (first + second) + (first + second) + second
    every_second = MatrixProducts([Network(wide, forward=0.5, inputs=0.5)], batch, cycle=2)
    assert every_second.flop == 0.5 * ((first + second) + (first + second))
    every_second()
    with pytest.raises(ValueError, match="cycle"):
        MatrixProducts([Network(wide, forward=0.5)], batch, cycle=1)


def test_products_of_the_updates(script: Any) -> None:
    """414 and 537 million operations, and 13.7 billion where critics see 31 actions per state."""
    problems = script("bench_updates").PROBLEMS
    flop = {
        name: MatrixProducts(problem.networks, 256, problem.cycle).flop / 1e6
        for name, problem in problems.items()
    }
    assert flop == pytest.approx({"td3_bc": 414.6, "iql": 536.5, "cql": 13725.2}, abs=0.1)


@pytest.mark.parametrize("name", ["td3_bc", "iql", "cql"])
def test_agents_equal_the_plain_reference(name: str, script: Any) -> None:
    bench = script("bench_updates")
    assert bench.demand_equality(name, "off", bench.make_arrays(3000)) <= 1e-5


def test_an_unequal_variant_is_not_timed(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script("bench_updates")
    reference = bench.PlainIQL

    def changed(*dims: int) -> Any:
        learner = reference(*dims)
        learner.expectile = 0.71
        return learner

    problem = bench.Problem(changed, 1, (), bench.PROBLEMS["iql"].pairs)
    monkeypatch.setitem(bench.PROBLEMS, "iql", problem)
    with pytest.raises(AssertionError, match="not timed"):
        bench.demand_equality("iql", "off", bench.make_arrays(3000))


def test_largest_difference_checks_shapes() -> None:
    a, b = torch.zeros(3), torch.tensor([0.0, -2.0, 1.0])
    assert largest_difference([a, a], [a, b]) == 2.0
    with pytest.raises(ValueError, match="shapes"):
        largest_difference([a], [torch.zeros(3, 1)])


def test_two_tiny_rounds(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = script("bench")
    file = tmp_path / "rows.json"
    chosen = "--section updates --section sampling --compile off --precision highest"
    tiny = "--rounds 2 --seconds 0.01 --rows 3000"
    bench.run(bench.arguments([*f"{chosen} {tiny}".split(), "--json", str(file)]))
    assert "| td3_bc ours, compile=off |" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["environment"]["threads"] == 1
    assert {"cpu", "flags", "torch", "load_before", "load_after", "precision"} <= set(
        content["environment"]
    )
    names = [row["name"] for row in content["rows"]]
    for agent in ("td3_bc", "iql", "cql"):
        assert f"{agent} plain eager" in names
        row = content["rows"][names.index(f"{agent} ours, compile=off")]
        assert row["reference"] == f"{agent} plain eager"
        assert row["largest_difference"] <= 1e-5
        assert 0 < row["percent_of_ceiling"]["median"]
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    assert "Buffer" in names


def test_evaluation_rounds(script: Any) -> None:
    rows = script("bench_data").evaluation_section(
        "iql", env_id="Hopper-v5", episodes=2, lanes=2, rounds=2
    )
    assert [len(row.rates) for row in rows] == [2, 2]


def test_loading_measures(script: Any, tmp_path: Path) -> None:
    bench = script("bench_data")
    path = tmp_path / "random.hdf5"
    bench.write_dataset(path, 3000)
    for kind in ("plain", "hdf5", "writes the cache", "cache"):
        result = bench._load(kind, path)
        assert 0 < result["load_s"] <= result["with_buffer_s"] or kind == "plain"
    assert np.isfinite(bench._train("off", "td3_bc", path, 2)["peak"])


def test_seeds_in_two_processes(script: Any) -> None:
    """Spawned processes meet before every block, and the slower one ends it."""
    rows = script("bench_updates").seeds_section(
        "td3_bc", seeds_each=2, rows=3000, updates=2, levels=("highest",), mode="off", rounds=2
    )
    names = [row.name for row in rows]
    assert names[0] == "plain runs" and len(names) == 3
    assert all(rate > 0 for row in rows for rate in row.rates)


def test_tables_and_files(tmp_path: Path) -> None:
    rows = compare("test", [Candidate("a", lambda: None)], rounds=2, seconds=0.0)
    rows[0].notes["peak"] = 1.25
    assert "peak 1.25" in table(rows)
    assert table([]) == "(nothing ran)"
    write_json(tmp_path / "new" / "rows.json", rows, {"cpu": "x"})
    assert json.loads((tmp_path / "new" / "rows.json").read_text())["rows"][0]["peak"] == 1.25
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.json"]


def test_online_equals_its_reference_and_iterates(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = script("bench_online")
    assert online.check() < 1e-6
    agent, iteration = online.ours(4, rollout=32, batch_size=16, epochs=1)
    iteration()
    assert agent.updates == 1
    plain = online.PlainPPO(online.envs.make_env(online.ENV))
    monkeypatch.setattr(online, "ROLLOUT", 64)
    plain.iteration()


def test_worlds_walk_bare_and_under_shifts(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worlds = script("bench_worlds")
    monkeypatch.setattr(worlds, "STEPS", 20)
    rows = worlds.worlds_section(rounds=1, seconds=0.01)
    assert len(rows) == 1 + sum(len(shifts) for shifts in worlds.GROUPS.values())
    assert all(row.unit == "env steps/s" and row.rates[0] > 0 for row in rows)
    assert [row.ratios for row in rows if row.name == row.reference] == [[1.0]] * 3


def test_the_search_for_nearest_rows_stands_beside_a_tree(script: Any) -> None:
    rows = script("bench_nearest").nearest_section(rows=300, rounds=1, seconds=0.01)
    assert [row.name.split(", ")[-1] for row in rows[:2]] == ["scipy's k-d tree", "blocks"]
    assert all(row.rates[0] > 0 for row in rows)


def test_the_latency_of_corrected_actions_stands_beside_the_base(script: Any) -> None:
    latency = script("bench_latency")
    rows = latency.latency_section(rounds=1, seconds=0.01)
    assert [row.name for row in rows[: len(latency.VARIANTS) + 1]][:2] == ["td3_bc", "cdsa, off"]
    assert len(rows) == 2 * (len(latency.VARIANTS) + 1)
    assert all(row.rates[0] > 0 for row in rows)


def test_generation_is_timed_only_where_samples_are_equal(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = script("bench_generation")
    first, second = generation.BATCHES
    monkeypatch.setattr(generation, "BATCHES", {first: (4,), second: (2,)})
    rows = generation.generation_section(
        modes=("off",), levels=("highest", "medium"), rounds=1, seconds=0.01
    )
    assert [row.name for row in rows] == [
        f"4 {first}, guided, compile=off, highest", f"4 {first}, guided, compile=off, medium",
        f"4 {first}, compile=off, highest", f"4 {first}, compile=off, medium",
        f"2 {second}, compile=off, highest", f"2 {second}, compile=off, medium",
    ]  # fmt: skip
    assert {row.unit for row in rows} == {"windows/s", "transitions/s"}
    assert all(row.rates[0] > 0 for row in rows)

    class Wrong(torch.nn.Module):
        def forward(self, x: Any, sigma: Any) -> Any:
            return 0.9 * x / (1 + sigma.square())

    monkeypatch.setattr(torch, "compile", lambda module, **flags: Wrong())
    with pytest.raises(AssertionError, match="not timed"):
        generation.candidates_of(first, ("off", "on"), ("highest",))


def test_an_update_of_a_sequence_stands_beside_one_of_its_learner(script: Any) -> None:
    rows = script("bench_continual").continual_section(
        rows=1000, memory=50, stored=(0, 2), modes=("off",), rounds=1, seconds=0.01
    )
    assert [row.name for row in rows] == [
        "td3_bc, compile=off", "oer, 0 stored tasks, compile=off",
        "oer, 2 stored tasks, compile=off",
    ]  # fmt: skip
    assert all(row.rates[0] > 0 for row in rows)
    agent = script("bench_continual").after(2, script("bench_continual").Buffer.from_arrays(
        script("bench_updates").make_arrays(1000)), 50)  # fmt: skip
    assert {k: len(part) for k, part in agent.memory.parts.items()} == {0: 50, 1: 50}
    assert agent.kept.current == 2 and agent.stage == "learner"
