"""Offline and online reinforcement learning under distribution shift.

The names below are imported on first use, so that `rl-shift --help` answers without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_shift.agent import Agent
    from rl_shift.api import configure, iterate, train
    from rl_shift.buffer import Buffer
    from rl_shift.config import RunConfig, Task
    from rl_shift.datasets import load as load_dataset
    from rl_shift.deployment import load_policy
    from rl_shift.envs import make_env
    from rl_shift.evaluation import evaluate
    from rl_shift.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Agent",
    "Buffer",
    "RunConfig",
    "Task",
    "Trainer",
    "__version__",
    "configure",
    "evaluate",
    "iterate",
    "load_dataset",
    "load_policy",
    "make_env",
    "train",
]

_ORIGIN = {
    "Agent": ("rl_shift.agent", "Agent"),
    "Buffer": ("rl_shift.buffer", "Buffer"),
    "RunConfig": ("rl_shift.config", "RunConfig"),
    "Task": ("rl_shift.config", "Task"),
    "Trainer": ("rl_shift.trainer", "Trainer"),
    "configure": ("rl_shift.api", "configure"),
    "evaluate": ("rl_shift.evaluation", "evaluate"),
    "iterate": ("rl_shift.api", "iterate"),
    "load_dataset": ("rl_shift.datasets", "load"),
    "load_policy": ("rl_shift.deployment", "load_policy"),
    "make_env": ("rl_shift.envs", "make_env"),
    "train": ("rl_shift.api", "train"),
}


def __getattr__(name: str) -> Any:
    """Imports a re-exported name when it is first asked for."""
    if name not in _ORIGIN:
        raise AttributeError(f"module 'rl_shift' has no attribute {name!r}")
    module, attribute = _ORIGIN[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
