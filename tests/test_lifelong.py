"""A life's rewards and regimes: recorded exactly, measured as defined."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_shift import checkpoint, cli
from rl_shift.life import Life, phases
from rl_shift.lifelong_metrics import (
    lifetime,
    moving_average,
    phase_means,
    recoveries,
)
from rl_shift.metrics import mean_interval
from rl_shift.report_lifelong import random_reward, shifts_of

STEPS = 100  # env steps per point


def test_points_are_means_over_steps_and_lanes() -> None:
    life = Life(every=5)
    for t in range(9):
        life.add(np.array([t, t + 1.0]), {"shift": {"regime": np.array([t // 4, 0])}})
    assert life.rows(lanes=2) == {"steps": 6, "reward": [1.5, 4.5, 7.5], "regime": [0, 0, 1]}
    copy = Life(every=5)
    copy.load_state(life.state())
    for each in (life, copy):
        each.add(np.ones(2), {})
    assert copy.rows(2) == life.rows(2)


def test_phases_are_cut_where_the_regime_changes() -> None:
    assert phases(np.array([0, 0, 1, 1, 1, 0])) == [(0, 2), (2, 5), (5, 6)]
    assert phases(np.array([], int)) == []
    assert phase_means([1, 3, 5, 5, 5, 9], [0, 0, 1, 1, 1, 0]).tolist() == [2, 5, 9]


def test_moving_averages() -> None:
    assert moving_average([1, 2, 3, 4], steps=100, window=200).tolist() == [1, 1.5, 2.5, 3.5]
    assert moving_average([1, 2, 3], steps=100, window=50).tolist() == [1, 2, 3]
    assert lifetime([1, 2, 6]) == 3


def a_life(before: float, dip: float, points: int, after: float) -> tuple[Any, Any]:
    """200 points before a shift, `points` at `dip`, then `after` up to 200 points."""
    reward = [before] * 200 + [dip] * points + [after] * (200 - points)
    return reward, [0] * 200 + [1] * 200


def test_drop_and_recovery_of_a_known_life() -> None:
    [found] = recoveries(*a_life(1.0, 0.2, 50, 1.0), STEPS)
    assert (found.start, found.before, found.rule) == (20_000, 1.0, "90%")
    assert found.drop == pytest.approx(0.8)
    # the average over ten points is 0.92 once nine of them are after the dip
    assert (found.steps, found.censored) == (59 * STEPS, False)
    [at_once] = recoveries(*a_life(1.0, 1.0, 0, 1.0), STEPS)
    assert (at_once.steps, at_once.drop) == (1000, 0.0)  # the window lies inside the phase


def test_a_life_that_never_recovers_is_censored() -> None:
    [found] = recoveries(*a_life(1.0, 0.2, 50, 0.5), STEPS)
    assert found.censored and found.steps == 20_000


def test_phases_that_earned_nothing_are_measured_from_the_reference() -> None:
    reward, regime = a_life(-1.0, -3.0, 20, -1.1)
    [found] = recoveries(reward, regime, STEPS, reference=lambda regime: -3.0)
    assert found.rule == "reference" and not found.censored  # the mark is -3 + 0.9 * 2 = -1.2
    assert found.steps == 30 * STEPS


def test_the_interval_of_five_seeds_uses_the_t_quantile() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    interval = mean_interval(values)
    half = 2.776 * np.std(values, ddof=1) / np.sqrt(5)
    assert interval.high - 3 == pytest.approx(half, rel=1e-3)


# ---- from the trainer --------------------------------------------------------------------------


def test_a_shifting_run_records_its_life_and_resumes_it(tmp_path: Path) -> None:
    few = ["--eval-episodes", "1", "--eval-every", "0", "--log-every", "1000"]
    argv = ["train", "sac", "--env", "Pendulum-v1", "--agent.hidden", "[8]", "--life-every", "10"]
    argv += ["--agent.warmup_steps", "500", "--shift", "action_flip:period=40", *few]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert cli.main([*argv, "--env-steps", "105", "--run-dir", whole]) == 0
    assert cli.main([*argv, "--env-steps", "63", "--run-dir", parts]) == 0
    assert cli.main(["train", "--resume", parts, "--env-steps", "105"]) == 0
    lives = [
        json.loads((Path(run) / "results.json").read_text())["lives"] for run in (whole, parts)
    ]
    assert lives[0] == lives[1]
    [life] = lives[0]
    assert (life["task"], life["seed"], life["steps"]) == (0, 0, 10)
    assert life["regime"] == [0] * 4 + [1] * 4 + [0] * 2
    assert len(life["reward"]) == 10 and all(-17 < r < 0 for r in life["reward"])
    assert checkpoint.latest(Path(parts)).is_dir()


def test_the_report_has_a_chapter_about_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--eval-episodes", "1", "--eval-every", "0", "--log-every", "100"]
    argv = ["train", "sac", "--env", "Pendulum-v1", "--agent.hidden", "[8]", "--env-steps", "8000"]
    argv += ["--agent.warmup_steps", "9000", "--shift", "obs_bias:value=1,period=3000", *few]
    monkeypatch.chdir(tmp_path)
    assert cli.main([*argv, "--run-dir", "runs/one", "--agent.buffer_capacity", "100"]) == 0
    logged = tmp_path / "runs" / "one" / "metrics.jsonl"
    entry = {"step": 1, "updates": 0, "env_steps": 100, "train/curiosity/state_error": 0.5}
    logged.write_text(logged.read_text() + json.dumps(entry) + "\n")
    assert cli.main(["report", "runs/one"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| sac | 1 |"))
    assert row.rstrip("| ").endswith("of 2")
    assert "Pendulum-v1, obs_bias:value=1,period=3000" in text
    assert list((tmp_path / "report").rglob("life-1.png"))
    details = text[text.index(": every life") :]
    assert "| sac | 0 | " in details and "| phase 0 | phase 1 | phase 2 |" in details


def test_shifts_without_a_jump_have_no_drop() -> None:
    reward, regime = a_life(1.0, 0.2, 50, 1.0)
    life = {"reward": reward, "regime": regime, "steps": STEPS}
    for gradual in ("type=triangle,period=9", "start=1,end=9", "sigma=0.1"):
        assert shifts_of(life, "Pendulum-v1", json.dumps(f"obs_bias:value=1,{gradual}")) == []
    assert len(shifts_of(life, "Pendulum-v1", json.dumps("obs_bias:value=1,start=20000"))) == 1


def test_phases_that_earn_nothing_are_measured_from_a_random_policy() -> None:
    flip = json.dumps("reward_scale:scale=2,period=20000")
    plain = random_reward("Pendulum-v1", flip, 0)
    assert -9 < plain < -4 and random_reward("Pendulum-v1", flip, 1) == pytest.approx(2 * plain)
    reward, regime = a_life(-1.0, -9.0, 50, -3.0)
    life = {"reward": reward, "regime": regime, "steps": STEPS}
    [found] = shifts_of(life, "Pendulum-v1", flip)
    # the mark is 0.9 * -1 + 0.1 * (about -12), which -3 does not reach and -2 does
    assert found.rule == "reference" and found.censored
    life["reward"] = a_life(-1.0, -9.0, 50, -2.0)[0]
    assert not shifts_of(life, "Pendulum-v1", flip)[0].censored
