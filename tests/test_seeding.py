"""Named streams: stable, independent, and the default generators come back as they were."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_shift import seeding

PATHS = st.lists(st.one_of(st.text(max_size=4), st.integers(0, 2**40)), max_size=3).map(tuple)


def test_streams_keep_their_numbers():
    """A change here changes every run of every user."""
    assert seeding.child(0) == 7896617691693857887
    assert seeding.child(0, "episode", 3) == seeding.child(0, "episode", 3)
    assert seeding.child(0, "a", 1) == 8305792829898238407


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**63 - 1), PATHS, st.integers(0, 2**63 - 1), PATHS)
def test_children_have_63_bits_and_differ(seed, names, other_seed, other_names):
    first, second = seeding.child(seed, *names), seeding.child(other_seed, *other_names)
    assert 0 <= first < 2**63
    assert (first == second) == ((seed, names) == (other_seed, other_names))


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, "a"), (0, "a", 0)), ((0, 1), (0, "1")), ((1,), (1, 0)), ((1 + 2**32,), (1, 1))],
)
def test_similar_paths_do_not_meet(one, other):
    assert seeding.child(*one) != seeding.child(*other)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="-1"):
        seeding.child(-1)
    with pytest.raises(ValueError, match="-2"):
        seeding.child(0, -2)


def test_generators_are_their_own():
    before = torch.get_rng_state()
    first = torch.rand(4, generator=seeding.torch_generator(3, "x"))
    second = torch.rand(4, generator=seeding.torch_generator(3, "x"))
    other = torch.rand(4, generator=seeding.torch_generator(3, "y"))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    draws = [seeding.numpy_generator(3, name).random(4) for name in ("x", "x", "y")]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])


def test_forked_leaves_no_trace():
    before = torch.get_rng_state()
    with seeding.forked(5):
        inside = torch.rand(3)
        with seeding.forked(6):
            torch.rand(7)
        further = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    with seeding.forked(5):
        assert torch.equal(inside, torch.rand(3)) and torch.equal(further, torch.rand(3))


def test_forked_restores_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), seeding.forked(5):
        torch.rand(3)
        raise RuntimeError("inside")
    assert torch.equal(before, torch.get_rng_state())


def test_capture_and_restore():
    with seeding.forked(0):
        states = seeding.capture()
        first = torch.rand(5)
        seeding.restore(states)
        assert torch.equal(first, torch.rand(5))
        assert "cpu" in states and all(isinstance(state, torch.Tensor) for state in states.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_forked_covers_the_gpu():
    torch.zeros(1, device="cuda")
    before = torch.cuda.get_rng_state()
    with seeding.forked(5):
        first = torch.rand(3, device="cuda")
    assert torch.equal(before, torch.cuda.get_rng_state())
    with seeding.forked(5):
        assert torch.equal(first, torch.rand(3, device="cuda"))
