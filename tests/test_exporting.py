"""Exported policies agree with the ones they came from; videos show what was evaluated."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import rl_shift
from rl_shift import cli, exporting, video
from rl_shift.deployment import TrainedPolicy
from rl_shift.errors import UserError

ENV, BLIND, BROKEN = "ExportPendulum-v0", "ExportBlind-v0", "ExportBroken-v0"
Told = pytest.CaptureFixture[str]


class Drawn(gymnasium.Env[Any, Any]):
    """A number that grows by the action in [-3, 3], drawn as a grey level; twelve steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-100, 100, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-3, 3, (1,), np.float32)
    fails = False

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.value, self.steps = float(self.np_random.normal()), 0
        return self._obs(), {}

    def _obs(self) -> Any:
        return np.array([self.value, 1.0, 50 + self.value], np.float32)

    def step(self, action: Any) -> Any:
        self.value += float(action[0])
        self.steps += 1
        return self._obs(), self.value, self.steps == 12, False, {}

    def render(self) -> Any:
        if self.fails:
            raise RuntimeError("no OpenGL context")
        return np.full((31, 48, 3), np.clip(100 + 10 * self.value, 0, 255), np.uint8)


class Blind(Drawn):
    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012


class Broken(Drawn):
    fails = True


@pytest.fixture(scope="module", autouse=True)
def _environments() -> Iterator[None]:
    for name, kind in ((ENV, Drawn), (BLIND, Blind), (BROKEN, Broken)):
        gymnasium.register(name, kind)
    yield
    for name in (ENV, BLIND, BROKEN):
        gymnasium.registry.pop(name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose normaliser and action box do something."""
    folder = tmp_path_factory.mktemp("runs")
    settings: dict[str, Any] = {"eval_every": 0, "eval_episodes": 1, "progress": False}
    from rl_shift.recording import record

    data = record(["random"], ENV, 60, folder / "data.hdf5", lanes=2)
    return rl_shift.train(
        "td3_bc",
        dataset=data,
        env=ENV,
        updates=5,
        agent_config={"hidden": [8], "batch_size": 8},
        run_dir=folder / "run",
        **settings,
    )


@pytest.fixture(scope="module")
def policy(run: Path) -> TrainedPolicy:
    return rl_shift.load_policy(run)


@pytest.mark.parametrize("format", ["torch", "torchscript"])
def test_a_file_equals_its_policy(
    run: Path, policy: TrainedPolicy, format: str, tmp_path: Path, capsys: Told
) -> None:
    path = tmp_path / "sub" / f"policy.{format}"
    assert cli.main(["export", str(run), "--format", format, "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"saved {path}: equal to the policy on 256 observations" in said
    assert ("deprecated" in said) == (format == "torchscript")
    obs = np.random.default_rng(1).normal([0, 1, 50], [3, 0, 3], (17, 3)).astype(np.float32)
    if format == "torch":
        program = torch.export.load(path).module()
    else:
        with pytest.warns(DeprecationWarning):
            program = torch.jit.load(str(path))
    found = program(torch.from_numpy(obs)).detach().numpy()
    expected, _ = policy.predict(obs, deterministic=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found).max() > 1  # beyond [-1, 1]: the box is inside
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("format", ["torch", "torchscript"])
def test_a_policy_with_heads_is_exported_too(run: Path, format: str, tmp_path: Path) -> None:
    small = {"hidden": [8], "learner_config": {"hidden": [8]}, "memory": 20, "selector": "random"}
    folder = rl_shift.train(
        "oer",
        dataset=run.parent / "data.hdf5",
        env=ENV,
        updates=5,
        agent_config={**small, "dynamics_updates": 1, "dynamics_hidden": [8]},
        run_dir=tmp_path / "oer",
        eval_every=0,
        eval_episodes=1,
        progress=False,
    )
    path = tmp_path / f"policy.{format}"
    assert cli.main(["export", str(folder), "--format", format, "--out", str(path)]) == 0


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="needs the extra export"
)
@pytest.mark.filterwarnings("ignore")
def test_onnx_equals_its_policy(run: Path, policy: TrainedPolicy, capsys: Told) -> None:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    assert cli.main(["export", str(run)]) == 0
    assert "equal to the policy" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(run / "policy.onnx"))
    obs = np.random.default_rng(2).normal([0, 1, 50], [3, 0, 3], (5, 3)).astype(np.float32)
    (found,) = session.run(["action"], {"obs": obs})
    np.testing.assert_allclose(found, policy.predict(obs, deterministic=True)[0], atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map["env"] == ENV


def test_onnx_names_its_extra(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Told, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "a.onnx")]) == 2
    assert 'pip install "rl_shift[export]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_disagrees_is_not_kept(
    policy: TrainedPolicy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    true = exporting._torch_export

    def wrong(*given: Any) -> Any:
        run = true(*given)
        return lambda obs: run(obs) + 0.01

    monkeypatch.setattr(exporting, "_torch_export", wrong)
    with pytest.raises(UserError, match="differs from the trained one by 0.01"):
        exporting.write(policy, tmp_path / "a.pt2", "torch")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_says_so(policy: TrainedPolicy, tmp_path: Path) -> None:
    act = policy.agent.act
    try:
        policy.agent.__dict__["act"] = lambda obs, explore: torch.rand_like(act(obs, explore))
        with pytest.raises(UserError, match="draws random numbers"):
            exporting.write(policy, tmp_path / "a.pt2", "torch")
        policy.agent.__dict__["act"] = lambda obs, explore: act(obs, bool(obs.sum() > 1e9))
        with pytest.raises(UserError, match="plain tensor operations"):
            exporting.write(policy, tmp_path / "a.pt2", "torch")
    finally:
        policy.agent.__dict__.pop("act")


# ---- videos ------------------------------------------------------------------------------------


class Writer:
    """Stands for moviepy's: keeps the frames."""

    made: list["Writer"] = []  # noqa: RUF012

    def __init__(self, name: str, size: tuple[int, int], fps: int, logfile: Any) -> None:
        self.name, self.size, self.fps = name, size, fps
        self.frames: list[Any] = []
        Path(name).write_bytes(b"film")
        Writer.made.append(self)

    def write_frame(self, frame: Any) -> None:
        self.frames.append(frame)

    def close(self) -> None:
        pass


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> None:
    Writer.made.clear()
    module = ModuleType("moviepy.video.io.ffmpeg_writer")
    module.__dict__["FFMPEG_VideoWriter"] = Writer
    for name in ("moviepy", "moviepy.video", "moviepy.video.io"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_video_shows_the_first_episode(
    run: Path, writer: None, tmp_path: Path, capsys: Told
) -> None:
    words = ["evaluate", str(run), "--episodes", "2", "--seed", "4"]
    assert cli.main([*words, "--video", str(tmp_path), "--json", str(tmp_path / "e.json")]) == 0
    import json

    (evaluation,) = json.loads((tmp_path / "e.json").read_text())["evaluations"]
    (made,) = Writer.made
    assert f"(return {evaluation['returns'][0][0]:.1f} in 12 steps)" in capsys.readouterr().out
    assert len(made.frames) == 13 and made.fps == 10
    assert made.size == (48, 30) and made.frames[0].shape == (30, 48, 3)
    assert [p.name for p in tmp_path.glob("*.mp4")] == ["data.mp4"]
    assert not list(tmp_path.glob(".*"))
    assert cli.main([*words, "--video", str(tmp_path), "--video-steps", "5"]) == 0
    assert len(Writer.made[-1].frames) == 6
    assert cli.main([*words, "--video", str(tmp_path), "--video-steps", "-1"]) == 2
    assert "--video-steps must be at least 0" in capsys.readouterr().err


def test_the_policy_that_explores_can_be_evaluated_and_filmed(
    run: Path, writer: None, tmp_path: Path, capsys: Told
) -> None:
    import json

    def returns(*more: str) -> list[float]:
        out = tmp_path / "e.json"
        words = ["evaluate", str(run), "--episodes", "3", "--lanes", "1", "--json", str(out)]
        assert cli.main([*words, *more]) == 0
        report = json.loads(out.read_text())
        assert report["sample"] == ("--sample" in more)
        found: list[float] = report["evaluations"][0]["returns"][0]
        return found

    greedy = returns()
    assert "exploring" not in capsys.readouterr().out
    before = torch.get_rng_state()
    sampled = returns("--sample", "true", "--video", str(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
    out = capsys.readouterr().out
    assert "data on ExportPendulum-v0, exploring: return" in out
    assert f"(return {sampled[0]:.1f} in 12 steps)" in out  # one lane: the same draws
    assert all(a != b for a, b in zip(greedy, sampled, strict=True))
    assert returns("--sample", "true") == sampled
    assert returns("--sample", "true", "--seed", "1") != sampled
    assert returns() == greedy


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (BLIND, "has no render mode rgb_array"),
        (BROKEN, "no OpenGL context): MuJoCo needs MUJOCO_GL=egl"),
    ],
)
def test_what_cannot_be_drawn_says_why(
    run: Path, writer: None, env: str, said: str, tmp_path: Path, capsys: Told
) -> None:
    words = ["evaluate", str(run), "--episodes", "1", "--env", env]
    assert cli.main([*words, "--video", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_video_names_its_extra(
    policy: TrainedPolicy,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Told,
) -> None:
    monkeypatch.setitem(sys.modules, "moviepy.video.io.ffmpeg_writer", None)
    with pytest.raises(UserError, match=r"rl_shift\[video\]"):
        video.film(policy.agent, policy.task, tmp_path)
    assert cli.main(["evaluate", str(run), "--episodes", "1", "--video", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert "rl_shift[video]" in told.err and "return" not in told.out  # before any episode
