"""The command `rl-shift`: thread counts first, then the command's own module.

Nothing heavy is imported here, so that `rl-shift --help` answers at once and the BLAS libraries
see their thread counts before numpy and torch load them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from rl_shift.errors import UserError, nearest

COMMANDS = {
    "train": ("rl_shift.commands:train", "train an agent, or go on with --resume"),
    "evaluate": ("rl_shift.evaluate_command:evaluate", "evaluate a run, or compare settings on it"),
    "data": ("rl_shift.data_commands:data", "list, info, verify, download or collect datasets"),
    "list": ("rl_shift.commands:listing", "list agents, envs, datasets or presets"),
    "sweep": ("rl_shift.sweep:sweep", "train every combination of a grid file"),
    "report": ("rl_shift.report:report", "compare runs: tables, intervals, pictures, one page"),
    "export": ("rl_shift.exporting:export", "write a policy as ONNX, TorchScript or torch program"),
    "demo": ("rl_shift.demo:demo", "train on the bundled dataset and show the result"),
}

HELP = """usage: rl-shift COMMAND ...

Offline and online reinforcement learning under distribution shift.

commands:
{commands}

options:
  -h, --help  show this message
  --version   show the version

`rl-shift COMMAND --help` explains a command, `rl-shift train AGENT --help` an agent's fields.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 2 for a user's mistake, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    limit_threads(requested_threads(argv))
    if os.getcwd() not in sys.path:  # module:Class and module:Env-v0 of the user's own folder
        sys.path.append(os.getcwd())
    try:
        return _dispatch(argv)
    except UserError as error:
        print(f"rl-shift: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"rl-shift: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # such as `rl-shift list datasets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0
    if argv[0] == "--version":
        from rl_shift import __version__

        print(f"rl-shift {__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        raise UserError(
            f"unknown command {command!r}{nearest(command, COMMANDS)}; "
            f"the commands are {', '.join(COMMANDS)}"
        )
    module, _, function = COMMANDS[command][0].partition(":")
    code: int = getattr(import_module(module), function)(rest)
    return code


def requested_threads(argv: Sequence[str]) -> int:
    """`--threads N`, else what the given config files or the resumed run say, else 1.

    Read without a parser: parsing imports the agent, and with it torch.
    """
    found = 1
    for option, value in _flag_values(argv):
        if option in ("--config", "--resume"):
            path = Path(value, "config.yaml") if option == "--resume" else Path(value)
            try:
                match = re.search(r"^threads:\s*(\d+)\s*$", path.read_text("utf-8"), re.M)
            except (OSError, UnicodeDecodeError):
                continue  # the command itself reports it
            found = int(match[1]) if match else found
    for option, value in _flag_values(argv):
        if option == "--threads" and value.isdecimal():
            found = int(value)
    return max(found, 1)


def limit_threads(count: int) -> None:
    """Thread counts of OpenMP and the BLAS libraries, for libraries that are loaded later."""
    for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB"):
        suffix = "MAXIMUM_THREADS" if name == "VECLIB" else "NUM_THREADS"
        os.environ[f"{name}_{suffix}"] = str(count)


def _flag_values(argv: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for token, following in pairwise([*argv, ""]):
        option, equals, value = token.partition("=")
        pairs.append((option, value if equals else following))
    return pairs


if __name__ == "__main__":
    sys.exit(main())
