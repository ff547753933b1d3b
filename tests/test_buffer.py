"""Property tests of the buffer against a plain model: one Python list of rows per lane."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_shift.buffer import Buffer, Mixture, transition_spec
from rl_shift.errors import UnsupportedSpace, UserError

SPEC = transition_spec(spaces.Box(-1, 1, (2,)), spaces.Discrete(3))
properties = settings(max_examples=40, deadline=None)


def rows(count, lanes=1, first=0, ends=None):
    """`count` steps of each lane, time-major: obs = (lane, time), reward = number of the row."""
    time, lane = np.divmod(np.arange(first * lanes, (first + count) * lanes), lanes)
    ends = np.zeros(count * lanes, bool) if ends is None else np.asarray(ends).reshape(-1)
    number = time * lanes + lane
    return {
        "obs": np.stack([lane, time], 1).astype(np.float64),
        "action": number % 3,
        "reward": number.astype(np.float64),
        "next_obs": np.stack([lane, time + 1], 1).astype(np.float32),
        "terminated": ends & (number % 2 == 0),
        "truncated": ends & (number % 2 == 1),
        "task": np.full(count * lanes, 2),
    }


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)


@st.composite
def rings(draw):
    """A ring after random appends, and per lane the (time, ended) rows it should hold."""
    lanes, slots = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    buffer = Buffer(SPEC, slots * lanes + draw(st.integers(0, lanes - 1)), lanes, seeds=(4,))
    model, time = [[] for _ in range(lanes)], 0
    for count in draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)):
        ended = draw(st.lists(st.booleans(), min_size=count * lanes, max_size=count * lanes))
        ended = np.array(ended).reshape(count, lanes)
        buffer.extend(rows(count, lanes, time, ended))
        for lane in range(lanes):
            model[lane] += [(time + t, bool(ended[t, lane])) for t in range(count)]
        time += count
    return buffer, [lane[-slots:] for lane in model]


def usable(stream, length):
    """Times at which a window of `length` rows may begin in one stream."""
    return [
        stream[i][0]
        for i in range(len(stream) - length + 1)
        if not any(ended for _, ended in stream[i : i + length - 1])
    ]


# ---------------------------------------------------------------------------- rings


@properties
@given(rings())
def test_ring_holds_the_last_rows_and_draws_every_one(case):
    buffer, model = case
    held = {(lane, time) for lane, stream in enumerate(model) for time, _ in stream}
    assert len(buffer) == len(held) <= buffer.capacity
    assert {tuple(row) for row in buffer.arrays()["obs"].int().tolist()} == held
    batch = buffer.sample(64 * buffer.capacity)
    assert set(batch["index"].tolist()) == set(range(len(buffer)))
    assert {tuple(row) for row in batch["obs"].int().tolist()} == held
    lane, time = batch["obs"].long().unbind(1)
    number = time * buffer.lanes + lane
    assert torch.equal(batch["reward"].long(), number)
    assert torch.equal(batch["action"], number % 3)
    assert torch.equal(batch["next_obs"][:, 1].long(), time + 1)
    ended = {(lane, time): e for lane, stream in enumerate(model) for time, e in stream}
    for k, a, b in zip(number, batch["terminated"], batch["truncated"], strict=True):
        row = (int(k) % buffer.lanes, int(k) // buffer.lanes)
        assert (bool(a), bool(b)) == (ended[row] and k % 2 == 0, ended[row] and k % 2 == 1)


@properties
@given(rings(), st.data())
def test_latest_is_the_newest_rows_oldest_first(case, data):
    buffer, model = case
    length = data.draw(st.integers(1, len(model[0])))
    batch = buffer.latest(length)
    expected = [[time for time, _ in stream[-length:]] for stream in model]
    assert batch["obs"].shape == (buffer.lanes, length, 2)
    assert batch["obs"][..., 1].tolist() == expected
    assert batch["obs"][..., 0].tolist() == [[k] * length for k in range(buffer.lanes)]
    with pytest.raises(UserError, match=f"has {len(model[0])}"):
        buffer.latest(len(model[0]) + 1)


@properties
@given(rings(), st.integers(1, 6))
def test_windows_of_a_ring_cross_neither_ends_nor_the_seam(case, length):
    buffer, model = case
    starts = {(lane, time) for lane, s in enumerate(model) for time in usable(s, length)}
    if not starts:
        longest = max(k for k in range(1, length) if any(usable(s, k) for s in model))
        with pytest.raises(UserError, match=f"longest usable window has {longest}"):
            buffer.windows(1, length)
        return
    batch = buffer.windows(64 * buffer.capacity, length)
    assert batch["obs"].shape == (64 * buffer.capacity, length, 2)
    assert {tuple(row) for row in batch["obs"][:, 0].int().tolist()} == starts
    lane, time = batch["obs"].unbind(2)
    assert (lane == lane[:, :1]).all()
    assert (time == time[:, :1] + torch.arange(length)).all()
    assert not (batch["terminated"] | batch["truncated"])[:, :-1].any()
    assert equal({k: v for k, v in batch.items() if k != "index"}, buffer.take(batch["index"]))


@properties
@given(rings(), st.integers(1, 4), st.data())
def test_where_keeps_windows_and_samples_to_the_rows_named(case, length, data):
    buffer, model = case
    where = data.draw(st.lists(st.integers(0, len(buffer) - 1), min_size=1, unique=True))
    index = torch.tensor(where)
    batch = buffer.sample(200, where=index)
    assert set(batch["index"].tolist()) <= set(where)
    obs = {int(i): tuple(buffer.take(torch.tensor(i))["obs"].int().tolist()) for i in where}
    starts = {(lane, time) for lane, s in enumerate(model) for time in usable(s, length)}
    if starts.isdisjoint(obs.values()):
        with pytest.raises(UserError, match=r"`where`.*longest usable"):
            buffer.windows(3, length, where=index)
    else:
        begun = buffer.windows(64 * len(where), length, where=index)["obs"][:, 0].int().tolist()
        assert {tuple(row) for row in begun} == starts & set(obs.values())


def test_capacity_is_rounded_down_to_the_lanes():
    buffer = Buffer(SPEC, 11, lanes=3)
    assert buffer.capacity == 9 and len(buffer) == 0
    with pytest.raises(ValueError, match="capacity 2"):
        Buffer(SPEC, 2, lanes=3)


def test_cut_ends_the_open_episodes():
    buffer = Buffer(SPEC, 8, lanes=2)
    buffer.cut()
    buffer.extend(rows(2, 2, ends=[[0, 0], [1, 0]]))  # row 2 terminated
    buffer.cut()
    buffer.extend(rows(1, 2, first=2))
    arrays = buffer.arrays()
    assert arrays["truncated"].tolist() == [False, False, False, True, False, False]
    assert arrays["terminated"].tolist() == [False, False, True, False, False, False]
    assert set(buffer.windows(100, 2)["index"][:, 0].tolist()) == {0, 1}


def test_what_cannot_be_appended_is_refused():
    buffer = Buffer(SPEC, 6, lanes=2)
    with pytest.raises(UserError, match="empty"):
        buffer.sample(2)
    with pytest.raises(UserError, match="empty"):
        buffer.windows(2, 2)
    with pytest.raises(ValueError, match="missing are \\['task'\\]"):
        buffer.extend({k: v for k, v in rows(1, 2).items() if k != "task"})
    with pytest.raises(ValueError, match="2 lanes"):
        buffer.extend(rows(3))
    with pytest.raises(ValueError, match="rows of shape"):
        buffer.extend(rows(1, 2) | {"obs": np.zeros((2, 3))})
    with pytest.raises(ValueError, match="has 4 rows"):
        buffer.extend(rows(1, 2) | {"reward": np.zeros(4)})
    with pytest.raises(RuntimeError, match="does not grow"):
        Buffer.from_arrays(rows(3)).extend(rows(1))
    with pytest.raises(RuntimeError, match="ring"):
        buffer.episodes()


# ---------------------------------------------------------------------------- flat data


@st.composite
def flats(draw):
    """Whole episodes, the last one possibly open, some ends marked apart from the columns."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    ended = np.zeros(sum(lengths), bool)
    ended[np.cumsum(lengths) - 1] = True
    apart = ended & np.array(
        draw(st.lists(st.booleans(), min_size=len(ended), max_size=len(ended)))
    )
    arrays = rows(len(ended), ends=ended & ~apart)
    return Buffer.from_arrays(arrays, seeds=(4,), episode_end=apart), lengths, arrays


@properties
@given(flats(), st.integers(1, 7))
def test_flat_data_keeps_its_episodes(case, length):
    buffer, lengths, arrays = case
    ends = np.cumsum(lengths)
    assert buffer.episodes().tolist() == [list(p) for p in zip(ends - lengths, ends, strict=True)]
    for key, values in buffer.arrays().items():
        assert np.array_equal(values.numpy(), arrays[key])
    starts = {
        int(e - k + i) for e, k in zip(ends, lengths, strict=True) for i in range(k - length + 1)
    }
    if not starts:
        with pytest.raises(UserError, match=f"longest usable window has {max(lengths)}"):
            buffer.windows(2, length)
        return
    drawn = buffer.windows(64 * len(buffer), length)["index"]
    assert set(drawn[:, 0].tolist()) == starts
    assert (drawn == drawn[:, :1] + torch.arange(length)).all()
    assert set(buffer.sample(64 * len(buffer))["index"].tolist()) == set(range(len(buffer)))
    assert buffer.latest(1)["obs"].tolist() == [[[0.0, len(buffer) - 1]]]


def test_packed_storage_keeps_types():
    images = np.arange(4 * 3 * 3 * 2, dtype=np.uint8).reshape(4, 3, 3, 2)
    numbers = np.array([[-0.5, 1e30, 3e-41], [0, 1, 2], [7, 8, 9], [-1, -2, -3]])
    arrays = {
        "obs": images,
        "action": np.array([0, 2, 1, 0], np.int32),
        "reward": np.array([1, 2, 3, 4], np.float64),
        "next_obs": torch.from_numpy(images[:, ::-1].copy()),
        "terminated": np.array([0, 0, 0.25, 0]),
        "truncated": np.array([False, False, False, True]),
        "task": np.array([3, 3, 2**40, 3]),
        "next_action": torch.from_numpy(numbers),
        "reward_mask": np.array([True, False, True, False]),
    }
    buffer = Buffer.from_arrays(arrays)
    for batch in (
        buffer.arrays(),
        buffer.take(torch.arange(4)),
        Buffer.from_packed(  # the same memory, read again
            buffer.spec, buffer._matrix, buffer._columns, episode_end=np.zeros(4, bool)
        ).arrays(),
    ):
        assert {key: value.dtype for key, value in batch.items()} == {
            "obs": torch.uint8,
            "action": torch.int64,
            "reward": torch.float32,
            "next_obs": torch.uint8,
            "terminated": torch.bool,
            "truncated": torch.bool,
            "task": torch.int64,
            "next_action": torch.float32,
            "reward_mask": torch.bool,
        }
        for key, value in arrays.items():
            assert np.array_equal(
                batch[key].numpy(), np.asarray(value).astype(batch[key].numpy().dtype)
            )
    assert buffer._matrix.shape == (4, 1 + 1 + 1 + 3 + 1)
    assert buffer.nbytes == 4 * (7 * 4 + 18 + 8 + 18 + 8)
    batch = buffer.sample(5)
    assert batch["index"].dtype == torch.int64 and batch["obs"].shape == (5, 3, 3, 2)
    assert all(value.is_contiguous() for value in batch.values())


def test_from_packed_shares_memory_and_read_only_arrays_are_fine():
    matrix = np.random.default_rng(0).random((5, 4), dtype=np.float32)
    spec = {"obs": ((3,), torch.float32), "terminated": ((), torch.bool)}
    matrix[:, 3] = [0, 0, 1, 0, 0]
    assert Buffer.from_packed(spec, matrix)._matrix.data_ptr() == matrix.ctypes.data
    matrix.flags.writeable = False
    buffer = Buffer.from_packed(spec, matrix)
    assert buffer.episodes().tolist() == [[0, 3], [3, 5]]
    assert np.array_equal(buffer.arrays()["obs"].numpy(), matrix[:, :3])
    assert Buffer.from_arrays({"obs": matrix[:, :3]}).keys == ("obs",)
    with pytest.raises(ValueError, match="expected \\(rows, 4\\)"):
        Buffer.from_packed(spec, matrix[:, :3])


def test_bad_arrays_are_refused_by_name():
    with pytest.raises(UserError, match="'reward' has 2 rows and 'obs' has 3"):
        Buffer.from_arrays({"obs": np.zeros((3, 1)), "reward": np.zeros(2)})
    with pytest.raises(UserError, match="no rows"):
        Buffer.from_arrays({"obs": np.zeros((0, 1))})
    with pytest.raises(UserError, match="without arrays"):
        Buffer.from_arrays({})
    with pytest.raises(UserError, match="'obs' has type complex128"):
        Buffer.from_arrays({"obs": np.zeros((3, 1), complex)})
    with pytest.raises(UserError, match="`where` is empty"):
        Buffer.from_arrays(rows(3)).sample(1, where=torch.zeros(0, dtype=torch.int64))


def test_conversion_in_chunks(monkeypatch):
    monkeypatch.setattr("rl_shift.buffer._CHUNK", 4)
    arrays = rows(11)
    buffer = Buffer.from_arrays(arrays)
    assert np.array_equal(buffer.arrays()["next_obs"].numpy(), arrays["next_obs"])
    mean, std = buffer.statistics("obs")
    assert mean.tolist() == [0, 5] and std[0] == 0
    assert std[1].item() == pytest.approx(np.sqrt(10))


def test_statistics_survive_a_large_offset():
    values = 1e6 + np.random.default_rng(0).standard_normal((1000, 2)).astype(np.float32)
    values = values.astype(np.float32)
    mean, std = Buffer.from_arrays({"obs": values}).statistics("obs")
    assert mean.dtype == std.dtype == torch.float32
    assert np.allclose(mean, values.mean(0, dtype=np.float64), rtol=1e-7)
    assert np.allclose(std, values.astype(np.float64).std(0), rtol=1e-6)
    with pytest.raises(UserError, match="no rows"):
        Buffer(SPEC, 4).statistics("obs")


# ---------------------------------------------------------------------------- drawing


READS = st.lists(st.sampled_from(["s3", "s5", "w", "where", "extend"]), min_size=1, max_size=45)


def read(buffer, action, time):
    if action == "extend":
        if not buffer.flat:
            buffer.extend(rows(1, buffer.lanes, time))
        return {}
    if action == "w":
        return buffer.windows(4, 2)
    if action == "where":
        return buffer.sample(2, where=torch.tensor([1, 2]))
    return buffer.sample(int(action[1:]))


@properties
@given(st.sampled_from([(True, 1), (True, 2), (False, 1), (False, 2)]), READS, READS)
def test_state_continues_bitwise(kind, before, after):
    flat, lanes = kind
    seeds = (7,) if lanes == 1 else (7, 8)

    def make():
        if flat:
            return Buffer.from_arrays(rows(20, ends=[i % 6 == 5 for i in range(20)]), seeds=seeds)
        return Buffer(SPEC, 7 * lanes, lanes, seeds=seeds)

    buffer = make()
    if not flat:
        buffer.extend(rows(4, lanes))
    for k, action in enumerate(before):
        read(buffer, action, 4 + k)
    state = buffer.state()
    taken = deepcopy(state)
    resumed = make()
    resumed.load_state(state)
    for k, action in enumerate(after):
        time = 4 + len(before) + k
        assert equal(read(buffer, action, time), read(resumed, action, time))
    assert equal(buffer.arrays(), resumed.arrays())
    # Reading and writing on has not changed the state taken before.
    assert torch.equal(state["generators"]["0"], taken["generators"]["0"])
    for key in state.get("rows", {}):
        assert torch.equal(state["rows"][key], taken["rows"][key])


def test_state_of_another_buffer_is_refused():
    flat, ring = Buffer.from_arrays(rows(6)), Buffer(SPEC, 6)
    assert "rows" not in flat.state() and "rows" in ring.state()
    with pytest.raises(UserError, match="capacity 6, this one 5"):
        Buffer(SPEC, 5).load_state(ring.state())
    with pytest.raises(UserError, match="seeds"):
        Buffer(SPEC, 6, seeds=(1,)).load_state(ring.state())
    with pytest.raises(UserError, match="same kind"):
        flat.load_state(ring.state())


@pytest.mark.parametrize("flat", [True, False])
def test_stacked_seeds_draw_what_separate_buffers_draw(flat):
    def make(seeds):
        if flat:
            return Buffer.from_arrays(rows(30, ends=[i % 7 == 6 for i in range(30)]), seeds=seeds)
        buffer = Buffer(SPEC, 24, lanes=2, seeds=seeds)
        buffer.extend(rows(15, 2))
        return buffer

    stacked, where = make((1, 3, 5)), torch.arange(3, 9)
    separate = {k: make((seed,)) for k, seed in enumerate(stacked.seeds)}
    batch = {}
    for _ in range(40):
        for reader in (
            lambda b: b.sample(6),
            lambda b: b.sample(2, where=where),
            lambda b: b.windows(4, 3),
            lambda b: b.windows(4, 2, where=where),
        ):
            batch = reader(stacked)
            for k, single in separate.items():
                assert equal({key: value[k] for key, value in batch.items()}, reader(single))
    assert batch["obs"].shape == (3, 4, 2, 2)
    assert stacked.latest(2)["obs"].shape == (3, stacked.lanes, 2, 2)
    assert not torch.equal(batch["index"][0], batch["index"][1])


def test_blocks_hand_out_fresh_batches_and_follow_the_data():
    flat = Buffer.from_arrays(rows(50))
    batches = [flat.sample(8)["index"] for _ in range(70)]
    assert len({tuple(index.tolist()) for index in batches}) == 70
    assert [len(block.batches) for block in flat._blocks.values()] == [32]
    ring = Buffer(SPEC, 50)
    sizes = []
    for k in range(3):
        ring.extend(rows(1, first=k))
        for _ in range(1 + 6 * k):
            ring.sample(4)
            sizes.append(len(ring._blocks[4, 0].batches))
        assert ring.sample(999)["reward"].max() == k  # what was added is drawn at once
    assert sizes == [1, 1, 2, 2, 4, 4, 4, 4, 1, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 8, 8]


def test_large_rows_make_small_blocks():
    images = np.zeros((4, 128, 128, 4), np.uint8)
    buffer = Buffer.from_arrays({"obs": images, "next_obs": images})
    buffer.sample(64)
    assert len(buffer._blocks[64, 0].batches) == 2


def test_sampling_is_uniform():
    buffer = Buffer.from_arrays(rows(10))
    counts = torch.zeros(10)
    for _ in range(100):
        counts += torch.bincount(buffer.sample(1000)["index"], minlength=10)
    assert (counts / 1e4 - 1).abs().max() < 0.05  # five standard deviations


# ---------------------------------------------------------------------------- mixture


@properties
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any), st.integers(4, 300))
def test_mixture_splits_by_largest_remainder(weights, n):
    buffers = [Buffer.from_arrays(rows(3), stream=str(k)) for k in range(len(weights))]
    mixture = Mixture(list(zip(buffers, weights, strict=True)))
    shares = [weight * n / sum(weights) for weight in weights if weight > 0]
    counts = mixture.split(n)
    assert sum(counts) == n and min(counts) >= 1
    if min(shares) >= 1:
        assert all(abs(c - share) < 1 for c, share in zip(counts, shares, strict=True))
        up = [share % 1 for c, share in zip(counts, shares, strict=True) if c > share + 1e-9]
        down = [share % 1 for c, share in zip(counts, shares, strict=True) if c < share - 1e-9]
        assert not up or not down or min(up) >= max(down) - 1e-9
    assert mixture.sample(n)["reward"].shape == (n,)


def test_mixture_of_nothing_is_refused():
    for fractions in ((0.0, 0.0), (-1.0, 2.0)):
        with pytest.raises(ValueError, match="mix nothing"):
            Mixture([(Buffer.from_arrays(rows(3)), fraction) for fraction in fractions])


def test_mixture_reads_from_both_in_order():
    data = Buffer.from_arrays(rows(40) | {"next_action": np.zeros(40)}, seeds=(1,))
    ring = Buffer(SPEC, 10, lanes=2, seeds=(1,), stream="ring")
    ring.extend(rows(5, 2) | {"task": np.full(10, 7)})
    mixture = Mixture([(data, 0.5), (ring, 0.5)])
    batch = mixture.sample(9)
    assert batch.keys() == {*SPEC, "index"} and set(mixture.keys) == set(SPEC)
    assert batch["task"].tolist() == [2] * 5 + [7] * 4  # ties go to the first
    assert mixture.windows(8, 3)["task"][:, 0].tolist() == [2] * 4 + [7] * 4
    assert mixture.latest(3)["obs"].shape == (1 + 2, 3, 2)
    assert len(mixture) == 50
    assert mixture.split(16) == [8, 8]
    assert Mixture([(data, 15), (ring, 1)]).split(256) == [240, 16]
    assert Mixture([(data, 0.999), (ring, 0.001)]).split(10) == [9, 1]
    assert Mixture([(data, 1.0), (ring, 0.0)]).split(3) == [3]
    with pytest.raises(ValueError, match="no room"):
        mixture.sample(1)
    with pytest.raises(ValueError, match="same seeds"):
        Mixture([(data, 0.5), (Buffer(SPEC, 4), 0.5)])


def test_mixture_of_stacked_buffers():
    parts = [
        (Buffer.from_arrays(rows(9), seeds=(1, 2), stream=stream), 0.5) for stream in ("a", "b")
    ]
    batch = Mixture(parts).sample(6)
    assert batch["obs"].shape == (2, 6, 2)
    assert not torch.equal(batch["index"][:, :3], batch["index"][:, 3:])


# ---------------------------------------------------------------------------- columns


def test_columns_of_spaces():
    image = transition_spec(spaces.Box(0, 255, (11, 11, 3), np.uint8), spaces.Discrete(4))
    assert image["obs"] == image["next_obs"] == ((11, 11, 3), torch.uint8)
    assert image["action"] == image["task"] == ((), torch.int64)
    flat = transition_spec(spaces.Box(-1, 1, (17,), np.float64), spaces.Box(-1, 1, (6,)))
    assert flat["obs"] == ((17,), torch.float32) and flat["action"] == ((6,), torch.float32)
    assert flat["terminated"] == flat["truncated"] == ((), torch.bool)
    assert flat["reward"] == ((), torch.float32)
    with pytest.raises(UnsupportedSpace, match="action space MultiBinary"):
        transition_spec(spaces.Discrete(3), spaces.MultiBinary(2))


def test_ring_of_images():
    spec = transition_spec(spaces.Box(0, 255, (4, 4, 1), np.uint8), spaces.Box(-1, 1, (2,)))
    buffer = Buffer(spec, 4, lanes=2)
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), dtype=np.uint8)
    for k in range(3):
        step = images[2 * k : 2 * k + 2]
        zeros, flags = np.zeros(2), np.zeros(2, bool)
        buffer.extend(
            {"obs": step, "action": np.zeros((2, 2)), "reward": zeros, "next_obs": step}
            | {"terminated": flags, "truncated": flags, "task": zeros}
        )
    expected = images.reshape(3, 2, 4, 4, 1)[1:].swapaxes(0, 1)
    assert np.array_equal(buffer.latest(2)["obs"].numpy(), expected)
    assert buffer.sample(3)["obs"].dtype == torch.uint8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_stacked_buffer_on_the_gpu():
    arrays = rows(200, ends=[i % 20 == 19 for i in range(200)])
    buffer = Buffer.from_arrays(arrays, device="cuda", seeds=(1, 3))
    buffer.sample(8)
    resumed = Buffer.from_arrays(arrays, device="cuda", seeds=(1, 3))
    resumed.load_state(buffer.state())
    for _ in range(40):
        batch = buffer.sample(8)
        assert equal(batch, resumed.sample(8)) and batch["obs"].is_cuda
        assert torch.equal(batch["reward"].long(), batch["index"])
    assert buffer.windows(4, 5)["obs"].shape == (2, 4, 5, 2)
    assert equal(buffer.sample(4, where=torch.arange(5)), resumed.sample(4, where=torch.arange(5)))


def test_a_list_of_starts_is_looked_through_once_and_anew_when_it_or_the_rows_change(monkeypatch):
    buffer = Buffer(SPEC, 24, lanes=1, seeds=(1,))
    buffer.extend(rows(12, ends=[i == 7 for i in range(12)]))
    looked, following = [], buffer._rows_following

    def counted():
        looked.append(1)
        return following()

    monkeypatch.setattr(buffer, "_rows_following", counted)
    where = torch.tensor([0, 6, 7, 8])
    firsts = [set(buffer.windows(50, 3, where)["index"][:, 0].tolist()) for _ in range(3)]
    assert firsts == [{0, 8}] * 3 and len(looked) == 1  # 6 and 7 cross the end
    where[0] = 1
    assert set(buffer.windows(50, 3, where)["index"][:, 0].tolist()) == {1, 8}
    assert set(buffer.windows(50, 2, where)["index"][:, 0].tolist()) == {1, 6, 8}
    assert len(looked) == 3
    buffer.extend(rows(3, ends=[True, False, False]))  # an episode ends right behind row 11
    buffer.windows(5, 2, where)
    assert len(looked) == 4
