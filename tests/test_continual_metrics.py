"""Continual metrics against matrices and series worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_shift import continual_metrics as cm
from rl_shift.continual_metrics import Row

# after task 1: 80; after task 2: 60 and 90; after task 3: 50, 70 and 60
MATRIX = np.array([[80.0, np.nan, np.nan], [60.0, 90.0, np.nan], [50.0, 70.0, 60.0]])


def rows_of_matrix(matrix: np.ndarray, seed: int = 0) -> list[Row]:
    return [
        Row(100 * (i + 1), i, j, seed, float(matrix[i, j]))
        for i in range(len(matrix))
        for j in range(i + 1)
    ]


def test_the_matrix_of_rows_is_the_matrix() -> None:
    both = [*rows_of_matrix(MATRIX), *rows_of_matrix(MATRIX + 1, seed=7)]
    np.testing.assert_array_equal(cm.task_matrix(both), np.stack([MATRIX, MATRIX + 1]))


def test_matrix_metrics_by_hand() -> None:
    assert cm.average_performance(MATRIX) == pytest.approx(60)
    assert cm.backward_transfer(MATRIX) == pytest.approx(((50 - 80) + (70 - 90)) / 2)
    assert cm.forgetting_continual_world(MATRIX) == pytest.approx((30 + 20 + 0) / 3)
    assert cm.backward_transfer(MATRIX[:1, :1]) == 0
    two = cm.average_performance(np.stack([MATRIX, MATRIX + 3]))
    np.testing.assert_allclose(two, [60, 63])
    full = np.array([[80.0, 12.0], [60.0, 90.0]])
    assert cm.forward_transfer_zero_shot(full, [1.0, 2.0]) == pytest.approx(10)


def test_continual_world_forgetting_is_a_multiple_of_bwt() -> None:
    a = np.random.default_rng(0).normal(size=(4, 5, 5))
    np.testing.assert_allclose(
        cm.forgetting_continual_world(a), -4 / 5 * cm.backward_transfer(a), atol=1e-12
    )


def test_a_matrix_of_averaged_evaluations() -> None:
    rows = [Row(step, 0, 0, 0, float(score)) for step, score in enumerate([0, 1, 2, 6])]
    assert cm.task_matrix(rows, average=2)[0, 0, 0] == 4
    again = [*rows, Row(3, 0, 0, 0, 8.0)]  # the last point was evaluated twice
    assert cm.task_matrix(again, average=2)[0, 0, 0] == 5
    assert cm.task_matrix(again)[0, 0, 0] == 8


def test_forward_transfer_of_continual_world() -> None:
    rows = [
        Row(1, 0, 0, 0, 0.0), Row(2, 0, 0, 0, 1.0),
        Row(3, 1, 0, 0, 1.0), Row(3, 1, 1, 0, 0.6), Row(4, 1, 1, 0, 1.0),
    ]  # fmt: skip
    areas = cm.areas_under_curves(rows)
    np.testing.assert_allclose(areas, [[0.5, 0.8]])
    expected = ((0.5 - 0.5) / 0.5 + (0.8 - 0.6) / 0.4) / 2
    assert cm.forward_transfer_continual_world(areas[0], [0.5, 0.6]) == pytest.approx(expected)
    np.testing.assert_allclose(cm.learning_curve_area(rows, first=1), [[0.0, 0.6]])


def test_min_acc_and_wc_acc() -> None:
    rows = [
        Row(1, 0, 0, 0, 9.0),  # during its own training: does not count
        Row(2, 0, 0, 0, 80.0),
        Row(3, 1, 0, 0, 20.0), Row(3, 1, 1, 0, 5.0),
        Row(4, 1, 0, 0, 70.0), Row(4, 1, 1, 0, 90.0),
        Row(5, 2, 0, 0, 60.0), Row(5, 2, 1, 0, 40.0), Row(5, 2, 2, 0, 50.0),
    ]  # fmt: skip
    assert cm.min_acc(rows) == pytest.approx([(20 + 40) / 2])
    assert cm.min_acc(rows, smoothed=True) == pytest.approx([(60 + 40) / 2])
    assert cm.wc_acc(rows) == pytest.approx([50 / 3 + (1 - 1 / 3) * 30])
    assert cm.wc_acc(rows[:2]) == pytest.approx([80])


def test_windows_find_what_the_reference_code_misses() -> None:
    series = (0.5, 0.2, 0.9)
    assert cm.windowed_gain(series, 3) == pytest.approx(0.7)
    assert cm.windowed_gain([-x for x in series], 3) == pytest.approx(0.3)
    rows = [Row(k, 0, 0, 0, x) for k, x in enumerate(series)]
    assert cm.windowed_plasticity(rows, 3) == pytest.approx([0.7])
    assert cm.windowed_forgetting(rows, 3) == pytest.approx([0.3])
    assert np.isnan(cm.windowed_forgetting(rows[:1], 3)).all()


@given(st.lists(st.integers(-9, 9), max_size=12), st.integers(2, 6))
def test_windowed_gain_equals_the_search_over_all_pairs(series: list[int], window: int) -> None:
    pairs = [
        series[n] - series[m] for n in range(len(series)) for m in range(max(0, n - window + 1), n)
    ]
    assert cm.windowed_gain(map(float, series), window) == max(pairs, default=float("-inf"))


def test_intervals_over_whole_seeds() -> None:
    one = cm.seed_interval([3.0, 3.0, 3.0])
    assert one == (3.0, 3.0, 3.0)
    values = np.random.default_rng(1).normal(10, 2, size=(20, 4))
    found = cm.seed_interval(values, lambda a: np.asarray(a.mean()), confidence=0.9)
    assert found.low < found.value < found.high
    half = 1.645 * values.mean(axis=1).std() / np.sqrt(20)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_summary_of_rows() -> None:
    rows = [
        *(Row(5, 0, 0, 4 + k, score) for k, score in enumerate([2.0, 6.0])),
        *(Row(9, 1, 0, 4 + k, score) for k, score in enumerate([10.0, 20.0])),
        *(Row(9, 1, 1, 4 + k, score) for k, score in enumerate([30.0, 40.0])),
    ]
    found = cm.summary(rows)
    np.testing.assert_allclose(found["PER"], [20, 30])
    np.testing.assert_allclose(found["BWT"], [8, 14])
    np.testing.assert_allclose(found["min-ACC"], [10, 20])
    np.testing.assert_allclose(found["WF^10"], [-8, -14])  # it rose: the largest drop is negative
