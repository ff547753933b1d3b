"""Several processes: seeds that cannot share one, and (later) sweeps. Placeholder being written."""
from __future__ import annotations
from typing import Any


def apart(run: Any) -> bool:
    return False


train_seeds = resume_seeds = load_seeds = None  # type: ignore[assignment]
