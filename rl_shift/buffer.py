"""Transitions in memory: `Buffer` for data sets and for collected rings, and the view `Mixture`.

Rows hold raw observations. All float32 and bool columns lie side by side in one float32 matrix, so
that a block of many batches is one gather; integer and image columns keep tensors of their own.
A ring of N lanes stores slot t of lane k in row t * N + k: each lane is a stream in time order, and
the row after any row of a stream is N further on, modulo the capacity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from rl_shift import seeding
from rl_shift.errors import UnsupportedSpace, UserError

if TYPE_CHECKING:
    import gymnasium

Batch = dict[str, Tensor]
Spec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

_BLOCK = 32  # batches drawn and gathered at once where rows do not change in between
_BLOCK_BYTES = 2**24  # ... unless they would take more room than this per seed (images)
_CHUNK = 2**16  # rows converted at once, so that no temporary copy of a whole column is made


def transition_spec(
    observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Columns of a transition between these spaces: key -> (shape of a row, type)."""
    obs = _space_column(observation_space, "observation")
    return {
        "obs": obs,
        "action": _space_column(action_space, "action"),
        "reward": ((), torch.float32),
        "next_obs": obs,
        "terminated": ((), torch.bool),
        "truncated": ((), torch.bool),
        "task": ((), torch.int64),
    }


def _space_column(space: gymnasium.Space[Any], role: str) -> tuple[tuple[int, ...], torch.dtype]:
    from gymnasium.spaces import Box, Discrete

    if isinstance(space, Discrete):
        return (), torch.int64
    if isinstance(space, Box):
        return space.shape, torch.uint8 if space.dtype == np.uint8 else torch.float32
    raise UnsupportedSpace(
        f"cannot store the {role} space {space}: wrap the environment into a Box or Discrete one"
    )


def _column_type(key: str, array: np.ndarray[Any, Any] | Tensor) -> torch.dtype:
    """Storage type of a column: bool, int64, uint8 for images, float32 for the rest."""
    kind = str(array.dtype).removeprefix("torch.")
    if key in ("terminated", "truncated") or kind == "bool":
        return torch.bool
    if kind == "uint8" and array.ndim > 1:
        return torch.uint8
    if kind.startswith(("int", "uint")):
        return torch.int64
    if kind.startswith(("float", "bfloat")):
        return torch.float32
    raise UserError(f"column {key!r} has type {kind}: give bool, integer or real numbers")


@dataclass
class _Block:
    """Several batches gathered at once, handed out in turn."""

    index: Tensor  # (batches, S, n): rows, or first rows of windows
    batches: list[Batch]
    cursor: int = 0


class Buffer:
    """A ring of transitions with lanes, or a flat data set (`from_arrays`).

    With one seed, batches are (B, ...). With S > 1 seeds they are (S, B, ...), and seed k draws
    what a separate buffer with `seeds=(k,)` would draw. Two buffers of one run need different seeds
    or different `stream` names, otherwise their draws go hand in hand.
    """

    def __init__(
        self,
        spec: Spec,
        capacity: int,
        lanes: int = 1,
        device: str | torch.device = "cpu",
        seeds: Sequence[int] = (0,),
        *,
        stream: str = "sampler",
    ) -> None:
        """Make an empty ring.

        Args:
            spec: key -> (shape of one row, type), see `transition_spec`.
            capacity: rows over all lanes, rounded down to a multiple of `lanes`.
            lanes: parallel streams; `extend` appends one row (or the same number of rows) to each.
            device: where the rows live, the indices are drawn and the batches come out.
            seeds: one number per stacked seed.
            stream: name of the random stream of these seeds.
        """
        if lanes < 1 or capacity < lanes:
            raise ValueError(f"capacity {capacity} holds no row for each of {lanes} lanes")
        if not seeds:
            raise ValueError("a buffer needs at least one seed")
        slots = capacity // lanes
        width = sum(math.prod(shape) for shape, kind in spec.values() if _packed(kind))
        self._setup(
            spec,
            torch.zeros(slots * lanes, width, device=device),
            {
                key: torch.zeros(slots * lanes, *shape, dtype=kind, device=device)
                for key, (shape, kind) in spec.items()
                if not _packed(kind)
            },
            lanes,
            tuple(seeds),
            stream,
        )

    def _setup(
        self,
        spec: Spec,
        matrix: Tensor,
        columns: dict[str, Tensor],
        lanes: int,
        seeds: tuple[int, ...],
        stream: str,
    ) -> None:
        self.spec = dict(spec)
        self.lanes = lanes
        self.seeds = seeds
        self.device = matrix.device
        self.capacity = matrix.shape[0]
        self.flat = False
        self._matrix = matrix  # (capacity, width): float32 and bool columns
        self._columns = columns  # key -> (capacity, ...): the other columns
        self._places: dict[str, slice] = {}  # key -> columns of the matrix
        place = 0
        for key, (shape, kind) in self.spec.items():
            if _packed(kind):
                self._places[key] = slice(place, place + math.prod(shape))
                place += math.prod(shape)
        self._row_bytes = max(1, 4 * place + sum(c[:1].nbytes for c in columns.values()))
        self._generators = [
            seeding.torch_generator(seed, stream, device=matrix.device) for seed in seeds
        ]
        self._slot = 0  # next slot to write; where the ring is full, also the oldest
        self._filled = 0  # slots written
        self.appended = 0  # rows appended so far, overwritten ones included
        self._episode_end: Tensor | None = None  # (rows,): ends that the transitions do not show
        self._forget()

    def _forget(self) -> None:
        """Drop everything derived from the rows, because they change."""
        self._blocks: dict[tuple[int, int], _Block] = {}  # (n, length or 0) -> block
        self._following: Tensor | None = None
        self._tables: dict[int, Tensor] = {}  # length -> first rows of all windows
        # the last `where` of `windows`, its version, the length, and what of it is usable
        self._pool: tuple[Tensor, int, int, Tensor] | None = None

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, np.ndarray[Any, Any] | Tensor],
        device: str | torch.device = "cpu",
        seeds: Sequence[int] = (0,),
        episode_end: np.ndarray[Any, Any] | Tensor | None = None,
        *,
        stream: str = "sampler",
    ) -> Buffer:
        """A flat buffer with the rows of whole episodes, in order; it does not grow.

        Args:
            arrays: key -> (rows, ...); copied.
            device: see `Buffer`.
            seeds: see `Buffer`.
            episode_end: (rows,) bool, last rows of episodes that no column marks as such.
            stream: see `Buffer`.
        """
        if not arrays:
            raise UserError("a data set without arrays: give at least obs, action and reward")
        rows = len(next(iter(arrays.values())))
        for key, array in arrays.items():
            if len(array) != rows:
                first = next(iter(arrays))
                raise UserError(
                    f"column {key!r} has {len(array)} rows and {first!r} has {rows}: "
                    "give all columns the same number of rows"
                )
        if rows == 0:
            raise UserError("the data set has no rows: give at least one transition")
        spec = {key: (tuple(a.shape[1:]), _column_type(key, a)) for key, a in arrays.items()}
        buffer = cls(spec, rows, device=device, seeds=seeds, stream=stream)
        for key, array in arrays.items():
            for start in range(0, rows, _CHUNK):
                buffer._write(key, start, array[start : start + _CHUNK])
        buffer._close(episode_end)
        return buffer

    @classmethod
    def from_packed(
        cls,
        spec: Spec,
        matrix: np.ndarray[Any, Any] | Tensor,
        columns: Mapping[str, np.ndarray[Any, Any] | Tensor] | None = None,
        device: str | torch.device = "cpu",
        seeds: Sequence[int] = (0,),
        episode_end: np.ndarray[Any, Any] | Tensor | None = None,
        *,
        stream: str = "sampler",
    ) -> Self:
        """A flat buffer around rows that are packed already; on the CPU nothing is copied.

        Args:
            spec: all columns, in the order in which they lie in the matrix.
            matrix: (rows, width) float32, the float32 and bool columns of `spec` side by side.
            columns: the int64 and uint8 columns of `spec`, key -> (rows, ...).
            device: see `Buffer`.
            seeds: see `Buffer`.
            episode_end: see `from_arrays`.
            stream: see `Buffer`.
        """
        width = sum(math.prod(shape) for shape, kind in spec.values() if _packed(kind))
        if matrix.ndim != 2 or matrix.shape[1] != width or len(matrix) == 0:
            raise ValueError(
                f"a packed matrix of shape {tuple(matrix.shape)}: expected (rows, {width})"
            )
        buffer = cls.__new__(cls)
        buffer._setup(
            spec,
            _tensor(matrix).to(device, torch.float32).contiguous(),
            {
                key: _tensor((columns or {})[key]).to(device, kind).contiguous()
                for key, (_, kind) in spec.items()
                if not _packed(kind)
            },
            1,
            tuple(seeds),
            stream,
        )
        buffer._close(episode_end)
        return buffer

    def _close(self, episode_end: np.ndarray[Any, Any] | Tensor | None) -> None:
        """Every row is written: from here on this is flat data."""
        self.flat = True
        self._filled = self.appended = self.capacity
        if episode_end is not None:
            self._episode_end = _tensor(episode_end).to(self.device, torch.bool)
            if self._episode_end.shape != (self.capacity,):
                raise ValueError(f"episode_end: expected {self.capacity} numbers")

    # ------------------------------------------------------------------ writing

    def extend(self, batch: Mapping[str, np.ndarray[Any, Any] | Tensor]) -> None:
        """Append one row per lane, (N, ...), or T of them in time order, (T * N, ...)."""
        if self.flat:
            raise RuntimeError("flat data does not grow: collect into a ring Buffer of its own")
        missing = self.spec.keys() - batch.keys()
        if missing:
            raise ValueError(f"extend needs {sorted(self.spec)}, missing are {sorted(missing)}")
        rows = len(batch[next(iter(self.spec))])
        if rows % self.lanes:
            raise ValueError(f"{rows} rows cannot be divided among {self.lanes} lanes")
        skip = max(0, rows - self.capacity)  # older than what the ring can hold
        at = (self._slot * self.lanes + skip) % self.capacity
        first = min(rows - skip, self.capacity - at)  # rows before the end of the ring
        for key in self.spec:
            values = batch[key]
            if len(values) != rows:
                raise ValueError(f"{key!r} has {len(values)} rows, expected {rows}")
            self._write(key, at, values[skip : skip + first])
            if skip + first < rows:
                self._write(key, 0, values[skip + first :])
        self._slot = (self._slot + rows // self.lanes) % (self.capacity // self.lanes)
        self._filled = min(self._filled + rows // self.lanes, self.capacity // self.lanes)
        self.appended += rows
        self._forget()

    def cut(self) -> None:
        """End the open episode of every lane: what is appended next does not continue it."""
        if self._filled and {"terminated", "truncated"} <= self.spec.keys():
            newest = (self._slot - 1) % (self.capacity // self.lanes) * self.lanes
            rows = self._matrix[newest : newest + self.lanes]
            not_terminated = rows[:, self._places["terminated"]] == 0
            rows[:, self._places["truncated"]].masked_fill_(not_terminated, 1.0)
            self._forget()

    def _write(self, key: str, at: int, values: np.ndarray[Any, Any] | Tensor) -> None:
        shape, _ = self.spec[key]
        if tuple(values.shape[1:]) != shape:
            raise ValueError(
                f"{key!r} has rows of shape {tuple(values.shape[1:])}, expected {shape}"
            )
        source = _tensor(values)
        rows = slice(at, at + len(source))
        if key in self._columns:
            self._columns[key][rows] = source
        else:
            if self.spec[key][1] == torch.bool:
                source = source != 0
            self._matrix[rows, self._places[key]] = source.reshape(len(source), -1)

    # ------------------------------------------------------------------ reading

    def sample(self, n: int, where: Tensor | None = None) -> Batch:
        """Uniform transitions with replacement, (n, ...), and their row numbers as "index".

        Args:
            n: transitions (per seed).
            where: rows to choose from, (rows,) int64; None means all.
        """
        if where is None:
            return self._next(n, 0)
        if not len(where):
            raise UserError("no row to sample from: `where` is empty")
        return self._batches(where.to(self.device)[self._uniform(len(where), 1, n)], 0)[0]

    def windows(self, n: int, length: int, where: Tensor | None = None) -> Batch:
        """Uniform windows of consecutive rows, (n, length, ...), "index" included.

        No window crosses an episode's end, the seam of the ring or two lanes.

        Args:
            n: windows (per seed).
            length: rows of a window.
            where: first rows to choose from, (rows,) int64; None means all.
        """
        if length < 1:
            raise ValueError(f"windows of {length} rows")
        if where is None:
            return self._next(n, length)
        known = self._pool  # looking through all of `where` costs more than a batch
        if known is None or known[0] is not where or known[1:3] != (where._version, length):
            following = self._rows_following()[where.to(self.device)]
            usable = where.to(self.device)[following >= length - 1]
            if not len(usable):
                longest = int(following.max()) + 1 if len(following) else 0
                raise UserError(
                    f"no window of {length} rows starts in `where`: the longest usable one has "
                    f"{longest}"
                )
            self._pool = known = (where, where._version, length, usable)
        return self._batches(known[3][self._uniform(len(known[3]), 1, n)], length)[0]

    def latest(self, length: int) -> Batch:
        """The last `length` rows of every lane, oldest first: (N, length, ...)."""
        if not 1 <= length <= self._filled:
            raise UserError(
                f"asked for the last {length} rows per lane, the buffer has {self._filled}: "
                "collect more first"
            )
        slots = torch.arange(self._slot - length, self._slot, device=self.device)
        slots = slots % (self.capacity // self.lanes)
        lanes = torch.arange(self.lanes, device=self.device)
        batch = self.take(slots * self.lanes + lanes[:, None])
        if len(self.seeds) > 1:
            return {k: v.expand(len(self.seeds), *v.shape) for k, v in batch.items()}
        return batch

    def newest(self, count: int) -> Tensor:
        """Numbers of the last `count` rows, or of all if there are fewer, oldest first."""
        count = min(count, len(self))
        last = self._slot * self.lanes if not self.flat else self.capacity
        return torch.arange(last - count, last, device=self.device) % self.capacity

    def take(self, index: Tensor) -> Batch:
        """Rows by number, (..., *row shape) for an index of any shape."""
        index = index.to(self.device)
        rows = index.flatten()
        packed = self._matrix.index_select(0, rows)
        batch = {}
        for key, (shape, kind) in self.spec.items():
            if key in self._columns:
                values = self._columns[key].index_select(0, rows)
            else:
                values = packed[:, self._places[key]]
                # Contiguous per key: one small copy per block makes every batch a plain slice.
                values = values > 0.5 if kind == torch.bool else values.contiguous()
            batch[key] = values.view((*index.shape, *shape))
        return batch

    def episodes(self) -> Tensor:
        """Row ranges [start, end) of the episodes of flat data, (E, 2) int64."""
        if not self.flat:
            raise RuntimeError("episodes are row ranges only in flat data, this is a ring")
        end = (self._rows_following() == 0).nonzero()[:, 0] + 1
        return torch.stack([torch.cat([end.new_zeros(1), end[:-1]]), end], 1)

    def arrays(self) -> Batch:
        """All written rows by key, (rows, ...), in storage order; views where the type allows."""
        return {key: self._column(key) for key in self.spec}

    def statistics(self, key: str) -> tuple[Tensor, Tensor]:
        """Mean and population standard deviation of a column over all rows, float32.

        Accumulated in float64, first the mean and then the squares around it.
        """
        column = self._column(key)
        if len(column) == 0:
            raise UserError(f"no rows to compute the statistics of {key!r} from")
        mean = torch.zeros(column.shape[1:], dtype=torch.float64, device=self.device)
        squares = torch.zeros_like(mean)
        for start in range(0, len(column), _CHUNK):
            mean += column[start : start + _CHUNK].double().sum(0) / len(column)
        for start in range(0, len(column), _CHUNK):
            chunk = column[start : start + _CHUNK].double()
            squares += (chunk - mean).square().sum(0) / len(column)
        return mean.float(), squares.sqrt().float()

    def __len__(self) -> int:
        """Rows written, over all lanes."""
        return self._filled * self.lanes

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.spec)

    @property
    def nbytes(self) -> int:
        """Bytes of storage reserved for rows."""
        return self._matrix.nbytes + sum(column.nbytes for column in self._columns.values())

    # ------------------------------------------------------------------ drawing

    def _next(self, n: int, length: int) -> Batch:
        block = self._blocks.get((n, length))
        if block is None or block.cursor == len(block.batches):
            block = self._refill(n, length, block)
        block.cursor += 1
        return block.batches[block.cursor - 1]

    def _refill(self, n: int, length: int, spent: _Block | None) -> _Block:
        """Draw and gather the next block of batches of this shape.

        A ring begins with one batch after every `extend` and doubles from there: what is drawn
        beyond the next `extend` is thrown away.
        """
        size = max(1, min(_BLOCK, _BLOCK_BYTES // (n * max(1, length) * self._row_bytes)))
        if not self.flat:
            size = min(size, 2 * len(spent.batches) if spent else 1)
        if self._filled == 0:
            raise UserError("the buffer is empty: load or collect transitions before sampling")
        if length == 0:
            index = self._uniform(len(self), size, n)
        else:
            table = self._starts(length)
            index = table[self._uniform(len(table), size, n)]
        block = _Block(index, self._batches(index, length))
        self._blocks[n, length] = block
        return block

    def _uniform(self, high: int, size: int, n: int) -> Tensor:
        """Numbers in [0, high), (size, S, n), each seed from its own generator."""
        draws = [
            torch.randint(high, (size, n), generator=generator, device=self.device)
            for generator in self._generators
        ]
        return torch.stack(draws, 1)

    def _batches(self, index: Tensor, length: int) -> list[Batch]:
        """Batches of an index (batches, S, n); the axis S is dropped where S = 1."""
        if len(self.seeds) == 1:
            index = index.squeeze(1)
        if length:
            steps = torch.arange(length, device=self.device) * self.lanes
            index = (index[..., None] + steps) % self.capacity
        block = self.take(index)
        block["index"] = index
        parts = zip(*(tensor.unbind(0) for tensor in block.values()), strict=True)
        return [dict(zip(block, batch, strict=True)) for batch in parts]

    def _column(self, key: str) -> Tensor:
        """All written rows of a column, (rows, *shape)."""
        shape, kind = self.spec[key]
        if key in self._columns:
            return self._columns[key][: len(self)]
        values = self._matrix[: len(self), self._places[key]].view(-1, *shape)
        return values > 0.5 if kind == torch.bool else values

    # ------------------------------------------------------------------ windows

    def _rows_following(self) -> Tensor:
        """Rows that follow each row in its stream before an episode's end or the seam, (rows,)."""
        if self._following is None:
            ends = torch.zeros(len(self), dtype=torch.bool, device=self.device)
            for key in ("terminated", "truncated"):
                if key in self.spec:
                    ends |= self._column(key)
            if self._episode_end is not None:
                ends |= self._episode_end
            oldest = self._slot if self._filled * self.lanes == self.capacity else 0
            ends = ends.view(self._filled, self.lanes).roll(-oldest, 0)  # in time order
            ends[-1:] = True
            time = torch.arange(self._filled, device=self.device)[:, None]
            end = torch.where(ends, time, self._filled).flip(0).cummin(0).values.flip(0)
            self._following = (end - time).roll(oldest, 0).flatten()
        return self._following

    def _starts(self, length: int) -> Tensor:
        """First rows of all windows of `length` rows."""
        if length not in self._tables:
            following = self._rows_following()
            table = (following >= length - 1).nonzero()[:, 0]
            if len(table) == 0:
                raise UserError(
                    f"no window of {length} rows fits into an episode of the data: the longest "
                    f"usable window has {int(following.max()) + 1}; choose a shorter one"
                )
            self._tables[length] = table
        return self._tables[length]

    # ------------------------------------------------------------------ state

    def state(self, copy: bool = True) -> dict[str, Any]:
        """What an exact continuation needs: generators, open blocks, and the rows of a ring.

        Flat data is not included, it is read again from its source.

        Args:
            copy: False gives the ring's rows as views, for a state that is written at once.
        """
        state: dict[str, Any] = {
            "capacity": self.capacity,
            "lanes": self.lanes,
            "seeds": list(self.seeds),
            "slot": self._slot,
            "filled": self._filled,
            "appended": self.appended,
            "generators": {str(k): g.get_state() for k, g in enumerate(self._generators)},
            "blocks": {
                str(k): {"n": n, "length": length, "cursor": b.cursor, "index": b.index.clone()}
                for k, ((n, length), b) in enumerate(self._blocks.items())
            },
        }
        if not self.flat:
            rows = {"packed": self._matrix, **self._columns}
            state["rows"] = {
                key: value[: len(self)].clone() if copy else value[: len(self)]
                for key, value in rows.items()
            }
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; the buffer must have been made in the same way."""
        for name, own in (
            ("capacity", self.capacity),
            ("lanes", self.lanes),
            ("seeds", list(self.seeds)),
        ):
            if state[name] != own:
                raise UserError(
                    f"the saved buffer has {name} {state[name]}, this one {own}: resume with the "
                    "data and the settings of the saved run"
                )
        if self.flat == ("rows" in state):
            raise UserError("the saved buffer and this one are not of the same kind (flat, ring)")
        self._forget()
        self._slot, self._filled = int(state["slot"]), int(state["filled"])
        self.appended = int(state.get("appended", len(self)))  # older checkpoints have none
        if not self.flat:
            for key, rows in {"packed": self._matrix, **self._columns}.items():
                rows[: len(self)] = state["rows"][key].to(self.device)
        for k, generator in enumerate(self._generators):
            generator.set_state(state["generators"][str(k)].cpu())
        for k in range(len(state["blocks"])):
            saved = state["blocks"][str(k)]
            n, length = int(saved["n"]), int(saved["length"])
            index = saved["index"].to(self.device)
            batches = self._batches(index, length)
            self._blocks[n, length] = _Block(index, batches, int(saved["cursor"]))


class PerSeed:
    """Reads from one buffer per stacked seed, all of one layout; batches are (S, n, ...)."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        """Read from `buffers`, the k-th for the k-th seed."""
        self.buffers = list(buffers)
        self.spec, self.keys = self.buffers[0].spec, self.buffers[0].keys
        self.seeds = tuple(seed for buffer in self.buffers for seed in buffer.seeds)

    def __len__(self) -> int:
        """Rows of all buffers."""
        return sum(len(buffer) for buffer in self.buffers)

    def sample(self, n: int) -> Batch:
        """Uniform transitions, (S, n, ...)."""
        return self._stack([buffer.sample(n) for buffer in self.buffers])

    def windows(self, n: int, length: int) -> Batch:
        """Uniform windows, (S, n, length, ...)."""
        return self._stack([buffer.windows(n, length) for buffer in self.buffers])

    def latest(self, length: int) -> Batch:
        """The last rows of every lane, (S, lanes, length, ...)."""
        return self._stack([buffer.latest(length) for buffer in self.buffers])

    def _stack(self, batches: list[Batch]) -> Batch:
        return {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}


class Mixture:
    """Reads from several buffers at once, each giving a fixed fraction of every batch.

    The keys are those that all buffers have. "index" counts within the buffer a row came from.
    """

    def __init__(self, parts: Sequence[tuple[Buffer | PerSeed, float]]) -> None:
        """Mix `parts`, (buffer, fraction) each; fractions are taken relative to their sum."""
        total = sum(fraction for _, fraction in parts)
        if total <= 0 or any(fraction < 0 for _, fraction in parts):
            raise ValueError(f"fractions {[fraction for _, fraction in parts]} mix nothing")
        self.parts = [(buffer, fraction / total) for buffer, fraction in parts if fraction > 0]
        self.sources = [source for source, _ in self.parts]
        self.buffers = [s for s in self.sources if isinstance(s, Buffer)]  # not those per seed
        if len({source.seeds for source in self.sources}) > 1:
            raise ValueError("the buffers of a mixture must have the same seeds")
        first = self.sources[0]
        self.keys = tuple(k for k in first.keys if all(k in s.spec for s in self.sources))
        self.seeds = first.seeds
        self._counts: dict[int, list[int]] = {}

    def __len__(self) -> int:
        """Rows of all buffers."""
        return sum(len(source) for source in self.sources)

    def split(self, n: int) -> list[int]:
        """How many of `n` each buffer gives: largest remainders, and at least one each."""
        if n not in self._counts:
            if n < len(self.parts):
                raise ValueError(f"a batch of {n} has no room for {len(self.parts)} buffers")
            shares = [fraction * n for _, fraction in self.parts]
            counts = [math.floor(share + 1e-9) for share in shares]
            order = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
            for i in order[: n - sum(counts)]:
                counts[i] += 1
            for i, count in enumerate(counts):
                if count == 0:
                    counts[counts.index(max(counts))] -= 1
                    counts[i] = 1
            self._counts[n] = counts
        return self._counts[n]

    def sample(self, n: int) -> Batch:
        """Uniform transitions of every buffer, (n, ...), in the order of the buffers."""
        counts = self.split(n)
        return self._join([s.sample(c) for s, c in zip(self.sources, counts, strict=True)])

    def windows(self, n: int, length: int) -> Batch:
        """Uniform windows of every buffer, (n, length, ...), in the order of the buffers."""
        counts = self.split(n)
        return self._join([s.windows(c, length) for s, c in zip(self.sources, counts, strict=True)])

    def latest(self, length: int) -> Batch:
        """The last rows of every lane of every buffer, (sum of lanes, length, ...)."""
        return self._join([source.latest(length) for source in self.sources])

    def _join(self, batches: list[Batch]) -> Batch:
        axis = 0 if len(self.seeds) == 1 else 1
        keys = [key for key in batches[0] if key in self.keys or key == "index"]
        return {key: torch.cat([batch[key] for batch in batches], axis) for key in keys}


def _packed(kind: torch.dtype) -> bool:
    """Whether columns of this type lie in the float32 matrix."""
    return kind in (torch.float32, torch.bool)


def _tensor(values: np.ndarray[Any, Any] | Tensor) -> Tensor:
    """A tensor on the same memory, or on a copy where that memory is read-only."""
    if isinstance(values, Tensor):
        return values
    values = np.asarray(values)
    if not values.flags.writeable or any(stride < 0 for stride in values.strides):
        values = values.copy()  # torch warns about the one and refuses the other
    return torch.from_numpy(values)
