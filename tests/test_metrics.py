"""Statistics against closed forms, loops and SciPy."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from rl_shift import metrics

SCORES = np.random.default_rng(0).normal(50, 20, size=(5, 3))  # 5 runs, 3 tasks
OTHER = np.random.default_rng(1).normal(60, 20, size=(4, 3)).round(-1)
AGGREGATES = [metrics.mean, metrics.median, metrics.iqm, metrics.optimality_gap]
RETURNS = arrays(float, st.integers(1, 40), elements=st.floats(-1e3, 1e3))


def test_aggregates():
    assert metrics.mean(SCORES) == pytest.approx(SCORES.mean())
    assert metrics.median(SCORES) == pytest.approx(sorted(SCORES.mean(0))[1])
    assert metrics.iqm(SCORES) == pytest.approx(stats.trim_mean(SCORES, 0.25, axis=None))
    high = np.array([[120.0, 40.0], [90.0, 100.0]])
    assert metrics.optimality_gap(high) == pytest.approx((0 + 60 + 10 + 0) / 4)
    assert metrics.optimality_gap([[0.25, 2.0]], target=1.0) == pytest.approx(0.375)


@pytest.mark.parametrize("runs", range(1, 9))
def test_iqm_of_any_number(runs):
    table = np.random.default_rng(runs).normal(size=(runs, 1))
    assert metrics.iqm(table) == pytest.approx(stats.trim_mean(table, 0.25, axis=None))


def test_outliers_move_the_mean_and_not_the_iqm():
    table = np.array([[1.0, 2, 3, 4, 5, 6, 7, 1e9]])
    assert metrics.iqm(table) == pytest.approx(4.5)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_aggregates_take_stacks(aggregate):
    stack = np.random.default_rng(2).normal(50, 40, size=(2, 7, 5, 3))
    each = [[float(aggregate(stack[i, j])) for j in range(7)] for i in range(2)]
    np.testing.assert_allclose(aggregate(stack), each)


def test_performance_profile():
    table = np.array([[0.0, 10.0], [20.0, 30.0]])
    np.testing.assert_allclose(
        metrics.performance_profile(table, [-1, 0, 10, 25, 30]), [1, 0.75, 0.5, 0.25, 0]
    )
    assert metrics.performance_profile(np.stack([table] * 3), [1, 2]).shape == (3, 2)


def test_probability_of_improvement():
    per_task = [stats.mannwhitneyu(SCORES[:, t], OTHER[:, t]).statistic / (5 * 4) for t in range(3)]
    assert metrics.probability_of_improvement(SCORES, OTHER) == pytest.approx(np.mean(per_task))
    assert metrics.probability_of_improvement(SCORES, SCORES) == pytest.approx(0.5)
    assert metrics.probability_of_improvement(SCORES + 1e3, OTHER) == 1
    stack = metrics.probability_of_improvement(np.stack([SCORES, SCORES + 1e3]), OTHER)
    np.testing.assert_allclose(stack, [np.mean(per_task), 1])


# ---- risk ------------------------------------------------------------------------------------


def test_risk_by_hand():
    returns = np.array([5.0, 1, 4, 2, 3, 10, 9, 8, 7, 6])
    assert metrics.value_at_risk(returns, 0.2) == 2
    assert metrics.conditional_value_at_risk(returns, 0.2) == 1.5
    assert metrics.conditional_value_at_risk(returns, 0.25) == 2  # ceil(2.5) = 3 episodes
    assert metrics.conditional_value_at_risk(returns, 1.0) == returns.mean()
    assert metrics.conditional_value_at_risk(np.arange(30.0), 0.1) == 1  # 3 episodes, not 4
    np.testing.assert_array_equal(
        metrics.value_at_risk(np.stack([returns, -returns]), 0.1), [1, -10]
    )
    np.testing.assert_array_equal(
        metrics.conditional_value_at_risk(np.stack([returns, -returns]), 0.1), [1, -10]
    )


@given(RETURNS, st.sampled_from([0.05, 0.1, 0.25, 0.5]))
def test_risk_orders(returns, fraction):
    var, cvar = (
        f(returns, fraction) for f in (metrics.value_at_risk, metrics.conditional_value_at_risk)
    )
    slack = 1e-9 * (1 + np.abs(returns).max())
    assert returns.min() - slack <= cvar <= var + slack
    assert cvar <= returns.mean() + slack
    assert var <= metrics.value_at_risk(returns, fraction * 1.5)
    assert cvar <= metrics.conditional_value_at_risk(returns, fraction * 1.5) + slack


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01])
def test_risk_needs_a_fraction(fraction):
    for measure in (metrics.value_at_risk, metrics.conditional_value_at_risk):
        with pytest.raises(ValueError, match="fraction of the episodes"):
            measure([1.0, 2.0], fraction)


# ---- intervals -------------------------------------------------------------------------------


def test_mean_interval():
    values = SCORES[:, 0]
    for confidence in (0.9, 0.95):
        found = metrics.mean_interval(values, confidence)
        expected = stats.t.interval(confidence, 4, values.mean(), stats.sem(values))
        assert found == pytest.approx((values.mean(), *expected))
    one = metrics.mean_interval([3.0])
    assert one.value == 3 and math.isnan(one.low) and math.isnan(one.high)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_stratified_bootstrap_equals_a_loop(aggregate):
    generator = np.random.default_rng(7)
    rows = generator.integers(5, size=(200, 5, 3))
    values = [
        float(aggregate(np.stack([SCORES[rows[b, :, t], t] for t in range(3)], axis=1)))
        for b in range(200)
    ]
    found = metrics.stratified_bootstrap_interval(SCORES, aggregate, resamples=200, seed=7)
    assert found == pytest.approx((float(aggregate(SCORES)), *np.percentile(values, [2.5, 97.5])))


def test_blocks_of_resamples_change_nothing(monkeypatch):
    whole = metrics.stratified_bootstrap_interval(SCORES, metrics.iqm, resamples=500)
    monkeypatch.setattr(metrics, "_RESAMPLED_NUMBERS", 7 * SCORES.size)
    assert metrics.stratified_bootstrap_interval(SCORES, metrics.iqm, resamples=500) == whole


def test_strata_stay_apart():
    """Equal runs per task: nothing is random, however far the tasks lie apart."""
    table = np.tile([1.0, 100.0, 1000.0], (4, 1))
    found = metrics.stratified_bootstrap_interval(table, metrics.mean)
    assert found == pytest.approx((367, 367, 367))


def test_bootstrap_interval_agrees_with_scipy():
    values = np.random.default_rng(5).gamma(2.0, size=60)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    found = metrics.bootstrap_interval(values, partial(np.mean, axis=-1), resamples=4000)
    assert found == pytest.approx((values.mean(), expected.low, expected.high), abs=0.02)
    cvar = partial(metrics.conditional_value_at_risk, fraction=0.05)
    risk = metrics.bootstrap_interval(values, cvar)
    assert risk.low <= risk.value <= risk.high < values.mean()


def test_pairs_are_redrawn_together():
    luck = np.random.default_rng(3).normal(0, 50, 60)
    cvar = partial(metrics.conditional_value_at_risk, fraction=0.1)
    found = metrics.paired_bootstrap_interval(luck + 2, luck, cvar)
    assert found == pytest.approx((2, 2, 2))  # the luck that both share cancels
    gained = luck + np.random.default_rng(4).normal(0, 5, 60)
    first = metrics.paired_bootstrap_interval(gained, luck, cvar)
    assert first.value == pytest.approx(float(cvar(gained) - cvar(luck)))
    assert first.low < first.value < first.high
    assert first == metrics.paired_bootstrap_interval(gained, luck, cvar)  # the same draws
    with pytest.raises(ValueError, match="equal shapes"):
        metrics.paired_bootstrap_interval(gained[:3], luck, cvar)


def test_bootstrap_interval_covers_the_truth():
    generator = np.random.default_rng(6)
    hits = 0
    for k in range(200):
        values = generator.normal(size=30)
        _, low, high = metrics.bootstrap_interval(
            values, partial(np.mean, axis=-1), 0.9, resamples=200, seed=k
        )
        hits += low <= 0 <= high
    assert 0.8 < hits / 200 < 0.96
