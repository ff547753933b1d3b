"""Named, independent random streams; the only file that makes generators from a run's seed.

Nothing in the suite draws from a global NumPy or ``random`` generator. The torch default generators
(one per device) belong to the learner's noise; `forked` keeps everybody else's hands off them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def _sequence(seed: int, names: tuple[str | int, ...]) -> np.random.SeedSequence:
    """Entropy of the stream `names` of `seed`: fixed-width entries, so that no two paths meet."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed lies in [0, 2**64), got {seed}")
    words = [seed % 2**32, seed >> 32]
    for name in names:
        if isinstance(name, str):
            words += [1, zlib.crc32(name.encode()), 0]
        elif 0 <= name < 2**64:
            words += [2, int(name) % 2**32, int(name) >> 32]
        else:
            raise ValueError(f"a number in a stream's name lies in [0, 2**64), got {name}")
    return np.random.SeedSequence(words)


def child(seed: int, *names: str | int) -> int:
    """Seed of the stream `names`: 63 bits, independent of every other stream of `seed`."""
    return int(_sequence(seed, names).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(
    seed: int, *names: str | int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """A torch generator of its own, on `device`, for the stream `names` of `seed`."""
    generator = torch.Generator(device=device)
    generator.manual_seed(child(seed, *names))
    return generator


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator of its own for the stream `names` of `seed`."""
    return np.random.default_rng(_sequence(seed, names))


def seed_default(seed: int) -> None:
    """Seed the torch default generators (the learner's noise) of the CPU and of every GPU in use.

    `torch.manual_seed` would do the same, but also touches devices that nobody opened.
    """
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed(seed)


@contextmanager
def forked(seed: int) -> Iterator[None]:
    """Run the body under torch default generators seeded with `seed`, then put the old ones back.

    Covers the CPU and the current GPU, so what runs inside (an evaluation, say) leaves no trace in
    the training's noise.
    """
    before = capture()
    seed_default(seed)
    try:
        yield
    finally:
        restore(before)


def capture() -> dict[str, Tensor]:
    """States of the torch default generators: "cpu", and "cuda" where a GPU is in use."""
    states = {"cpu": torch.default_generator.get_state()}
    if _cuda_in_use():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: Mapping[str, Tensor]) -> None:
    """Put back what `capture` gave. A state of a device that this process lacks is left out."""
    torch.default_generator.set_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


def _cuda_in_use() -> bool:
    """Whether this process has opened a GPU: asking must not open one."""
    return torch.cuda.is_available() and bool(
        torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    )
