"""Nearest rows against all distances in float64: ties, limits, used rows, blocks of any size."""

import numpy as np
import pytest
import torch

from rl_shift import seeding
from rl_shift.nearest import Nearest


def rows_of(generator: np.random.Generator, n: int, d: int, rounded: bool) -> np.ndarray:
    """Correlated rows; `rounded` ones hold many exact duplicates."""
    rows = generator.normal(size=(n, d)) @ generator.normal(size=(d, d))
    return (rows.round() if rounded else rows).astype(np.float32)


def by_hand(points: np.ndarray, query: np.ndarray, used: np.ndarray) -> tuple[int, float]:
    """The first of the nearest unused rows."""
    distance = np.where(used, np.inf, np.square(points - query).sum(1))
    return int(distance.argmin()), float(np.sqrt(distance.min()))


@pytest.mark.parametrize(
    ("n", "d", "rounded", "limit", "extra"),
    [
        (3000, 17, False, np.inf, False),
        (3000, 5, False, 0.5, True),
        (2500, 2, True, np.inf, False),
        (2500, 3, True, 0.8, True),
        (90, 4, False, np.inf, False),  # fewer rows than queries in the end
    ],
)
def test_rows_are_those_of_all_distances(
    n: int, d: int, rounded: bool, limit: float, extra: bool
) -> None:
    generator = seeding.numpy_generator(n + d, "rows")
    rows = rows_of(generator, n, d, rounded)
    coordinate = np.abs(generator.normal(size=n)).astype(np.float32) if extra else None
    starts = generator.integers(n, size=(3, 70))
    queries = rows[starts] + (0 if rounded else 0.2 * generator.normal(size=(3, 70, d)))
    wide = Nearest(torch.from_numpy(rows), coordinate)
    narrow = Nearest(torch.from_numpy(rows), coordinate, size=64)
    points = rows / rows.std(0, dtype=np.float64)
    if coordinate is not None:
        points = np.column_stack([points, coordinate])
    used = np.zeros(n, dtype=bool)
    for part in queries:
        found, distances = narrow(part, limit)
        np.testing.assert_array_equal(wide(part, limit)[0], found)
        whitened = np.pad(part / rows.std(0, dtype=np.float64), ((0, 0), (0, int(extra))))
        for query, row, distance in zip(whitened, found, distances, strict=True):
            expected, least = by_hand(points, query, used)
            if least > limit or used.all():
                assert row == -1 and distance == np.inf
                continue
            assert row == expected
            np.testing.assert_allclose(distance, least, rtol=1e-9, atol=1e-9)
            used[row] = True


def test_marked_rows_and_queries_that_are_not_finite_find_nothing() -> None:
    rows = torch.arange(6.0)[:, None]
    near = Nearest(rows)
    near.mark([])
    near.mark([2, 3])
    found, distances = near(np.array([[2.1], [np.nan], [np.inf], [1e300], [5.4]]))
    assert found.tolist() == [1, -1, -1, -1, 5]
    assert np.isinf(distances[1:4]).all()
    assert near(np.zeros((5, 1)))[0].tolist() == [0, 4, -1, -1, -1]


def test_the_neighbour_distance_passes_over_the_row_itself() -> None:
    generator = seeding.numpy_generator(0)
    rows = np.array([[0.0], [1.0], [3.0], [3.0]], dtype=np.float32)
    near = Nearest(torch.from_numpy(rows))
    spread = rows.std(dtype=np.float64)
    assert near.neighbour_distance(1.0, generator) == pytest.approx(1 / spread)
    assert near.neighbour_distance(0.0, generator) == 0.0
    assert near(np.array([[3.0]]))[0].tolist() == [2]  # nothing was used up
    assert Nearest(torch.zeros(1, 2)).neighbour_distance(0.95, generator) == 0.0


def test_rows_far_from_the_origin_keep_their_digits() -> None:
    """A product of raw numbers would lose the differences: 1e-3 beside 1e4."""
    rows = np.arange(4000.0)[:, None].astype(np.float32) * 2.0**-10 + 8192
    near = Nearest(torch.from_numpy(rows))
    found, _ = near(rows[::-7].astype(np.float64))
    np.testing.assert_array_equal(found, np.arange(4000)[::-7])
