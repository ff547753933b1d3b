"""Two tiny worlds in which fine-tuning forgets (arXiv 2402.02868): when, and what cloning mends."""

import numpy as np
import pytest

# ---- the two-state MDP, state-coverage gap -----------------------------------------------------

DISCOUNT, R0, R1, EPSILON = 0.9, 0.0, -1.0, 1.0


def far_skill(theta: float) -> float:
    """P(right action in s1): what the one parameter does in the far state."""
    if theta <= 1 - EPSILON / 2:
        return 1 - EPSILON / (1 - EPSILON / 2) * theta
    return 2 * theta - 1


def value(theta: float, discount: float = DISCOUNT) -> float:
    """Closed form of v(s0)."""
    f, g = far_skill(theta), discount
    top = theta + R0 * (1 - theta) * (1 - g * f) + g * theta * R1 * (1 - f)
    return top / ((1 - g) * (1 - g * f + g * theta))


def ascent(theta: float, objective=value, steps: int = 4000, rate: float = 2e-4) -> float:
    """Projected gradient ascent; normalised, since slopes differ by orders of magnitude."""
    for _ in range(steps):
        low, high = max(theta - 1e-6, 0.0), min(theta + 1e-6, 1.0)
        slope = (objective(high) - objective(low)) / (high - low)
        theta = min(max(theta + rate * float(np.sign(slope)), 0.0), 1.0)
    return theta


def test_the_closed_form_is_the_value_of_the_simulated_chain() -> None:
    rng = np.random.default_rng(0)
    for theta in (0.2, 0.8):
        f, runs, total, scale = far_skill(theta), 20_000, 0.0, 1.0
        far = np.zeros(runs, dtype=bool)
        for _ in range(150):
            luck = rng.random(runs)
            good = luck < np.where(far, f, theta)
            total += scale * float(np.where(good, 1.0, np.where(far, R1, R0)).mean())
            far = good  # from s0 the right action leads on, from s1 it stays; else back to s0
            scale *= DISCOUNT
        assert total == pytest.approx(value(theta), abs=0.05)


def test_gradient_ascent_falls_into_the_trap() -> None:
    assert value(1 / 9) == pytest.approx(2.2222, abs=1e-3)
    assert value(1.0) == pytest.approx(10.0)
    assert value(0.0) == pytest.approx(0.0)
    assert value(0.5) == pytest.approx(0.345, abs=1e-3)
    for start, end in ((0.0, 1 / 9), (0.45, 1 / 9), (0.6, 1.0)):
        assert ascent(start) == pytest.approx(end, abs=1e-3)


def test_cloning_cannot_rescue_a_policy_of_one_parameter() -> None:
    ends = [
        ascent(0.0, lambda theta, w=weight: value(theta) - w * (1 - far_skill(theta)) ** 2)
        for weight in (1.0, 10.0, 100.0)
    ]
    assert ends == pytest.approx([0.103, 0.072, 0.031], abs=2e-3)


# ---- AppleRetrieval ----------------------------------------------------------------------------


def episodes(weights: np.ndarray, c: float, size: int, far_only: bool, rng: np.random.Generator):
    """32 episodes at once: observations, actions (True: right), rewards and masks, (100, 32)."""
    place = np.full(32, size if far_only else 0)
    back = np.full(32, far_only)
    alive = np.ones(32, dtype=bool)
    steps = []
    for _ in range(100):
        if not alive.any():
            break
        obs = np.where(back, c, -c)
        right = rng.random(32) < 1 / (1 + np.exp(-(weights[0] * obs + weights[1])))
        reward = np.where(right != back, 1.0, -1.0)
        steps.append((obs, right, reward, alive.copy()))
        place = np.clip(place + np.where(right, 1, -1), 0, None)
        alive &= ~(back & (place <= 0))
        back |= place >= size
    return (np.array(part) for part in zip(*steps, strict=True))


def wrong(weights: np.ndarray, c: float) -> float:
    """Probability of walking away from home on the way back."""
    return float(1 / (1 + np.exp(-(weights[0] * c + weights[1]))))


def train(
    weights: np.ndarray, c: float, far_only: bool, updates: int, rng, cloning: float = 0.0
) -> tuple[np.ndarray, float]:
    """REINFORCE with normalised steps; gives the weights and the worst `wrong` on the way."""
    kept, worst = wrong(weights, c), 0.0
    for _ in range(updates):
        obs, right, reward, alive = episodes(weights, c, 30, far_only, rng)
        to_go = (reward * alive)[::-1].cumsum(axis=0)[::-1]
        count = alive.sum(axis=1, keepdims=True)
        advantage = to_go - (to_go * alive).sum(axis=1, keepdims=True) / np.maximum(count, 1)
        score = right - 1 / (1 + np.exp(-(weights[0] * obs + weights[1])))
        push = score * advantage * alive
        gradient = np.array([(push * obs).sum(), push.sum()]) / 32
        gradient += cloning * (kept - wrong(weights, c)) * np.array([c, 1.0])
        norm = np.linalg.norm(gradient)
        weights = weights + 0.05 * gradient / max(float(norm), 1e-12)
        worst = max(worst, wrong(weights, c))
    return weights, worst


def worst_forgetting(c: float, cloning: float) -> float:
    """Worst probability of a wrong step in phase 2 while phase 1 is learnt, over seeds."""
    found = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        weights, _ = train(np.zeros(2), c, True, 100, rng)
        found.append(train(weights, c, False, 200, rng, cloning)[1])
    return float(np.mean(found))


def test_cloning_the_far_phase_keeps_it_and_small_observations_make_it_forget() -> None:
    vanilla = {c: worst_forgetting(c, 0.0) for c in (1.0, 0.25)}
    cloned = worst_forgetting(0.25, 1000.0)
    assert vanilla[0.25] > vanilla[1.0] + 0.1
    assert cloned < vanilla[0.25] - 0.15
