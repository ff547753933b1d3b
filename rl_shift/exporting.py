"""The command `export`: a trained policy as one file, checked against the policy it came from.

The file maps the environment's observations to its own actions: normaliser and action scaling are
inside. Formats: ONNX; `torch`, the program of `torch.export` (.pt2); and TorchScript, which torch
2.13 still writes but calls deprecated in favour of `torch.export`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rl_shift import atomic
from rl_shift.errors import UserError
from rl_shift.options import asked

if TYPE_CHECKING:
    from rl_shift.deployment import TrainedPolicy

Format = Literal["onnx", "torchscript", "torch"]
SUFFIX: dict[str, str] = {"onnx": ".onnx", "torchscript": ".ts", "torch": ".pt2"}
ROWS = 256  # observations on which the exported policy must agree
TOLERANCE = 1e-4  # of the width of the action box

USAGE = "rl-shift export RUN_DIR[#k] [--format onnx|torchscript|torch] [--out FILE]"
TEXT = """Writes the policy of a run as one file that needs no rl_shift: raw observations in, (N,
obs) float32 under the name "obs", the environment's own actions out, under the name "action". The
file is read back and compared with the policy on random observations. ONNX needs an extra: pip
install "rl_shift[export]". TorchScript is deprecated in torch 2.13; --format torch, a program of
torch.export, takes its place."""


@dataclass(frozen=True)
class ExportSettings:
    """Flags of `rl-shift export`."""

    format: Format = "onnx"  # of the file
    out: str | None = None  # the file; default: policy.onnx (.ts, .pt2) in the run folder
    task: int = -1  # index of the task to act in, for runs of several


def export(argv: list[str]) -> int:
    """`rl-shift export`."""
    given = asked(ExportSettings, argv, USAGE, TEXT)
    if given is None:
        return 0
    words, settings, _ = given
    if len(words) != 1:
        raise UserError(f"give one RUN_DIR, not {len(words)}: {USAGE}")
    from rl_shift.deployment import load_policy

    folder = Path(words[0].partition("#")[0])
    path = Path(settings.out or folder / f"policy{SUFFIX[settings.format]}")
    error = write(load_policy(words[0], settings.task), path, settings.format)
    if settings.format == "torchscript":
        print("note: TorchScript is deprecated in torch 2.13: prefer --format torch")
    print(f"saved {path}: equal to the policy on {ROWS} observations, largest error {error:.1e}")
    return 0


def write(policy: TrainedPolicy, path: Path, format: Format) -> float:
    """Export a policy, read the file back and compare.

    Args:
        policy: of a run.
        path: of the file; it is replaced in one step.
        format: of the file.

    Returns:
        The largest difference of an action, in units of the environment's action.

    Raises:
        UserError: a missing extra, a policy that cannot be exported, or a file that disagrees.
    """
    import torch

    obs = observations(policy)
    example = torch.from_numpy(obs[:2])
    module = policy.module.cpu().eval()
    with torch.no_grad():
        expected = module(torch.from_numpy(obs)).numpy()
        again = module(torch.from_numpy(obs)).numpy()
    if not np.array_equal(expected, again):
        raise UserError("this policy draws random numbers when it acts: it cannot be exported")
    writers: dict[str, Callable[..., Callable[[Any], Any]]] = {
        "onnx": _onnx, "torchscript": _torchscript, "torch": _torch_export,
    }  # fmt: skip
    with atomic.replacing(path, "choose another --out", SUFFIX[format]) as partial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its next version
            run = writers[format](module, example, partial, _facts(policy))
            found = np.asarray(run(obs))
        width = _width(policy)
        error = float(np.abs(found.astype(np.float64) - expected).max())
        if found.shape != expected.shape or not error <= TOLERANCE * width:
            raise UserError(
                f"the exported policy differs from the trained one by {error:.2g}, more than "
                f"{TOLERANCE * width:.1g}: it was not kept; please report this"
            )
    return error


def observations(policy: TrainedPolicy) -> np.ndarray[Any, Any]:
    """(ROWS, ...) random observations as the agent has them, spread as the data it was fitted on.

    Images, and other observations in bounds, are drawn from the space; numbers of states from all.
    """
    from gymnasium import spaces

    from rl_shift.seeding import numpy_generator

    generator = numpy_generator(0, "export")
    space = policy.agent.observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        space.seed(0)
        return np.stack([space.sample() for _ in range(ROWS)])
    normalizer = policy.agent.normalizer
    mean, std = normalizer.mean.cpu().numpy(), normalizer.std.cpu().numpy()
    rows = mean + std * generator.standard_normal((ROWS, *space.shape))
    return np.clip(rows, space.low, space.high).astype(np.float32)


def _width(policy: TrainedPolicy) -> float:
    scale = policy.module.scale
    return 2 * float(scale.max()) if scale.numel() else 1.0


def _facts(policy: TrainedPolicy) -> dict[str, str]:
    """What the file says about itself."""
    from rl_shift import __version__

    return {
        "agent": policy.run.agent_name,
        "env": str(policy.task.env),
        "task": policy.task.name,
        "rl_shift": __version__,
    }


def _onnx(module: Any, example: Any, path: Path, facts: dict[str, str]) -> Callable[[Any], Any]:
    import torch

    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
        import onnxscript  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f'ONNX needs {error.name}: pip install "rl_shift[export]"') from error
    rows = torch.export.Dim("rows")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = _tried(
        lambda: torch.onnx.export(
            module, (example,), input_names=["obs"], output_names=["action"],
            dynamic_shapes=({0: rows},), dynamo=True, verbose=False,
        )
    )  # fmt: skip
    program.model.metadata_props.update(facts)
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda obs: session.run(None, {"obs": obs})[0]


def _torchscript(
    module: Any, example: Any, path: Path, facts: dict[str, str]
) -> Callable[[Any], Any]:
    import torch

    def traced() -> Any:
        with torch.no_grad():
            return torch.jit.freeze(torch.jit.trace(module, example))  # type: ignore[no-untyped-call]

    torch.jit.save(_tried(traced), str(path), _extra_files={"rl_shift.json": json.dumps(facts)})
    loaded = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return lambda obs: loaded(torch.from_numpy(obs)).numpy()


def _torch_export(
    module: Any, example: Any, path: Path, facts: dict[str, str]
) -> Callable[[Any], Any]:
    import torch

    shapes = ({0: torch.export.Dim("rows")},)
    with torch.no_grad():
        program = _tried(lambda: torch.export.export(module, (example,), dynamic_shapes=shapes))
    try:
        torch.export.save(program, path, extra_files={"rl_shift.json": json.dumps(facts)})
    except RuntimeError as error:  # torch's own writer, where the place cannot be written
        raise OSError(" ".join(str(error).split())[:160]) from error
    loaded = torch.export.load(path).module()
    return lambda obs: loaded(torch.from_numpy(obs)).detach().numpy()


def _tried(work: Callable[[], Any]) -> Any:
    """What torch cannot export, as one line."""
    try:
        return work()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"this policy cannot be exported ({type(error).__name__}: {reason}): its `act` must be "
            "plain tensor operations"
        ) from error
