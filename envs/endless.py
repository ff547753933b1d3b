"""A life without ends, of any environment. Our design."""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.utils import RecordConstructorArgs


class EndlessLife(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """No transition is terminal: where the environment ends, the life is moved to a new start.

    Such a transition keeps its true last observation and is `truncated`, so that learners bootstrap
    from it and no pair of observations straddles the move.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        """Wraps any environment."""
        RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """`terminated` is always False."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, False, terminated or truncated, info
