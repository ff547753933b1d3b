"""Policy selection by a bandit: the specification's six checks, and the command."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_shift import bandit, cli

RNG = np.random.default_rng(0)


def pool(*means: float, spread: float = 1.0, size: int = 200) -> list[Any]:
    return [mean + spread * RNG.uniform(-1, 1, size) for mean in means]


def test_negative_returns_do_not_favour_arms_that_were_not_pulled() -> None:
    returns = pool(-50.0, -40.0, -10.0, spread=0.1)
    chosen = bandit.pulls(returns, 3, 20, 50)
    np.testing.assert_allclose(chosen[:, 3:], returns[2].mean())
    assert set(chosen[:, 1]) <= {float(r.mean()) for r in returns}


def test_scale_and_offset_do_not_change_what_is_pulled() -> None:
    returns = pool(1.0, 1.5, 2.0, 2.2)
    plain = bandit.pulls(returns, 3, 60, 40)
    large = bandit.pulls([1000 * r + 77 for r in returns], 3, 60, 40)
    np.testing.assert_allclose(large, 1000 * plain + 77)


def test_without_a_pull_the_choice_is_random() -> None:
    returns = pool(0.0, 1.0, 2.0, 3.0)
    start = bandit.pulls(returns, 2, 0, 20_000)
    assert start.shape == (20_000, 1)
    assert start.mean() == pytest.approx(np.mean([r.mean() for r in returns]), abs=0.04)


def test_many_pulls_find_the_best_of_a_draw() -> None:
    returns = pool(0.0, 1.0, 2.0, 3.0, 4.0, spread=2.0)
    chosen = bandit.pulls(returns, 4, 400, 400)
    best_of_draws = 4 * 0.8 + 3 * 0.2  # the best is missing in one of five draws
    assert chosen[:, -1].mean() == pytest.approx(best_of_draws, abs=0.15)
    assert chosen[:, 4].mean() < chosen[:, -1].mean()


def test_one_arm_is_a_flat_line() -> None:
    chosen = bandit.pulls(pool(1.0, 5.0), 1, 10, 30)
    assert (chosen == chosen[:, :1]).all()


def test_a_seed_repeats_everything() -> None:
    returns = pool(1.0, 2.0, 3.0)
    one, two = (bandit.interval(bandit.pulls(returns, 2, 9, 50, seed=3), 3) for _ in range(2))
    np.testing.assert_array_equal(one.low, two.low)
    np.testing.assert_array_equal(one.high, two.high)
    assert (one.low <= one.mean).all() and (one.mean <= one.high).all()
    other = bandit.pulls(returns, 2, 9, 50, seed=4)
    assert not np.array_equal(other, bandit.pulls(returns, 2, 9, 50, seed=3))


def test_the_command_makes_a_table(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for score in (10.0, 30.0, 60.0):
        Path("pool", f"a{score:g}").mkdir(parents=True)
        evaluation = {
            "task": 0, "during": 0, "updates": 5, "env_steps": 0,
            "returns": [[2 * score - 20 + x for x in (-1, 0, 1)]], "score": None, "lengths": [],
        }  # fmt: skip
        task = {
            "name": "one", "env": "E", "updates": 5, "env_steps": 0, "reward": "raw",
            "shift": None, "dataset": None, "reference_scores": [-20.0, 180.0],
        }  # fmt: skip
        document = {
            "format": 1, "status": "finished", "agent": f"a{score:g}", "agent_config": {},
            "tasks": [task], "seeds": [0], "evaluations": [evaluation], "updates": 5,
            "env_steps": 0, "wall_time_s": 1.0, "updates_per_s": 1.0, "precision": "highest",
            "compile": "off", "threads": 1, "device": "cpu", "data_mode": "native", "versions": {},
        }  # fmt: skip
        Path("pool", f"a{score:g}", "results.json").write_text(json.dumps(document))
    words = ["report", "bandit", "--pool", "pool", "--arms", "3", "--pulls", "12", "--trials", "40"]
    assert cli.main([*words, "--out", "shown"]) == 0
    said = capsys.readouterr().out
    assert "3 policies with 3 or more stored episodes; the protocol asks for 1000" in said
    with Path("shown/bandit.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13
    assert rows[0]["task"] == "one (D4RL-normalised score)"
    assert float(rows[-1]["mean"]) == pytest.approx(60.0)
    assert 10 < float(rows[0]["mean"]) < 60
    document["tasks"][0]["env"] = "F"
    Path("pool/other").mkdir()
    Path("pool/other/results.json").write_text(json.dumps(document))
    assert cli.main([*words, "--out", "shown"]) == 1
    assert "not those of the other policies" in capsys.readouterr().out


def test_mistakes_are_named(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["bandit"], "give the pool"),
        (["bandit", "--pool", "x", "--arms", "0"], "at least 1"),
        (["bandit", "--pool", "x"], "is no folder"),
    ):
        assert cli.main(["report", *words]) == 2
        assert said in capsys.readouterr().err
