"""From rows of a file to transitions: what follows what, and where an episode ends.

`native` is right at episode ends. `legacy_qlearning` reproduces D4RL's `qlearning_dataset` bit for
bit, its defects included; scores that are compared with published tables need it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rl_shift.dataset_files import RawArrays

Arrays = dict[str, np.ndarray]
KEYS = ("obs", "action", "reward", "next_obs", "terminated", "truncated")


@dataclass
class Transitions:
    """Transitions in the order of the file.

    `truncated` marks the last transition of an episode that did not terminate. Where the file lacks
    the successor of an episode's last row, that row cannot become a transition; its reward and
    action are kept as the tail of the transition before it, one per row marked `truncated`.

    Attributes:
        arrays: obs, action, reward, next_obs, terminated, truncated of K rows.
        true_next: whether `next_obs` of terminated rows is the true last observation; otherwise it
            is a placeholder (the row's own observation; in legacy mode the next episode's first).
        tail_reward: (E,) float32, or empty.
        tail_action: (E, action), or empty.
    """

    arrays: Arrays
    true_next: bool
    tail_reward: np.ndarray
    tail_action: np.ndarray


def native(raw: RawArrays, horizon: int | None = None, continuous: bool = False) -> Transitions:
    """Transitions that never cross an episode's end.

    Args:
        raw: the file's arrays.
        horizon: where to cut files that have no `timeouts`.
        continuous: maze2d, one trajectory in which `terminals` and `timeouts` mark a new goal of
            the collecting controller. Such a row repeats its successor's observation and is left
            out; nothing terminates.
    """
    count = len(raw.rewards)
    if continuous:
        switch = raw.terminals if raw.timeouts is None else raw.terminals | raw.timeouts
        keep = ~switch
        keep[-1] = False
        none = np.zeros(count, dtype=np.bool_)
        result = _selected(raw, keep, none, none)
        if len(result.arrays["truncated"]):
            result.arrays["truncated"][-1] = True
        return result
    terminals = raw.terminals
    if raw.timeouts is not None:
        cut = raw.timeouts & ~terminals
    elif horizon is not None:
        cut = _counted(terminals, horizon, legacy=False) & ~terminals
    elif raw.next_observations is not None:
        cut = _jumps(raw) & ~terminals
    else:
        cut = np.zeros(count, dtype=np.bool_)
    cut[-1] = not terminals[-1]
    if raw.next_observations is not None:
        arrays = {
            "obs": raw.observations,
            "action": raw.actions,
            "reward": raw.rewards,
            "next_obs": raw.next_observations,
            "terminated": terminals,
            "truncated": cut,
        }
        return Transitions(arrays, True, raw.rewards[:0], raw.actions[:0])
    result = _selected(raw, ~cut, terminals, cut)
    arrays = result.arrays
    arrays["next_obs"][arrays["terminated"]] = arrays["obs"][arrays["terminated"]]
    return result


def legacy_qlearning(raw: RawArrays, horizon: int | None = None) -> Transitions:
    """`qlearning_dataset(env)` of D4RL 1.1, vectorised; `truncated` is our addition.

    Rows that end in a timeout and the file's last row are left out, terminal rows are followed by
    the next episode's first observation, and `next_observations` of the file is not used.
    """
    if raw.timeouts is not None:
        cut = raw.timeouts.copy()
    elif horizon is not None:
        cut = _counted(raw.terminals, horizon, legacy=True)
    else:
        cut = np.zeros(len(raw.rewards), dtype=np.bool_)
    cut[-1] = True
    return _selected(raw, ~cut, raw.terminals, cut)


def _counted(terminals: np.ndarray, horizon: int, legacy: bool) -> np.ndarray:
    """(N,) rows at which a step counter, restarted at each episode's start, fills the horizon.

    D4RL's counter is increased after its restart at a terminal row, so that the next episode is cut
    one row early; after a cut it restarts properly.
    """
    count = len(terminals)
    cut = np.zeros(count, dtype=np.bool_)
    start, offset = 0, 0
    for end in [*(np.flatnonzero(terminals) + 1).tolist(), count]:
        cut[start + horizon - 1 - offset : end : horizon] = True
        # A terminal row that is also a cut is skipped by D4RL, and the counter restarts at 0.
        offset = int(legacy and not cut[end - 1])
        start = end
    return cut


def _jumps(raw: RawArrays) -> np.ndarray:
    """(N,) rows whose true successor is not the next row (the official IQL's rule)."""
    assert raw.next_observations is not None
    gap = raw.observations[1:].astype(np.float32) - raw.next_observations[:-1]
    far = np.square(gap).sum(axis=tuple(range(1, gap.ndim))) > 1e-12
    return np.append(far, True)


def _selected(
    raw: RawArrays, keep: np.ndarray, terminated: np.ndarray, cut: np.ndarray
) -> Transitions:
    """The rows of `keep` with the file's next row as successor.

    A row before one of `cut` that is left out becomes the end of its episode.
    """
    lost = np.flatnonzero(cut & ~keep)
    lost = lost[lost > 0]
    tail = lost[keep[lost - 1] & ~terminated[lost - 1]]
    truncated = np.zeros(len(keep), dtype=np.bool_)
    truncated[tail - 1] = True
    # Rows by number are gathered several times faster than by flags.
    rows = np.flatnonzero(keep)
    arrays = {
        "obs": raw.observations.take(rows, axis=0),
        "action": raw.actions.take(rows, axis=0),
        "reward": raw.rewards.take(rows),
        "next_obs": raw.observations.take(rows + 1, axis=0, mode="clip"),
        "terminated": terminated.take(rows),
        "truncated": truncated.take(rows),
    }
    return Transitions(arrays, False, raw.rewards[tail], raw.actions[tail])


def episode_ends(arrays: Arrays) -> np.ndarray:
    """Row numbers of the last transitions of all episodes, the file's last row included."""
    ends = np.flatnonzero(arrays["terminated"] | arrays["truncated"])
    last = len(arrays["reward"]) - 1
    return ends if len(ends) and ends[-1] == last else np.append(ends, last)


def next_action(transitions: Transitions) -> np.ndarray:
    """(K, action) action taken in `next_obs`; at an end without one, the row's own action."""
    arrays = transitions.arrays
    action = arrays["action"]
    following = np.empty_like(action)
    following[:-1] = action[1:]
    ends = episode_ends(arrays)
    following[ends] = action[ends]
    if len(transitions.tail_action):
        following[arrays["truncated"]] = transitions.tail_action
    return following


def mc_return(
    transitions: Transitions, discount: float, scale: float = 1.0, shift: float = 0.0
) -> np.ndarray:
    """(K,) float32 discounted sum of `scale` x reward + `shift` to the episode's end in the data.

    Sums over doubling distances inside each episode: log2(longest episode) passes, no loop over
    rows.
    """
    arrays = transitions.arrays
    total = arrays["reward"].astype(np.float64) * scale + shift
    if len(transitions.tail_reward):
        total[arrays["truncated"]] += discount * (transitions.tail_reward * scale + shift)
    ends = episode_ends(arrays)
    lengths = np.diff(ends, prepend=-1)
    remaining = np.repeat(ends, lengths) - np.arange(len(total))
    distance, weight = 1, discount
    while distance < lengths.max() and weight > 1e-30:
        reach = remaining[:-distance] >= distance
        total[:-distance] += np.where(reach, weight * total[distance:], 0.0)
        distance, weight = 2 * distance, weight * weight
    return total.astype(np.float32)
