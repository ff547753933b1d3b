"""The curiosity family: sizes, errors, losses, visits, and the traps of the published code."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from rl_shift.curiosity import KINDS, Curiosity, RewardModel, curiosity, visits
from rl_shift.online_networks import Features
from rl_shift.running import Detector

VECTOR, IMAGE = Box(-np.inf, np.inf, (3,), np.float32), Box(0, 1, (11, 11, 3), np.uint8)
DISCRETE, BOX = Discrete(3), Box(-1.0, 1.0, (2,), np.float32)
WORLDS = [(VECTOR, DISCRETE), (VECTOR, BOX), (IMAGE, DISCRETE)]


def batch_of(spaces: Any = (VECTOR, DISCRETE), rows: int = 12) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    obs = torch.rand(2, rows, *spaces[0].shape, generator=g).round(decimals=1)
    if spaces[1] is BOX:
        action = torch.rand(rows, 2, generator=g) * 2 - 1
    else:
        action = torch.randint(3, (rows,), generator=g)
    reward = torch.randn(rows, generator=g)
    return {"obs": obs[0], "action": action, "reward": reward, "next_obs": obs[1]}


def made(kind: str, spaces: Any = (VECTOR, DISCRETE), **changes: Any) -> Any:
    torch.manual_seed(5)
    return curiosity(kind, *spaces, **changes)


def train(model: Curiosity, batch: dict[str, Tensor], steps: int, lr: float = 3e-3) -> None:
    adam = torch.optim.Adam(model.model.parameters(), lr)
    for _ in range(steps):
        adam.zero_grad()
        model.loss(batch)[0].backward()
        adam.step()


@pytest.mark.parametrize("spaces", WORLDS)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "none"])
def test_errors_are_positive_and_fall_on_what_is_learnt(kind: str, spaces: Any) -> None:
    model, batch = made(kind, spaces, latent=8), batch_of(spaces)
    before = model.error(batch).detach()
    assert before.shape == (12,) and (before >= 0).all() and before.sum() > 0
    frozen = {k: v.clone() for k, v in model.named_buffers()}
    train(model, batch, 150)
    # RIDE's is no error but a change of the latent; ICM's inverse model may stretch the latent
    if kind not in ("ride", "icm"):
        assert model.error(batch).mean() < 0.7 * before.mean()
    for key, value in model.named_buffers():
        assert torch.equal(value, frozen[key]), key


@torch.no_grad()
def test_the_state_error_sums_over_the_latent_and_the_forward_loss_is_half_its_mean() -> None:
    model, batch = made("icm"), batch_of()
    latent, following = (model.model.encoder(batch[k]) for k in ("obs", "next_obs"))
    assert latent.shape == (12, 128)
    difference = model.model.predicted(latent, batch["action"]) - following
    error = model.error(batch)
    torch.testing.assert_close(error, 128 * difference.square().mean(-1))
    loss, metrics = model.loss(batch)
    torch.testing.assert_close(metrics["curiosity/forward"], 0.5 * error.mean())
    guess = model.model.inverse_model(torch.cat([latent, following], -1))
    inverse = torch.nn.functional.cross_entropy(guess, batch["action"])
    torch.testing.assert_close(loss, 0.2 * 0.5 * error.mean() + 0.8 * inverse)


def test_the_forward_loss_does_not_move_its_target() -> None:
    model, batch = made("icm", forward_weight=1.0), batch_of()
    batch["obs"] = torch.zeros(12, 3)
    grown = batch["next_obs"].clone().requires_grad_()
    loss = model.loss(batch | {"next_obs": grown})[0]
    (gradient,) = torch.autograd.grad(loss, grown, allow_unused=True, materialize_grads=True)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@torch.no_grad()
def test_published_sizes() -> None:
    def widths(layers: Features) -> list[Any]:
        return [layers.layers[0].in_features, *(layer.out_features for layer in layers.layers)]

    icm = made("icm", (IMAGE, DISCRETE)).model
    assert [icm.encoder[0].width, icm.encoder[1].width] == [256, 128]
    assert widths(icm.forward_model) == [132, 128, 128, 128]
    assert widths(icm.inverse_model) == [256, 128, 128, 3]
    assert widths(made("icm").model.encoder) == [3, 128, 128, 128]
    assert icm.embedding.layer.weight.shape == (3, 4)
    on_image, on_vector = (RewardModel(*s).model for s in ((IMAGE, DISCRETE), (VECTOR, BOX)))
    assert widths(on_image.layers) == [260, 128, 128, 1]
    assert widths(on_vector.layers) == [5, 128, 128, 128, 1]
    assert widths(made("rnd", (IMAGE, DISCRETE)).model[1]) == [256, 512, 512, 512]
    assert widths(made("noveld", (IMAGE, DISCRETE)).model[1]) == [256, 128, 128, 128]
    disagreement = made("disagreement").model
    assert len(disagreement) == 5 and widths(disagreement[0]) == [6, 1024, 3]


def test_the_frozen_target_differs_from_the_predictor_and_is_no_parameter() -> None:
    model = made("rnd", (IMAGE, DISCRETE))
    assert (model.error(batch_of((IMAGE, DISCRETE))) > 0).all()
    assert not list(model.target.parameters())
    assert len(dict(model.target.named_buffers())) == len(list(model.model.parameters()))


@torch.no_grad()
def test_noveld_is_the_rise_of_rnd_at_a_first_visit() -> None:
    model, batch = made("noveld"), batch_of()
    rise = (model.distance(batch["next_obs"]) - 0.5 * model.distance(batch["obs"])).clamp(min=0)
    torch.testing.assert_close(model.error(batch), rise)
    batch["visits"] = torch.tensor([1.0, 2.0] * 6)
    torch.testing.assert_close(model.error(batch), rise * torch.tensor([1.0, 0.0] * 6))


@torch.no_grad()
def test_ride_is_the_change_of_the_latent_over_the_root_of_the_visits() -> None:
    model, batch = made("ride"), batch_of()
    change = model.model.encoder(batch["next_obs"]) - model.model.encoder(batch["obs"])
    batch["visits"] = torch.arange(1.0, 13.0)
    expected = change.square().sum(-1) / torch.arange(1.0, 13.0).sqrt()
    torch.testing.assert_close(model.error(batch), expected)


def test_disagreement_vanishes_on_deterministic_data() -> None:
    model, batch = made("disagreement"), batch_of()
    before = model.error(batch).detach()
    spread = model.predictions(batch).detach().numpy().var(0, ddof=1).mean(-1)
    np.testing.assert_allclose(before.numpy(), spread, rtol=1e-4)
    train(model, batch, 300)
    assert model.error(batch).mean() < 0.05 * before.mean()


def test_visits_are_counted_per_lane_in_time_order() -> None:
    a, b, c = (torch.full((2, 2), x, dtype=torch.uint8) for x in (0, 1, 2))
    obs = torch.stack([torch.stack([a, b, a, a, c, b]), torch.stack([b, b, b, c, a, a])])
    assert visits(obs).tolist() == [[1, 1, 2, 3, 1, 2], [1, 2, 3, 1, 1, 2]]
    assert visits(obs.float() / 7).tolist() == visits(obs).tolist()


def test_the_inverse_target_of_continuous_actions() -> None:
    batch = batch_of((VECTOR, BOX))
    mean, sampled = made("icm", (VECTOR, BOX)), made("icm", (VECTOR, BOX), sampled_inverse=True)
    assert mean.model.log_std is None and sampled.model.log_std is not None
    expected = float(mean.loss(batch)[1]["curiosity/inverse"].detach())
    draws = [float(sampled.loss(batch)[1]["curiosity/inverse"].detach()) for _ in range(200)]
    assert np.std(draws) > 0
    assert np.mean(draws) > expected + 0.5  # the Gaussian's own variance, 1 at the start


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="choose icm, rnd"):
        curiosity("icn", VECTOR, DISCRETE)
    assert float(made("none").error(batch_of()).sum()) == 0


# ---- detector ------------------------------------------------------------------------------------


def stream(detector: Detector, rows: Tensor, piece: int) -> list[float]:
    return [float(detector.update(part)) for part in rows.split(piece)]


@pytest.mark.parametrize("piece", [1, 8])
def test_a_rise_is_detected_soon_and_noise_is_not(piece: int) -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.rand(8000, generator=g)
    rows[6000:] += 1.0
    detector = Detector(fast=0.02, slow=0.001)
    scores = np.repeat(stream(detector, rows, piece), piece)
    assert (scores[:1000] == 0).all()  # nothing is said before the slow average is warm
    assert scores[1500:6000].max() < 4
    first = int(np.flatnonzero(scores > 4)[0])
    assert 6000 <= first < 6100


def test_averages_do_not_depend_on_how_the_stream_is_cut() -> None:
    rows = torch.rand(512, generator=torch.Generator().manual_seed(0))
    one, many = Detector(0.02, 0.001), Detector(0.02, 0.001)
    stream(one, rows, 1)
    stream(many, rows, 64)
    for key in ("count", "fast", "slow"):
        torch.testing.assert_close(one.values[key], many.values[key], rtol=1e-4, atol=1e-6)
    twice = Detector(0.02, 0.001)
    for part in rows.split(64):
        twice.update(part, repeats=2)
        twice.update(part, repeats=2)
    torch.testing.assert_close(twice.values["count"], one.values["count"])
    torch.testing.assert_close(twice.values["slow"], one.values["slow"], rtol=0.02, atol=1e-4)
    again = Detector(0.02, 0.001)
    again.load_state(many.state())
    assert torch.equal(again.update(rows), many.update(rows))
