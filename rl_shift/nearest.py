"""Exact nearest rows of a dataset, each of them found at most once; our design.

Rows lie in blocks of neighbours, as the leaves of a k-d tree, and a block is compared with many
queries in one matrix product. In 17 to 20 dimensions of noisy data a k-d tree looks at nearly every
row, one at a time; here the worst case is one product of all queries with all rows. Products are
float32 with a bound on their rounding, and whatever could be nearest is compared in float64, so
what is found does not depend on the blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]
_GROUP = 64  # queries at once: their products with a block stay in the cache
_FARTHEST = 1e15  # standard deviations; beyond it products might overflow


class Nearest:
    """Exact nearest unused rows in observations whitened by the data's standard deviation.

    Memory beside the data is 4 d + 20 bytes for a row of d numbers, and up to 10 d while it is
    built (68 MiB for 500,000 rows of 17); `extra` copies the data, 4 d + 4 more. Among 500,000
    rows a query took 0.1 ms of a core (hopper, d = 11) to 0.8 ms (independent normal numbers,
    d = 20, where every row is looked at), 50 queries at a time.

    Attributes:
        scale: (d,) what the coordinates are divided by.
    """

    def __init__(self, obs: Tensor, extra: Floats | None = None, size: int = 2048) -> None:
        """Divide rows (rows, obs) into blocks.

        Args:
            obs: raw observations.
            extra: (rows,) one more coordinate, which queries have at 0.
            size: rows of a block; changes the time, never what is found.
        """
        self.size = size
        values = obs.float().cpu().numpy()
        spread = np.array([values[:, k].astype(np.float64).std() for k in range(values.shape[1])])
        self.scale = np.where(spread > 1e-8, spread, 1.0)
        if extra is not None:
            values = np.concatenate([values, extra[:, None].astype(np.float32)], axis=1)
            self.scale = np.append(self.scale, 1.0)
        self.values = values
        width = len(self.scale)
        order = _neighbours(values, self.scale, size)
        blocks = -(-len(order) // size)
        self.rows = np.full((blocks, size), -1, dtype=np.int64)
        self.rows.flat[: len(order)] = order
        self.place = np.empty(len(order), dtype=np.int64)
        self.place[order] = np.arange(len(order))
        # Coordinates around the block's centre, so that products keep their digits, and last the
        # squared norm, which is infinite for rows that must not be found.
        self.blocks = np.zeros((blocks, width + 1, size), dtype=np.float32)
        self.blocks[:, -1] = np.inf
        self.low, self.high = np.empty((2, blocks, width))
        self.centre, self.radius = np.empty((blocks, width)), np.empty(blocks)
        for b in range(blocks):
            points = values[self.rows[b][self.rows[b] >= 0]] / self.scale
            self.low[b], self.high[b], self.centre[b] = points.min(0), points.max(0), points.mean(0)
            points -= self.centre[b]
            norms = np.square(points).sum(1)
            self.blocks[b, :-1, : len(points)] = points.T
            self.blocks[b, -1, : len(points)] = norms
            self.radius[b] = np.sqrt(norms.max())
        # Twice the rounding of two conversions and a sum of width + 1 products.
        self.rounding = (width + 8) * float(np.finfo(np.float32).eps)

    def mark(self, rows: Indices | list[int]) -> None:
        """These rows shall not be found any more."""
        block, column = np.divmod(self.place[rows], self.size)
        self.blocks[block, -1, column] = np.inf

    def neighbour_distance(self, quantile: float, generator: np.random.Generator) -> float:
        """Quantile of the distances between rows and their nearest other rows (2,000 rows)."""
        rows = generator.choice(len(self.values), min(2000, len(self.values)), replace=False)
        points, found = self.values[rows] / self.scale, np.empty(len(rows))
        for start in range(0, len(rows), _GROUP):
            part = slice(start, start + _GROUP)
            _, found[part] = self._search(points[part], np.inf, own=rows[part])
        return float(np.quantile(found, quantile)) if len(self.values) > 1 else 0.0

    def __call__(self, obs: Floats, limit: float = np.inf) -> tuple[Indices, Floats]:
        """Nearest unused row of every query and its distance; those found are used from now on.

        Queries choose in turn, and of equally near rows the first one in the data. A query that is
        not finite, or that has no unused row within `limit`, gets row -1 at distance infinity.

        Args:
            obs: (n, obs) raw queries.
            limit: the largest distance, in standard deviations.
        """
        queries = np.zeros((len(obs), len(self.scale)))
        queries[:, : obs.shape[1]] = obs / self.scale[: obs.shape[1]]
        rows, distances = np.full(len(obs), -1, dtype=np.int64), np.full(len(obs), np.inf)
        usable = np.flatnonzero((np.abs(queries) < _FARTHEST).all(1))
        for start in range(0, len(usable), _GROUP):
            part = usable[start : start + _GROUP]
            rows[part], distances[part] = self._search(queries[part], limit)
        return rows, distances

    def _search(
        self, queries: Floats, limit: float, own: Indices | None = None
    ) -> tuple[Indices, Floats]:
        """As `__call__`, for whitened queries; with `own` rows to pass over, none becomes used."""
        lower = self._boxes(queries)
        # Squared, as all distances until the end; finite, so that used rows are out of reach.
        most = min(limit**2 * (1 + 1e-12), float(np.finfo(np.float64).max))
        upper = np.full(len(queries), most)
        places = np.full(len(queries), -1) if own is None else self.place[own]

        def compare(block: int, who: Indices) -> None:
            """Bound the distances between a block and queries from both sides."""
            products, norms, error = self._products(block, queries[who], places[who])
            nearest = products.min(1) + norms
            lower[who, block] = np.maximum(lower[who, block], nearest - error)
            upper[who] = np.minimum(upper[who], nearest + error)

        first = lower.argmin(1)
        for block in np.unique(first):
            compare(int(block), np.flatnonzero(first == block))
        for block in np.flatnonzero((lower <= upper[:, None]).any(0)):
            who = np.flatnonzero((lower[:, block] <= upper) & (first != block))
            if len(who):
                compare(int(block), who)
        rows, distances = np.full(len(queries), -1, dtype=np.int64), np.full(len(queries), np.inf)
        for k in range(len(queries)):
            row, distance = self._nearest(queries[k], lower[k], most, places[k])
            if row >= 0 and distance <= limit:
                rows[k], distances[k] = row, distance
                if own is None:
                    self.mark([row])
        return rows, distances

    def _boxes(self, queries: Floats) -> Floats:
        """Lower bounds of the squared distances between queries and blocks, (n, blocks)."""
        total = np.zeros((len(queries), len(self.low)))
        for low, high, value in zip(self.low.T, self.high.T, queries.T[:, :, None], strict=True):
            outside = np.maximum(low - value, value - high)
            total += np.square(np.maximum(outside, 0.0))
        return total * (1 - 1e-12)

    def _products(
        self, block: int, queries: Floats, places: Indices
    ) -> tuple[NDArray[np.float32], Floats, Floats]:
        """Squared distances between queries and a block's rows, in two summands, and their error.

        Returns:
            (n, block) float32, infinite for rows at `places` and used ones; (n,); (n,).
        """
        around = queries - self.centre[block]
        norms = np.square(around).sum(1)
        left = np.ones((len(queries), len(self.scale) + 1), dtype=np.float32)
        left[:, :-1] = -2 * around
        products = left @ self.blocks[block]
        inside = np.flatnonzero(places // self.size == block)
        products[inside, places[inside] % self.size] = np.inf
        return products, norms, self.rounding * (np.sqrt(norms) + self.radius[block]) ** 2

    def _nearest(self, query: Floats, lower: Floats, most: float, place: int) -> tuple[int, float]:
        """Row and distance: exact in the blocks whose lower bound (blocks,) leaves a chance."""
        best, row = most, -1
        while lower[block := int(lower.argmin())] <= best:
            lower[block] = np.inf
            products, norms, error = self._products(block, query[None], np.array([place]))
            least = float(products.min())
            if np.isinf(least) or least + norms[0] - error[0] > best:
                continue
            rows = self.rows[block][products[0] <= least + 2 * error[0]]
            exact = np.square(self.values[rows] / self.scale - query).sum(1)
            found = float(exact.min())
            first = int(rows[exact == found].min())
            if found < best or (found == best and (row < 0 or first < row)):
                best, row = found, first
        return row, float(np.sqrt(best)) if row >= 0 else np.inf


def _neighbours(values: NDArray[np.float32], scale: Floats, size: int) -> Indices:
    """Row numbers so that every `size` in turn are near each other, (rows,).

    Halves along the coordinate of the largest deviation until parts are small enough.
    """
    order = np.arange(len(values))
    parts = [(0, len(order))]
    while parts:
        start, end = parts.pop()
        if end - start <= size:
            continue
        rows = order[start:end]
        points = values[rows]
        half = -(-(end - start) // (2 * size)) * size
        axis = int((points.std(axis=0) / scale).argmax())
        order[start:end] = rows[np.argpartition(points[:, axis], half)]
        parts += [(start, start + half), (start + half, end)]
    return order
